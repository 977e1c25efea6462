"""Feeds damaged and hostile files to the readers of files that one did not make.

    python tests/fuzz.py --count 200000                 every reader
    python tests/fuzz.py --count 10000 --seed 1 npy pth

Each input is a valid or hostile file, changed at random. A reader must give a result or a ValueError (as BadInput is)
of one printable line, within a second of CPU time and little memory; never another error, a crash, or anything run.
A process of its own reads the files: its memory is limited, a timer ends it, an audit hook sees programs started,
files written and pickles loaded, and hostile files would create a file that is looked for. Input number i of a reader
depends on the seed and i alone. Prints a line for each reader; exit code 1 where something was found, which is kept.
"""
import argparse
import io
import mmap
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import numpy as np
from PIL import Image

from params_writer import params_file, v0_array
from tool import image_files, mxnet_params, score_files
from tool.safe_npy import load_dict
from voc12 import lists

SECONDS, MEMORY = 1, 200 * 2 ** 20      # CPU time and bytes for one input
MAX_INPUT = 2 ** 16                     # bytes
CANARY = 'canary'                       # what hostile files would create, in the working directory of the process
WATCHED = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'os.remove', 'os.rename',
           'os.mkdir', 'subprocess.Popen', 'socket.connect', 'pickle.find_class', 'ctypes.dlopen')
NUMBERS = (0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 2 ** 20, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40,
           2 ** 63 - 1, 2 ** 64 - 1)


# ----- seeds: lists of bytes for each reader -----

def npy_bytes(value, protocol=None):
    """Bytes of np.save; with a protocol, as other versions of NumPy write them."""
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    data = file.getvalue()
    if protocol is None:
        return data
    array = np.empty((), object)
    array[()] = value
    return data[:128] + pickle.dumps(array, protocol)


def hostile_pickles():
    """Pickles that run something, or that take much from a reader that believes them."""
    touch = b'touch ' + CANARY.encode()
    text = b'X' + struct.pack('<I', len(touch)) + touch
    code = f'open({CANARY!r}, "w")'.encode()
    code = b'X' + struct.pack('<I', len(code)) + code
    calls = [b'c' + name + b'\n' + arg + b'\x85R.' for name, arg in (
        (b'os\nsystem', text), (b'posix\nsystem', text), (b'subprocess\ngetoutput', text), (b'builtins\neval', code),
        (b'__builtin__\nexec', code), (b'numpy.testing._private.utils\nrunstring', code + b'}\x86'),
        (b'torch._utils\n_import_dotted_name', text), (b'builtins\nbytearray', b'J\0\0\0\x7f'))]
    calls += [b'(' + text + b'ios\nsystem\n.', b'(cos\nsystem\n' + text + b'o.', b'cos\nsystem\n' + text + b'\x85\x81.']
    nested = b'}q\0)' + b'q\1h\1\x86' * 60 + b'K\1s.'
    return [b'\x80\x04' + body for body in (
        *calls, nested, b'}q\0)' + b'\x85' * 3000 + b'K\1s.', b'K\1r\xff\xff\xff\x7f.', b'\x8b\xff\xff\xff\x7f1.',
        b'\x8e' + b'\xff' * 7 + b'\x7fabc.', b'\x95' + b'\xff' * 8 + b'.', b'\x96\0\0\0\0\1\0\0\0.')]


def score_dicts():
    cam = {0: np.arange(6, dtype=np.float32).reshape(2, 3) / 7, 14: np.full((2, 3), .5, np.float32)}
    crf = {0: cam[0], 4: 1 - cam[0]}
    return [cam, crf, {}, {key: value.astype('>f8').T for key, value in crf.items()}]


def random_dicts(count):
    """Dicts of arrays of any type, shape and value under odd keys."""
    rng = np.random.default_rng(0)
    dicts = []
    for _ in range(count):
        shape = tuple(rng.integers(0, 4, rng.choice((2, 2, 2, 0, 1, 3))))
        dicts.append({key: (rng.choice((0, .5, 1, -1, 300, np.nan, np.inf, 1e300)) * np.ones(shape)).astype(dtype)
                      for key, dtype in zip(rng.choice((0, 1, 2, 14, 254, 255, -1, 2 ** 40), 2).tolist() + ['a'],
                                            rng.choice(('<f4', '<f4', '>f8', '<f2', '|b1', '<i8', '|u1'), 3))
                      if rng.random() < .7})
    return dicts


