"""Reads MXNet `.params` files (the format of the ImageNet weights of ResNet38) without MXNet.

All numbers are little-endian and nothing is padded:

    u64 0x112, u64 0, u64 n, n arrays, u64 k, k names (u64 length, utf-8 bytes), end of file.

The first u32 of an array tells its version, and with it how the shape is written:

    V0  (until 2017)  the number of dimensions itself, then that many u32
    V1  0xF993FAC8    u32 dimensions, i64 each
    V2  0xF993FAC9    i32 storage type (0 is dense), i32 dimensions, i64 each
    V3  0xF993FACA    as V2; only here do 0 dimensions mean a scalar, elsewhere they mean "no array"

Then follow i32 device type, i32 device id, i32 dtype code and the values in C order.
"""
import math
import os
import struct

import numpy as np

FILE_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
MAX_DIMS = 32        # the most that every numpy can hold; weights have 4 at most
BOOL, BFLOAT16 = 7, 12
DTYPES = {0: '<f4', 1: '<f8', 2: '<f2', 3: 'u1', 4: '<i4', 5: 'i1', 6: '<i8', BOOL: 'u1', 8: '<i2',
          9: '<u2', 10: '<u4', 11: '<u8', BFLOAT16: '<u2'}


def load(path):
    """Arrays of a `.params` file: dict name -> numpy array, in file order.

    Names keep their `arg:` or `aux:` prefix. The arrays are writable, own their memory and have the
    dtype of the file in native byte order; bfloat16, which numpy lacks, comes as float32 (exact).
    No length in the file is trusted: each is compared with the bytes that are left before memory is
    taken for it. Raises ValueError (file, byte offset, what was found) for whatever is not such a file:
    truncated or longer than it says, unknown dtype, sparse or absent arrays, names missing (k = 0: an
    array without a name cannot be matched to a layer), twice, or not utf-8; OSError for an unreadable path.
    """
    with open(path, 'rb') as file:
        magic, reserved, n = _unpack(file, '3Q', 'the file header')
        if (magic, reserved) != (FILE_MAGIC, 0):
            raise _error(file, 0, f'not an MXNet .params file: it starts with {magic:#x}, {reserved:#x}, not 0x112, 0')
        if n * 4 > _bytes_left(file):
            raise _error(file, 16, f'{n} arrays announced, but only {_bytes_left(file)} bytes follow')
        arrays = [_read_array(file) for _ in range(n)]
        offset = file.tell()
        k, = _unpack(file, 'Q', 'the number of names')
        if k != n:
            raise _error(file, offset, f'{k} names for {n} arrays')
        named = {}
        for array in arrays:
            offset = file.tell()
            name = _read_name(file)
            if name in named:
                raise _error(file, offset, f'the name {name!r} appears twice')
            named[name] = array
        if _bytes_left(file):
            raise _error(file, file.tell(), f'{_bytes_left(file)} bytes too many after the last name')
    return named


def _error(file, offset, found):
    return ValueError(f'{file.name}: at byte {offset}: {found}')


def _bytes_left(file):
    return os.fstat(file.fileno()).st_size - file.tell()


def _unpack(file, fmt, what):
    """Numbers of the struct format `fmt`; `what` they are, for the message when the file ends there."""
    offset, size = file.tell(), struct.calcsize('<' + fmt)
    data = file.read(size)
    if len(data) < size:
        raise _error(file, offset, f'the file ends inside {what} ({len(data)} of {size} bytes)')
    return struct.unpack('<' + fmt, data)


def _read_shape(file):
    """Tuple of non-negative ints, from the version-dependent first part of an array."""
    offset = file.tell()
    version, = _unpack(file, 'I', 'an array header')
    dim_type = 'q'
    if version in (V2, V3):
        storage, ndim = _unpack(file, '2i', 'an array header')
        if storage != 0:
            raise _error(file, offset, f'storage type {storage}; only dense arrays (0) can be read, not sparse ones')
    elif version == V1:
        ndim, = _unpack(file, 'I', 'an array header')
    else:
        ndim, dim_type = version, 'I'
    if ndim > MAX_DIMS:
        raise _error(file, offset, f'{ndim} ({ndim:#x}) is neither an array version nor a number of dimensions')
    if ndim < 0 or (ndim == 0 and version != V3):
        raise _error(file, offset, f'no array here, only a placeholder ({ndim} dimensions)')
    shape = _unpack(file, f'{ndim}{dim_type}', 'the shape of an array')
    if any(dim < 0 for dim in shape):
        raise _error(file, offset, f'no array here, only a placeholder (shape {shape})')
    return shape


def _read_array(file):
    offset = file.tell()
    shape = _read_shape(file)
    _, _, code = _unpack(file, '3i', 'the device and dtype of an array')
    if code not in DTYPES:
        raise _error(file, file.tell() - 4, f'unknown dtype code {code}')
    dtype = np.dtype(DTYPES[code])
    count = math.prod(shape)
    if count * dtype.itemsize > _bytes_left(file):
        raise _error(file, offset, f'an array of shape {shape} needs {count * dtype.itemsize} bytes, '
                                   f'but only {_bytes_left(file)} follow')
    flat = np.empty(count, dtype)
    if file.readinto(flat) != flat.nbytes:      # straight into place: one copy of a 437 MB file
        raise _error(file, offset, 'the file became shorter while it was read')
    if code == BFLOAT16:                        # the upper half of a float32
        flat = (flat.astype('<u4') << 16).view('<f4')
    elif code == BOOL:
        flat = flat != 0
    try:
        return flat.astype(flat.dtype.newbyteorder('='), copy=False).reshape(shape)
    except ValueError as error:                 # no values, but dimensions beyond numpy: (2**62, 0, 2**62)
        raise _error(file, offset, f'shape {shape}: {error}') from error


def _read_name(file):
    offset = file.tell()
    length, = _unpack(file, 'Q', 'the length of a name')
    if length > _bytes_left(file):
        raise _error(file, offset, f'a name of {length} bytes, but only {_bytes_left(file)} follow')
    data = file.read(length)
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as error:
        raise _error(file, offset + 8, f'the name {data[:80]!r} is not utf-8') from error
