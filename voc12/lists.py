"""Class names, image-level labels and lists, by default those of PASCAL VOC 2012. Needs no torch."""
import collections
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree

import numpy as np

from tool.cli import BadInput, check_dir, dead_link
from tool.files import describe
from tool.image_files import IGNORE
from tool.image_lists import IMG_FOLDER, get_img_path, load_img_name_list, read_lines     # noqa: F401: re-exported
from tool.unpickle import load_dict

CAT_LIST = ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
            'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
            'tvmonitor']

ANNOT_FOLDER = 'Annotations'
GT_FOLDER = 'SegmentationClass'
AUG_GT_FOLDER = 'SegmentationClassAug'
LIST_FOLDER = os.path.join('ImageSets', 'Segmentation')

# names that no foreground class has, letters alone, in lower case
NO_CLASS = re.compile('.*background.*|.*unlabel.*|bg|bkgd?|void|ignored?|ignoreregion|dontcare|none|null|noclass|'
                      'nolabel|negatives?|nothing|noobjects?|nofindings?')
# lines of files of other forms: colours, JSON, YAML
OTHER_FORM = re.compile(r'#[\da-fA-F]{6}|\d+([\s,;]+)\d+\1\d+|^#|["\[\]{}]|:$')

JOINERS = '\u200c\u200d'          # invisible, but part of the spelling of Persian and of languages of India


def clean_class_name(text):
    """Returns the name of a class with single blanks and in Unicode's form NFC, so that the same letters are equal."""
    return ' '.join(unicodedata.normalize('NFC', text).split())


def check_class_names(names, source):
    """Raises BadInput unless these can be the foreground classes: 1 to 254 different names without invisible
    characters, none of which means the background or ignored pixels in any spelling, and not all with a number before
    them. source: where they come from, for the message."""
    if not 1 <= len(names) < IGNORE:
        raise BadInput(f'{source} has {len(names)} classes; 1 to {IGNORE - 1} are possible')
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f'{source} names the class {name} twice')
        hidden = [char for char in name if unicodedata.category(char) == 'Cf' and char not in JOINERS]
        if hidden:
            raise BadInput(f'{source} has the class {name}, in which the character U+{ord(hidden[0]):04X} is '
                           'invisible: type the name anew')
        if OTHER_FORM.search(name):
            raise BadInput(f'{source} has {name[:100]!r}, which looks like a colour or a file of another tool; write '
                           'only the names of the foreground classes, one per line, without the background')
        if NO_CLASS.fullmatch(''.join(filter(str.isalpha, name.casefold()))):
            raise BadInput(f'{source} has the class {name}: delete it and list only foreground classes, because 0 is '
                           f'always the background and {IGNORE} the ignored pixels')
    # label maps of other tools: 0 cat, 1: dog
    numbered = [re.fullmatch(r'(\d+)[\s:,;=]+(.*)', name) for name in names]
    if len(names) > 1 and all(numbered) and len({match[2] for match in numbered}) == len(names):
        numbers = sorted(int(match[1]) for match in numbered)
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            raise BadInput(f'{source} has a number before every class, such as {names[0]!r}: delete the numbers')


def load_class_names(path):
    """Returns the names of the foreground classes in order: VOC's 20 if path is None, else the lines of a text file.

    Class c, from 0, is the key c of CAM dicts and place c of multi-hot labels, and c + 1 in label maps, where 0 is the
    background and 255 is ignored. So there can be 1 to 254 classes. Blank lines and spaces around a name are ignored.
    Raises BadInput as `read_lines` and `check_class_names` do.
    """
    if path is None:
        return CAT_LIST
    names = [clean_class_name(line) for line in read_lines(path, '--class_names') if line.strip()]
    if len(names) == 1 and ',' in names[0]:
        raise BadInput(f'{path} (--class_names) has one line, {names[0][:100]!r}; write one name per line')
    check_class_names(names, f'{path} (--class_names)')
    return names


