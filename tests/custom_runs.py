"""A folder of small images, and make_custom.py run on it."""
import numpy as np
import pytest
from PIL import Image

from tool.image_files import save_label_map
from voc12.lists import load_class_names, load_img_name_list, load_labels
from voc12.make_custom import get_args_parser, main

# file -> its classes; every format that is common in a folder of photographs
FILES = {'a.jpg': ['cat'], 'b.png': ['dog', 'cat'], 'c.JPG': ['dog'], 'sub/d.webp': ['red fox'], 'e 1.bmp': ['cat'],
         'f.gif': ['dog'], 'g.jpeg': ['red fox', 'dog'], 'h.tif': ['cat'], 'i.jpg': ['dog'], 'j.jpg': ['red fox']}
ROWS = [','.join([path, *classes]) for path, classes in FILES.items()]
ONE_HOT = ['image,dog,cat,red fox'] + [
    ','.join([path, *(str(int(name in classes)) for name in ('dog', 'cat', 'red fox'))])
    for path, classes in FILES.items()]


@pytest.fixture
def images(tmp_path):
    """Folder of ten images, 12 pixels wide and 9 high."""
    folder = tmp_path / 'photos'
    (folder / 'sub').mkdir(parents=True)
    for number, path in enumerate(FILES):
        Image.new('RGB', (12, 9), (20 * number, 100, 50)).save(folder / path)
    return folder


def arguments(images, text, *flags, out='root'):
    """Writes the labels `text` (str, bytes, or a list of lines). Returns the command line of make_custom.py."""
    text = '\n'.join(text) if isinstance(text, list) else text
    labels = images.parent / 'labels.csv'
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ['--images', str(images), '--labels', str(labels), '--out', str(images.parent / out), *map(str, flags)]


def make(images, text, *flags, out='root'):
    """Runs the script in this process; returns the data root."""
    main(get_args_parser().parse_args(arguments(images, text, *flags, out=out)))
    return images.parent / out


def split_of(root, split):
    return load_img_name_list(str(root / 'ImageSets' / 'Segmentation' / f'{split}.txt'))


def labels_of(root):
    """Returns a dict name -> list of its class names, read as training reads them."""
    class_names = load_class_names(str(root / 'class_names.txt'))
    names = np.load(root / 'cls_labels.npy', allow_pickle=True).item()
    labels = load_labels(names, str(root / 'cls_labels.npy'), str(root), class_names)
    return {name: [class_names[i] for i in np.flatnonzero(label)] for name, label in labels.items()}


def content(root):
    """Returns a dict relative path -> bytes of every file."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def write_mask(path, values, size=(9, 12)):
    """Writes a label map of (h, w) whose first pixels have `values`."""
    mask = np.zeros(size, np.uint8)
    mask.flat[:len(values)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    save_label_map(str(path), mask)
