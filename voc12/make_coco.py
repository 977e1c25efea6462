"""Makes a data root in VOC's layout from MS COCO, for image-level training and, with --masks, for scoring.

    python voc12/make_coco.py --coco_root coco --masks
    python train_SEAM.py --voc12_root COCO --train_list COCO/ImageSets/Segmentation/train.txt \\
        --cls_labels COCO/cls_labels.npy --class_names voc12/coco_names.txt ...

Reads annotations/instances_{train,val}2014.json, the second where it exists, and the images in {train,val}2014/
or images/{train,val}2014/ below --coco_root; links to the images. The file name of an image, without folders and
extension and with _ for blanks, dots and the like, is its name in lists and results. A class is a category; its index
is the category's place by ascending id (ids have gaps: COCO's are 1 to 90 for 80 categories). Crowd regions count like
objects; objects without an outline count in the labels alone.

Images without any annotation are left out: about 700 of the 82,783 training and 400 of the 40,504 validation images of
2014. With --negatives they stay on the lists, with a label of zeros, as images that show none of the classes.
"""
import argparse
import functools
import json
import os
import re
import sys

import numpy as np

try:
    from pycocotools import mask as coco_mask
except ImportError:                 # needed for --masks alone
    coco_mask = None

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_file, check_range, exit_on_bad_input, make_dir
from tool.files import file_digest
from tool.image_files import save_label_map
from tool.outputs import ResultFolder, open_folders
from tool.workers import parallel_map
from voc12.data_root import EXTENSIONS, check_out, name_images, write_lines, write_root
from voc12.lists import GT_FOLDER, IMG_FOLDER, check_class_names, clean_class_name, read_lines

HERE = os.path.dirname(os.path.abspath(__file__))
MARKER = 'COCO.txt'                # tells a folder of ours from others


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--coco_root', required=True, help='folder of the annotations and the images, see above')
    parser.add_argument('--out', default='COCO', metavar='ROOT',
                        help='folder to write: new, empty, or made by this script before')
    parser.add_argument('--names', default=os.path.join(HERE, 'coco_names.txt'), metavar='FILE',
                        help='text file to write, the --class_names of the other scripts: one class per line, by '
                             'ascending category id (default: coco_names.txt beside this script)')
    parser.add_argument('--masks', action='store_true', help=f'write {GT_FOLDER}/ too, for evaluation.py')
    parser.add_argument('--negatives', action='store_true',
                        help='keep the images without any annotation: they count as images that show no class')
    parser.add_argument('--resume', action='store_true', help='keep the masks that an interrupted run has finished')
    parser.add_argument('--year', default=2014, type=int, help='year in the names of these files and folders')
    parser.add_argument('--num_workers', default=8, type=int, help='number of processes; 0 uses the main process')
    return parser


# ----- outlines: float32 (n, 2) polygons, x and y in pixels, or int64 (runs,) run lengths, or None: empty -----

def decode_counts(text):
    """Returns the run lengths, a list of int, of COCO's compressed RLE string.

    A character is 48 plus 6 bits: the lower 5 belong to a number, least significant first, and the top one says that
    the number continues. Bit 4 of the last group is the sign. From index 3 on, the number is the difference from the
    run length two places before. (pycocotools accepts a string that ends too early, and returns arbitrary pixels.)
    """
    counts = []
    for number in re.findall('[P-o]*[0-O]', text):       # of 48..111, 'P' and above go on
        bits = [ord(char) - 48 & 0x1f for char in number]
        value = sum(group << 5 * place for place, group in enumerate(bits))
        value -= bits[-1] >> 4 << 5 * len(bits)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def read_outline(segmentation, h, w):
    """Returns the outline that is stored in `segmentation` of the JSON file of an image of h x w pixels: polygons
    [[x, y, x, y, ...], ...], or an RLE object {'size': [h, w], 'counts': list or compressed string}. Returns None if it
    is empty; polygons of fewer than three points have no area. Raises ValueError."""
    if isinstance(segmentation, dict):
        counts = segmentation['counts']
        if not counts:
            return None
        counts = np.array(decode_counts(counts) if isinstance(counts, str) else counts, np.int64)
        if segmentation['size'] != [h, w] or counts.sum() != h * w or counts.min() < 0:
            raise ValueError(f'the run lengths do not fill the {h} x {w} pixels of the image')
        return counts
    if any(not isinstance(polygon, list) or len(polygon) % 2 for polygon in segmentation or ()):
        raise ValueError('a polygon must be a list with an even count of numbers')
    polygons = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in segmentation or () if len(polygon) >= 6]
    if not all((np.abs(polygon) < 1e5).all() for polygon in polygons):          # nan too
        raise ValueError('a polygon has numbers that cannot be coordinates of an image')
    return polygons or None