def read_names(path, flag):
    """Returns the set of the names in a list of VOC or SBD, and prints those that it has twice."""
    names = load_img_name_list(path, flag)
    twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    if twice:
        print(f'{path} has {len(twice)} names more than once, which count once: {join_first(twice)}')
    return set(names)


def read_sbd(sbd_root):
    """Returns the folder of SBD's lists and cls/, which is `sbd_root` or dataset/ in it, and the set of its names."""
    check_dir(sbd_root, '--sbd_root')
    inner = os.path.join(sbd_root, 'dataset')
    folder = inner if os.path.isdir(inner) else sbd_root
    lists = [read_names(os.path.join(folder, key + '.txt'), '--sbd_root') for key in ('train', 'val')]
    return folder, set().union(*lists)


def stems(folder, extension, flag):
    """Returns the set of file names in `folder` that end in `extension`, without it. Hidden files do not count."""
    check_dir(folder, flag)
    split = [os.path.splitext(name) for name in os.listdir(folder) if not name.startswith('.')]
    return {stem for stem, found in split if found == extension}


def join_first(names, most=5):
    """Returns the first few of a list of names as text for a message."""
    return ', '.join(names[:most]) + (', ...' if len(names) > most else '')


def check_images(names, list_path, voc12_root):
    """Raises BadInput for the first name of a list that has no image in the data root."""
    check_dir(voc12_root, '--voc12_root')
    for name in names:
        path = get_img_path(name, voc12_root)
        if not os.path.isfile(path):
            what = dead_link(path) or f'no such image: {path}'
            raise BadInput(f'{what} (--voc12_root); it is image {name} of {list_path}')


