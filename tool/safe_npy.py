"""Reads dicts of numbers and NumPy arrays, scores and labels, without running the pickles that hold them.

See tool/safe_pickle.py. Needs no torch.
"""
import io
import math
import os
import re
import zipfile

import numpy as np

from tool.cli import BadInput
from tool.safe_pickle import Made, Name, describe, run_pickle

MAX_BYTES = 2 ** 30             # of a file of scores or labels, and of what is zipped in it: that packs a thousandfold
MAX_MEMBERS = 200_000           # of a .npz

# what np.save writes, in NumPy 1 (numpy.core) and 2 (numpy._core); _codecs and bytes: before NumPy 1.17
ARRAY_NAMES = {'numpy.ndarray': 'class', 'numpy.dtype': 'dtype', '_codecs.encode': 'encode',
               '__builtin__.bytes': 'bytes', 'builtins.bytes': 'bytes'}
for _core in ('numpy.core', 'numpy._core'):
    ARRAY_NAMES.update({f'{_core}.multiarray._reconstruct': 'array', f'{_core}.multiarray.scalar': 'scalar',
                        f'{_core}.numeric._frombuffer': 'frombuffer'})
DTYPE = re.compile(r'b1|[iu][1248]|f[248]|O[48]?|U\d{1,4}')
HEADER = re.compile(r"\{'descr': '([<>|=]?\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,700})\), \}\s*")


