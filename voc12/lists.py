"""Class names, image lists and image-level labels, by default those of PASCAL VOC 2012. Needs no torch."""
import collections
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from tool.cli import BadInput, check_dir
from tool.image_files import IGNORE
from tool.lists import IMG_FOLDER, get_img_path, load_img_name_list, read_lines     # noqa: F401: for others, too
from tool.unpickle import load_dict

CAT_LIST = ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
            'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
            'tvmonitor']

ANNOT_FOLDER = 'Annotations'
GT_FOLDER = 'SegmentationClass'
AUG_GT_FOLDER = 'SegmentationClassAug'

# what no foreground class is called, letters alone, in lower case
NO_CLASS = {'background', 'bg', 'bkg', 'backgroundclass', 'void', 'ignore', 'ignored', 'ignoreregion', 'unlabeled',
            'unlabelled', 'dontcare', 'none', 'noclass', 'nolabel'}
MAX_XML = 2 ** 20                  # bytes of an annotation; those of VOC have 20,000 at most


def check_class_names(names, source):
    """Raises BadInput unless these can be the foreground classes: 1 to 254 different names, none of which means the
    background or ignored pixels, under any spelling. source: where they are from, for the message."""
    if not 1 <= len(names) < IGNORE:
        raise BadInput(f'{source} has {len(names)} classes; 1 to {IGNORE - 1} are possible')
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f'{source} names the class {name} twice')
        if name.startswith('#') or re.search(r'\d+([\s,;]+)\d+\1\d+|#[\da-fA-F]{6}', name):
            raise BadInput(f'{source} has {name[:100]!r}: a label map with colours; write the names of the foreground '
                           'classes alone, one a line, without the background')
        if ''.join(filter(str.isalpha, name.casefold())) in NO_CLASS:
            raise BadInput(f'{source} has the class {name}: delete it and list foreground classes alone; 0 is the '
                           f'background already, and {IGNORE} what is ignored')


def load_class_names(path):
    """Names of the foreground classes, in order: VOC's 20 where path is None, else the lines of a text file.

    Class c counts from 0 in CAM dicts and multi-hot labels, and is c + 1 in label maps, where 0 is the background
    and 255 is ignored: so there are 1 to 254 classes. Blank lines and spaces around a name are passed over, and
    spaces in a name stay. Raises BadInput as `read_lines` and `check_class_names` do.
    """
    if path is None:
        return CAT_LIST
    names = [' '.join(line.split()) for line in read_lines(path, '--class_names') if line.strip()]
    check_class_names(names, f'{path} (--class_names)')
    return names


def read_names(path, flag):
    """Set of the names in a list of VOC or SBD; prints the ones that are there twice."""
    names = load_img_name_list(path, flag)
    twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    if twice:
        print(f'{path}: {len(twice)} names more than once, kept once: {first_five(twice)}')
    return set(names)


def stems(folder, extension, flag):
    """Set of the file names in `folder` that end in `extension`, without it. Hidden files do not count."""
    check_dir(folder, flag)
    split = [os.path.splitext(name) for name in os.listdir(folder) if not name.startswith('.')]
    return {stem for stem, found in split if found == extension}


def first_five(names):
    """The first five of a list of names, for a message."""
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


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


def label_from_xml(path, class_names, unknown=None):
    """float32 (C,) multi-hot of one VOC annotation file.

    Every `<object><name>` among the class names counts, difficult ones too; the names of `<part>`s are no classes.
    unknown: a Counter, to which the other objects' names are added.
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
        elif unknown is not None:
            unknown[name] += 1
    return label


def describe_unknown(unknown):
    """One line on object names in XML that are no class. unknown: Counter of the names, not empty."""
    names = [f'{name or "(no name)"} ({count})' for name, count in unknown.most_common(20)]
    if len(unknown) > len(names):
        names.append(f'{len(unknown) - len(names)} more names')
    return (f'{sum(unknown.values()):,} objects in {ANNOT_FOLDER} are of no class of --class_names and do not count: '
            + ', '.join(names))


class LabelReader:
    """Image-level labels by name, from a cls_labels file or, where that is missing, from the XML of the data root.

    cls_labels: .npy file of a pickled dict (the reference's format, read without running anything in it) or .npz file
    of arrays. Keys are names, or whole numbers as in irn's file: 2007000032 is 2007_000032.
    source: where they are from, for messages. unknown: Counter of object names in the XML that are no class.
    """

    def __init__(self, cls_labels, voc12_root, class_names):
        self.class_names, self.unknown = class_names, collections.Counter()
        self.folder = os.path.join(voc12_root, ANNOT_FOLDER)
        self.table = load_dict(cls_labels, '--cls_labels') if os.path.isfile(cls_labels) else None
        self.source = (f'{self.folder} (--cls_labels {cls_labels} does not exist)' if self.table is None
                       else f'{cls_labels} (--cls_labels)')
        for key in [key for key in self.table or () if not isinstance(key, str)]:
            self.table[f'{str(key)[:4]}_{str(key)[4:]}'] = self.table[key]

    def read(self, name):
        """float32 (C,) of 0 and 1, perhaps of 0 alone. Raises ValueError, which says why there is no such label."""
        if self.table is None:
            return label_from_xml(os.path.join(self.folder, name + '.xml'), self.class_names, self.unknown)
        if name not in self.table:
            raise ValueError('no entry')
        try:
            label = np.asarray(self.table[name], np.float32)
        except OverflowError as error:
            raise ValueError(str(error)) from error
        if label.shape != (len(self.class_names),):
            raise ValueError(f'shape {label.shape}, not ({len(self.class_names)},), a value for each of --class_names')
        if not np.isin(label, (0, 1)).all():
            raise ValueError('other values than 0 and 1')
        return label


def load_labels(names, cls_labels, voc12_root, class_names=CAT_LIST):
    """Image-level labels of `names`: dict name -> float32 (C,) multi-hot, none of them empty. Sources: see LabelReader.
    Raises BadInput for a bad file, a name without a usable label, and for an image without any class. Warns of objects
    in the XML that are of no class."""
    reader = LabelReader(cls_labels, voc12_root, class_names)
    if reader.table is None:
        print(f'labels: from {reader.source}')
    labels = {}
    for name in dict.fromkeys(names):
        try:
            labels[name] = reader.read(name)
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(f'the label of image {name} is not usable: {error}; it is from {reader.source}') from error
    if reader.unknown:
        print(f'warning: {describe_unknown(reader.unknown)}')
    for name, label in labels.items():
        if not label.any():
            raise BadInput(f'image {name} has no class in {reader.source}; take it out of the list, or correct its '
                           'label')
    return labels
