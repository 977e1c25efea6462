"""Small helpers: bad input, files, flags, meters. Needs no torch."""
import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time

from tqdm import tqdm


class BadInput(ValueError):
    """A file or a flag that the user has to change. Its text is one line: what, which file, which flag."""


class NotFinite(ArithmeticError):
    """A loss that is no number any more. Its text is one line, as BadInput's."""


@contextlib.contextmanager
def exit_on_bad_input():
    """Wraps a script's `main`: a BadInput or NotFinite ends the script with one line on stderr and exit code 2."""
    try:
        yield
    except (BadInput, NotFinite) as error:
        # A DataLoader worker hands its exceptions over with the whole traceback as their text;
        # the message proper is its last line, behind the class name.
        line = str(error).rstrip().rsplit('\n', 1)[-1].split('BadInput: ', 1)[-1]
        tqdm.write(f'{os.path.basename(sys.argv[0])}: error: {line}', file=sys.stderr)   # below a progress bar
        sys.exit(2)
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        tqdm.write(f'{os.path.basename(sys.argv[0])}: error: a loader process was killed, perhaps for lack of memory '
                   '(--num_workers)', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write('interrupted', file=sys.stderr)
        sys.exit(130)


def check_dir(path, flag):
    """Raises BadInput unless `path` is a folder; `flag` is the command-line flag that named it."""
    if not os.path.isdir(path):
        raise BadInput(f'no such folder: {path} ({flag})')


def check_file(path, flag):
    """Raises BadInput unless `path` is a file; `flag` is the command-line flag that named it."""
    if not os.path.isfile(path):
        raise BadInput(f'no such file: {path} ({flag})')


def check_range(args, low, high, *names):
    """Raises BadInput for the first of these flags (numbers, or lists of them) that is not in low..high."""
    for name in names:
        values = getattr(args, name)
        if not all(low <= value <= high for value in (values if isinstance(values, list) else [values])):
            raise BadInput(f'--{name} must be from {low} to {high}, not {values}')


def import_network(name, attribute):
    """The module of the `--network` flag; its class Net must have `attribute`, which tells the kind of network.
    Raises BadInput."""
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise BadInput(f'no network {name} (--network): {error}') from error
    if not hasattr(getattr(module, 'Net', None), attribute):
        raise BadInput(f'{name} (--network) is no network for this script: it has no Net.{attribute}')
    return module


def make_dir(path, flag):
    """Creates the folder `path`, parents included; raises BadInput where that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f'cannot create the folder {path} ({flag}): {error.strerror}') from error


def available_cores():
    """Processor cores that this process may use: those of its affinity mask, or fewer where a cgroup limits it, shared
    with the other ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    cores = max(cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1)
    try:
        with open('/sys/fs/cgroup/cpu.max', encoding='ascii') as file:
            quota, period = file.read().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):       # no cgroup, or a quota of 'max'
        return cores


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary binary file beside `path` and renames it to `path` when the block ends well.

    A run that is killed, or an error in the block, leaves `path` as it was. Raises BadInput where the disk is full
    or the folder is read-only.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, temporary = tempfile.mkstemp(prefix='.' + os.path.basename(path) + '.', dir=folder)
    except OSError as error:
        raise BadInput(f'cannot write {path}: {error.strerror}') from error
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)    # mkstemp makes private files; outputs are ordinary ones
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise BadInput(f'cannot write {path}: {error.strerror}') from error
        raise


def parallel_map(work, items, num_workers, desc):
    """Yields work(item) for every item, in order, from up to `num_workers` processes, with a progress bar.

    work: a function that can be pickled, or functools.partial of one. This process does the work itself where that is
    faster: another one takes as long to start as about 50 items. Raises what `work` raises, and BadInput where a
    process was killed.
    """
    items = list(items)
    bar = functools.partial(tqdm, total=len(items), desc=desc, dynamic_ncols=True, disable=None)  # on a terminal only
    workers = min(num_workers, multiprocessing.cpu_count(), len(items) // 50)
    if workers < 2:
        yield from bar(map(work, items))
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), signal.signal,
                                                  (signal.SIGINT, signal.SIG_IGN))     # this process answers to Ctrl-C
    try:
        yield from bar(pool.map(work, items, chunksize=8))
    except concurrent.futures.BrokenExecutor as error:
        raise BadInput(f'{desc}: a process was killed, perhaps for lack of memory (--num_workers)') from error
    finally:
        pool.shutdown(cancel_futures=True)


def str2bool(text):
    """argparse type for flags that the reference declared `type=bool`: `--curve False` means no."""
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0', ''):
        return False
    raise argparse.ArgumentTypeError(f'True or False expected, not {text!r}')


class AverageMeter:
    """Means of named values since the last `pop`. Values of a GPU stay there until then, so no step waits for it."""

    def __init__(self):
        self._entries = []

    def add(self, values, step=0, names=()):
        """values: dict name -> number or 0-d tensor, of one training step on the images `names`."""
        self._entries.append((values, step, names))

    def check(self):
        """Raises NotFinite for the first step since the last `pop` that has a value that is not finite."""
        for values, step, names in self._entries:
            if not math.isfinite(sum(values.values())):
                terms = ', '.join(f'{name} {float(value):.4g}' for name, value in values.items())
                raise NotFinite(f'the loss is not finite at step {step} ({terms}), images {" ".join(names)}: try a '
                                'lower --lr, --amp off, or --weights that are pretrained')

    def pop(self):
        """Returns dict name -> mean and starts over. Raises NotFinite."""
        self.check()
        entries, self._entries = [values for values, _, _ in self._entries], []
        names = dict.fromkeys(name for values in entries for name in values)
        return {name: float(sum(values[name] for values in entries if name in values))
                / sum(name in values for values in entries) for name in names}


class Timer:
    """Wall-clock time of a training run: speed since the last report, and the estimated finish."""

    def __init__(self, step=0):
        self._start = self._last = time.time()
        self._first_step = self._last_step = step

    def report(self, step, max_step, batch_size):
        """Returns (images per second since the last report, estimated finish as text)."""
        now = time.time()
        speed = (step - self._last_step) * batch_size / max(now - self._last, 1e-9)
        finish = now + (now - self._start) * (max_step - step) / max(step - self._first_step, 1)
        self._last, self._last_step = now, step
        return speed, time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(finish))


class Logger:
    """Prints lines and keeps them in <session_name>.log, flushed line by line; records go to <session_name>.jsonl.
    Creates their folder. quiet: does nothing, for ranks other than the first."""

    def __init__(self, session_name, append=False, quiet=False):
        self._files, self._told = None, set()
        if quiet:
            return
        make_dir(os.path.dirname(session_name) or '.', '--session_name')
        try:
            self._files = [open(session_name + end, 'a' if append else 'w', encoding='utf-8')
                           for end in ('.log', '.jsonl')]
        except OSError as error:
            raise BadInput(f'cannot write {error.filename} (--session_name): {error.strerror}') from error

    def _write(self, number, line):
        self._files[number].write(line + '\n')
        self._files[number].flush()

    def __call__(self, line):
        if self._files:
            tqdm.write(line)        # goes to stdout, and leaves a progress bar whole
            self._write(0, line)

    def warn_once(self, kind, line):
        """A warning that is told the first time that its kind turns up."""
        if kind not in self._told:
            self._told.add(kind)
            self('warning: ' + line)

    def record(self, values):
        """One line of JSON: dict name -> number or text."""
        if self._files:
            self._write(1, json.dumps(values))
