"""Feeds damaged and hostile files to the readers of scores, labels and weights that one did not make.

    python tests/by_hand/fuzz.py --count 200000                 every reader
    python tests/by_hand/fuzz.py --count 10000 --seed 1 npy pth

Each input is a valid or hostile file, changed at random; number i of a reader depends on the seed and i alone. A reader
must give a result or a ValueError (as BadInput is) of one printable line, and run nothing: an audit hook sees programs
started, files written and names looked up by Python's own unpickler. Stops at the first input where that is not so.
"""
import argparse
import io
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import warnings
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]

import numpy as np
import torch

from network.weights import _read_state_dict
from tool.unpickle import load_dict

SECONDS, ADDRESSES = 60, 2 ** 33        # the most for one input; PyTorch takes many addresses
WATCHED = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.remove', 'subprocess.Popen', 'socket.connect',
           'pickle.find_class')
TOKENS = [b'\n', b'\x1b[2J', b'R', b'b', b'\x81', b'\x93', b'h\0', b'c__builtin__\neval\n', b'cnumpy\ndtype\n', b'q\1',
          b'0', b'2', b'(', b't', b'\x85', b'u', b'PK\1\2', b'\xff' * 8, b'\0' * 8, b'\xff\xff\xff\x7f']


# ----- seeds: lists of bytes for each reader -----

def saved(save, *args, **kwargs):
    """Bytes that a function such as np.save, which takes a file first, writes."""
    file = io.BytesIO()
    save(file, *args, **kwargs)
    return file.getvalue()


def npy_bytes(value, protocol=4):
    """Bytes of a .npy file with a pickled dict, as other versions of NumPy write them."""
    array = np.empty((), object)
    array[()] = value
    return saved(np.save, {})[:128] + pickle.dumps(array, protocol)


def hostile_pickles():
    """Pickles that would create a file in the working directory, in every way that the format has."""
    touch = b'\x8c\x09touch ran'
    return [b'\x80\x04' + body for body in (
        b'cos\nsystem\n' + touch + b'\x85R.', b'\x8c\2os\x8c\6system\x93' + touch + b'\x85R.',
        b'(' + touch + b'ios\nsystem\n.', b'(cos\nsystem\n' + touch + b'o.', b'cos\nsystem\n' + touch + b'\x85\x81.',
        b'cbuiltins\neval\n\x8c\x0eopen("ran","w")\x85R.', b'\x82\1.')]


def npy_seeds():
    dicts = [{0: np.eye(3, dtype=np.float32), 14: np.full((3, 3), .5, '>f8').T}, {0: np.ones((2, 2)), 254: np.nan}, {},
             {'a': np.array([0, 1], np.float32), 'b': np.array([True, False]), np.str_('c'): np.float16(2), 'd': 3}]
    return ([npy_bytes(value, protocol) for value in dicts for protocol in (2, 3, 4, 5)]
            + [npy_bytes({})[:128] + body for body in hostile_pickles()] + [saved(np.save, np.zeros(3))])


def npz_seeds():
    return [saved(write, **content) for write in (np.savez, np.savez_compressed)
            for content in ({'0': np.eye(3), '14': np.ones((3, 3), '>f4')}, {}, {'a': np.array([0, 1])},
                            {'0': np.array([{}])}, {'1': np.zeros(2, 'f4,i4')})]


def pth_seeds():
    weights = {'module.a.weight': torch.arange(6.).reshape(2, 3), 'b': torch.zeros(2, dtype=torch.int64)}
    seeds = [saved(lambda file, zipped: torch.save(content, file, _use_new_zipfile_serialization=zipped), zipped)
             for content in (weights, {'model': weights, 'step': 3}, {'a': torch.nn.Parameter(torch.zeros(1))})
             for zipped in (True, False)]
    return 2 * seeds + hostile_pickles() + [
        repack(seeds[0], lambda name, data: body if name.endswith('.pkl') else data) for body in hostile_pickles()]


TARGETS = {     # reader: its seeds, what is called on a path
    'npy': (npy_seeds, lambda path: load_dict(path, '--x')), 'npz': (npz_seeds, lambda path: load_dict(path, '--x')),
    'pth': (pth_seeds, _read_state_dict)}


# ----- changes -----

def repack(data, change):
    """Bytes of a zip with change(name, content) in place of each content, and the checksums that belong to it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, 'w') as new:
        for member in old.infolist():
            new.writestr(member, change(member.filename, old.read(member)), member.compress_type)
    return target.getvalue()


def mutate(rng, data, pool):
    """data with one random change: bytes left out, doubled, replaced by a token, a byte or the end of another seed."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 65)))
    new, end = rng.choice(((b'', at + size), (2 * data[at:at + size], at + size), (rng.choice(TOKENS), at),
                           (rng.choice(TOKENS)[:size], at + size), (rng.randbytes(size), at + size), (b'', len(data)),
                           (rng.choice(pool)[at:], len(data))))
    return data[:at] + new + data[end:]


def make_input(seed, target, index, pool):
    """Bytes of input number `index`. Zips are changed inside half of the time, .npy files mostly after the header."""
    rng = random.Random(f'{seed} {target} {index}')
    data = rng.choice(pool)
    if data[:4] == b'PK\3\4' and rng.random() < .5:
        return repack(data, lambda _, part: mutate(rng, part, pool) if rng.random() < .5 else part)
    start = 128 if data[:6] == b'\x93NUMPY' and rng.random() < .7 else 0
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = data[:start] + mutate(rng, data[start:], pool)
    return data


# ----- running -----

seen = []       # what the audit hook noted


def note_event(event, args):
    if event in WATCHED or event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+'):
        seen.append(f'{event} {args}')


def judge(read, path):
    """(whether it was read, finding or None) of a reader on one file."""
    seen.clear()
    fine, finding = True, None
    try:
        read(path)
    except ValueError as error:
        fine = False
        if not str(error).isprintable() or len(str(error)) > 1000:
            finding = f'no printable line: {str(error)[:1000]!r}'
    except BaseException as error:
        fine, finding = False, f'{type(error).__name__}: {error}'
    return fine, f'something ran: {seen}' if seen or os.path.exists('ran') else finding


def fuzz(target, count, seed, folder):
    """Runs `count` inputs through the reader of a target, in the folder, which is the working directory."""
    make_seeds, read = TARGETS[target]
    pool, fine = make_seeds(), 0
    path = os.path.join(folder, f'input.{target}')
    for number in range(count):
        with open(path, 'wb') as file:
            file.write(make_input(seed, target, number, pool))
        signal.alarm(SECONDS)           # its default action ends the process
        was_read, finding = judge(read, path)
        signal.alarm(0)
        fine += was_read
        if finding:
            sys.exit(f'{path}, input {number} of seed {seed}: {finding}')
    print(f'{target}: {count:,} inputs, {fine:,} read, {count - fine:,} refused', file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', nargs='*', help=f'readers, of {" ".join(TARGETS)} (default: all)')
    parser.add_argument('--count', default=200_000, type=int, help='inputs of each reader (default: %(default)s)')
    parser.add_argument('--seed', default=0, type=int, help='of the random changes (default: %(default)s)')
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix='fuzz-')
    print(f'in {folder}, where the last input stays', file=sys.stderr)
    os.chdir(folder)
    sys.stdout = open(os.devnull, 'w')          # readers print what they do
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.RLIM_INFINITY))
    sys.addaudithook(note_event)
    for target in args.target or TARGETS:
        fuzz(target, args.count, args.seed, folder)


if __name__ == '__main__':
    main()
