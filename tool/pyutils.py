"""Small helpers: bad input, files, flags, meters. Needs no torch."""
import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time

from tqdm import tqdm


class BadInput(ValueError):
    """A file or a flag that the user has to change. Its text is one line: what, which file, which flag."""


@contextlib.contextmanager
def exit_on_bad_input():
    """Wraps a script's `main`: a BadInput ends the script with one line on stderr and exit code 2."""
    try:
        yield
    except BadInput as error:
        # A DataLoader worker hands its exceptions over with the whole traceback as their text;
        # the message proper is its last line, behind the class name.
        line = str(error).rstrip().rsplit('\n', 1)[-1].split('BadInput: ', 1)[-1]
        tqdm.write(f'{os.path.basename(sys.argv[0])}: error: {line}', file=sys.stderr)   # below a progress bar
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


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary binary file beside `path` and renames it to `path` when the block ends well.

    A run that is killed, or an error in the block, leaves `path` as it was.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix='.' + os.path.basename(path) + '.', dir=folder)
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)    # mkstemp makes private files; outputs are ordinary ones
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def str2bool(text):
    """argparse type for flags that the reference declared `type=bool`: `--curve False` means no."""
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0', ''):
        return False
    raise argparse.ArgumentTypeError(f'True or False expected, not {text!r}')


class AverageMeter:
    """Running means of named values since the last `pop`."""

    def __init__(self):
        self._sums, self._counts = {}, {}

    def add(self, values):
        """values: dict name -> number, or 0-d tensor: those stay on their device until `pop`."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self):
        """Returns dict name -> mean and starts over."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class Timer:
    """Wall-clock time of a training run: speed since the last report, and the estimated finish."""

    def __init__(self):
        self._start = self._last = time.time()
        self._last_step = 0

    def report(self, step, max_step, batch_size):
        """Returns (images per second since the last report, estimated finish as text)."""
        now = time.time()
        speed = (step - self._last_step) * batch_size / max(now - self._last, 1e-9)
        finish = self._start + (now - self._start) * max_step / step
        self._last, self._last_step = now, step
        return speed, time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(finish))


class Logger:
    """Prints lines and keeps them in a file, flushed line by line. Creates the file's folder."""

    def __init__(self, path):
        make_dir(os.path.dirname(path) or '.', '--session_name')
        try:
            self._file = open(path, 'w', encoding='utf-8')
        except OSError as error:
            raise BadInput(f'cannot write {path} (--session_name): {error.strerror}') from error

    def __call__(self, line):
        tqdm.write(line)        # goes to stdout, and leaves a progress bar whole
        self._file.write(line + '\n')
        self._file.flush()


def progress_line(optimizer, timer, batch_size, losses, counts=()):
    """The `Iter:` line of the reference. losses: the total first; counts: of the pairs, in AffinityNet."""
    step, max_step = optimizer.global_step, optimizer.max_step
    speed, finish = timer.report(step, max_step, batch_size)
    parts = [f'Iter:{step - 1:5d}/{max_step:5d}', 'loss:' + ' '.join(f'{loss:.4f}' for loss in losses),
             f'imps:{speed:.1f}']
    if counts:
        parts.append('cnt:' + ' '.join(f'{count:.0f}' for count in counts))
    return ' '.join(parts + [f'Fin:{finish}', f'lr: {optimizer.param_groups[0]["lr"]:.4f}'])