def make_array(data, dtype, shape, order):
    """ndarray of its own memory in native byte order. data: bytes, exactly those of the shape (tuple of ints)."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in 'biuf':
        raise ValueError('an array holds other things than numbers')
    if type(shape) is not tuple or len(shape) > 32 or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError('an array has no shape')
    if type(data) not in (bytes, memoryview) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError('an array has other bytes than its shape needs')
    return np.ndarray(shape, dtype, data, order=order).astype(dtype.newbyteorder('='))


class ArrayMaker:
    """The stand-ins for what a pickle of NumPy calls. limit: bytes that may be made in all."""

    def __init__(self, limit):
        self.left = limit

    def spend(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise ValueError('the pickle makes more bytes than it holds')
        return data

    def call(self, name, args):
        """name: Name; args: tuple, as in the pickle. Raises ValueError and the like for what NumPy does not write."""
        kind = ARRAY_NAMES.get(name) if type(name) is Name else None
        if kind == 'array':                         # its shape and values come with BUILD
            return Made()
        if kind == 'dtype' and type(args[0]) is str and DTYPE.fullmatch(args[0]):
            return Made(np.dtype(args[0].rstrip('48') if args[0][0] == 'O' else args[0]))
        if kind == 'scalar':
            dtype, data = args[0].value, self.spend(args[1])
            if dtype.kind == 'U':
                return str(data, 'utf-32-be' if dtype.str[0] == '>' else 'utf-32-le').rstrip('\0')
            return make_array(data, dtype, (), 'C').item()
        if kind == 'frombuffer':
            data, dtype, shape, order, *axes = args
            array = make_array(self.spend(data), dtype.value, shape, 'F' if order == 'F' else 'C')
            return Made(array.transpose(axes[0]) if axes and axes[0] is not None else array)
        if kind == 'encode' and args[1] == 'latin1':        # how protocol 2 writes bytes
            return self.spend(args[0]).encode('latin1')
        if kind == 'bytes' and args == ():
            return b''
        raise ValueError('the pickle calls something in a way that NumPy does not')

    def build(self, made, state):
        """Sets the state of a dtype (its byte order) or an array. An array of objects may hold one dict, no more."""
        if isinstance(made.value, np.dtype):
            if state[0] != 3 or state[1] not in ('<', '>', '=', '|') or any(part is not None for part in state[2:5]):
                raise ValueError('a dtype has fields')
            made.value = made.value.newbyteorder(state[1])
            return
        version, shape, dtype, is_fortran, data = state
        if version != 1 or made.value is not None:
            raise ValueError('an array of another version')
        if dtype.value.kind == 'O':
            if shape != () or type(data) is not list or [type(item) for item in data] != [dict]:
                raise ValueError('an array of objects, where one dict is to be')
            made.value = data[0]
        else:
            made.value = make_array(self.spend(data), dtype.value, shape, 'F' if is_fortran else 'C')


def read_header(file):
    """(dtype text, 'C' or 'F', shape) at the start of .npy bytes (BytesIO). Exactly the text that NumPy writes is
    taken; its own reader evaluates it."""
    magic = file.read(8)
    if magic[:6] != b'\x93NUMPY' or magic[6:] not in (b'\1\0', b'\2\0', b'\3\0'):
        raise ValueError('it is no .npy or .npz file')
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), 'little')
    found = HEADER.fullmatch(file.read(length).decode('latin1'))
    if not found:
        raise ValueError('its header is not one of NumPy')
    return found[1], 'CF'[found[2] == 'True'], tuple(int(side) for side in found[3].split(',') if side.strip())


def read_npy(data):
    """dict of the bytes of a .npy file with a pickled dict."""
    file = io.BytesIO(data)
    dtype, _, _ = read_header(file)
    if dtype.lstrip('|') != 'O':
        raise ValueError(f'it holds an array of {dtype[:20]}, no dict')
    maker = ArrayMaker(2 * len(data))       # protocol 2 makes bytes from text, and an array from the bytes
    made, _ = run_pickle(memoryview(data), file.tell(), ARRAY_NAMES, maker.call, maker.build)
    if not isinstance(made, Made) or type(made.value) is not dict:
        raise ValueError('it holds no dict')
    result = {}
    for key, value in made.value.items():
        value = value.value if isinstance(value, Made) else value
        if not isinstance(value, (np.ndarray, bool, int, float, str)) or isinstance(value, Name):
            raise ValueError(f'the entry {str(key)[:100]!r} is neither a number nor an array of numbers')
        result[key] = value
    return result


def read_npz(data):
    """dict name -> array of the bytes of a .npz file."""
    if data.count(b'PK\1\2') > MAX_MEMBERS:
        raise ValueError(f'it has more than {MAX_MEMBERS:,} arrays')
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_BYTES:
            raise ValueError(f'it unpacks to more than {MAX_BYTES >> 20} MiB')
        for member in members:
            name = member.filename.removesuffix('.npy')
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):      # LZMA takes memory at will
                raise ValueError(f'{name[:100]!r} is packed in another way than NumPy does')
            if name in arrays:
                raise ValueError(f'it has the array {name[:100]!r} twice')
            with archive.open(member) as packed:        # a size makes it stop there, whatever the packed bytes say
                file = io.BytesIO(packed.read(member.file_size + 1))
            dtype, order, shape = read_header(file)
            if not DTYPE.fullmatch(dtype[1:]):
                raise ValueError(f'{name[:100]!r} is an array of {dtype[:20]}, not of numbers')
            arrays[name] = make_array(file.read(), np.dtype(dtype), shape, order)
    return arrays


def load_dict(path, flag):
    """Dict of a .npy file with a pickled dict (NumPy 1 or 2) or of a .npz file, told apart by the content.

    Accepted: keys str, and in .npy int (|key| < 2**63); values ndarray of bool, int, uint or float, and in .npy
    numbers and str. Arrays are writable, own their memory and are of native byte order. Refused: everything else that
    a pickle can name or do, by name and before anything of it runs; files of more than 1 GiB, packed or unpacked.
    `flag` is the command-line flag that named the file. Raises BadInput, in one line.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f'it is larger than {MAX_BYTES >> 20} MiB')
        with open(path, 'rb') as file:
            data = file.read()
        return read_npz(data) if data[:2] == b'PK' else read_npy(data)
    except Exception as error:          # damaged bytes raise whatever they lead to
        raise BadInput(f'cannot read {path} ({flag}): {describe(error)}') from error
