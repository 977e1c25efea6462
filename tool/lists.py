"""Lists of image names, and the images that they name, as voc12 and the tools read them. Needs no torch."""
import os
import re

from tool.cli import BadInput, check_file

IMG_FOLDER = 'JPEGImages'
IMG_EXTENSIONS = ('.jpg', '.JPG', '.jpeg', '.JPEG', '.png', '.PNG')
MAX_TEXT = 100 * 2 ** 20           # bytes of a list


def read_lines(path, flag):
    """Lines of a utf-8 text file of up to 100 MiB, with or without a byte-order mark. Raises BadInput naming the path
    and its flag, also for control characters, which would reach the terminal with the next message."""
    check_file(path, flag)
    if os.path.getsize(path) > MAX_TEXT:
        raise BadInput(f'{path} ({flag}) is larger than {MAX_TEXT >> 20} MiB: no list')
    try:
        with open(path, encoding='utf-8-sig') as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'cannot read {path} ({flag}) as a text file: {error}') from error
    for number, line in enumerate(lines, 1):
        if re.search(r'[\x00-\x08\x0e-\x1f\x7f-\x9f]', line):
            raise BadInput(f'{path} ({flag}) has control characters in line {number}: no text file')
    return lines


def get_img_path(name, voc12_root):
    """Path of an image under the data root: NAME.jpg, or where that is missing NAME with another of IMG_EXTENSIONS."""
    stem = os.path.join(voc12_root, IMG_FOLDER, name)
    return next((stem + extension for extension in IMG_EXTENSIONS if os.path.isfile(stem + extension)), stem + '.jpg')


def load_img_name_list(path, flag='--train_list or --infer_list'):
    """Image names of a list file, in order.

    Accepts VOC's own form (one name a line) and the two-column form of AffinityNet and SEAM
    (`/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png`); blank lines are passed over, and the -1, 0 or 1 behind the
    names in VOC's lists of one class. The first column ends behind an extension, so names may have blanks there. Only
    its file name counts, so every image is one of the data root.
    `flag` is the command-line flag that named the file, for the messages.
    Raises BadInput for a missing or empty list, and for a name that leaves the data root: `..` as a folder or a name,
    a backslash; and for blanks in a name without an extension.
    """
    if not os.path.isfile(path) and os.path.basename(os.path.dirname(os.path.abspath(path))) == 'voc12':
        source = ' --sbd_root benchmark_RELEASE' if os.path.basename(path) == 'train_aug.txt' else ''
        raise BadInput(f'no such list: {path} ({flag}); make it with: '
                       f'python voc12/make_lists.py --voc12_root VOC2012{source}')
    names = []
    for line in filter(None, map(str.strip, read_lines(path, flag))):
        column = (re.match(r'(.+?)\.(?:jpe?g|png)(?!\S)', line, re.IGNORECASE)
                  or re.fullmatch(r'(\d{4}_\d{6})\s+-?[01]', line))
        field = column[1] if column else line
        name = os.path.basename(field)
        unclear = not column and len(line.split()) > 1
        if unclear or name in ('', '.') or '..' in field.split('/') or '\\' in name:
            raise BadInput(f'{path} ({flag}) has {line[:100]!r}, which is no name of an image in the data root; a name '
                           'with blanks needs its extension')
        names.append(name)
    if not names:
        raise BadInput(f'the list is empty: {path} ({flag})')
    return names
