"""Means of the losses, timer and log of a training. Needs no torch."""
import errno
import json
import math
import os
import time

from tqdm import tqdm

from tool.cli import BadInput, NotFinite, make_dir
from tool.files import atomic_write

# errors of an output that is a closed terminal, a closed pipe, or a file on a full disk
NO_READER = errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EDQUOT


class AverageMeter:
    """Means of named values since the last `pop`. Tensors stay on the GPU until then, so no step waits for it."""

    def __init__(self):
        self._entries = []

    def add(self, values, step=0, names=()):
        """Adds the values of one training step on the images `names`: dict name -> number or 0-d tensor."""
        self._entries.append((values, step, names))

    def check(self):
        """Raises NotFinite for the first step since the last `pop` with a value that is not finite."""
        for values, step, names in self._entries:
            if not math.isfinite(sum(values.values())):
                terms = ', '.join(f'{name} {float(value):.4g}' for name, value in values.items())
                raise NotFinite(f'the loss is not finite at step {step} ({terms}), images {" ".join(names)}: try a '
                                'lower --lr, --amp off, or --weights that are pretrained')

    def pop(self):
        """Returns a dict name -> mean, and starts over. Raises NotFinite."""
        self.check()
        entries, self._entries = [values for values, _, _ in self._entries], []
        names = dict.fromkeys(name for values in entries for name in values)
        return {name: float(sum(values[name] for values in entries if name in values))
                / sum(name in values for values in entries) for name in names}


class Timer:
    """Clock of a training run, for its speed since the last report and its estimated finish."""

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
    """Prints lines and appends them to <session_name>.log; writes records to <session_name>.jsonl. Creates their
    folder. If the disk is full, it warns once, and the run continues.

    step: first step of a resumed run, which appends to both files; records of later steps, written by a killed run
    after its last checkpoint, are deleted. None overwrites both files. quiet: do nothing, for all ranks but the first.
    """

    def __init__(self, session_name, step=None, quiet=False):
        self._session, self._quiet, self._full, self._told = session_name, quiet, False, set()
        if quiet:
            return
        make_dir(os.path.dirname(session_name) or '.', '--session_name')
        try:
            for end in ('.log', '.jsonl'):
                open(session_name + end, 'w' if step is None else 'a', encoding='utf-8').close()
            if step is not None:
                _cut_records(session_name + '.jsonl', step)
        except OSError as error:
            raise BadInput(f'cannot write {error.filename} (--session_name): {error.strerror}') from error

    def _write(self, end, line):
        if self._full:
            return
        try:
            with open(self._session + end, 'a', encoding='utf-8', errors='backslashreplace') as file:
                file.write(line + '\n')
        except OSError as error:
            self._full = True
            tqdm.write(f'warning: cannot write {self._session}{end} (--session_name): {error.strerror}; '
                       'the run continues without it')

    def __call__(self, line):
        if not self._quiet:
            self._write('.log', line)
            try:
                tqdm.write(line)        # prints to stdout without breaking a progress bar
            except OSError as error:
                if error.errno not in NO_READER:        # the training still has to save
                    raise

    def warn_once(self, kind, line):
        """Logs a warning if there was none of this kind before."""
        if kind not in self._told:
            self._told.add(kind)
            self('warning: ' + line)

    def record(self, values):
        """Writes a dict name -> number or text as one line of JSON."""
        if not self._quiet:
            self._write('.jsonl', json.dumps(values))


def _cut_records(path, step):
    """Deletes the records of `step` and later, and lines that are no records, from a .jsonl file."""
    def is_before(line):
        try:
            return json.loads(line)['step'] < step
        except (ValueError, LookupError, TypeError):        # an incomplete line of a killed run
            return False
    with open(path, encoding='utf-8', errors='backslashreplace') as file:
        lines = file.readlines()
    kept = [line for line in lines if is_before(line)]
    if kept != lines:
        with atomic_write(path) as file:
            file.write(''.join(kept).encode())