def as_numpy_1(data):
    """The modules of NumPy 2 named as in NumPy 1."""
    for module in (b'multiarray', b'numeric'):
        old, new = b'numpy._core.' + module, b'numpy.core.' + module
        data = data.replace(bytes([0x8c, len(old)]) + old, bytes([0x8c, len(new)]) + new).replace(old, new)
    return data


def npy_seeds():
    labels = {'a': np.array([0, 1], np.float32), 'b': np.array([True, False]), np.str_('c'): np.float16(2), 'd': 3}
    seeds = [npy_bytes(value) for value in (*score_dicts(), labels)]
    for protocol in (2, 3, 4, 5):
        seeds += [npy_bytes(value, protocol) for value in (score_dicts()[0], labels)]
    seeds += [as_numpy_1(seed) for seed in seeds] + [npy_bytes(value) for value in random_dicts(100)]
    header = npy_bytes({})[:128]
    return 2 * seeds + [header + body for body in hostile_pickles()] + [npy_bytes(np.zeros(3))]


def npz_seeds():
    seeds = []
    for write in (np.savez, np.savez_compressed):
        for scores in (*score_dicts(), *random_dicts(20), {'a': np.array([0, 1], np.float32)}, {0: np.array([{}])}):
            file = io.BytesIO()
            write(file, **{str(key): value for key, value in scores.items()})
            seeds.append(file.getvalue())
    return seeds


def params_seeds():
    folder = os.path.join(HERE, 'golden', 'params')
    seeds = [open(os.path.join(folder, name), 'rb').read() for name in sorted(os.listdir(folder))
             if name.endswith('.params')]
    return seeds + [params_file([v0_array(np.zeros((2, 3), np.float32))] * 2, ['arg:a', 'aux:b'])]


def list_seeds():
    return [b'2007_000032\n2007_000039\n', b'/JPEGImages/a.jpg /SegmentationClass/a.png\r\n\r\n', b'\xef\xbb\xbfx\n',
            b'../../etc/passwd\n', 'é b\n'.encode(), b'aeroplane\nbicycle\n']


def xml_seeds():
    laughs = ''.join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    texts = ['<annotation><object><name>dog</name><part><name>cat</name></part></object></annotation>',
             '<?xml version="1.0" encoding="iso-8859-1"?><annotation><object><name> dog </name></object></annotation>',
             f'<!DOCTYPE a [<!ENTITY l0 "lol">{laughs}]><annotation><object><name>&l9;</name></object></annotation>',
             '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
             '<a b="&lt;&#65;" c=\'\'><![CDATA[x]]><!-- x --><?x y?></a>']
    return [text.encode(code) for text in texts for code in ('utf-8', 'utf-16', 'utf-8-sig')]


def pth_seeds():
    import torch
    seeds = []
    weights = {'module.a.weight': torch.arange(6.).reshape(2, 3), 'b': torch.zeros(2, dtype=torch.int64)}
    for content in (weights, {'model': weights, 'step': 3, 'args': {'x': None, 'y': [1., 'z']}},
                    torch.nn.BatchNorm1d(2).state_dict(), {'a': torch.nn.Parameter(torch.zeros(1))}):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            seeds.append(file.getvalue())
    zipped = seeds[0]
    return 5 * seeds + [repack(zipped, lambda name, data, body=body: body if name.endswith('.pkl') else data)
                    for body in hostile_pickles()] + hostile_pickles()


