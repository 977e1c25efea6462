"""Output folders of long runs: what is finished already, what may be skipped, and whether the disk will do."""
import contextlib
import json
import os
import shutil

from tqdm import tqdm

from tool.cli import BadInput, make_dir
from tool.files import atomic_write

SETTINGS = 'settings.json'
# what a whole file of ours ends with: a pickle, a zip directory without comment, a PNG
LAST_BYTES = {'.npy': b'.', '.npz': b'\0\0', '.png': b'IEND\xaeB`\x82'}


def read_settings(folder):
    """What `open_folder` has written about a folder; an empty dict where there is nothing. Raises BadInput."""
    path = os.path.join(folder, SETTINGS)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f'cannot read {path}: {error}; name another folder, or --overwrite') from error


def open_folder(folder, flag, settings, overwrite, paths):
    """Creates an output folder, or takes up one that was made with the same settings (a dict for json).

    Raises BadInput, naming the difference, for a folder of other settings, and for one with results of unknown
    settings. With `overwrite` it is taken over, and the results among `paths` are removed: after the settings, so that
    a run killed in between leaves no old result that passes for one of the new settings.
    """
    make_dir(folder, flag)
    settings = json.loads(json.dumps(settings))
    if overwrite:
        for path in (os.path.join(folder, SETTINGS), *paths):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    before = read_settings(folder)
    differ = [f'{key} was {before.get(key)}, is {settings.get(key)}'
              for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if not before:
        results = any(os.path.splitext(name)[1] in LAST_BYTES for name in os.listdir(folder))
        differ = [f'it has results and no {SETTINGS}'] if results else []
    if differ and not overwrite:
        raise BadInput(f'{folder} ({flag}) was made with other settings: {"; ".join(differ)}. Name another folder, '
                       'or make it anew with --overwrite')
    with atomic_write(os.path.join(folder, SETTINGS)) as file:
        file.write(json.dumps(settings, indent=1).encode())


def is_whole(path):
    """Whether an output file is there to its end; files are written elsewhere and renamed, but copies can be cut."""
    end = LAST_BYTES[os.path.splitext(path)[1]]
    try:
        with open(path, 'rb') as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


class SkipBad:
    """A dataset whose items may be the BadInput that reading them raised, for `Errors` to judge."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        try:
            return self.dataset[self.indices[number]]
        except BadInput as error:
            return error


class Errors:
    """What `--on_error` does with a BadInput: stop raises it, skip keeps it for the end."""

    def __init__(self, on_error):
        self.skip, self.lines = on_error == 'skip', []

    def add(self, error):
        if not self.skip:
            raise error
        self.lines.append(str(error))

    def report(self):
        """Lists what was skipped. Returns the exit code: 3 where something was, else 0; also for a rank of torchrun,
        which would stop the other ranks."""
        for line in self.lines:
            tqdm.write(f'skipped: {line}')
        return 3 if self.lines and 'WORLD_SIZE' not in os.environ else 0


class SpaceCheck:
    """Warns, from the size of the first outputs, when the disk will not hold them all."""

    FIRST = 10

    def __init__(self, count):
        self._left, self._paths = count, []

    def add(self, paths):
        """paths: all outputs of one image, which may still be on their way."""
        self._left -= 1
        if self._paths is None:         # it has been said, or need not be
            return
        self._paths = (self._paths + paths)[:self.FIRST * len(paths)]
        if len(self._paths) < self.FIRST * len(paths) or not all(map(os.path.isfile, self._paths)):
            return
        need = sum(map(os.path.getsize, self._paths)) / self.FIRST * self._left
        free = shutil.disk_usage(os.path.dirname(paths[0])).free
        if need > free:
            tqdm.write(f'warning: the other {self._left} images will take about {need / 2 ** 30:.1f} GiB, '
                       f'and {free / 2 ** 30:.1f} GiB are free')
        self._paths = None
