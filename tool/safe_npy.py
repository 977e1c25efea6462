"""Reads pickles without running them: dicts of numbers and NumPy arrays, and what stands in weight files.

A pickle is a program: Python's own reader imports and calls whatever the file names. `run_pickle` walks through the
same steps, but none of its steps imports or calls anything: a name must be on a short list, and a call goes to a
stand-in of ours. So nothing of the file runs, and each length is compared with the bytes of the file before memory is
taken for it. Needs no torch.
"""
import io
import math
import os
import pickletools
import re
import struct
import zipfile

import numpy as np

from tool.pyutils import BadInput

MAX_BYTES = 2 ** 30             # of a file of scores or labels, and of what is zipped in it: that packs a thousandfold
MAX_STEPS = 10_000_000          # of a pickle; the labels of 12,000 images take 270,000
MAX_MEMBERS = 200_000           # of a .npz
WEIGHTS_HEAD = 2 ** 24          # bytes at the start of a .pth of PyTorch before 1.6 that hold its pickles


def unsigned(raw):
    return int.from_bytes(raw, 'little')


def signed(raw):
    return int.from_bytes(raw, 'little', signed=True)


def number(raw):
    return struct.unpack('>d', raw)[0]


def text(raw):
    return str(raw, 'utf-8')


# steps with an argument: its bytes, or those of the length before it; which of the two; how it is read
ARGUMENTS = {
    'BININT1': (1, False, unsigned), 'BININT2': (2, False, unsigned), 'BININT': (4, False, signed),
    'LONG1': (1, True, signed), 'BINFLOAT': (8, False, number),
    'SHORT_BINUNICODE': (1, True, text), 'BINUNICODE': (4, True, text), 'BINUNICODE8': (8, True, text),
    'SHORT_BINBYTES': (1, True, memoryview), 'BINBYTES': (4, True, memoryview), 'BINBYTES8': (8, True, memoryview),
    'BYTEARRAY8': (8, True, memoryview),
    'BINPUT': (1, False, unsigned), 'LONG_BINPUT': (4, False, unsigned),
    'BINGET': (1, False, unsigned), 'LONG_BINGET': (4, False, unsigned),
    'PROTO': (1, False, unsigned), 'FRAME': (8, False, unsigned)}
STEPS = {ord(opcode.code): (opcode.name, *ARGUMENTS.get(opcode.name, (0, False, None)))
         for opcode in pickletools.opcodes}
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}

# what np.save writes, in NumPy 1 (numpy.core) and 2 (numpy._core); _codecs and bytes: before NumPy 1.17
ARRAY_NAMES = {'numpy.ndarray': 'class', 'numpy.dtype': 'dtype', '_codecs.encode': 'encode',
               '__builtin__.bytes': 'bytes', 'builtins.bytes': 'bytes'}
for _core in ('numpy.core', 'numpy._core'):
    ARRAY_NAMES.update({f'{_core}.multiarray._reconstruct': 'array', f'{_core}.multiarray.scalar': 'scalar',
                        f'{_core}.numeric._frombuffer': 'frombuffer'})
DTYPE = re.compile(r'b1|[iu][1248]|f[248]|O[48]?|U\d{1,4}')
HEADER = re.compile(r"\{'descr': '([<>|=]?\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,700})\), \}\s*")

STORAGE_BYTES = {f'torch.{kind}Storage': size for kind, size in dict(
    Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1).items()}
TENSOR_NAMES = {'torch._utils._rebuild_tensor_v2': 'tensor', 'torch._utils._rebuild_tensor': 'tensor',
                'torch._utils._rebuild_parameter': 'tensor', 'torch.Size': 'tensor', 'torch.device': 'tensor',
                'collections.OrderedDict': 'dict', **dict.fromkeys(STORAGE_BYTES, 'storage')}


# ----- pickles -----

class Name(str):
    """A function or class that a pickle names, and that is on the list."""


class Made:
    """What a pickle gets for calling a name. value: np.dtype, ndarray, or the dict inside an array of objects."""

    def __init__(self, value=None):
        self.value = value


def find_name(text, names):
    """The Name of `module.attribute`. Raises ValueError, with the name, for one that is not in `names`."""
    if text not in names:
        raise ValueError(f'it is a pickle that uses {text[:100]!r}, which is refused: it could run code, and numbers, '
                         'names and arrays do not need it')
    return Name(text)


