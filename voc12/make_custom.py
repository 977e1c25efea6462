"""Makes a data root in VOC's layout from a folder of images and a CSV file of image-level labels.

    python voc12/make_custom.py --images photos --labels labels.csv --out mydata

The CSV file is UTF-8. Its fields are separated by tabs, commas or semicolons: the first of these three that its first
line has. A row is an image, its path in --images with or without extension, and its classes in one of two forms:

    names     cat1.jpg,cat,dog      each field is a class, or several, separated by ; or |
    one-hot   image,cat,dog         the header names the classes; below it are only 1 or 0, True or False, yes or no,
              cat1.jpg,1,1          their first letters, x or nothing (also - or NaN), in any capitals

1. A first line that does not begin with the path of an image is a header. So is one that begins without an extension
   (image,label) if all lines below have one, even if there is an image.jpg.
2. The columns of --label_columns hold classes. Without this flag they are the columns called label, class, category,
   tag or the like; if there are none, all but the first.
3. If all their fields are a yes or no, the form is one-hot. Otherwise the fields are names.
4. The classes of all rows of an image add up. An image whose fields are empty (`sky.jpg,`) or all 0 shows none of the
   classes. An image without a row is not used.
5. What could mean something else is refused: names in several columns of a header that do not say that they hold
   classes; one-hot values below a column such as label or fold; numbers, yes or no, val, and several classes in one
   field as the name of a class. --label_columns and --class_names say what is meant.

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

from tool.cli import BadInput, HelpFormatter, check_dir, check_range, exit_on_bad_input
from tool.image_files import IGNORE
from voc12.data_root import EXTENSIONS, check_out, images_in, name_images, write_root
from voc12.lists import (GT_FOLDER, IMG_FOLDER, LIST_FOLDER, check_class_names, clean_class_name, common_classes,
                         join_first, load_class_names, read_lines)

MARKER = 'CUSTOM.txt'              # tells a folder of ours from others
ENDINGS = EXTENSIONS + tuple(map(str.upper, EXTENSIONS))
YES = {'1', 'true', 'yes', 'on', 'y', 't', 'x', '✓', '✔', '☑'}      # values of the one-hot form, in lower case
NO = {'', '0', 'false', 'no', 'off', 'n', 'f', '-', 'nan', 'na', 'n/a', 'none', 'null', '✗', '✘', '☐'}
# names of columns that hold classes, letters alone, in lower case
LABEL_COLUMN = re.compile('(?:image|img|gt|true)?(label|class|categor|tag|choice|species|breed|target)'
                          '(?:s|es|y|ies|name|names)*')
# names of columns of 1 and 0 that are no classes
NO_CLASS_COLUMN = re.compile(r'split|(sub)?set|fold|verified|reviewed|checked|is\W*_?(train|val|valid|test)\w*|'
                             r'(.*[\W_])?(id|index)|unnamed.*|difficult|occluded|truncated|(is_?)?crowd|any|all|total|'
                             'count')
SPLITS = {'val', 'valid', 'validation', 'test', 'testing', 'training', 'trainval'}
IN_NAMES = set("_-.'’()")          # punctuation that names of classes may have


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the images, sub-folders included')
    parser.add_argument('--labels', required=True, metavar='CSV', help='image-level labels, see above')
    parser.add_argument('--out', required=True, metavar='ROOT',
                        help='folder to write: new, empty, or made by this script before')
    parser.add_argument('--masks', metavar='DIR',
                        help='folder of ground truth for evaluation: PNGs of class indices (0 background, '
                             f'{IGNORE} ignored) with the names of the images, in the same sub-folders or in none; '
                             'not every image needs one')
    parser.add_argument('--val_share', default=0.2, type=float,
                        help='share of the images in val.txt, 0 to 0.9; 0 writes no val.txt. The last image of a class '
                             'stays in train')
    parser.add_argument('--seed', default=0, type=int, help='seed of the random split')
    parser.add_argument('--class_names', metavar='FILE',
                        help='text file with the names of the foreground classes, one per line (default: those of '
                             '--labels, sorted)')
    parser.add_argument('--label_columns', nargs='+', metavar='NAME',
                        help='columns of the header that hold the classes; other columns are ignored')
    parser.add_argument('--copy', action='store_true', help='copy images and masks instead of making links to them')
    return parser


# ----- reading -----

def unicode_forms(path):
    """Returns a path as it is, and in the forms that a CSV file and file systems may write it: a letter and its accent
    are one character (NFC) or two (NFD, in ZIP files of a Mac)."""
    return [path, unicodedata.normalize('NFC', path), unicodedata.normalize('NFD', path)]


def find_image(images, field):
    """Returns the path, relative to the folder `images`, of the image that a row names, or None. The row may leave out
    the extension, write it in other capitals, or have another Unicode form. Raises BadInput for an image outside the
    folder, and if several images have the name."""
    paths = [os.path.join(images, form.replace('\\', '/')) for form in unicode_forms(field)]    # absolute ones stay so
    split = list(map(os.path.splitext, paths))
    for tries in (paths[:1], paths, [stem + change(extension) for stem, extension in split
                                     for change in (str.lower, str.upper)],
                  [path + ending for path in paths for ending in ENDINGS]):
        # by inode: on file systems that ignore capitals, two of these may be one file
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
    """Returns the rows of a CSV file that are not blank: list of (file and line for messages, fields)."""
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
    """Returns whether a value of the one-hot form means yes, or None for text that is neither yes nor no."""
    text = value.casefold()
    try:
        text = f'{float(text.replace(",", ".")):g}'              # 1.0 and 1,00 are 1
    except ValueError:
        pass
    return text in YES if text in YES | NO else None


def label_kind(column):
    """Returns 'label', 'class' or the like if the name of a column says that it holds classes, else ''."""
    match = LABEL_COLUMN.fullmatch(''.join(filter(str.isalpha, column.casefold())))
    return match[1] if match else ''


def choose_columns(header, wanted, source):
    """Returns the indices of the columns that hold classes: those of --label_columns (wanted), else those called label,
    class or the like, else all but the first. header: list of its fields, or []. source: the file, for messages.
    Raises BadInput if a column is missing, or if columns of several kinds may be meant."""
    unknown = [name for name in wanted if name not in header[1:]]
    if unknown:
        raise BadInput(f'{source} has no column "{unknown[0]}" (--label_columns); it has '
                       + (', '.join(header[1:]) or 'no header'))
    kinds = {name: label_kind(name) for name in header[1:] if label_kind(name)}
    if len(set(kinds.values())) > 1 and not wanted:
        raise BadInput(f'{source} has the columns {", ".join(kinds)}: name those that hold classes (--label_columns)')
    return [i for i, name in enumerate(header) if i and name in (wanted or kinds or header)]


def pick_fields(where, fields, header, indices):
    """Returns the fields of a row that hold classes: without a header all but the first. Fields beyond the header
    belong to its last column. where: file and line. Raises BadInput for too few and too many fields."""
    found = [fields[i] for i in indices if i < len(fields)] if header else fields[1:]
    beyond = [field for field in fields[len(header):] if field and header]
    if not found:
        raise BadInput(f'{where}: "{fields[0]}" has no field for its classes; write "{fields[0]}," if the image shows '
                       'none of them, or delete the line')
    if beyond and len(header) - 1 not in indices:
        raise BadInput(f'{where}: {len(fields)} fields, but the header has {len(header)}')
    return found + beyond


def read_classes(rows, header, wanted, source):
    """Applies the rules above. Returns (the set of classes of each row, class names of a one-hot header or []).
    rows: see `read_rows`; the other arguments: see `choose_columns`. Raises BadInput for what is ambiguous."""
    indices = choose_columns(header, wanted, source)
    columns = [header[i] for i in indices]
    unread = [name or '(no name)' for i, name in enumerate(header) if i and i not in indices]
    if unread:
        print(f'{source}: classes are in {", ".join(columns)}; not read: {", ".join(unread)}')
    values = [pick_fields(where, fields, header, indices) for where, fields in rows]
    texts = sorted({field.casefold() for found in values for field in found} - {''})
    bits = list(map(read_bit, texts))
    if not texts or None in bits:           # names
        if len(columns) > 1 and not wanted and not all(map(label_kind, columns)):
            example = texts[bits.index(None)] if texts else ''
            raise BadInput(f'{source} has a header and values such as "{example}". Name the columns that hold classes '
                           f'(--label_columns), of {", ".join(columns)}; or write 1 and 0 below the names of classes; '
                           'or delete the header if all columns hold classes')
        names = [re.split('[;|]', '|'.join(found)) for found in values]
        return [set(map(clean_class_name, of_row)) - {''} for of_row in names], []      # as load_class_names
    if not columns or '' in columns or len(set(columns)) < len(columns):
        raise BadInput(f'{source} has only values such as "{texts[0]}", so its first line must be a header that names '
                       'one class for every column, each once')
    if all(len(text) == 1 and text.isalpha() for text in texts) and len(set(bits)) < len(bits):
        raise BadInput(f'{source} has the values {", ".join(texts)}: are they classes, or yes and no? Write 1 and 0, '
                       'or longer names of classes')
    odd = [name for name in columns if label_kind(name) or NO_CLASS_COLUMN.fullmatch(name.casefold())]
    if odd and not wanted:
        raise BadInput(f'{source} has values such as "{texts[0]}" below "{odd[0]}", which is hardly a class: write '
                       'names of classes, or name their columns (--label_columns)')
    for (where, _), found in zip(rows, values):
        if len(found) != len(columns):
            raise BadInput(f'{where}: {len(found)} values, but the header names {len(columns)} classes')
    return [{name for name, field in zip(columns, found) if read_bit(field)} for found in values], columns


def check_spelling(names, source):
    """Raises BadInput for names (set of str) that look like numbers, yes or no, several classes in one field, a split,
    or one class in two spellings. --class_names accepts them all. Prints the names with blanks."""
    cure = 'Write ; or | between the classes of an image, or list all names as they are in --class_names'
    by_lower, by_word = {name.casefold(): name for name in sorted(names)}, {}
    for name in sorted(names):
        lower = name.casefold()
        parts = re.split(r"[\s_.()'’-]+", lower)
        marks = [char for char in name if unicodedata.category(char)[0] in 'PS' and char not in IN_NAMES]
        others = ([by_lower[part] for part in parts if part in by_lower and part != lower]
                  + [by_word[word] for word in lower.split() if by_word.setdefault(word, name) != name])
        if re.fullmatch(r'[\W\d_]*(e[-+]?\d+)?', lower) or (len(name) > 1 and read_bit(name) is not None):
            raise BadInput(f'{source} has the class "{name}", a number or a yes or no: write names, leave the field '
                           'empty for an image without any class, or name the columns of classes (--label_columns)')
        if lower in SPLITS:
            raise BadInput(f'{source} has the class "{name}", the name of a split: delete that column, or write a '
                           'header and use --label_columns')
        if by_lower[lower] != name:
            raise BadInput(f'{source} has the classes "{name}" and "{by_lower[lower]}": write them alike, or list both '
                           'in --class_names')
        if marks or {'and', 'or'} & set(parts):
            raise BadInput(f'{source} has the class "{name}", which looks like several classes or like none. {cure}')
        if others:
            raise BadInput(f'{source} has the classes "{name}" and "{others[0]}", which share a word. {cure}')
    blanks = [name for name in sorted(names) if ' ' in name]
    if blanks:
        print(f'{len(blanks)} classes have a blank in their name: {join_first(blanks)}; if these are several classes, '
              'write ; or | between them')


def read_labels(args):
    """Reads the CSV file. Returns (dict relative image path -> set of class names, class names of a one-hot header or
    [])."""
    rows, header, source = read_rows(args.labels), [], f'{args.labels} (--labels)'
    if not rows:
        raise BadInput(f'{source} has no rows')
    first, *below = [fields[0].lower().endswith(EXTENSIONS) for _, fields in rows]
    if not first and (below and all(below) or find_image(args.images, rows[0][1][0]) is None):
        print(f'{args.labels}: the first line is a header, because "{rows[0][1][0]}" is not the file name of an image')
        header = list(map(clean_class_name, rows.pop(0)[1]))
        while header and not header[-1]:
            header.pop()
    if not rows:
        raise BadInput(f'{source} has no rows below its header')
    paths = [find_image(args.images, fields[0]) for _, fields in rows]
    missing = [f'"{fields[0]}": {where}' for path, (where, fields) in zip(paths, rows) if path is None]
    if missing:
        raise BadInput(f'{len(missing)} rows name images that are not in {args.images} (--images), the first is '
                       f'{missing[0]}; the first column holds the images')
    classes, columns = read_classes(rows, header, list(map(clean_class_name, args.label_columns or [])), source)
    if not any(classes):
        raise BadInput(f'{source}: no image shows a class')
    if not columns and not args.class_names:
        check_spelling(set().union(*classes), source)
    labels = {path: set() for path in paths}
    for path, of_row in zip(paths, classes):
        labels[path] |= of_row
    return labels, columns


def choose_classes(used, args):
    """Returns the class names in the order of their indices. used: set of the names in the CSV file. Raises BadInput
    for names that are not in --class_names or cannot be classes."""
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
    """Returns dict NAME -> path of its mask in --masks, for the images that have one. names: dict NAME -> image path.
    Raises BadInput if no image has one, and for a mask that is the image itself."""
    masks = {}
    for name, path in names.items():
        stems = [os.path.join(args.masks, os.path.splitext(inner)[0])
                 for form in unicode_forms(path) for inner in (form, os.path.basename(form))]
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
    """Splits the names of `labels` (dict name -> float32 (C,) multi-hot) at random. Returns (train, val), sorted lists.
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
    used = {os.path.realpath(os.path.join(args.images, path)) for path in found}
    unused = sorted(os.path.relpath(path, args.images)
                    for path in images_in(args.images, filter(None, (args.out, args.masks)))
                    if os.path.realpath(path) not in used)
    if unused:
        print(f'{len(unused)} images of {args.images} (--images) have no line in {args.labels} (--labels) and are not '
              f'used: {join_first(unused)}')
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
        print(f'warning: every image of train.txt shows {", ".join(common)}, so the classifier will find it in any '
              'new image: add images without it, as lines with an empty field for the classes (sky.jpg,)')
    path = os.path.join(args.out, LIST_FOLDER, 'train.txt')
    flags = shlex.join(['--voc12_root', args.out, '--cls_labels', os.path.join(args.out, 'cls_labels.npy'),
                        '--class_names', os.path.join(args.out, 'class_names.txt')])
    print(f'to check it: python voc12/check.py --list {shlex.quote(path)} {flags}\n'
          f'to train on it: python train_SEAM.py --train_list {shlex.quote(path)} {flags}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
