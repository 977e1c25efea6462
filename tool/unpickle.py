"""Reads pickles that somebody else made, and runs nothing of them.

A pickle is a program: it names functions, and Python's reader imports and calls them. Here it can name the few that
NumPy writes for numbers, text and arrays, and gets stand-ins of ours for them, because NumPy's own would take bytes of
the file for pointers to objects if the file says so. So a hostile file can waste time and memory, and no more.
"""
import codecs
import collections
import contextlib
import pickle
import warnings

import numpy as np

from tool.cli import BadInput
from tool.files import describe

KINDS = 'biufU'         # of dtypes that are read: bool, integers, floats, text


class DType:
    """Stands for np.dtype in a pickle. Its text comes first, the byte order as state; fields and flags are left out."""

    def __init__(self, text, *_):
        self.value = np.dtype(text)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class Array:
    """Stands for an ndarray in a pickle, which is made empty and gets its shape and values as state.
    value: an ndarray, or the list of what is in an array of objects."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.value = data if dtype.value.kind == 'O' else make_array(data, dtype, shape, 'F' if is_fortran else 'C')


def make_array(data, dtype, shape, order='C'):
    """ndarray on the bytes of a pickle. dtype: DType. Raises ValueError for other things than numbers and text."""
    if dtype.value.kind not in KINDS:
        raise ValueError(f'it holds an array of {dtype.value}; numbers and text are read')
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def make_scalar(dtype, data):
    """Stands for numpy.core.multiarray.scalar: bool, int, float or str."""
    return make_array(data, dtype, ()).item()


def array_from_buffer(data, dtype, shape, order, axes=None):
    """Stands for numpy.core.numeric._frombuffer, which protocol 5 calls. With `axes`, the bytes are in the order of
    the transposed array."""
    array = Array()
    array.value = make_array(data, dtype, shape, 'C' if axes else order)
    if axes:
        array.value = array.value.transpose(axes)
    return array


STAND_INS = {
    'numpy.dtype': DType, 'numpy.ndarray': Array, 'numpy.core.multiarray._reconstruct': Array,
    'numpy.core.multiarray.scalar': make_scalar, 'numpy.core.numeric._frombuffer': array_from_buffer,
    'collections.OrderedDict': collections.OrderedDict,
    # how protocol 2 writes bytes
    '_codecs.encode': codecs.encode, '__builtin__.bytes': bytes, 'builtins.bytes': bytes}


class NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """The stand-in for a name. Every name that a pickle uses comes through here."""
        full_name = f'{module}.{name}'.replace('numpy._core.', 'numpy.core.')       # of NumPy 2 and 1
        if full_name not in STAND_INS:
            raise ValueError(f'it is a pickle that uses {full_name[:100]}, which is refused: numbers, names and arrays '
                             'do not need it, and it could run code')
        return STAND_INS[full_name]


def read_npy(file):
    """The dict in a .npy file that np.save made of it. Its arrays are still of the class Array."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError('it is a .npy file of a version that np.save does not use for a dict')
    _, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != object:
        raise ValueError(f'it holds an array of {dtype}, no dict')
    made = NumpyUnpickler(file).load()
    if not isinstance(made, Array) or len(made.value) != 1 or not isinstance(made.value[0], dict):
        raise ValueError('it holds no dict')
    return made.value[0]


def load_dict(path, flag):
    """Dict of a .npy file with a pickled dict (NumPy 1 or 2) or of a .npz file, told apart by the content.

    Keys are str, and in .npy also int; values are ndarrays of bool, int, uint, float or text, and in .npy also
    numbers and str. Arrays are writable, own their memory and are of native byte order.
    `flag` is the command-line flag that named the file. Raises BadInput, in one line, for everything else.
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
                raise ValueError('it is no .npy or .npz file')
        for key, value in content.items():
            value = value.value if isinstance(value, Array) else value
            if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
                value = value.astype(value.dtype.newbyteorder('='))         # a copy
            elif not isinstance(value, (int, float, str)):
                raise ValueError(f'the entry {str(key)[:100]!r} is neither a number nor an array of numbers')
            if not isinstance(key, (int, str)):
                raise ValueError(f'it has a key of type {type(key).__name__}; names and whole numbers are read')
            result[key] = value
    except Exception as error:          # damaged bytes raise whatever they lead to
        raise BadInput(f'cannot read {path} ({flag}): {describe(error)}') from error
    return result


def load_tensors(path):
    """What torch.save wrote, on the CPU: tensors, numbers and names in dicts, lists and tuples.
    Raises ValueError for a file that names other things; a damaged one raises whatever it leads to, see `describe`."""
    import torch        # here, because lists and labels are read without it
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            names = []
            with contextlib.suppress(Exception):        # of a damaged file, or one of before PyTorch 1.6
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            raise ValueError('it is a pickle that uses other things than tensors, numbers and names, which could run '
                             f'code, and is refused {names[:4] or ""}') from error
