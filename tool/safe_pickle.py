"""Reads pickles without running them, and looks through weight files before PyTorch opens them. Needs no torch.

A pickle is a program: Python's own reader imports and calls whatever the file names. `run_pickle` walks through the
same steps, but none of its steps imports or calls anything: a name must be on a short list, and a call goes to a
stand-in of ours. So nothing of the file runs, and each length is compared with the bytes of the file before memory is
taken for it.
"""
import os
import pickletools
import struct
import zipfile

MAX_STEPS = 10_000_000          # of a pickle; the labels of 12,000 images take 270,000
WEIGHTS_HEAD = 2 ** 24          # bytes at the start of a .pth of PyTorch before 1.6 that hold its pickles


def unsigned(raw):
    return int.from_bytes(raw, 'little')


def signed(raw):
    return int.from_bytes(raw, 'little', signed=True)


def double(raw):
    return struct.unpack('>d', raw)[0]


def utf8(raw):
    return str(raw, 'utf-8')


# steps with an argument: its bytes, or those of the length before it; which of the two; how it is read
ARGUMENTS = {
    'BININT1': (1, False, unsigned), 'BININT2': (2, False, unsigned), 'BININT': (4, False, signed),
    'LONG1': (1, True, signed), 'BINFLOAT': (8, False, double),
    'SHORT_BINUNICODE': (1, True, utf8), 'BINUNICODE': (4, True, utf8), 'BINUNICODE8': (8, True, utf8),
    'SHORT_BINBYTES': (1, True, memoryview), 'BINBYTES': (4, True, memoryview), 'BINBYTES8': (8, True, memoryview),
    'BYTEARRAY8': (8, True, memoryview),
    'BINPUT': (1, False, unsigned), 'LONG_BINPUT': (4, False, unsigned),
    'BINGET': (1, False, unsigned), 'LONG_BINGET': (4, False, unsigned),
    'PROTO': (1, False, unsigned), 'FRAME': (8, False, unsigned)}
STEPS = {ord(opcode.code): (opcode.name, *ARGUMENTS.get(opcode.name, (0, False, None)))
         for opcode in pickletools.opcodes}
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}

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


def describe(error):
    """One line on why a file could not be read."""
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f'it is damaged ({type(error).__name__})'
    text = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:400] or type(error).__name__
    return ''.join(character if character.isprintable() else '?' for character in text)


# ----- weight files -----

def check_weights(path):
    """Raises ValueError for a .pth that should not reach torch.load, not even with weights_only=True.

    That runs no code, but a file can crash it (wherever it hashes nested tuples: keys of dicts and of storages) or
    make it take any memory (by packed parts, a bytearray, storages that are larger than the file). Accepted: state
    dicts, and dicts, lists and tuples of tensors, numbers and names, from torch.save, also that of before PyTorch 1.6.
    Damaged files raise LookupError, TypeError and the like, see `describe`.
    """
    size, storages = os.path.getsize(path), {}      # bytes

    def load_storage(description):
        kind, name, key, _, count, *views = description
        if kind != 'storage' or type(name) is not Name or type(key) is not str or views not in ([], [None]):
            raise ValueError('a tensor is stored in a way that torch.save does not')
        storages[key] = count * STORAGE_BYTES[name]
        if not 0 <= storages[key] <= size:
            raise ValueError(f'a tensor is larger than the file, which has {size:,} bytes')

    def call(name, args):
        if type(name) is not Name or TENSOR_NAMES[name] == 'storage':
            raise ValueError('the pickle calls something in a way that torch.save does not')
        if TENSOR_NAMES[name] == 'tensor':
            return Made()
        result = {}
        for key, value in args[0] if args else ():          # Python 2 wrote the items here
            put_items(result, [key, value])
        return result

    def build(made, state):             # the _metadata of a state dict
        if type(made) is not dict or type(state) is not dict:
            raise ValueError('the pickle sets the state of something that has none')

    with open(path, 'rb') as file:
        if file.read(4) == b'PK\3\4':
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError('its parts are compressed, which torch.save does not do')
                if sum(max(member.file_size, member.compress_size) for member in members) > size:
                    raise ValueError('its parts are larger than the file')
                pickles = [member for member in members if member.filename.endswith('.pkl')]
                if len(pickles) != 1:
                    raise ValueError(f'it has {len(pickles)} parts *.pkl; torch.save writes one, data.pkl')
                run_pickle(memoryview(archive.read(pickles[0])), 0, TENSOR_NAMES, call, build, load_storage)
            return
        file.seek(0)
        head, at = memoryview(file.read(WEIGHTS_HEAD)), 0
        for _ in range(5):              # magic number, version, system, the weights, the order of the storages
            keys, at = run_pickle(head, at, TENSOR_NAMES, call, build, load_storage)
        if type(keys) is not list or not all(type(key) is str for key in keys) or sum(storages.values()) > size:
            raise ValueError('its tensors are larger than the file, or stored in a way that torch.save does not')