def image_seeds():
    img = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    seeds = []
    for mode, kind in (('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGB', 'PNG'), ('P', 'PNG'), ('L', 'PNG'),
                       ('I;16', 'PNG'), ('RGB', 'BMP'), ('P', 'GIF'), ('RGB', 'TIFF'), ('RGB', 'WEBP'), ('L', 'PPM')):
        file = io.BytesIO()
        img.convert('L' if mode == 'I;16' else mode).convert(mode).save(file, format=kind)
        seeds.append(file.getvalue())
    return seeds + [b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(' + CANARY.encode() + b') (w) file\n%%EOF\n']


# ----- readers: what is called on a path, in order, until one refuses -----

def dict_readers():
    return [lambda path: load_dict(path, '--x'), lambda path: score_files.load_scores(path, '--x', 'cam'),
            lambda path: score_files.load_scores(path, '--x', 'crf'),
            lambda path: lists.load_labels(['a'], path, '.', ['x', 'y'])]


def pth_readers():
    import torch
    from network.weights import _read_state_dict
    torch.set_num_threads(1)
    return [_read_state_dict]


TARGETS = {     # reader: seeds, readers (the others where the first succeeds), address space
    'npy': (npy_seeds, dict_readers, MEMORY), 'npz': (npz_seeds, dict_readers, MEMORY),
    'params': (params_seeds, lambda: [mxnet_params.load], MEMORY),
    'list': (list_seeds, lambda: [lambda path: lists.load_img_name_list(path, '--x')], MEMORY),
    'names': (list_seeds, lambda: [lists.load_class_names], MEMORY),
    'xml': (xml_seeds, lambda: [lambda path: lists.label_from_xml(path, lists.CAT_LIST)], MEMORY),
    'pth': (pth_seeds, pth_readers, MEMORY),
    # an image takes what its header says, up to 89 million pixels; Pillow asks for more than it uses
    'image': (image_seeds, lambda: [image_files.read_image, lambda path: image_files.read_label_map(path, '--x')],
              2 ** 33)}
TOKENS = [*hostile_pickles(), b'<!DOCTYPE a [<!ENTITY x "y">]>', b'&x;', b'../', b'\0', b'\n', b'\x1b[2J', b'/',
          b'..\n', b'R', b'b', b'\x81', b'\x93', b'c__builtin__\neval\n', b'h\0', b'q\1', b'0', b'2', b'(', b't',
          b'\x85', b'u', b'numpy.core.multiarray', b'\x8c\x05shape', b'PK\1\2', b'PK\3\4', b'\xff\xfe',
          b"'shape': (99999999, 99999)"]


# ----- changes -----

def repack(data, change):
    """Bytes of a zip with change(name, content) in place of each content, and the checksums that belong to it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, 'w') as new:
        for member in old.infolist():
            new.writestr(member, change(member.filename, old.read(member)), member.compress_type)
    return target.getvalue()


def mutate_steps(rng, data):
    """data with one step of its pickle left out, doubled, or replaced by another; as it is where it has none."""
    try:
        start = data.index(b'\x80')
        cuts = [start + position for _, _, position in pickletools.genops(data[start:])] + [len(data)]
    except Exception:
        return data
    steps = [data[a:b] for a, b in zip(cuts, cuts[1:])]
    at = rng.randrange(len(steps))
    steps[at] = rng.choice((b'', 2 * steps[at], rng.choice(steps), rng.choice(steps) + steps[at], rng.choice(TOKENS)))
    return data[:start] + b''.join(steps)


def mutate_once(rng, data, pool):
    """data with one random change; pool: other seeds to splice with."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, rng.randrange(1, 65)))
    kind = rng.randrange(12)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == 1:
        return data[:at] + bytes([rng.choice((0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)))]) + data[at + 1:]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.randbytes(size) + data[at:]
    if kind == 4:
        return data[:at] + data[at + size:]
    if kind == 5:
        return data[:at] + data[at:at + size] * rng.choice((2, 3, 100)) + data[at + size:]
    if kind == 6:
        other = rng.choice(pool)
        return data[:at] + other[rng.randrange(len(other) + 1):]
    if kind == 7:
        width = rng.choice((1, 2, 4, 8))
        number = (rng.choice(NUMBERS) + rng.randrange(-1, 2)) % 256 ** width
        return data[:at] + number.to_bytes(width, rng.choice(('little', 'big'))) + data[at + width:]
    if kind > 8:
        return mutate_steps(rng, data)
    token = rng.choice(TOKENS)
    return data[:at] + token + data[at + rng.choice((0, len(token))):]


def make_input(seed, target, index, pool):
    """Bytes of input number `index`. Zipped seeds are changed inside half of the time."""
    rng = random.Random(f'{seed} {target} {index}')
    data = rng.choice(pool)

    def change(part):
        for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
            part = mutate_once(rng, part, pool)
        return part[:MAX_INPUT]
    if data[:4] == b'PK\3\4' and rng.random() < .5:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            chosen = rng.choice(archive.namelist())
        return repack(data, lambda name, part: change(part) if name == chosen else part)
    if data[:6] == b'\x93NUMPY' and rng.random() < .7:
        return data[:128] + change(data[128:])
    return change(data)


# ----- running -----

def causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def judge(read, path):
    """(whether it was read, finding or None) of one reader on one file."""
    try:
        read(path)
        return True, None
    except ValueError as error:
        text = str(error)
        if any(isinstance(cause, MemoryError) for cause in causes(error)):
            return False, f'memory: {text}'
        one_line = len(text) < 1000 and not re.search(r'[\x00-\x1f\x7f-\x9f\u2028\u2029]', text)
        return False, None if one_line else f'no printable line: {text!r}'
    except BaseException as error:
        return False, f'{type(error).__name__}: {error}'


