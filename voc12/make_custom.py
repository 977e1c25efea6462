"""Makes a data root in VOC's layout from a folder of images and a CSV file of image-level labels.

    python voc12/make_custom.py --images photos --labels labels.csv --out mydata

The CSV file is UTF-8. Its fields are separated by tabs, commas or semicolons: the first of these three that its first
line has. A row is an image, by its path in --images with or without extension, and its classes, in one of two forms:

    names     cat1.jpg,cat,dog      a class in a field, or several, separated by ; or |
    one-hot   image,cat,dog         a header with the class names, and below it alone 1 or 0, True or False, yes or no,
              cat1.jpg,1,1          their first letters, x or nothing (also - or NaN), in any capitals

A first line that does not begin with the path of an image is a header. Where it names columns label, class, category,
tag or the like, classes are read from these alone; --label_columns names other ones. The classes of all rows of an
image add up. An image whose fields are empty (`sky.jpg,`) or all 0 shows none of the classes. An image without a row is
not used.

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
import sys
import unicodedata

import numpy as np

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, check_dir, check_range, exit_on_bad_input
from tool.image_files import IGNORE
from voc12.data_root import EXTENSIONS, check_out, name_images, write_root
from voc12.lists import (GT_FOLDER, IMG_FOLDER, LIST_FOLDER, check_class_names, common_classes, join_first,
                         load_class_names, read_lines)

MARKER = 'CUSTOM.txt'              # tells a folder of ours from others
ENDINGS = EXTENSIONS + tuple(map(str.upper, EXTENSIONS))
YES = {'1', 'true', 'yes', 'on', 'y', 't', 'x', '✓', '✔', '☑'}      # values of the one-hot form, in lower case
NO = {'', '0', 'false', 'no', 'off', 'n', 'f', '-', 'nan', 'na', 'n/a', 'none', 'null', '✗', '✘', '☐'}
# what a column of classes is called, letters alone, in lower case
LABEL_COLUMN = re.compile('(?:image|img|gt|true)?(label|class|categor|tag|choice|species|breed|target)'
                          '(?:s|es|y|ies|name|names)*')
# what a column of 1 and 0 is called that is no class
NO_CLASS_COLUMN = re.compile(r'split|(sub)?set|fold|verified|reviewed|checked|is\W*_?(train|val|valid|test)\w*|'
                             r'(.*[\W_])?(id|index)|unnamed.*')
SPLITS = {'val', 'valid', 'validation', 'test', 'testing', 'training', 'trainval'}
IN_NAMES = set("_-.'’()")          # of the marks and symbols of Unicode, those that names of classes have


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the images, sub-folders included')
    parser.add_argument('--labels', required=True, metavar='CSV', help='image-level labels, see above')
    parser.add_argument('--out', required=True, metavar='ROOT',
                        help='folder to write: new, empty, or made by this script before')
    parser.add_argument('--masks', metavar='DIR',
                        help='folder of ground truth, for evaluation alone: PNGs of class indices (0 background, '
                             f'{IGNORE} ignored) named as the images, in the same sub-folders or none; some may lack')
    parser.add_argument('--val_share', default=0.2, type=float,
                        help='share of the images in val.txt, 0 to 0.9; 0 writes no val.txt. The last image of a class '
                             'stays in train (default: %(default)s)')
    parser.add_argument('--seed', default=0, type=int, help='of the split (default: %(default)s)')
    parser.add_argument('--class_names', metavar='FILE',
                        help='foreground classes, one a line (default: those of --labels, sorted)')
    parser.add_argument('--label_columns', nargs='+', metavar='NAME',
                        help='columns of the header that hold the classes; the others are not read')
    parser.add_argument('--copy', action='store_true', help='copy images and masks in place of links to them')
    return parser


# ----- reading -----

def find_image(images, field):
    """Path, relative to the folder `images`, of the image that a row names, or None. The row may leave out the
    extension, or write it in other capitals. Raises BadInput for an image outside of the folder, and where several
    images have the name."""
    path = os.path.join(images, field.replace('\\', '/'))        # an absolute field stays what it is
    stem, extension = os.path.splitext(path)
    for tries in [path], [stem + extension.lower(), stem + extension.upper()], [path + ending for ending in ENDINGS]:
        # by their numbers on the disk: where capitals do not count, two of these are one file
        found = {os.stat(file).st_ino: file for file in filter(os.path.isfile, tries)}
        if len(found) > 1:
            files = ', '.join(map(os.path.basename, found.values()))
            raise BadInput(f'"{field}" (--labels) is the name of several files in {images} (--images): {files}; write '
                           'the extension')
        if found:
            break
    else:
        return None
    folder, file = os.path.split(*found.values())
    for resolve in (os.path.abspath, os.path.realpath):          # links in `images` may lead out of it
        inner = os.path.relpath(resolve(folder), resolve(images))
        if inner.split(os.sep)[0] != os.pardir:
            return os.path.normpath(os.path.join(inner, file))
    raise BadInput(f'"{field}" (--labels) is not in the folder {images} (--images)')


def read_rows(path):
    """Rows of a CSV file that are not blank: list of (file and line for messages, fields)."""
    lines = read_lines(path, '--labels')
    first = next((line for line in lines if line.strip()), '')
    delimiter = next((char for char in '\t,;' if char in first), ',')
    reader = csv.reader((line + '\n' for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        rows = [(f'{path} (--labels), line {reader.line_num}', [field.strip() for field in row]) for row in reader]
    except csv.Error as error:
        raise BadInput(f'{path} (--labels), line {reader.line_num}: {error}') from error
    return [(where, fields) for where, fields in rows if any(fields)]


def read_bit(value):
    """Whether a value of the one-hot form means yes; None for text that is none of the usual spellings."""
    text = value.casefold()
    try:
        text = f'{float(text.replace(",", ".")):g}'              # 1.0 and 1,00 are 1
    except ValueError:
        pass
    return text in YES if text in YES | NO else None


def label_kind(column):
    """'label', 'class' or the like where the name of a column says that it holds classes, else ''."""
    match = LABEL_COLUMN.fullmatch(''.join(filter(str.isalpha, column.casefold())))
    return match[1] if match else ''


def find_label_columns(header, wanted, source):
    """Indices of the columns that --label_columns (wanted) names, else of those whose name says that they hold classes,
    else of all but the first. header: list of its fields. source: the file, for messages. Raises BadInput for a column
    that the header lacks, and where it has columns of classes of several kinds."""
    if wanted:
        other = [name for name in wanted if name not in header[1:]]
        if other:
            raise BadInput(f'{source} has no column "{other[0]}" (--label_columns); it has '
                           + (', '.join(header[1:]) or 'no header'))
        return [i for i, name in enumerate(header) if i and name in wanted]
    kinds = {i: label_kind(name) for i, name in enumerate(header) if i and label_kind(name)}
    if len(set(kinds.values())) > 1:
        raise BadInput(f'{source} has the columns {", ".join(header[i] for i in kinds)}; say which hold the classes '
                       '(--label_columns)')
    return list(kinds or range(1, len(header)))


def is_one_hot(values, columns, wanted, source):
    """Whether the values (set of str, lower case) of a CSV file are those of the one-hot form. columns: the header's
    names for them, or []. wanted: whether --label_columns named these. source: the file, for messages.
    Raises BadInput where it cannot be told."""
    named = sorted(values - {''})
    bits = [value for value in named if read_bit(value) is not None]
    others = [value for value in named if read_bit(value) is None]
    letters_alone = all(len(value) == 1 and value.isalpha() for value in bits)         # these may be classes
    if bits and not others:
        if not columns or '' in columns or len(set(columns)) < len(columns):
            raise BadInput(f'{source} has values such as "{bits[0]}" alone, so its first line must be a header that '
                           'names a class for every column, each once')
        if letters_alone and len(set(map(read_bit, bits))) < len(bits):
            raise BadInput(f'{source} has the values {", ".join(bits)}: classes, or yes and no? Write 1 and 0, or '
                           'longer names of the classes')
        odd = [name for name in columns if label_kind(name) or NO_CLASS_COLUMN.fullmatch(name.casefold())]
        if odd and not wanted:
            raise BadInput(f'{source} has values such as "{bits[0]}" below "{odd[0]}", which is hardly a class: write '
                           'the names of the classes, or name their columns (--label_columns)')
        return True
    if bits and (not letters_alone or len(columns) > 1):
        raise BadInput(f'{source} has "{others[0]}" beside "{bits[0]}", a yes or no of the one-hot form, which has '
                       'these alone: name the columns of the classes (--label_columns), and leave the field of an '
                       'image without any empty')
    if named and len(columns) > 1 and not (wanted or all(map(label_kind, columns))):
        raise BadInput(f'{source} has a header and values such as "{others[0]}": name the columns that hold classes '
                       f'(--label_columns), of {", ".join(columns)}; or write 1 and 0 below the names of classes; or '
                       'delete the header if all hold classes')
    return False


def check_spelling(names, source):
    """Raises BadInput for names (set of str) that look like numbers, several classes in one field, values of another
    column, or one class in two spellings: where they are meant so, --class_names lists them. Prints names with blanks.
    """
    cure = 'write ; or | between the classes of an image, or list all names as they are in --class_names'
    by_lower_case = {name.casefold(): name for name in sorted(names)}
    by_word = {}
    for name in sorted(names):
        lower = name.casefold()
        parts = re.split(r"[\s_.()'’-]+", lower)
        if re.fullmatch(r'[\W\d_]*(e[-+]?\d+)?', lower):
            raise BadInput(f'{source} has the number {name} for a class: write names, or list the classes in '
                           '--class_names')
        if by_lower_case[lower] != name:
            raise BadInput(f'{source} has the classes "{name}" and "{by_lower_case[lower]}": write one as the other, '
                           'or list both in --class_names')
        if lower in SPLITS:
            raise BadInput(f'{source} has the class {name}, as in a column that splits the images: delete that column, '
                           'or write a header and --label_columns')
        marks = [char for char in name if unicodedata.category(char)[0] in 'PS' and char not in IN_NAMES]
        if marks or {'and', 'or'} & set(parts):
            raise BadInput(f'{source} has the class "{name}", which looks like several, or like no class: {cure}')
        others = ([by_lower_case[part] for part in parts if part in by_lower_case and part != lower]
                  + [by_word[word] for word in lower.split() if by_word.setdefault(word, name) != name])
        if others:
            raise BadInput(f'{source} has the classes "{name}" and "{others[0]}", which share a word: {cure}')
    blanks = [name for name in sorted(names) if ' ' in name]
    if blanks:
        print(f'{len(blanks)} classes have a blank in their name: {join_first(blanks)}; if these are several classes, '
              'write ; or | between them')


def read_labels(args):
    """Reads the CSV file: (dict relative image path -> set of class names, class names of a one-hot header or [])."""
    rows, header, source = read_rows(args.labels), [], f'{args.labels} (--labels)'
    if not rows:
        raise BadInput(f'{source} has no rows')
    first = rows[0][1][0]
    if not first.lower().endswith(EXTENSIONS) and find_image(args.images, first) is None:
        print(f'{args.labels}: the first line is a header, since {args.images} has no image "{first}"')
        header = [' '.join(field.split()) for field in rows.pop(0)[1]]
        while header and not header[-1]:
            header.pop()
    if not rows:
        raise BadInput(f'{source} has no rows below its header')
    paths = [find_image(args.images, fields[0]) for _, fields in rows]
    missing = [f'"{fields[0]}": {where}' for path, (where, fields) in zip(paths, rows) if path is None]
    if missing:
        raise BadInput(f'{len(missing)} rows name images that are not in {args.images} (--images), the first is '
                       f'{missing[0]}; the first column holds the images')

    indices = find_label_columns(header, args.label_columns, source)
    columns = [header[i] for i in indices]
    rest = [name or '(no name)' for i, name in enumerate(header) if i and i not in indices]
    if rest:
        print(f'{args.labels}: classes are in {", ".join(columns)}; not read: {", ".join(rest)}')
    values = [pick_values(where, fields, header, indices) for where, fields in rows]
    one_hot = is_one_hot({value.casefold() for found in values for value in found}, columns,
                         bool(args.label_columns), source)
    labels = {}
    for path, (where, _), found in zip(paths, rows, values):
        if one_hot and len(found) != len(columns):
            raise BadInput(f'{where}: {len(found)} values, but the header names {len(columns)} classes')
        if one_hot:
            classes = {name for name, value in zip(columns, found) if read_bit(value)}
        else:
            names = re.split('[;|]', '|'.join(found))
            classes = {' '.join(name.split()) for name in names} - {''}         # as load_class_names reads them
        labels.setdefault(path, set()).update(classes)
    if not any(labels.values()):
        raise BadInput(f'{source}: no image shows a class')
    if not one_hot and not args.class_names:
        check_spelling(set().union(*labels.values()), source)
    return labels, columns if one_hot else []


def pick_values(where, fields, header, indices):
    """The fields of a row that hold classes; without a header all but the first. Those behind the last column of the
    header belong to it. Raises BadInput for a row without such a field, and for more fields than a header that ends
    with another column has."""
    found = [fields[i] for i in indices if i < len(fields)] if header else fields[1:]
    extra = fields[len(header):] if header else []
    if not found:
        raise BadInput(f'{where}: "{fields[0]}" has no field for its classes; write "{fields[0]}," for an image that '
                       'shows none of them, or take it out')
    if any(extra) and len(header) - 1 not in indices:
        raise BadInput(f'{where}: {len(fields)} fields, but the header has {len(header)}')
    return found + [field for field in extra if field]


def choose_classes(used, args):
    """List of the class names, in the order of their indices. used: set of those in the CSV file."""
    if not args.class_names:
        check_class_names(sorted(used), f'{args.labels} (--labels)')
        return sorted(used)
    classes = load_class_names(args.class_names)
    other = sorted(used - set(classes))
    if other:
        raise BadInput(f'{args.labels} (--labels) has {len(other)} classes that are not in {args.class_names} '
                       f'(--class_names), the first is "{other[0]}"')
    return classes


def find_masks(args, names):
    """dict NAME -> path of its mask in --masks, for the images that have one. names: dict NAME -> image path.
    Raises BadInput where no image has one, and for a mask that is the image itself."""
    masks = {}
    for name, path in names.items():
        stems = [os.path.join(args.masks, os.path.splitext(inner)[0]) for inner in (path, os.path.basename(path))]
        mask = next(filter(os.path.isfile, (stem + end for stem in stems for end in ('.png', '.PNG'))), None)
        if mask and filecmp.cmp(mask, os.path.join(args.images, path), shallow=False):
            raise BadInput(f'{mask} (--masks) is the image {path} itself, not its mask')
        if mask:
            masks[name] = mask
    if not masks:
        raise BadInput(f'no file of {args.masks} (--masks) is the mask of an image; they have the names of the images, '
                       'with .png')
    return masks


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
    names = name_images(found, f'{args.images} (--images)')
    masks = find_masks(args, names) if args.masks else {}
    files = {os.path.join(IMG_FOLDER, name + '.jpg'): os.path.join(args.images, path) for name, path in names.items()}
    files |= {os.path.join(GT_FOLDER, name + '.png'): path for name, path in masks.items()}
    labels = {name: np.array([c in found[path] for c in class_names], np.float32) for name, path in names.items()}
    train, val = split_names(labels, args.val_share, args.seed)

    write_root(args.out, MARKER, files, labels, class_names, {'train': train, 'val': val}, args.copy)
    negatives = [image for image, label in labels.items() if not label.any()]
    if negatives:
        print(f'{len(negatives)} of {len(labels)} images show none of the classes: {join_first(negatives)}')
    print(f'{"images per class":24}{"train":>8}{"without":>9}{"val":>8}{"without":>9}')
    for c, name in enumerate(class_names):
        counts = [int(sum(labels[image][c] for image in images)) for images in (train, val)]
        print(f'{name:24}{counts[0]:8}{len(train) - counts[0]:9}{counts[1]:8}{len(val) - counts[1]:9}')
    for what, names_of in (('all', labels), ('with a mask', masks)):
        print(f'{what:24}' + f'{"":9}'.join(f'{len(names_of.keys() & set(images)):8}' for images in (train, val)))
    common = common_classes({name: labels[name] for name in train}, class_names)
    if common:
        print(f'warning: every image of train.txt shows {", ".join(common)}, so it cannot be learned: add images '
              'without it, with an empty field for their classes (sky.jpg,)')
    path = os.path.join(args.out, LIST_FOLDER, 'train.txt')
    flags = shlex.join(['--voc12_root', args.out, '--cls_labels', os.path.join(args.out, 'cls_labels.npy'),
                        '--class_names', os.path.join(args.out, 'class_names.txt')])
    print(f'next: python voc12/check.py --list {shlex.quote(path)} {flags}\n'
          f'then: python train_SEAM.py --train_list {shlex.quote(path)} {flags}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
