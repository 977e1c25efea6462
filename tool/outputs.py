"""Result folders of long runs: what is finished, what may be skipped, whether the disk will do."""
import contextlib
import json
import os
import shutil

from tqdm import tqdm

from tool.cli import BadInput, CannotWrite, is_out_of_memory, make_dir
from tool.files import atomic_write, file_digest

SETTINGS = 'settings.json'
# what a complete file of ours ends with: a pickle, a zip directory without comment, a PNG
LAST_BYTES = {'.npy': b'.', '.npz': b'\0\0', '.png': b'IEND\xaeB`\x82'}
OUTDATED = 10 ** 9      # seconds since 1970, in 2001: older files are to be made again, see ResultFolder


def read_settings(folder):
    """The settings that `ResultFolder.open` has written into a folder; None where there are none. Raises BadInput."""
    path = os.path.join(folder, SETTINGS)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f'cannot read {path}: {error}; remove it') from error


def results_in(folder):
    """Paths of the results in a folder, whatever their names, sorted."""
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if os.path.splitext(name)[1] in LAST_BYTES and not name.startswith('.')]


def describe_folder(folder, flag):
    """What tells the files of an input folder from others, wherever it lies, for the settings of what is made from
    them: its settings, each under `flag`; for a folder of other programs the digest of its first file."""
    settings = read_settings(folder)
    if settings is None:
        settings = {'first file': file_digest(path) for path in results_in(folder)[:1]}
    return {f'{flag} {key}': value for key, value in settings.items()}


class ResultFolder:
    """A folder with one file an image, NAME + extension, all of the same settings, which it keeps in settings.json.

    settings: a dict for json of what the files depend on: numbers and digests, not paths, which can be written in many
    ways. flag: the command-line flag that named the folder.

    A run without --resume makes all files anew. Each old file can be read until its new one replaces it, but is dated
    1970 when the run starts, and what is dated so does not count as finished. So if the run is stopped half-way,
    --resume can tell old files from new ones: their names are the same, and settings.json has the new settings already.
    """

    def __init__(self, path, flag, extension, settings):
        self.path, self.flag, self.extension = path, flag, extension
        self.settings = json.loads(json.dumps(settings))        # as they are read back

    def file(self, name):
        return os.path.join(self.path, name + self.extension)

    def is_finished(self, name):
        """Whether the file of an image is complete (its last bytes are there: copies can be cut) and not outdated."""
        end = LAST_BYTES[self.extension]
        try:
            with open(self.file(name), 'rb') as file:
                file.seek(-len(end), os.SEEK_END)
                return file.read() == end and os.stat(file.fileno()).st_mtime > OUTDATED
        except OSError:
            return False

    def open(self, names, resume):
        """Creates the folder, or takes up one that is there, for a run over these images. With `resume`, finished files
        stay; raises BadInput where they have other or unknown settings. Without it, all are to be made anew."""
        make_dir(self.path, self.flag)
        old = results_in(self.path)
        differences = '; '.join(self._differences()) if old else ''
        if differences and resume:
            raise BadInput(f'{self.path} ({self.flag}) was made with other settings: {differences}. Name another '
                           'folder, or leave --resume out to make it anew')
        if differences:
            print(f'warning: {self.path} ({self.flag}) has results of other settings, which are replaced one by one: '
                  f'{differences}')
        elif resume:
            old = []
        else:       # those of these images: another rank may have made others already
            old = [path for path in map(self.file, names) if os.path.isfile(path)]
        try:        # first the dates, then the settings: a run that is killed here leaves nothing that passes for new
            for path in old:
                os.utime(path, (0, 0))
        except OSError as error:
            raise BadInput(f'cannot make {self.path} ({self.flag}) anew: {error}; name another folder') from error
        with atomic_write(os.path.join(self.path, SETTINGS)) as file:
            file.write(json.dumps(self.settings, indent=1).encode())

    def _differences(self):
        try:
            before = read_settings(self.path)
        except BadInput as error:
            return [str(error)]
        if before is None:
            return [f'there is no {SETTINGS}']
        return [f'{key} was {before.get(key)}, is {self.settings.get(key)}'
                for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]


def open_folders(folders, names, resume, inputs=()):
    """Opens ResultFolders for a run over `names`. Returns the names that lack a finished file in one of them.
    Raises BadInput also where two of them, or one and a folder of `inputs`, are the same: it has one settings.json."""
    paths = [os.path.realpath(path) for path in (*(folder.path for folder in folders), *filter(None, inputs))]
    for folder in folders:
        if paths.count(os.path.realpath(folder.path)) > 1:
            raise BadInput(f'{folder.path} ({folder.flag}) is the folder of other files of this run too: name another')
    for folder in folders:
        folder.open(names, resume)
    todo = [name for name in names if not all(folder.is_finished(name) for folder in folders)]
    if len(todo) < len(names):
        print(f'{len(names) - len(todo)} of {len(names)} images are finished')
    return todo


class Errors:
    """What `--on_error` does with a bad image, and with one for which memory runs out: stop raises a BadInput, skip
    keeps it for the end. memory_help: what the user may change where memory runs out."""

    def __init__(self, on_error, memory_help):
        self.skip, self.memory_help, self.lines = on_error == 'skip', memory_help, []

    @contextlib.contextmanager
    def caught(self, name):
        """The context in which the image `name` is worked on. A disk that is full stops the run in any case."""
        try:
            yield
        except CannotWrite:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                error = BadInput(f'out of memory at the image {name}; what helps: {self.memory_help}')
            if not (self.skip and isinstance(error, BadInput)):
                raise error
            self.lines.append(str(error))

    def report(self):
        """Lists what was skipped. Returns the exit code: 3 where something was, else 0; also for a rank of torchrun,
        which would stop the other ranks."""
        for line in self.lines:
            tqdm.write(f'skipped: {line}')
        return 3 if self.lines and 'WORLD_SIZE' not in os.environ else 0


@contextlib.contextmanager
def no_more_than_a_warning(what):
    """For pictures, which must not stop an inference: whatever goes wrong is one line."""
    try:
        yield
    except Exception as error:
        tqdm.write(f'warning: {what}: {" ".join(str(error).split()) or type(error).__name__}')


def warn_of_background(shares, folder, flag):
    """Warns where the labels of a run have hardly any background, or hardly anything else: then the exponent `flag`
    does not suit the CAMs. shares: of each image, the share of its pixels that are background."""
    share = sum(shares) / max(len(shares), 1)
    if shares and not 0.05 < share < 0.97:
        change = 'lower' if share < 0.5 else 'higher'
        print(f'warning: {share:.1%} of the pixels in {folder} are background; try a {change} {flag}. Where the curve '
              'of evaluation.py has its best background score s, ln(s) / ln(1 - s) is an exponent to begin with')


class SpaceCheck:
    """Warns, once the results of the first ten images are there, where the disk will not hold those of all `names`."""

    def __init__(self, folders, names):
        self._left, self._first = len(names), len(names[:10])
        self._paths = [folder.file(name) for folder in folders for name in names[:10]]

    def count_image(self):
        """To be called after each image; its files may still be on their way."""
        self._left -= 1
        if not self._paths or not all(map(os.path.isfile, self._paths)):
            return
        need = sum(map(os.path.getsize, self._paths)) / self._first * self._left
        free = shutil.disk_usage(os.path.dirname(self._paths[0])).free
        if need > free:
            tqdm.write(f'warning: the other {self._left} images will take about {need / 2 ** 30:.1f} GiB, '
                       f'and {free / 2 ** 30:.1f} GiB are free')
        self._paths = []        # told once
