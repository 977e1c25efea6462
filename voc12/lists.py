"""Class names, image lists and image-level labels, by default those of PASCAL VOC 2012. Needs no torch."""
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from tool.cli import BadInput, check_dir, check_file
from tool.image_files import IGNORE
from tool.unpickle import load_dict

CAT_LIST = ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
            'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
            'tvmonitor']

IMG_FOLDER = 'JPEGImages'
ANNOT_FOLDER = 'Annotations'
GT_FOLDER = 'SegmentationClass'
AUG_GT_FOLDER = 'SegmentationClassAug'

MAX_TEXT = 100 * 2 ** 20           # bytes of a list
MAX_XML = 2 ** 20                  # bytes of an annotation; those of VOC have 20,000 at most


def load_class_names(path):
    """Names of the foreground classes, in order: VOC's 20 where path is None, else the lines of a text file.

    Class c counts from 0 in CAM dicts and multi-hot labels, and is c + 1 in label maps, where 0 is the background
    and 255 is ignored: so there are 1 to 254 classes. Blank lines and spaces around a name are passed over, and
    spaces in a name stay.
    Raises BadInput, also for a name that is there twice, and for "background", which is no class of its own.
    """
    if path is None:
        return CAT_LIST
    names = [' '.join(line.split()) for line in read_lines(path, '--class_names') if line.strip()]
    if not 1 <= len(names) < IGNORE:
        raise BadInput(f'{path} (--class_names) has {len(names)} classes; 1 to {IGNORE - 1} are possible')
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadInput(f'{path} (--class_names) names the class {twice[0]} twice')
    if 'background' in names:
        raise BadInput(f'{path} (--class_names) has the class background: list foreground classes alone')
    return names


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
    """Path of an image under the data root."""
    return os.path.join(voc12_root, IMG_FOLDER, name + '.jpg')


def load_img_name_list(path, flag='--train_list or --infer_list'):
    """Image names of a list file, in order.

    Accepts VOC's own form (one name a line) and the two-column form of AffinityNet and SEAM
    (`/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png`); blank lines are passed over.
    Only the file name of the first column counts, so every image is one of the data root.
    `flag` is the command-line flag that named the file, for the messages.
    Raises BadInput for a missing or empty list, and for a name that leaves the data root: `..` as a folder or a name,
    a backslash.
    """
    if not os.path.isfile(path) and os.path.basename(os.path.dirname(os.path.abspath(path))) == 'voc12':
        source = ' --sbd_root benchmark_RELEASE' if os.path.basename(path) == 'train_aug.txt' else ''
        raise BadInput(f'no such list: {path} ({flag}); make it with: '
                       f'python voc12/make_lists.py --voc12_root VOC2012{source}')
    names = []
    for field in (line.split()[0] for line in read_lines(path, flag) if line.strip()):
        stem, extension = os.path.splitext(os.path.basename(field))
        names.append(stem if extension.lower() in ('.jpg', '.jpeg', '.png') else stem + extension)
        if names[-1] in ('', '.') or '..' in [names[-1], *field.split('/')] or '\\' in names[-1]:
            raise BadInput(f'{path} ({flag}) has {field[:100]!r}, which is no name of an image in the data root')
    if not names:
        raise BadInput(f'the list is empty: {path} ({flag})')
    return names


def check_images(names, list_path, voc12_root):
    """Raises BadInput for the first of the list's names that has no image under the data root."""
    check_dir(voc12_root, '--voc12_root')
    for name in names:
        if not os.path.isfile(get_img_path(name, voc12_root)):
            raise BadInput(f'no such image: {get_img_path(name, voc12_root)}, named in {list_path} (--voc12_root)')


def read_xml(path):
    """Root element of an XML file of up to 1 MiB in utf-8, utf-16 or an 8-bit encoding that it declares.

    Raises ValueError for a DOCTYPE, before anything is parsed: it can define entities that expand without end or
    are read from other files. No file of VOC has one. Other damage raises ParseError, LookupError or OSError.
    """
    with open(path, 'rb') as file:
        data = file.read(MAX_XML + 1)
    if len(data) > MAX_XML:
        raise ValueError(f'it is larger than {MAX_XML >> 20} MiB')
    declared = re.match(rb'\s*<\?xml[^>]{0,200}?\bencoding\s*=\s*["\']([\w.-]{1,40})["\']', data)
    encoding = declared[1].decode().lower() if declared else 'utf-8'
    if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
        encoding = 'utf-16'
    elif not re.fullmatch(r'utf-8|us-ascii|iso-8859-\d+|windows-125\d', encoding):
        raise ValueError(f'its encoding is {encoding}; save it as utf-8')
    # the parser gets the very text that was searched, whatever encoding the file declares
    text = data.decode(encoding).removeprefix('\ufeff')
    if '\0' in text:                # makes the parser guess utf-16 in spite of what it is told
        raise ValueError('it is no text file')
    if '<!DOCTYPE' in text or '<!ENTITY' in text:
        raise ValueError('it has a DOCTYPE, which is refused')
    return ElementTree.fromstring(text)


def label_from_xml(path, class_names):
    """float32 (C,) multi-hot of one VOC annotation file.

    Every `<object><name>` among the class names counts, difficult ones too; the names of `<part>`s are no classes.
    Raises BadInput for a file that cannot be read, see `read_xml`.
    """
    label = np.zeros(len(class_names), np.float32)
    try:
        objects = read_xml(path).findall('object')
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:   # the last two: odd encodings
        raise BadInput(f'cannot read the annotation {path} (--voc12_root): {error}') from error
    for name in (element.findtext('name', '').strip() for element in objects):
        if name in class_names:
            label[class_names.index(name)] = 1.
    return label


def load_labels(names, cls_labels, voc12_root, class_names=CAT_LIST):
    """Image-level labels of `names`: dict name -> float32 (C,) multi-hot, none of them empty.

    cls_labels: .npy file of a pickled dict (the reference's format, read by tool/unpickle.py, which runs nothing) or
    .npz file of arrays. Where that file is missing, the XML annotations of the data root are read.
    Raises BadInput for another file, a name without an entry, and for an image without any class.
    """
    if os.path.isfile(cls_labels):
        source = f'{cls_labels} (--cls_labels)'
        table = load_dict(cls_labels, '--cls_labels')
        try:
            labels = {name: np.asarray(table[name], np.float32) for name in names}
        except KeyError as error:
            raise BadInput(f'image {error.args[0]} is not in {source}') from error
        except (ValueError, OverflowError) as error:        # text, or a number beyond float
            raise BadInput(f'{source} holds labels that are no numbers: {error}') from error
    else:
        source = f'{os.path.join(voc12_root, ANNOT_FOLDER)} (--cls_labels {cls_labels} does not exist)'
        print(f'labels: from {source}')
        labels = {name: label_from_xml(os.path.join(voc12_root, ANNOT_FOLDER, name + '.xml'), class_names)
                  for name in names}
    for name, label in labels.items():
        if label.shape != (len(class_names),):
            raise BadInput(f'the label of image {name} has shape {label.shape}, not ({len(class_names)},), one value '
                           f'for each of --class_names: {source}')
        if not np.isin(label, (0, 1)).all():
            raise BadInput(f'the label of image {name} holds other values than 0 and 1: {source}')
        if not label.any():
            raise BadInput(f'image {name} has no class in {source}; take it out of the list, or correct its label')
    return labels