def work(target, numbers, seed, folder, state):
    """Reads the inputs `numbers`, in a process of its own. state: shared u64s, the input at work, how many were read,
    slowest (microseconds). Findings go to the file `findings`, a line each."""
    make_seeds, make_readers, memory = TARGETS[target]
    os.chdir(folder)
    os.dup2(os.open('stderr', os.O_WRONLY | os.O_CREAT), 2)     # libraries of image formats write there
    sys.stdout = open(os.devnull, 'w')
    warnings.simplefilter('ignore')
    pool, readers, seen = make_seeds(), make_readers(), []
    path = os.path.join(folder, 'input.' + target)

    def hook(event, args):
        writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')
        if hook.active and (event in WATCHED or writes):
            seen.append(f'{event} {args}')
    hook.active = False
    sys.addaudithook(hook)
    with open('findings', 'a') as findings:
        for warm_up, number in enumerate([*range(len(pool)), *numbers]):
            warm_up = warm_up < len(pool)
            data = pool[number] if warm_up else make_input(seed, target, number, pool)
            with open(path, 'wb') as file:
                file.write(data)
            if not warm_up:
                struct.pack_into('<Q', state, 0, number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS * (1 + 9 * warm_up))       # their default action ends the
            signal.setitimer(signal.ITIMER_REAL, 30 * SECONDS)                      # process
            start, hook.active = time.process_time(), True
            fine, finding = judge(readers[0], path)
            for read in readers[1:] if fine else ():
                finding = judge(read, path)[1] or finding
            hook.active = False
            if os.path.exists(CANARY) or seen:
                finding = f'something ran: {seen}'
                seen.clear()
            if warm_up:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                used = int(open('/proc/self/statm').read().split()[0]) * mmap.PAGESIZE
                resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
            else:
                signal.setitimer(signal.ITIMER_PROF, 0)
                _, read_before, slowest = struct.unpack_from('<3Q', state)
                struct.pack_into('<2Q', state, 8, read_before + fine,
                                 max(slowest, int(1e6 * (time.process_time() - start))))
                if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 > min(memory, 5 * MEMORY):
                    finding = finding or 'memory'
            if finding:
                kept = f'{target}-{seed}-{"seed" if warm_up else ""}{number}'
                shutil.copy(path, kept)
                findings.write(f'{kept}: {finding[:500]!r}\n')
                findings.flush()
    os._exit(0)


def fuzz(target, count, seed, folder):
    """Runs `count` inputs through one reader; returns the findings, lines of text."""
    folder = os.path.join(folder, target)
    os.makedirs(folder)
    start, next_number = time.time(), 0
    state = mmap.mmap(-1, 24)
    struct.pack_into('<q', state, 0, -1)
    while next_number < count:
        child = os.fork()
        if not child:
            try:
                work(target, range(next_number, count), seed, folder, state)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and status:
            raise RuntimeError(f'a mistake of the fuzzer; see {folder}/stderr')
        number, read, slowest = struct.unpack('<q2Q', state)
        next_number = number + 1 if status else count
        if number < 0:
            raise RuntimeError(f'status {status} on an unchanged seed, {folder}/input.{target}')
        if status:
            kept = f'{target}-{seed}-{number}'
            shutil.copy(os.path.join(folder, 'input.' + target), os.path.join(folder, kept))
            with open(os.path.join(folder, 'findings'), 'a') as findings:
                findings.write(f'{kept}: the process ended with status {status} (signal {status & 127})\n')
    with open(os.path.join(folder, 'findings')) as file:
        findings = file.read().splitlines()
    print(f'{target:8} {count:8,} inputs: {read:7,} read, {count - read:7,} refused, {len(findings)} findings; '
          f'slowest {slowest / 1e6:.3f} s; {time.time() - start:.0f} s in all', flush=True)
    return findings


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', nargs='*', help=f'readers, of {" ".join(TARGETS)} (default: all)')
    parser.add_argument('--count', default=200_000, type=int, help='inputs over all readers (default: %(default)s)')
    parser.add_argument('--seed', default=0, type=int, help='of the random changes (default: %(default)s)')
    return parser


def main(args):
    """Returns the exit code: 1 where something was found."""
    targets = args.target or list(TARGETS)
    folder = tempfile.mkdtemp(prefix='fuzz-')
    found = [line for target in targets for line in fuzz(target, -(-args.count // len(targets)), args.seed, folder)]
    for line in found[:50]:
        print(line)
    if found:
        print(f'{len(found)} findings; the files are in {folder}')
    else:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == '__main__':
    sys.exit(main(get_args_parser().parse_args()))
