"""Bad input, and checks of flags. Needs no torch."""
import argparse
import contextlib
import errno
import functools
import importlib
import os
import signal
import sys

from tqdm import tqdm

HANG_UP = [signal.SIGHUP] if hasattr(signal, 'SIGHUP') else []      # of a terminal that is closed; not on Windows


class BadInput(ValueError):
    """A file or a flag that the user has to change. Its text is one line: what, which file, which flag."""


class CannotWrite(BadInput):
    """A file that cannot be written: the disk is full, or the folder read-only."""


class NotFinite(ArithmeticError):
    """A loss that is no number any more. Its text is one line, as BadInput's."""


@contextlib.contextmanager
def exit_on_bad_input(memory_help='smaller images, fewer --num_workers'):
    """Wraps a script's `main`: what the user can mend ends it with one line on stderr and exit code 2, Ctrl-C with 130;
    output into a closed pipe (`| head`) ends it without a word, with 141, and output to a closed terminal with 129, or
    with the exit code that it has already. Characters that the console cannot print become escapes. memory_help: the
    flags that help where memory runs out."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    terminal_closed = False
    try:
        try:
            yield
        except KeyboardInterrupt:
            exit_with('interrupted', 130)
        except (BadInput, NotFinite) as error:
            exit_with(f'error: {error}', 2)
        except Exception as error:
            if is_out_of_memory(error):
                exit_with(f'error: out of memory; what helps: {memory_help}', 2)
            if is_killed_loader(error):
                exit_with('error: a loader process was killed, perhaps for lack of memory (--num_workers)', 2)
            raise
        finally:
            try:
                print(end='', flush=True)       # a closed pipe or a full disk is noticed here, not when Python ends
            except OSError as error:
                terminal_closed = error.errno == errno.EIO
                if not terminal_closed:
                    raise
                discard_output()
    except OSError as error:
        if terminal_closed and error.errno == errno.EIO:        # while the script ran; else EIO is of a file
            sys.exit(129)                   # as of a process that SIGHUP ends
        if error.filename or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        discard_output()
        if error.errno == errno.EPIPE:
            sys.exit(141)                   # as of a process that SIGPIPE ends
        exit_with(f'error: cannot write the output: {error.strerror}', 2)


def discard_output():
    """What is left of the output of this process goes nowhere, so that Python does not fail on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error):
    """Whether an exception says that memory ran out: of Python, NumPy, PyTorch on a CPU or a GPU, or the system."""
    if isinstance(error, (RuntimeError, OSError)):      # PyTorch has no class for all of its own
        text = str(error).lower()
        return any(words in text for words in ('out of memory', 'allocate memory', 'not enough memory', 'bad_alloc',
                                               'status_alloc_failed'))
    return isinstance(error, MemoryError)


def is_killed_loader(error):
    """Whether a loader process was killed. PyTorch's signal handler raises that error wherever the program is, also
    inside `torch.save`, whose own error then has it as its context."""
    while error:
        if isinstance(error, RuntimeError) and 'DataLoader worker (pid' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_with(line, code):
    with contextlib.suppress(OSError):      # stderr on a full disk
        tqdm.write(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.stderr)     # below a progress bar
    sys.exit(code)


def dead_link(path):
    """A text for messages where `path`, or a folder above it, is a link to what is not there; else ''."""
    link, above = os.path.abspath(path), None
    while link != above:
        if os.path.islink(link) and not os.path.exists(link):
            return (f'{link} is a link to {os.readlink(link)}, which is not there: was it moved, or is a disk not '
                    'mounted?')
        link, above = os.path.dirname(link), link
    return ''


def check_dir(path, flag):
    """Raises BadInput unless `path` is a folder; `flag` is the command-line flag that named it."""
    if not os.path.isdir(path):
        raise BadInput(f'{dead_link(path) or "no such folder: " + str(path)} ({flag})')


def check_file(path, flag):
    """Raises BadInput unless `path` is a file; `flag` is the command-line flag that named it."""
    if not os.path.isfile(path):
        raise BadInput(f'{dead_link(path) or "no such file: " + str(path)} ({flag})')


def check_range(args, low, high, *names):
    """Raises BadInput for the first of these flags (numbers, or lists of them) that is not in low..high. None passes:
    the flag is not given."""
    for name in names:
        values = getattr(args, name)
        numbers = values if isinstance(values, list) else [values]
        if values is not None and not all(low <= number <= high for number in numbers):
            raise BadInput(f'--{name} must be from {low} to {high}, not {values}')


def make_dir(path, flag):
    """Creates the folder `path`, parents included; raises BadInput where that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f'cannot create the folder {path} ({flag}): {error.strerror}') from error


def import_network(name, kind, backbone=None):
    """The class Net of the module of the `--network` flag, a `Network` of network/base.py of this kind: 'SEAM',
    'affinity' or 'segmentation'. backbone: the `--backbone` flag, a name for networks that take one. Raises BadInput.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise BadInput(f'cannot import the network {name} (--network): {error}') from error
    net = getattr(module, 'Net', None)
    if getattr(net, 'kind', None) != kind:
        what = f'its Net has the kind {getattr(net, "kind", None)!r}' if net else 'it has no class Net'
        raise BadInput(f'{name} (--network) does not suit this script, which needs a network of the kind {kind!r}: '
                       f'{what}')
    if backbone is None:
        return net
    if not net.takes_backbone:
        raise BadInput(f'--backbone {backbone}: {name} (--network) has a backbone of its own; network.timm_SEAM, '
                       'network.timm_aff and network.timm_deeplab take one of timm by its name')
    return functools.partial(net, backbone=backbone)


def str2bool(text):
    """argparse type for flags that the reference declared `type=bool`: `--curve False` means no."""
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0', ''):
        return False
    raise argparse.ArgumentTypeError(f'True or False expected, not {text!r}')
