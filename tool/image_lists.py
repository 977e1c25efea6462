"""Reads lists of image names and finds their images, for voc12/ and tool/. Needs no torch."""
import os
import re

from tool.cli import BadInput, check_file, dead_link

REPO_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMG_FOLDER = 'JPEGImages'
IMG_EXTENSIONS = ('.jpg', '.JPG', '.jpeg', '.JPEG', '.png', '.PNG')
MAX_TEXT = 100 * 2 ** 20           # bytes of a list


def read_lines(path, flag):
    """Returns the lines of a utf-8 text file of up to 100 MiB, with or without a byte-order mark. flag: the flag that
    named the path. Raises BadInput, also for control characters, which messages would send to the terminal."""
    check_file(path, flag)
    if os.path.getsize(path) > MAX_TEXT:
        raise BadInput(f'{path} ({flag}) is larger than {MAX_TEXT >> 20} MiB, so it is no list')
    try:
        with open(path, encoding='utf-8-sig') as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'cannot read {path} ({flag}) as a text file: {error}') from error
    for number, line in enumerate(lines, 1):
        if re.search(r'[\x00-\x08\x0e-\x1f\x7f-\x9f]', line):
            raise BadInput(f'{path} ({flag}) has control characters in line {number}, so it is no text file')
    return lines


def get_img_path(name, voc12_root):
    """Returns the path of an image in the data root: NAME.jpg or, if that is missing, NAME with another extension."""
    stem = os.path.join(voc12_root, IMG_FOLDER, name)
    return next((stem + extension for extension in IMG_EXTENSIONS if os.path.isfile(stem + extension)), stem + '.jpg')


def check_list_exists(path, flag):
    """Raises BadInput if a list does not exist. The message says which command makes it, if it is one of voc12/, or
    where it is, if the command was not started in the folder of the repository."""
    if os.path.isfile(path) or dead_link(path):
        return
    here = os.path.join(REPO_ROOT, path)
    if os.path.isfile(here):
        raise BadInput(f'no such list: {path} ({flag}) in the working directory {os.getcwd()}; start the command in '
                       f'{REPO_ROOT}, or use {here}')
    if os.path.basename(os.path.dirname(os.path.abspath(path))) == 'voc12':
        elsewhere = os.path.abspath(path) != os.path.abspath(here)
        source = ' --sbd_root benchmark_RELEASE' if os.path.basename(path) == 'train_aug.txt' else ''
        there = f' in {REPO_ROOT} (start this command there too)' if elsewhere else ''
        raise BadInput(f'no such list: {path} ({flag}); make it{there} with: '
                       f'python voc12/make_lists.py --voc12_root VOC2012{source}')


def load_img_name_list(path, flag='--train_list or --infer_list'):
    """Returns the image names in a list file, in order.

    A list has VOC's own form (one name per line) or the two-column form of AffinityNet and SEAM
    (`/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png`). Blank lines are ignored, and so are whole numbers behind
    VOC's names (-1, 0 or 1 in its lists of one class, class indices in those of other code). The first column ends
    with an extension, so names with an extension may contain blanks. Only the file name of the column counts, so every
    image lies in the data root.
    flag: the command-line flag that named the file, for messages.
    Raises BadInput for a missing or empty list, for a name that leaves the data root (`..` as a folder or a name), for
    a backslash, and for blanks in a name without an extension or columns behind it.
    """
    check_list_exists(path, flag)
    names = []
    for line in filter(None, map(str.strip, read_lines(path, flag))):
        column = (re.match(r'(.+?)\.(?:jpe?g|png)(?!\S)', line, re.IGNORECASE)
                  or re.fullmatch(r'(\d{4}_\d{6})(?:\s+-?\d+)+', line))
        field = column[1] if column else line
        name = os.path.basename(field)
        cure = ''
        if '\\' in field:
            cure = 'it has a backslash: write / between folders'
        elif not column and len(line.split()) > 1:
            cure = 'delete the columns behind the name, or add the extension to a name with blanks'
        if cure or name in ('', '.') or '..' in field.split('/'):
            raise BadInput(f'{path} ({flag}) has {line[:100]!r}, which is no name of an image in the data root'
                           + (f'; {cure}' if cure else ''))
        names.append(name)
    if not names:
        raise BadInput(f'the list is empty: {path} ({flag})')
    return names
