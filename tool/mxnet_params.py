"""Reads MXNet `.params` files (the format of the ImageNet weights of ResNet38) without MXNet.

All numbers are little-endian and nothing is padded:

    u64 0x112, u64 0, u64 n, n arrays, u64 n, n names (u64 length, utf-8 bytes), end of file.

The first u32 of an array tells its version, and with it how the shape is written:

    V0  (until 2017)  the number of dimensions itself, then that many u32
    V1  0xF993FAC8    u32 dimensions, i64 each
    V2  0xF993FAC9    i32 storage type (0 is dense), i32 dimensions, i64 each
    V3  0xF993FACA    as V2; only here do 0 dimensions mean a scalar, elsewhere they mean "no array"

Then follow i32 device type, i32 device id, i32 dtype code and the values in C order.
"""
import math
import mmap
import os
import struct

import numpy as np

V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
HEADERS = {V1: 'I', V2: '2i', V3: '2i'}     # what follows the version; the last of it is the number of dimensions
MAX_DIMS = 32                               # the most that every numpy can hold; weights have 4 at most
DTYPES = dict(enumerate('<f4 <f8 <f2 u1 <i4 i1 <i8 ? <i2 <u2 <u4 <u8 <u2'.split()))
BFLOAT16 = 12


def load(path):
    """Arrays of a `.params` file: dict name -> numpy array, in file order.

    Names keep their `arg:` or `aux:` prefix. The arrays are writable, own their memory and have the dtype of the file
    in native byte order; bfloat16, which numpy lacks, comes as float32 (exact). Raises ValueError (file, byte offset,
    what was found) for whatever is not such a file, before memory is taken; OSError for an unreadable path.
    """
    with open(path, 'rb') as file:
        reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b'')
    try:
        return reader.read_file()
    except (struct.error, ValueError) as error:
        raise ValueError(f'{path}: at byte {reader.at}: {error}') from error


class _Reader:
    """Takes one thing after the other from the bytes of a file. `at`: the offset that an error is told of."""

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
            raise ValueError(f'{n} arrays announced, but only {self.bytes_left()} bytes follow')
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
            raise ValueError(f'{self.bytes_left()} bytes too many after the last name')
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
            raise ValueError(f'no array here, only a placeholder ({ndim} dimensions, shape {shape})')
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