def put_items(target, items):
    """Adds [key, value, key, value, ...] to a dict of names and whole numbers. Raises ValueError for other keys:
    the hash of a tuple of tuples can take for ever, and huge numbers can be chosen to collide."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError('the pickle fills something that is no dict')
    for key, value in zip(items[::2], items[1::2]):
        if type(key) is not str and not (type(key) is int and -2 ** 63 <= key < 2 ** 63):
            raise ValueError(f'a dict has a key of type {type(key).__name__}; names and whole numbers are read')
        target[key] = value


def read_step(data, at):
    """(name, argument or None, position behind it) of the step at position `at` of a memoryview."""
    step, size, is_length, read = STEPS[data[at]]
    at += 1
    if step == 'GLOBAL':                # two lines of text: module and attribute
        lines = bytes(data[at:at + 256]).split(b'\n', 2)
        return step, b'.'.join(lines[:2]).decode(), at + len(lines[0]) + len(lines[1]) + 2
    if read is None:
        return step, None, at
    if is_length:
        at, size = at + size, unsigned(data[at:at + size])
    raw = data[at:at + size]
    if len(raw) < size:
        raise ValueError('the pickle ends early')
    return step, read(raw), at + size


def run_pickle(data, at, names, call, build, load_storage=None):
    """(value, position behind it) of the pickle at position `at` of a memoryview. Bytes come as memoryviews.

    names: what it may name (module.attribute). call(name, args) gives what calling the name stands for,
    build(value, state) sets a state, load_storage(id) gives what an id of a weight file stands for.
    Raises ValueError for everything else; a damaged pickle raises LookupError, TypeError and the like.
    """
    stack, marks, memo = [], [], {}
    for _ in range(MAX_STEPS):
        step, arg, at = read_step(data, at)
        if step in ('MEMOIZE', 'BINPUT', 'LONG_BINPUT'):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif step in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[arg])
        elif step in ('GLOBAL', 'STACK_GLOBAL'):
            stack.append(find_name(arg or '.'.join([stack.pop(), stack.pop()][::-1]), names))
        elif step in ('PROTO', 'FRAME'):
            pass
        elif arg is not None:
            stack.append(arg)
        elif step in CONSTANTS:
            stack.append(CONSTANTS[step])
        elif step == 'MARK':
            marks.append(stack)
            stack = []
        elif step in ('TUPLE', 'APPENDS', 'SETITEMS'):
            items, stack = stack, marks.pop()
            if step == 'TUPLE':
                stack.append(tuple(items))
            elif step == 'SETITEMS':
                put_items(stack[-1], items)
            else:
                stack[-1].extend(items)
        elif step in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            items = [stack.pop() for _ in range(int(step[-1]))]
            stack.append(tuple(items[::-1]))
        elif step in ('REDUCE', 'BUILD', 'APPEND'):
            operand = stack.pop()
            if step == 'REDUCE':
                stack.append(call(stack.pop(), operand))
            elif step == 'BUILD':
                build(stack[-1], operand)
            else:
                stack[-1].append(operand)
        elif step == 'SETITEM':
            value, key = stack.pop(), stack.pop()
            put_items(stack[-1], [key, value])
        elif step in ('EMPTY_DICT', 'EMPTY_LIST'):
            stack.append({} if step == 'EMPTY_DICT' else [])
        elif step == 'BINPERSID' and load_storage:
            stack.append(load_storage(stack.pop()))
        elif step == 'STOP':
            return stack.pop(), at
        else:
            raise ValueError(f'it is a pickle with the step {step}, which no dict of numbers or arrays needs')
    raise ValueError(f'it is a pickle of more than {MAX_STEPS:,} steps')


# ----- dicts of scores and labels -----

def make_array(data, dtype, shape, order):
    """ndarray of its own memory in native byte order. data: bytes, exactly those of the shape (tuple of ints)."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in 'biuf':
        raise ValueError('an array holds other things than numbers')
    if type(shape) is not tuple or len(shape) > 32 or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError('an array has no shape')
    if type(data) not in (bytes, memoryview) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError('an array has not the number of bytes that its shape needs')
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
            file = io.BytesIO(archive.read(member))     # stops at file_size, whatever the packed bytes say
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


def describe(error):
    """One line on why a file could not be read."""
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f'it is damaged ({type(error).__name__})'
    text = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:400] or type(error).__name__
    return ''.join(character if character.isprintable() else '?' for character in text)


# ----- weight files -----

def check_weights(path):
    """Raises ValueError for a .pth that should not reach torch.load, not even with weights_only=True.

    That runs no code, but a file can crash it (by a dict key of nested tuples) or make it take any memory (by packed
    parts, a bytearray, storages that are larger than the file). Accepted: state dicts, and dicts, lists and tuples of
    tensors, numbers and names, from torch.save, also that of before PyTorch 1.6. Damaged files raise LookupError,
    TypeError and the like, see `describe`.
    """
    size = os.path.getsize(path)

    def load_storage(description):
        kind, name, count = description[0], description[1], description[4]
        if kind != 'storage' or type(name) is not Name or not 0 <= count * STORAGE_BYTES[name] <= size:
            raise ValueError(f'a tensor is larger than the file, which has {size:,} bytes')

    def call(name, args):
        if type(name) is not Name or TENSOR_NAMES[name] == 'storage':
            raise ValueError('the pickle calls something in a way that torch.save does not')
        return {} if name == 'collections.OrderedDict' else Made()

    def build(made, state):             # of a tensor, or the _metadata of a state dict
        if not isinstance(made, (Made, dict)):
            raise ValueError('the pickle sets the state of something that has none')

    with open(path, 'rb') as file:
        if file.read(4) == b'PK\3\4':
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if sum(max(member.file_size, member.compress_size) for member in members) > size:
                    raise ValueError('its parts are larger than the file: torch.save packs nothing')
                pickles = [member for member in members if member.filename.endswith('.pkl')]
                if len(pickles) != 1:
                    raise ValueError(f'it has {len(pickles)} parts *.pkl; torch.save writes one, data.pkl')
                run_pickle(memoryview(archive.read(pickles[0])), 0, TENSOR_NAMES, call, build, load_storage)
            return
        file.seek(0)
        head, at = memoryview(file.read(WEIGHTS_HEAD)), 0
        for _ in range(5):              # magic number, version, system, the weights, the order of the storages
            _, at = run_pickle(head, at, TENSOR_NAMES, call, build, load_storage)