class XmlBuilder(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, which can define entities that expand without end. No file of VOC has one."""

    def doctype(self, *_):
        raise ValueError('it has a DOCTYPE, which is refused')


def label_from_xml(path, class_names, unknown=None):
    """Reads the label of one VOC annotation file, float32 (C,) multi-hot.

    Every `<object><name>` that is a class name counts, difficult ones too; the names of `<part>`s do not.
    unknown: a Counter to which the names of other objects are added.
    Raises BadInput for a file that cannot be read, and for one with a DOCTYPE.
    """
    label = np.zeros(len(class_names), np.float32)
    try:
        objects = ElementTree.parse(path, ElementTree.XMLParser(target=XmlBuilder())).findall('object')
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:   # the last two: odd encodings
        raise BadInput(f'cannot read the annotation {path} (--voc12_root): {describe(error)}') from error
    for element in objects:
        name = clean_class_name(element.findtext('name', ''))
        if name in class_names:
            label[class_names.index(name)] = 1.
        elif unknown is not None:
            unknown[name] += 1
    return label


def describe_unknown(unknown):
    """Returns a line about object names in XML that are no class. unknown: Counter of the names, not empty."""
    names = [f'{name or "(no name)"} ({count})' for name, count in unknown.most_common()]
    return (f'{sum(unknown.values()):,} objects in {ANNOT_FOLDER} are of no class of --class_names and do not count: '
            + join_first(names, 20))


def label_from_table(table, name, num_classes):
    """Returns the label of an image from the dict of a cls_labels file, float32 (C,) of 0 and 1. A key may be a whole
    number: 2007000032 is 2007_000032, as in irn's file, and 139 is 000000000139. Raises ValueError or OverflowError if
    there is no usable one."""
    number = name.replace('_', '')
    key = int(number) if name not in table and number.isdecimal() else name
    if key not in table:
        raise ValueError(f'no entry; the first one in the file is {str(next(iter(table), None))[:100]!r}')
    label = np.asarray(table[key], np.float32)
    if label.shape != (num_classes,):
        raise ValueError(f'shape {label.shape}, not ({num_classes},), a value for each of --class_names')
    if not np.isin(label, (0, 1)).all():
        raise ValueError('other values than 0 and 1')
    return label


def read_labels(names, cls_labels, voc12_root, class_names):
    """Reads image-level labels from a cls_labels file (.npy of a pickled dict, .npz of arrays) or, if that is missing,
    from the XML of the data root. Returns (labels, unusable, unknown, source): dict name -> float32 (C,) multi-hot,
    perhaps all 0; dict name -> the error, for names without a usable label; Counter of object names in the XML that are
    no class; where the labels come from, for messages. Raises BadInput for a cls_labels file that cannot be read."""
    labels, unusable, unknown = {}, {}, collections.Counter()
    table, source, folder = None, f'{cls_labels} (--cls_labels)', os.path.join(voc12_root, ANNOT_FOLDER)
    if os.path.exists(cls_labels):
        table = load_dict(cls_labels, '--cls_labels')
    else:
        source = f'{folder} (--cls_labels {cls_labels} does not exist)'
    for name in dict.fromkeys(names):
        try:
            labels[name] = (label_from_xml(os.path.join(folder, name + '.xml'), class_names, unknown) if table is None
                            else label_from_table(table, name, len(class_names)))
        except (ValueError, OverflowError) as error:            # BadInput is a ValueError
            unusable[name] = error
    return labels, unusable, unknown, source


def absent_classes(labels, class_names):
    """Returns the names of the classes that no image has. labels: dict name -> (C,) multi-hot, not empty."""
    present = np.any(list(labels.values()), axis=0)
    return [name for name, is_there in zip(class_names, present) if not is_there]


def common_classes(labels, class_names):
    """Returns the names of the classes that every image has. labels: dict name -> (C,) multi-hot, not empty."""
    common = np.all(list(labels.values()), axis=0)
    return [name for name, is_there in zip(class_names, common) if is_there]


def check_training_labels(labels, class_names, train_list, cls_labels, names_file=None):
    """Returns lines for the log of a training. They warn of classes that no image or every image shows and, if there
    are negatives (images that show none of the classes), count the images with and without each class. Raises BadInput
    if all images are negatives.

    labels: dict name -> (C,) multi-hot, not empty. names_file: the --class_names file; None means VOC's classes, of
    which a list may lack some without a warning. train_list, cls_labels: paths, used in messages only.
    """
    absent, common, lines = absent_classes(labels, class_names), common_classes(labels, class_names), []
    if len(absent) == len(class_names):
        raise BadInput(f'no image of {train_list} (--train_list) shows any of the {len(class_names)} classes, by the '
                       f'labels of {cls_labels} (--cls_labels)')
    if absent and names_file:
        lines.append(f'warning: {len(absent)} of the {len(class_names)} classes of {names_file} (--class_names) cannot '
                     f'be learned, because no image of {train_list} (--train_list) shows them: '
                     f'{join_first(absent, 20)}')
    if common:
        lines.append(f'warning: every image of {train_list} (--train_list) shows {join_first(common, 20)}, so the '
                     'classifier has nothing to tell it from: add images without it; a label of zeros means none of '
                     'the classes')
    negatives = sum(not label.any() for label in labels.values())
    if negatives:
        counts = np.sum(list(labels.values()), axis=0).astype(int)
        lines.append(f'{negatives:,} of {len(labels):,} images are negatives, which show none of the classes; images '
                     'with and without each class: ' + ', '.join(
                         f'{name} {count} and {len(labels) - count}' for name, count in zip(class_names, counts)))
    return lines


def load_labels(names, cls_labels, voc12_root, class_names=CAT_LIST):
    """Reads labels as `read_labels` does, and returns dict name -> float32 (C,) multi-hot; all 0 for negatives, images
    that show none of the classes. Prints how many negatives there are, and warns of objects in the XML that are no
    class. Raises BadInput for a bad file, and for a name without a usable label, which is not a negative."""
    labels, unusable, unknown, source = read_labels(names, cls_labels, voc12_root, class_names)
    if not os.path.exists(cls_labels):
        print(f'labels: from {source}')
    if unusable:
        name, error = next(iter(unusable.items()))
        raise BadInput(f'the label of image {name} is not usable: {error}; it is from {source}') from error
    if unknown:
        print(f'warning: {describe_unknown(unknown)}')
    empty = [name for name, label in labels.items() if not label.any()]
    if empty:
        print(f'labels: {len(empty):,} of {len(labels):,} images show none of the classes: {join_first(empty)}')
    return labels