def fill_runs(counts, h, w):
    """Returns the mask, bool (h, w), of run lengths, int64 (runs,): of zeros and ones in turn, zeros first, column by
    column."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(w, h).T


def fill_polygons(polygons, h, w):
    """Returns the union of polygons, float32 (n, 2) x, y, as bool (h, w), with the pixels that COCO's own tools choose.
    Pixel (row, column) covers column to column + 1 and row to row + 1."""
    return coco_mask.decode(coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], h, w)).any(axis=2)


def paint_objects(h, w, objects):
    """Returns the label map, uint8 (h, w), 0 background, of objects: list of (class index, is a crowd, outline).

    Crowds are painted first, then objects by descending area in pixels, so that small ones stay visible. Of two with
    the same area the later one is on top. Empty outlines are skipped.
    """
    layers = []
    for index, crowd, outline in objects:
        if outline is None:
            continue
        mask = fill_polygons(outline, h, w) if isinstance(outline, list) else fill_runs(outline, h, w)
        layers.append((not crowd, -np.count_nonzero(mask), index, mask))
    labels = np.zeros((h, w), np.uint8)
    for _, _, index, mask in sorted(layers, key=lambda layer: layer[:2]):
        labels[mask] = index
    return labels


def write_mask(picture, folder):
    """Writes NAME.png into a ResultFolder. picture: (NAME, h, w, objects)."""
    name, h, w, objects = picture
    with folder.writing(name) as path:
        save_label_map(path, paint_objects(h, w, objects))


# ----- annotations -----

def find_image_folder(coco_root, split, year):
    """Returns the image folder of a split. Raises BadInput if it is missing."""
    folders = [os.path.join(coco_root, *inner, f'{split}{year}') for inner in ((), ('images',))]
    for folder in folders:
        if os.path.isdir(folder):
            return folder
    raise BadInput(f'no such folder: {folders[0]}, nor {folders[1]} (--coco_root)')


def read_size(number):
    """Returns a width or height, which may be stored as 64.0 or "64", as int. Raises ValueError or TypeError."""
    size = float(number)
    if not (size.is_integer() and 1 <= size <= 1e5):
        raise ValueError(f'an image has a size of {number} pixels')
    return int(size)


def by_id(entries, what):
    """Returns dict id -> entry of the images or categories. Raises ValueError if two have the same id."""
    found = {entry['id']: entry for entry in entries}
    if len(found) < len(entries):
        raise ValueError(f'two {what} have the same id')
    return found


def read_json(path, with_masks):
    """Reads an instances file. Returns (class names by ascending category id; list of (file name of an image, h, w,
    objects)). objects: see `paint_objects`; outlines are None without masks. Raises BadInput for any other content."""
    where, empty = '', []
    try:
        with open(path, encoding='utf-8-sig') as json_file:
            data = json.load(json_file)
        categories = by_id(data['categories'], 'categories')
        index_of = {number: index for index, number in enumerate(sorted(categories), 1)}
        names = [clean_class_name(categories[number]['name']) for number in index_of]
        images = {}
        for number, entry in by_id(data['images'], 'images').items():
            h, w = read_size(entry['height']), read_size(entry['width'])
            images[number] = (entry['file_name'].replace('\\', '/'), h, w, [])
        for entry in data['annotations']:
            where = f'annotation {entry.get("id")}: '
            _, h, w, objects = images[entry['image_id']]
            outline = read_outline(entry.get('segmentation'), h, w) if with_masks else None
            objects.append((index_of[entry['category_id']], bool(int(entry.get('iscrowd') or 0)), outline))
            if with_masks and outline is None:
                empty.append(entry.get('id'))
    except KeyError as error:
        raise BadInput(f'{path} (--coco_root) is not a complete instances file: {where}{error} is missing') from error
    except (OSError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f'{path} (--coco_root) is not an instances file of COCO: {where}{error}') from error
    check_class_names(names, f'{path} (--coco_root)')
    if empty:
        print(f'warning: {len(empty)} of {len(data["annotations"])} annotations have no outline, the first is number '
              f'{empty[0]}: they count for the image-level labels, but are missing in the masks')
    return names, list(images.values())


def read_split(path, folder, with_masks, negatives):
    """Reads a split. Returns (class names, dict image name -> (path, h, w, objects), sorted by name). negatives: keep
    images without objects. Raises BadInput for images that are missing, not in `folder`, or have the same name."""
    print(f'reading {path}')
    class_names, images = read_json(path, with_masks)
    # a file name may be absolute and still lie in the folder
    images = [(os.path.relpath(os.path.join(folder, file), folder), *image) for file, *image in images]
    for file, *_ in images:
        if file.startswith(os.pardir) or not file.lower().endswith(EXTENSIONS):
            raise BadInput(f'{path} (--coco_root) has the file name {file!r}, which is not an image in {folder}')
    missing = [file for file, *_ in images if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise BadInput(f'{len(missing)} of the {len(images)} images of {path} are not in {folder} (--coco_root), the '
                       f'first: {missing[0]}')
    used = [image for image in images if image[-1] or negatives]
    names = name_images([file for file, *_ in used], f'{path} (--coco_root)')
    by_file = {file: (os.path.join(folder, file), h, w, objects) for file, h, w, objects in used}
    if negatives:
        print(f'{len(names)} images; {sum(not objects for *_, objects in used)} of them without any annotation')
    else:
        print(f'{len(names)} images; {len(images) - len(names)} more without any annotation are left out')
    return class_names, {name: by_file[file] for name, file in names.items()}


def instances_file(args, split):
    return os.path.join(args.coco_root, 'annotations', f'instances_{split}{args.year}.json')


def read_splits(args):
    """Returns (class names, dict 'train' or 'val' -> images as in `read_split`; none if val has no instances file).
    Raises BadInput if the two do not fit."""
    class_names, splits = {}, {'train': {}, 'val': {}}
    for split in splits:
        path = instances_file(args, split)
        if split == 'val' and not os.path.exists(path):
            print(f'no val.txt: there is no {path}')
            continue
        check_file(path, '--coco_root')
        folder = find_image_folder(args.coco_root, split, args.year)
        class_names[split], splits[split] = read_split(path, folder, args.masks, args.negatives)
    if class_names.get('val', class_names['train']) != class_names['train'] or splits['train'].keys() & splits['val']:
        raise BadInput(f'the instances files of train and val (--coco_root {args.coco_root}) do not belong together: '
                       'categories differ, or an image is in both')
    if not any(objects for *_, objects in splits['train'].values()):
        raise BadInput(f'no image of train has an annotation (--coco_root {args.coco_root})')
    return class_names['train'], splits


def main(args):
    check_range(args, 0, 256, 'num_workers')
    check_out(args.out, MARKER)
    if args.masks and coco_mask is None:
        raise BadInput('--masks draws polygons with pycocotools, which is not installed: pip install pycocotools')
    class_names, splits = read_splits(args)
    pictures = {**splits['train'], **splits['val']}
    labels = {name: np.isin(range(1, len(class_names) + 1), [index for index, *_ in objects]).astype(np.float32)
              for name, (*_, objects) in pictures.items()}

    make_dir(os.path.dirname(os.path.abspath(args.names)), '--names')
    if os.path.isfile(args.names) and read_lines(args.names, '--names') != class_names:
        print(f'warning: {args.names} (--names) has the class names of another data set, which this run replaces; '
              'those of each data set are in its own class_names.txt')
    files = {os.path.join(IMG_FOLDER, name + '.jpg'): picture[0] for name, picture in pictures.items()}
    if args.masks:          # before anything is replaced: with --resume, this refuses masks of other annotations
        digests = {split: file_digest(instances_file(args, split)) for split, images in splits.items() if images}
        folder = ResultFolder(os.path.join(args.out, GT_FOLDER), '--out', '.png', {'annotations': digests})
        todo = open_folders([folder], list(pictures), args.resume)
    write_root(args.out, MARKER, files, labels, class_names, splits)
    write_lines(args.names, class_names)
    print(f'{len(labels)} images of {len(class_names)} classes in {args.out}, class names in {args.names}')
    if args.masks:
        work = ((name, *pictures[name][1:]) for name in todo)
        for _ in parallel_map(functools.partial(write_mask, folder=folder), work, args.num_workers, 'masks'):
            pass
        print(f'{len(todo)} masks written to {folder.path}, {len(pictures) - len(todo)} already there')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
