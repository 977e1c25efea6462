"""Names, lists and image-level labels of PASCAL VOC 2012. Needs no torch."""
import os
import xml.etree.ElementTree as ElementTree

import numpy as np

from tool.pyutils import BadInput, check_dir, check_file

CAT_LIST = ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
            'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
            'tvmonitor']
NUM_CLASSES = len(CAT_LIST)        # foreground classes: 0..19 in CAM dicts, 1..20 in label maps
IGNORE = 255                       # ground truth that does not count (object borders)

IMG_FOLDER = 'JPEGImages'
ANNOT_FOLDER = 'Annotations'
GT_FOLDER = 'SegmentationClass'
AUG_GT_FOLDER = 'SegmentationClassAug'


def get_img_path(name, voc12_root):
    """Path of an image under the data root."""
    return os.path.join(voc12_root, IMG_FOLDER, name + '.jpg')


def load_img_name_list(path, flag='--train_list or --infer_list'):
    """Image names of a list file, in order.

    Accepts VOC's own form (one name a line) and the two-column form of AffinityNet and SEAM
    (`/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png`); blank lines are passed over.
    `flag` is the command-line flag that named the file, for the messages.
    Raises BadInput for a missing or empty list.
    """
    if not os.path.isfile(path) and os.path.basename(os.path.dirname(os.path.abspath(path))) == 'voc12':
        source = ' --sbd_root benchmark_RELEASE' if os.path.basename(path) == 'train_aug.txt' else ''
        raise BadInput(f'no such list: {path} ({flag}); make it with: '
                       f'python voc12/make_lists.py --voc12_root VOC2012{source}')
    check_file(path, flag)
    try:
        with open(path, encoding='utf-8-sig') as file:
            fields = [line.split()[0] for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f'the list is no text file: {path} ({flag})') from error
    names = []
    for field in fields:
        stem, extension = os.path.splitext(os.path.basename(field))
        names.append(stem if extension.lower() in ('.jpg', '.jpeg', '.png') else stem + extension)
    if not names:
        raise BadInput(f'the list is empty: {path} ({flag})')
    return names


def check_images(names, list_path, voc12_root):
    """Raises BadInput for the first of the list's names that has no image under the data root."""
    check_dir(voc12_root, '--voc12_root')
    for name in names:
        if not os.path.isfile(get_img_path(name, voc12_root)):
            raise BadInput(f'no such image: {get_img_path(name, voc12_root)}, named in {list_path} (--voc12_root)')


def label_from_xml(path):
    """float32 (20,) multi-hot of one VOC annotation file.

    Every `<object><name>` counts, difficult ones too; the names of `<part>`s are no classes.
    """
    label = np.zeros(NUM_CLASSES, np.float32)
    try:
        objects = ElementTree.parse(path).findall('object')
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:   # the last two: odd encodings
        raise BadInput(f'cannot read the annotation {path} (--voc12_root): {error}') from error
    for name in (element.findtext('name', '').strip() for element in objects):
        if name in CAT_LIST:
            label[CAT_LIST.index(name)] = 1.
    return label


def load_labels(names, cls_labels, voc12_root):
    """Image-level labels of `names`: dict name -> float32 (20,) multi-hot, none of them empty.

    cls_labels: .npy file of a pickled dict (the reference's format; a pickle can run code, so use only
    files that you trust). Where that file is missing, the XML annotations of the data root are read.
    Raises BadInput for a name without an entry, and for an image without any class.
    """
    if os.path.isfile(cls_labels):
        source = f'{cls_labels} (--cls_labels)'
        try:
            table = np.load(cls_labels, allow_pickle=True).item()
            labels = {name: np.asarray(table[name], np.float32) for name in names}
        except KeyError as error:
            raise BadInput(f'image {error.args[0]} is not in {source}') from error
        except Exception as error:      # unpickling raises whatever it likes
            raise BadInput(f'cannot read {source}: {error}') from error
    else:
        source = f'{os.path.join(voc12_root, ANNOT_FOLDER)} (--cls_labels {cls_labels} does not exist)'
        print(f'labels: from {source}')
        labels = {name: label_from_xml(os.path.join(voc12_root, ANNOT_FOLDER, name + '.xml')) for name in names}
    for name, label in labels.items():
        if label.shape != (NUM_CLASSES,):
            raise BadInput(f'the label of image {name} has shape {label.shape}, not ({NUM_CLASSES},): {source}')
        if not np.isin(label, (0, 1)).all():
            raise BadInput(f'the label of image {name} holds other values than 0 and 1: {source}')
        if not label.any():
            raise BadInput(f'image {name} has no class in {source}; take it out of the list, or correct its label')
    return labels
