"""Reads MXNet `.params` files (the format of the ImageNet weights of ResNet38) without MXNet.

All numbers are little-endian and nothing is padded:

    u64 0x112, u64 0, u64 n, n arrays, u64 n, n names (u64 length, utf-8 bytes), end of file.

The first u32 of an array is its version, which determines how the shape is written:

    V0  (until 2017)  the number of dimensions itself, then that many u32
    V1  0xF993FAC8    u32 dimensions, i64 each
    V2  0xF993FAC9    i32 storage type (0 is dense), i32 dimensions, i64 each
    V3  0xF993FACA    like V2, but 0 dimensions mean a scalar; in other versions they mean "no array"

After the shape come i32 device type, i32 device id, i32 dtype code and the values in C order.
"""
import math
import mmap
import os
import struct

import numpy as np

V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
HEADERS = {V1: 'I', V2: '2i', V3: '2i'}     # numbers that follow the version; the last is the number of dimensions
MAX_DIMS = 32                               # most that every numpy allows; weights have 4 at most
DTYPES = dict(enumerate('<f4 <f8 <f2 u1 <i4 i1 <i8 ? <i2 <u2 <u4 <u8 <u2'.split()))
BFLOAT16 = 12


def load(path):
    """Reads a `.params` file. Returns a dict name -> numpy array, in file order.

    Names keep their `arg:` or `aux:` prefix. The arrays are writable, own their memory and have the dtype of the file
    in native byte order; bfloat16, which numpy lacks, becomes float32 (exact). Raises ValueError (file, byte offset,
    what was found) for every other file, before it uses memory; OSError for an unreadable path.
    """
    with open(path, 'rb') as file:
        reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b'')
    try:
        return reader.read_file()
    except (struct.error, ValueError) as error:
        raise ValueError(f'{path}: at byte {reader.at}: {error}') from error


class _Reader:
    """Reads the bytes of a file from start to end. next: offset of the next byte. at: offset that an error names."""

    def __init__(self, data):
        self.data, self.at, self.next = data, 0, 0

    def bytes_left(self):
        return len(self.data) - self.next

    def numbers(self, layout):
        numbers = struct.unpack_from('<' + layout, self.data, self.next)
        self.next += struct.calcsize('<' + layout)
        return numbers

    def read_file(self):
        start = self.numbers('2Q')
        if start != (0x112, 0):
            raise ValueError(f'not an MXNet .params file: it starts with {start[0]:#x}, {start[1]:#x}, not 0x112, 0')
        self.at = self.next
        n, = self.numbers('Q')
        if n * 4 > self.bytes_left():
            raise ValueError(f'the file announces {n} arrays, but only {self.bytes_left()} bytes follow')
        arrays = [self.read_array() for _ in range(n)]
        self.at = self.next
        k, = self.numbers('Q')
        if k != n:
            raise ValueError(f'{k} names for {n} arrays')
        named = {}
        for array in arrays:
            name = self.read_name()
            if name in named:
                raise ValueError(f'the name {name!r} appears twice')
            named[name] = array
        self.at = self.next
        if self.bytes_left():
            raise ValueError(f'{self.bytes_left()} bytes follow the last name, where the file should end')
        return named

    def read_array(self):
        self.at = self.next
        version, = self.numbers('I')
        *storage, ndim = self.numbers(HEADERS[version]) if version in HEADERS else [version]
        if any(storage):
            raise ValueError(f'storage type {storage[0]}; only dense arrays (0) can be read, not sparse ones')
        if ndim > MAX_DIMS:
            raise ValueError(f'{ndim} ({ndim:#x}) is neither an array version nor a number of dimensions')
        shape = self.numbers(f'{max(ndim, 0)}{"q" if version in HEADERS else "I"}')
        if min(ndim, *shape, 0) < 0 or (ndim == 0 and version != V3):
            raise ValueError(f'there is only a placeholder in place of an array ({ndim} dimensions, shape {shape})')
        _, _, code = self.numbers('3i')
        if code not in DTYPES:
            self.at = self.next - 4
            raise ValueError(f'unknown dtype code {code}')
        dtype, count = np.dtype(DTYPES[code]), math.prod(shape)
        if max(count * dtype.itemsize, *shape, 0) > self.bytes_left():
            raise ValueError(f'an array of shape {shape} needs {count * dtype.itemsize} bytes, '
                             f'but only {self.bytes_left()} follow')
        array = np.frombuffer(self.data, dtype, count, self.next) if count else np.empty(0, dtype)
        self.next += array.nbytes
        if code == BFLOAT16:                        # the upper half of a float32
            array = (array.astype('<u4') << 16).view('<f4')
        return array.astype(array.dtype.newbyteorder('=')).reshape(shape)           # a copy

    def read_name(self):
        self.at = self.next
        length, = self.numbers('Q')
        if length > self.bytes_left():
            raise ValueError(f'a name of {length} bytes, but only {self.bytes_left()} follow')
        data = self.data[self.next:self.next + length]
        self.next += length
        try:
            return data.decode('utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'the name {data[:80]!r} is not utf-8') from error
