"""Makes a data root in VOC's layout from a folder of images and a CSV file of image-level labels.

    python voc12/make_custom.py --images photos --labels labels.csv --out mydata

The CSV file is UTF-8. Its fields are separated by tabs, commas or semicolons: the first of these three that its first
line has. A row is an image, by its path in --images with or without extension, and its classes, in one of two forms:

    names     cat1.jpg,cat,dog      a class in a field, or several, separated by ; or |
    one-hot   image,cat,dog         a header with the class names, and below it 0 (or nothing) and 1 alone
              cat1.jpg,1,1

A first line whose image does not exist is a header. The classes of all rows of an image add up.

JPEGImages/NAME.jpg is a link to the image, whatever its format, since all readers go by the content. NAME, by which
lists and results go, is the image's file name without extension, with _ for blanks, dots and the like.
"""
import argparse
import csv
import filecmp
import os
import random
import re
import shlex
import shutil
import sys

import numpy as np
from tqdm import tqdm

# `python voc12/make_custom.py` puts voc12/ on the path, not the repository root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, check_dir, check_range, exit_on_bad_input, make_dir
from tool.files import atomic_write
from tool.image_files import IGNORE
from voc12.lists import GT_FOLDER, IMG_FOLDER, load_class_names, read_lines

LIST_FOLDER = os.path.join('ImageSets', 'Segmentation')
MARKER = 'CUSTOM.txt'              # tells a folder of ours from others
EXTENSIONS = ('.jpg', '.JPG', '.jpeg', '.JPEG', '.png', '.PNG', '.bmp', '.gif', '.tif', '.tiff', '.webp')
BITS = {'': False, '0': False, '0.0': False, '1': True, '1.0': True}      # values of the one-hot form


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the images, sub-folders included')
    parser.add_argument('--labels', required=True, metavar='CSV', help='image-level labels, see above')
    parser.add_argument('--out', required=True, metavar='ROOT',
                        help='folder to write, the --voc12_root of the other scripts: new, empty, or made by this '
                             'script before')
    parser.add_argument('--masks', metavar='DIR',
                        help='folder of ground truth, for evaluation alone: PNGs at the paths of the images, with '
                             f'class indices, 0 background, 1..C, {IGNORE} ignored; images may lack one')
    parser.add_argument('--val_share', default=0.2, type=float,
                        help='share of the images in val.txt, 0 to 0.9; 0 writes no val.txt. The last image of a class '
                             'stays in train (default: %(default)s)')
    parser.add_argument('--seed', default=0, type=int, help='of the split (default: %(default)s)')
    parser.add_argument('--class_names', metavar='FILE',
                        help='names of the foreground classes, one a line, in the order of their indices; without it '
                             'the classes of --labels, sorted')
    parser.add_argument('--copy', action='store_true',
                        help='copy images and masks, so that ROOT can be moved elsewhere without them')
    return parser


# ----- reading -----

def find_image(images, field):
    """Path, relative to the folder `images`, of the image that a row names, or None."""
    for extension in ('', *EXTENSIONS):
        if os.path.isfile(os.path.join(images, field + extension)):
            return os.path.normpath(field + extension)
    return None


def read_rows(path):
    """Rows of a CSV file that are not blank: list of (file and line for messages, fields)."""
    lines = read_lines(path, '--labels')
    first = next((line for line in lines if line.strip()), '')
    delimiter = next((char for char in '\t,;' if char in first), ',')
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        rows = [(f'{path} (--labels), line {reader.line_num}', [field.strip() for field in row]) for row in reader]
    except csv.Error as error:
        raise BadInput(f'{path} (--labels), line {reader.line_num}: {error}') from error
    return [(where, fields) for where, fields in rows if any(fields)]


def tidy(name):
    """A class name as load_class_names reads it."""
    return ' '.join(name.split())


def read_labels(args):
    """Reads the CSV file: (dict relative image path -> set of class names, class names of a one-hot header or [])."""
    rows, header = read_rows(args.labels), []
    if rows and find_image(args.images, rows[0][1][0]) is None:
        header = [tidy(field) for field in rows.pop(0)[1]]
        print(f'{args.labels}: the first line is a header, since {args.images} has no image "{header[0]}"')
    if not rows:
        raise BadInput(f'{args.labels} (--labels) has no rows')
    values = {value for _, (_, *values) in rows for value in values} - {''}
    one_hot = bool(values) and values <= set(BITS)
    columns = header[1:] if one_hot else []
    if one_hot and (not columns or '' in columns or len(set(columns)) < len(columns)):
        raise BadInput(f'{args.labels} (--labels) has values 0 and 1 alone, so its first line must be a header that '
                       'names a class for every column, each once')
    if not one_hot and values & set(BITS):
        raise BadInput(f'{args.labels} (--labels) has "{max(values - set(BITS))}" beside values 0 and 1, which the '
                       'one-hot form has alone, and which no class may be called')
    labels, missing = {}, []
    for where, (field, *values) in rows:
        if one_hot and len(values) != len(columns):
            raise BadInput(f'{where}: {len(values)} values, but the header names {len(columns)} classes')
        if one_hot:
            classes = {name for name, value in zip(columns, values) if BITS[value]}
        else:
            classes = {tidy(name) for value in values for name in re.split('[;|]', value)} - {''}
        if not classes:
            raise BadInput(f'{where}: {field} has no class; an image without any cannot be trained on, take it out')
        path = find_image(args.images, field)
        if path is None:
            missing.append(f'"{field}": {where}')
        else:
            labels.setdefault(path, set()).update(classes)
    if missing:
        raise BadInput(f'{len(missing)} rows name images that are not in {args.images} (--images), the first is '
                       f'{missing[0]}')
    return labels, columns


