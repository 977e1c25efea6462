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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the description as it is written, and adds "(required)" or "(default: ...)" to the help of each flag. The
    default is left out where the help states it, and where it says nothing: None, an empty list, a switch."""

    def _get_help_string(self, action):
        if action.required and action.option_strings:
            return f'{action.help} (required)'
        if 'efault: ' in action.help or action.nargs == 0 or action.default in (None, []):
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f'{action.help} (default: {" ".join(map(str, action.default))})'
        return super()._get_help_string(action)


class BadInput(ValueError):
    """A file or a flag that the user has to change. Its text is one line: what is wrong, which file, which flag."""


class CannotWrite(BadInput):
    """A file that cannot be written, because the disk is full or the folder read-only."""


class NotFinite(ArithmeticError):
    """A loss that is NaN or infinite. Its text is one line, as that of BadInput."""


@contextlib.contextmanager
def exit_on_bad_input(memory_help='smaller images, fewer --num_workers'):
    """Context for a script's `main`, which turns exceptions into exit codes. An error that the user can mend ends the
    script with one line on stderr and exit code 2, Ctrl-C with 130. If its output goes to a closed pipe (`| head`), it
    ends silently with 141, a training after its last step; to a closed terminal, with 129 or the exit code that it
    already has. Characters that the console cannot print become escapes. memory_help: text on the flags that help if
    memory runs out."""
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
            if is_killed_loader(error):
                exit_with('error: a loader process was killed, perhaps for lack of memory, or of shared memory in a '
                          'container (docker run --shm-size=8g): try fewer --num_workers', 2)
            if is_out_of_memory(error):
                exit_with(f'error: out of memory; what helps: {memory_help}', 2)
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
        if terminal_closed and error.errno == errno.EIO:        # else a file caused EIO
            sys.exit(129)                   # as for a process that SIGHUP ends
        if error.filename or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        discard_output()
        if error.errno == errno.EPIPE:
            sys.exit(141)                   # as for a process that SIGPIPE ends
        exit_with(f'error: cannot write the output: {error.strerror}', 2)


def discard_output():
    """Sends the rest of this process's output nowhere, so that Python does not fail on it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, in Python, NumPy, PyTorch on a CPU or a GPU, or the system."""
    if isinstance(error, (RuntimeError, OSError)):      # PyTorch has no common class for these errors
        text = str(error).lower()
        return any(words in text for words in ('out of memory', 'allocate memory', 'not enough memory', 'bad_alloc',
                                               'status_alloc_failed'))
    return isinstance(error, MemoryError)


def is_killed_loader(error):
    """Whether an exception says that a loader process was killed, or found no room for a batch in shared memory.
    PyTorch's signal handler raises it wherever the program is, also inside `torch.save`, whose own error then has it as
    its context."""
    while error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in (
                'DataLoader worker (pid', 'shared memory(shm)', 'file </torch_')):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_with(line, code):
    with contextlib.suppress(OSError):      # stderr may be a file on a full disk
        tqdm.write(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.stderr)     # below a progress bar
    sys.exit(code)


def dead_link(path):
    """Text for a message if `path`, or a folder above it, is a link to something that does not exist; else ''."""
    link, above = os.path.abspath(path), None
    while link != above:
        if os.path.islink(link) and not os.path.exists(link):
            return (f'{link} is a link to {os.readlink(link)}, which does not exist: was it moved, or is a disk not '
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
    """Raises BadInput for the first of these flags (a number, or a list of them) that is not in low..high. A flag that
    is None was not given, and passes."""
    for name in names:
        values = getattr(args, name)
        numbers = values if isinstance(values, list) else [values]
        if values is not None and not all(low <= number <= high for number in numbers):
            raise BadInput(f'--{name} must be from {low} to {high}, not {values}')


def make_dir(path, flag):
    """Creates the folder `path` with its parents; raises BadInput if that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f'cannot create the folder {path} ({flag}): {error.strerror}') from error


def import_network(name, kind, backbone=None):
    """Returns the class Net of a module, a `Network` of network/base.py.
    name: the `--network` flag. kind: which the script needs, 'SEAM', 'affinity' or 'segmentation'. backbone: the
    `--backbone` flag, or None. Raises BadInput for a module without such a Net.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise BadInput(f'cannot import the network {name} (--network): {error}') from error
    net = getattr(module, 'Net', None)
    if getattr(net, 'kind', None) != kind:
        what = f'its Net has the kind {getattr(net, "kind", None)!r}' if net else 'it has no class Net'
        raise BadInput(f'{name} (--network) is not for this script, which needs a network of the kind {kind!r}: '
                       f'{what}')
    if backbone is None:
        return net
    if not net.takes_backbone:
        raise BadInput(f'--backbone {backbone}: {name} (--network) has its own backbone; leave --backbone out, or use '
                       'one of network.timm_SEAM, network.timm_aff and network.timm_deeplab')
    return functools.partial(net, backbone=backbone)


def str2bool(text):
    """argparse type for flags that the reference declared as `type=bool`. Here `--curve False` means False."""
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0', ''):
        return False
    raise argparse.ArgumentTypeError(f'True or False expected, not {text!r}')
