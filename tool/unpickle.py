"""Reads pickles of unknown origin without running code in them.

A pickle is a program: it names functions, and Python's reader imports and calls them. Here it can only name the few
functions that NumPy writes for numbers, text and arrays, and gets stand-ins for them. NumPy's own functions would be
unsafe, because they interpret bytes of the file as pointers to objects if the file says so. A hostile file can
therefore waste time and memory, but nothing else.
"""
import codecs
import collections
import contextlib
import pickle
import warnings

import numpy as np

from tool.cli import BadInput
from tool.files import describe

KINDS = 'biufU'         # kinds of dtypes that are read: bool, integers, floats, text


class DType:
    """Stands for np.dtype in a pickle, made from its text; its state has the byte order. Ignores fields and flags."""

    def __init__(self, text, *_):
        self.value = np.dtype(text)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class Array:
    """Stands for an ndarray in a pickle, which is made empty; its state has shape and values.
    value: an ndarray, or the list of the objects in an array of objects."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.value = data if dtype.value.kind == 'O' else make_array(data, dtype, shape, 'F' if is_fortran else 'C')


def make_array(data, dtype, shape, order='C'):
    """Makes an ndarray from bytes of a pickle. dtype: DType. Raises ValueError unless it has numbers or text."""
    if dtype.value.kind not in KINDS:
        raise ValueError(f'it contains an array of {dtype.value}; only numbers and text are read')
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def make_scalar(dtype, data):
    """Stands for numpy.core.multiarray.scalar: bool, int, float or str."""
    return make_array(data, dtype, ()).item()


def array_from_buffer(data, dtype, shape, order, axes=None):
    """Stands for numpy.core.numeric._frombuffer, which pickles of protocol 5 call. With `axes`, the bytes are in the
    order of the transposed array."""
    array = Array()
    array.value = make_array(data, dtype, shape, 'C' if axes else order)
    if axes:
        array.value = array.value.transpose(axes)
    return array


STAND_INS = {
    'numpy.dtype': DType, 'numpy.ndarray': Array, 'numpy.core.multiarray._reconstruct': Array,
    'numpy.core.multiarray.scalar': make_scalar, 'numpy.core.numeric._frombuffer': array_from_buffer,
    'collections.OrderedDict': collections.OrderedDict,
    # protocol 2 writes bytes by these
    '_codecs.encode': codecs.encode, '__builtin__.bytes': bytes, 'builtins.bytes': bytes}


class NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """Returns the stand-in for a name. The unpickler calls it for every name in a pickle."""
        full_name = f'{module}.{name}'.replace('numpy._core.', 'numpy.core.')       # NumPy 2 renamed it
        if full_name not in STAND_INS:
            raise ValueError(f'it is a pickle that uses {full_name[:100]}, which is refused: numbers, names and arrays '
                             'do not need it, and it could run code')
        return STAND_INS[full_name]


def read_npy(file):
    """Returns the dict that np.save wrote into a .npy file. Its arrays are still of the class Array."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError('it is a .npy file of a version that np.save does not use for dicts')
    _, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != object:
        raise ValueError(f'it contains an array of {dtype}, not a dict')
    made = NumpyUnpickler(file).load()
    if not isinstance(made, Array) or len(made.value) != 1 or not isinstance(made.value[0], dict):
        raise ValueError('it contains no dict')
    return made.value[0]


def load_dict(path, flag):
    """Reads the dict in a .npy file (pickled by NumPy 1 or 2) or a .npz file, told apart by their content.

    Keys are str, and in .npy also int; values are ndarrays of bool, int, uint, float or text, and in .npy also numbers
    and str. Arrays are writable, own their memory and have native byte order.
    flag: the command-line flag that named the file, for messages. Raises BadInput for everything else.
    """
    result = {}
    try:
        with open(path, 'rb') as file:
            start = file.read(6)
            file.seek(0)
            if start[:2] == b'PK':
                with np.load(file, allow_pickle=False) as archive:
                    content = dict(archive)
            elif start == b'\x93NUMPY':
                content = read_npy(file)
            else:
                raise ValueError('it is not a .npy or .npz file')
        for key, value in content.items():
            value = value.value if isinstance(value, Array) else value
            if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
                value = value.astype(value.dtype.newbyteorder('='))         # a copy
            elif not isinstance(value, (int, float, str)):
                raise ValueError(f'the entry {str(key)[:100]!r} is neither a number nor an array of numbers')
            if not isinstance(key, (int, str)):
                raise ValueError(f'it has a key of type {type(key).__name__}; only names and whole numbers are read')
            result[key] = value
    except Exception as error:          # damaged bytes can raise any exception
        raise BadInput(f'cannot read {path} ({flag}): {describe(error)}') from error
    return result


def load_tensors(path):
    """Reads a file of torch.save to the CPU: tensors, numbers and names in dicts, lists and tuples.
    Raises ValueError for a file that contains other things; for a damaged file, any exception, see `describe`."""
    import torch        # here, because lists and labels are read without torch
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            names = []
            with contextlib.suppress(Exception):        # the file may be damaged, or older than PyTorch 1.6
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            raise ValueError('it is a pickle that uses other things than tensors, numbers and names, which could run '
                             f'code, and is refused {names[:4] or ""}') from error
