"""Writes MXNet `.params` files for tests. It defines the format a second time on purpose, and imports no reader."""
import struct

import numpy as np

DTYPE_CODES = {'float32': 0, 'float64': 1, 'float16': 2, 'uint8': 3, 'int32': 4, 'int8': 5, 'int64': 6, 'bool': 7,
               'int16': 8, 'uint16': 9, 'uint32': 10, 'uint64': 11}


def v0_array(array):
    """Returns the bytes of an array in the oldest version, that of the ImageNet weights of ResNet38."""
    array = np.asarray(array)
    return (struct.pack(f'<I{array.ndim}I', array.ndim, *array.shape)
            + struct.pack('<3i', 1, 0, DTYPE_CODES[array.dtype.name])
            + array.astype(array.dtype.newbyteorder('<')).tobytes())


def params_file(arrays, names, n=None, k=None):
    """Returns the bytes of a file. arrays: list of bytes; names: list of str or bytes; n, k: false counts of both."""
    names = [name.encode() if isinstance(name, str) else name for name in names]
    return (struct.pack('<3Q', 0x112, 0, len(arrays) if n is None else n) + b''.join(arrays)
            + struct.pack('<Q', len(names) if k is None else k)
            + b''.join(struct.pack('<Q', len(name)) + name for name in names))


def write_v0(path, named_arrays):
    """Writes a file. named_arrays: dict name (with `arg:` or `aux:`) -> numpy array of at least one dimension."""
    data = params_file([v0_array(array) for array in named_arrays.values()], list(named_arrays))
    with open(path, 'wb') as file:
        file.write(data)
