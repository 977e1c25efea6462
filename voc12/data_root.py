"""Finds and names images, and writes a data root of VOC's layout."""
import collections
import contextlib
import filecmp
import os
import pathlib
import re
import shutil
import sys
import unicodedata

import numpy as np
from tqdm import tqdm

from tool.cli import BadInput, check_file, make_dir
from tool.files import atomic_write
from tool.outputs import JOURNAL, SETTINGS
from voc12.lists import GT_FOLDER, LIST_FOLDER, join_first

# of images, in any capitals
EXTENSIONS = ('.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm')


def name_images(paths, source):
    """Returns a dict NAME -> image path, sorted by NAME: the file name without extension, with _ for blanks, dots and
    the like. source: flag that named the paths, for the message. Raises BadInput if two images have one NAME."""
    names = {}
    for path in sorted(paths):
        stem = os.path.splitext(os.path.basename(path))[0]
        name = re.sub(r'[^\w-]', '_', unicodedata.normalize('NFC', stem))       # NFD has accents as characters
        if name in names:
            raise BadInput(f'{source}: {names[name]} and {path} would both be the image {name}; rename one')
        names[name] = path
    return dict(sorted(names.items()))


def images_in(folder, leave_out=()):
    """Returns the paths of all images in a folder and its sub-folders, which may be links, and prints how many other
    files there are. Leaves out hidden files and folders, sub-folders with results, and the folders `leave_out`."""
    found, others = [], collections.Counter()
    seen = set(map(os.path.realpath, leave_out))        # each folder once: a link may lead back to one above it
    for inner, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(inner) in seen or (inner != folder and {SETTINGS, JOURNAL} <= set(names)):
            folders.clear()
            continue
        seen.add(os.path.realpath(inner))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.'):
                found.append(os.path.normpath(os.path.join(inner, name)))
            elif not name.startswith('.'):
                others[os.path.splitext(name)[1] or name] += 1
    if others:
        print(f'{sum(others.values()):,} other files in {folder} are not read as images: '
              + join_first([f'{ending} ({count:,})' for ending, count in others.most_common()]))
    return found


def find_images(paths):
    """Finds the images of the --images flag: files, and folders with their sub-folders.
    Returns (dict NAME -> path, see `name_images`; the innermost folder that contains all of `paths`).
    Raises BadInput for a path that does not exist and for a folder without images."""
    files = []
    for path in paths:
        if not os.path.isdir(path):
            check_file(path, '--images')
            files.append(os.path.normpath(path))
            continue
        found = images_in(path)
        if not found:
            raise BadInput(f'{path} (--images) has no images; their names end in {", ".join(EXTENSIONS)}')
        files += found
    folders = [os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path) or '.') for path in paths]
    return name_images(set(files), '--images'), os.path.commonpath(folders)


def check_out(out, marker):
    """Raises BadInput unless the folder `out` is new, empty, or made by this script, which leaves the file `marker`."""
    if os.path.isdir(out) and os.listdir(out) and not os.path.isfile(os.path.join(out, marker)):
        raise BadInput(f'{out} was not made by this script; name an empty or new folder (--out)')


def write_lines(path, lines):
    with atomic_write(path) as file:
        file.write(''.join(line + '\n' for line in lines).encode('utf-8'))


def place_file(source, target, copy):
    """Makes `target` a link to the file `source`, or a copy with `copy` or if links are not possible. Replaces an older
    link. Raises BadInput if there is another file, which may be the user's."""
    if os.path.islink(target):
        os.unlink(target)
    elif os.path.exists(target):
        if not filecmp.cmp(source, target, shallow=False):
            raise BadInput(f'{target} (--out) exists and is no copy of {source}; move it away, or name another folder')
        return
    if not copy:
        with contextlib.suppress(OSError):         # a file system or an account may have no links
            os.symlink(os.path.abspath(source), target)
            return
    with open(source, 'rb') as original, atomic_write(target) as file:
        shutil.copyfileobj(original, file)


def write_root(out, marker, files, labels, class_names, lists, copy=False):
    """Writes a data root, the lists last. Of earlier runs, images that no list names any more stay, and links to masks
    are deleted.

    files: dict path in `out` -> path of the file to link to. labels: dict NAME -> float32 (C,). lists: dict 'train' or
    'val' -> names; empty lists are not written. copy: copy the files instead of linking to them.
    """
    for folder in sorted({LIST_FOLDER, *map(os.path.dirname, files)}):
        make_dir(os.path.join(out, folder), '--out')
    write_lines(os.path.join(out, marker), [f'made by voc12/{os.path.basename(sys.argv[0])}'])
    for path in pathlib.Path(out, GT_FOLDER).glob('*'):
        if path.is_symlink() and os.path.join(GT_FOLDER, path.name) not in files:
            path.unlink()
    for target, source in tqdm(files.items(), desc='links', disable=None):
        place_file(source, os.path.join(out, target), copy)
    with atomic_write(os.path.join(out, 'cls_labels.npy')) as file:
        np.save(file, labels, allow_pickle=True)
    write_lines(os.path.join(out, 'class_names.txt'), class_names)
    for split, names in lists.items():
        path = os.path.join(out, LIST_FOLDER, split + '.txt')
        if names:
            write_lines(path, names)
        elif os.path.exists(path):
            os.unlink(path)
