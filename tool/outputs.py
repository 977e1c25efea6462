"""Result folders of long runs: which images are finished, with which settings, and whether the disk suffices."""
import contextlib
import json
import os
import shutil

from tqdm import tqdm

from tool.cli import BadInput, CannotWrite, make_dir
from tool.files import atomic_write, file_digest

SETTINGS, JOURNAL = 'settings.json', 'finished.txt'
EXTENSIONS = '.npy', '.npz', '.png'


def read_settings(folder):
    """Returns the settings that `ResultFolder.open` wrote into a folder, or None if there are none. Raises BadInput."""
    path = os.path.join(folder, SETTINGS)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f'cannot read {path}: {error}; remove it') from error


def results_in(folder, extensions=EXTENSIONS):
    """Returns the sorted paths of all results in a folder."""
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if name.endswith(extensions) and not name.startswith('.')]


def read_journal(folder):
    """Returns a dict name -> size in bytes from its last line in a folder's journal; None for a file that a later run
    was to replace. It is empty without a journal. An incomplete last line does not count."""
    path, sizes = os.path.join(folder, JOURNAL), {}
    if os.path.isfile(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file.read().split('\n')[:-1]:
                name, _, size = line.rpartition('\t')
                sizes[name] = int(size) if size.isdecimal() else None
    return sizes


def warn_of_older_files(folder, names, flag):
    """Warns if a folder has a journal without some of these files: its last run, perhaps one with other settings, has
    not replaced them. A file that was changed by hand keeps its line, so it does not count."""
    sizes = read_journal(folder)
    older = [name for name in names if sizes.get(name) is None]
    if sizes and older:
        print(f'warning: {len(older):,} of {len(names):,} files in {folder} ({flag}), such as {older[0]}, have no line '
              f'in its {JOURNAL}: they may be of an earlier run with other settings')


def describe_folder(folder, flag):
    """Returns a dict that identifies the files in an input folder, for the settings of the results made from them: the
    folder's own settings, each under `flag`, or the digest of its first file if another program made it."""
    settings = read_settings(folder)
    if settings is None:
        settings = {'first file': file_digest(path) for path in results_in(folder)[:1]}
    return {f'{flag} {key}': value for key, value in settings.items()}


def check_class_names(folder, flag, class_names):
    """Raises BadInput if the settings of a folder, or those of the CAMs behind it, have other names of the classes."""
    for key, value in (read_settings(folder) or {}).items():
        if key.split()[-1:] == ['class_names'] and isinstance(value, list) and value != class_names:
            raise BadInput(f'{folder} ({flag}) was made for the {len(value)} classes {", ".join(map(str, value))}; '
                           f'--class_names has {len(class_names)}: {", ".join(class_names)}')


class ResultFolder:
    """A folder with one file per image, NAME + extension, all made with the same settings.

    settings.json contains the settings. finished.txt is the journal: each finished file adds the line "NAME<tab>BYTES".
    An image is finished if its last line has the size of its file. Lines are only added, each in one write, so several
    ranks can share the journal, and a run that is killed leaves at most one incomplete line. Files are written whole:
    one of another size was changed by somebody else, and --resume refuses to replace it.

    settings: a dict, for JSON, of everything that the files depend on: numbers and digests, not paths, because one file
    has many paths. flag: the command-line flag that named the folder.
    """

    def __init__(self, path, flag, extension, settings):
        self.path, self.flag, self.extension = path, flag, extension
        self.settings = json.loads(json.dumps(settings))        # as they are read back
        self.journal = os.path.join(path, JOURNAL)

    def file(self, name):
        return os.path.join(self.path, name + self.extension)

    @contextlib.contextmanager
    def writing(self, name):
        """The context in which the file of an image is written, to the path that it yields. If it ends well, the image
        is finished."""
        if os.path.isfile(self.file(name)):     # a run that is killed here may leave a file of another size
            self._write_journal('ab', f'{name}\tanew\n')
        yield self.file(name)
        self._write_journal('ab', f'{name}\t{os.path.getsize(self.file(name))}\n')

    def remove_outdated(self, name):
        """Removes the file of an image that is not finished. Returns its path, or None where there is no such file."""
        path = self.file(name)
        if not os.path.isfile(path) or name in self.finished():
            return None
        try:
            os.unlink(path)
        except OSError as error:
            raise CannotWrite(f'cannot remove {path} ({self.flag}): {error.strerror}') from error
        return path

    def finished(self):
        """Returns the set of the names of finished images."""
        return {name for name, size in read_journal(self.path).items()
                if os.path.isfile(self.file(name)) and os.path.getsize(self.file(name)) == size}

    def open(self, names, resume):
        """Prepares the folder for a run over these images, and creates it if needed. With `resume`, finished files
        stay; raises BadInput if they have other or unknown settings. Without it, none of these images counts as
        finished any more; their old files can be read until the new ones replace them."""
        make_dir(self.path, self.flag)
        differences = '; '.join(self._differences()) if results_in(self.path, (*EXTENSIONS, self.extension)) else ''
        if differences and resume:
            raise BadInput(f'{self.path} ({self.flag}) was made with other or unknown settings: {differences}. Name '
                           'another folder, or leave --resume out to overwrite it')
        sizes, kept = read_journal(self.path), self.finished() if resume else set()
        changed = [self.file(name) for name in names if resume and name not in kept and sizes.get(name) is not None
                   and os.path.isfile(self.file(name)) and os.path.getsize(self.file(name))]    # a crash empties files
        if changed:
            raise BadInput(f'{self.path} ({self.flag}): {len(changed):,} of {len(names):,} files were changed since '
                           f'they were written, such as {", ".join(changed[:3])}. Move them to another folder, or '
                           'leave --resume out to overwrite them')
        # the journal first, then the settings: if the run is killed here, no old file counts as a new one
        if differences:
            print(f'warning: {self.path} ({self.flag}) has results of other settings, which this run overwrites one by '
                  f'one: {differences}')
            self._write_journal('wb', '')
        # the blank ends an incomplete line so that it never counts; other images in the journal may be another rank's
        outdated = sizes.keys() & set(names) - kept
        self._write_journal('ab', ' \n' + ''.join(f'{name}\tanew\n' for name in sorted(outdated)))
        with atomic_write(os.path.join(self.path, SETTINGS)) as file:
            file.write(json.dumps(self.settings, indent=1).encode())

    def _write_journal(self, mode, text):
        try:
            with open(self.journal, mode) as file:
                file.write(text.encode())
        except OSError as error:
            raise CannotWrite(f'cannot write {self.journal} ({self.flag}): {error.strerror}') from error

    def _differences(self):
        try:
            before = read_settings(self.path)
        except BadInput as error:
            return [str(error)]
        if before is None or not os.path.isfile(self.journal):
            return [f'there is no {SETTINGS if before is None else JOURNAL}']
        return [f'{key} was {before.get(key)}, is {self.settings.get(key)}'
                for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]


def open_folders(folders, names, resume, inputs=(), vis_dir=None):
    """Opens ResultFolders for a run over `names`, and creates `vis_dir`, the folder of pictures, unless it is None.
    Returns the names that lack a finished file in one of the ResultFolders. inputs: folders whose files the run must
    not overwrite; None is ignored. Raises BadInput, also if a folder is among `inputs` or is that of two outputs."""
    taken = {os.path.realpath(path) for path in inputs if path}
    pictures = [(vis_dir, '--vis_dir')] if vis_dir else []
    for path, flag in [*pictures, *((folder.path, folder.flag) for folder in folders)]:
        if os.path.realpath(path) in taken:
            raise BadInput(f'{path} ({flag}) is also the folder of other files of this run: name another')
        if flag != '--vis_dir':             # pictures may lie beside results of this run: extensions differ
            taken.add(os.path.realpath(path))
    for path, flag in pictures:
        make_dir(path, flag)
    for folder in folders:
        folder.open(names, resume)
    finished = set.intersection(*(folder.finished() for folder in folders))
    todo = [name for name in names if name not in finished]
    if len(todo) < len(names):
        print(f'{len(names) - len(todo)} of {len(names)} images are finished')
    return todo


def warn_of_background(shares, folder, flag):
    """Warns if the labels of a run have hardly any background, or hardly anything else, because then the exponent
    `flag` does not fit the CAMs. shares: for each image, the share of background among its pixels; None for an image
    without any class, which does not count."""
    shares = [share for share in shares if share is not None]
    share = sum(shares) / max(len(shares), 1)
    if shares and not 0.05 < share < 0.97:
        change = 'lower' if share < 0.5 else 'higher'
        print(f'warning: {share:.1%} of the pixels in {folder} are background; try a {change} {flag}. Where the curve '
              'of evaluation.py has its best background score s, start with the exponent ln(s) / ln(1 - s); with '
              f'tool/label_photos.py, try a {"higher" if share < 0.5 else "lower"} --t')


class SpaceCheck:
    """Warns, after the first ten images, if the disk is too small for the results of all `names`."""

    def __init__(self, folders, names):
        self._left, self._first = len(names), len(names[:10])
        self._paths = [folder.file(name) for folder in folders for name in names[:10]]

    def count_image(self):
        """Call it after each image. Its files may be written later, by a worker process."""
        self._left -= 1
        if not self._paths or not all(map(os.path.isfile, self._paths)):
            return
        need = sum(map(os.path.getsize, self._paths)) / self._first * self._left
        free = shutil.disk_usage(os.path.dirname(self._paths[0])).free
        if need > free:
            tqdm.write(f'warning: the results of the other {self._left} images need about {need / 2 ** 30:.1f} GiB, '
                       f'but only {free / 2 ** 30:.1f} GiB are free')
        self._paths = []        # warns once