def choose_classes(used, args):
    """List of the class names, in the order of their indices. used: set of those in the CSV file."""
    if args.class_names:
        classes = load_class_names(args.class_names)
        other = sorted(used - set(classes))
        if other:
            raise BadInput(f'{args.labels} (--labels) has {len(other)} classes that are not in {args.class_names} '
                           f'(--class_names), the first is "{other[0]}"')
        return classes
    if len(used) >= IGNORE or 'background' in used:
        raise BadInput(f'{args.labels} (--labels) has {len(used)} classes; 1 to {IGNORE - 1} are possible, and none '
                       'may be called background')
    return sorted(used)


def name_images(paths):
    """dict NAME -> relative image path, sorted by NAME. Raises BadInput for two images of one NAME."""
    names = {}
    for path in sorted(paths):
        name = re.sub(r'[^\w-]', '_', os.path.splitext(os.path.basename(path))[0])
        if name in names:
            raise BadInput(f'{names[name]} and {path} (--images) would both be the image {name}; rename one')
        names[name] = path
    return dict(sorted(names.items()))


def split_names(labels, val_share, seed):
    """(train, val), sorted lists of the names of `labels`: dict name -> float32 (C,) multi-hot.
    val gets the share, rounded, but never the last image of a class, so train has every class."""
    left = np.sum(list(labels.values()), axis=0)                 # (C,) images of each class in train
    names, val = sorted(labels), set()
    random.Random(seed).shuffle(names)
    for name in names:
        if len(val) < round(val_share * len(names)) and (left[labels[name] > 0] > 1).all():
            val.add(name)
            left = left - labels[name]
    return sorted(set(names) - val), sorted(val)


# ----- writing, for make_coco.py too -----

def check_out(out, marker):
    """Raises BadInput unless the folder `out` is new, empty, or one of ours, which has the file `marker`."""
    if os.path.isdir(out) and os.listdir(out) and not os.path.isfile(os.path.join(out, marker)):
        raise BadInput(f'{out} was not made by this script; name an empty or new folder (--out)')


def write_lines(path, lines):
    with atomic_write(path) as file:
        file.write(''.join(line + '\n' for line in lines).encode('utf-8'))


def place_file(source, target, copy):
    """Makes `target` a link to the file `source`, or a copy where that is asked for or links are not possible.
    An older link is replaced. Raises BadInput for another file in the way, which may be the user's."""
    if os.path.islink(target):
        os.unlink(target)
    elif os.path.exists(target):
        if not filecmp.cmp(source, target, shallow=False):
            raise BadInput(f'{target} (--out) is no copy of {source}; move it away, or name another folder')
        return
    if not copy:
        try:
            os.symlink(os.path.abspath(source), target)
            return
        except OSError:
            pass                   # a file system or an account that has no links
    with open(source, 'rb') as original, atomic_write(target) as file:
        shutil.copyfileobj(original, file)


def write_root(out, marker, files, labels, class_names, lists, copy=False):
    """Writes a data root, the lists last. Images and masks of earlier runs that no list names any more stay.

    files: dict path in `out` -> path of the file to link to. labels: dict NAME -> float32 (C,). lists: dict 'train' or
    'val' -> names; an empty list is not written.
    """
    for folder in sorted({LIST_FOLDER, *map(os.path.dirname, files)}):
        make_dir(os.path.join(out, folder), '--out')
    write_lines(os.path.join(out, marker), [f'made by voc12/{os.path.basename(sys.argv[0])}'])
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


def main(args):
    check_range(args, 0, 0.9, 'val_share')
    folders = {'--images': args.images} | ({'--masks': args.masks} if args.masks else {})
    for flag, folder in folders.items():
        check_dir(folder, flag)
        if (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(args.out) + os.sep):
            raise BadInput(f'{folder} ({flag}) lies in {args.out} (--out); name another folder to write')
    check_out(args.out, MARKER)
    found, columns = read_labels(args)
    class_names = choose_classes(set().union(columns, *found.values()), args)
    names = name_images(found)
    files = {os.path.join(IMG_FOLDER, name + '.jpg'): os.path.join(args.images, path) for name, path in names.items()}
    masks = {name: os.path.join(args.masks, os.path.splitext(path)[0] + '.png')
             for name, path in names.items()} if args.masks else {}
    masks = {name: path for name, path in masks.items() if os.path.isfile(path)}
    if args.masks and not masks:
        raise BadInput(f'no file of {args.masks} (--masks) is the mask of an image; they have the paths of the images, '
                       'with .png')
    files.update({os.path.join(GT_FOLDER, name + '.png'): path for name, path in masks.items()})
    labels = {name: np.array([c in found[path] for c in class_names], np.float32) for name, path in names.items()}
    lists = dict(zip(('train', 'val'), split_names(labels, args.val_share, args.seed)))

    write_root(args.out, MARKER, files, labels, class_names, lists, args.copy)
    rows = [(name, [int(sum(labels[image][c] for image in images)) for images in lists.values()])
            for c, name in enumerate(class_names)]
    rows += [('all', [len(images) for images in lists.values()]),
             ('with a mask', [len(masks.keys() & set(images)) for images in lists.values()])]
    for name, counts in [('images per class', lists), *rows]:
        print(f'{name:24}' + ''.join(f'{count:>8}' for count in counts))
    path = os.path.join(args.out, LIST_FOLDER, 'train.txt')
    flags = shlex.join(['--voc12_root', args.out, '--cls_labels', os.path.join(args.out, 'cls_labels.npy'),
                        '--class_names', os.path.join(args.out, 'class_names.txt')])
    print(f'next: python voc12/check.py --list {shlex.quote(path)} {flags}\n'
          f'then: python train_SEAM.py --train_list {shlex.quote(path)} {flags}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
