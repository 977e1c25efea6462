"""Makes a data root in VOC's layout from MS COCO, for image-level training and, with --masks, for scoring.

    python voc12/make_coco.py --coco_root coco --masks
    python train_SEAM.py --voc12_root COCO --train_list COCO/ImageSets/Segmentation/train.txt \\
        --cls_labels COCO/cls_labels.npy --class_names voc12/coco_names.txt ...

Reads annotations/instances_{train,val}2014.json and the images in {train,val}2014/ or images/{train,val}2014/ below
--coco_root; links to the images. A class is a category; its index is the category's place by ascending id (ids have
gaps: COCO's are 1 to 90 for 80 categories). Crowd regions count like objects.

Training refuses images without a class, and so does inference, which takes the classes from the labels. So images
without any annotation are left out: about 700 of the 82,783 training and 400 of the 40,504 validation images of 2014.
"""
import argparse
import functools
import json
import os
import re
import sys

import cv2
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
# `python voc12/make_coco.py` puts voc12/ on the path, not the repository root
sys.path.insert(0, os.path.dirname(HERE))

from tool.cli import BadInput, check_file, check_range, exit_on_bad_input, make_dir
from tool.image_files import IGNORE, save_label_map
from tool.workers import parallel_map
from voc12.lists import GT_FOLDER, IMG_FOLDER
from voc12.make_custom import check_out, write_lines, write_root

SPLITS = ('train', 'val')
MARKER = 'COCO.txt'                # tells a folder of ours from others
FINE = 8                           # grid points per pixel side that polygons are drawn on; even: centres are on it


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='Makes a data root in the layout of VOC from COCO: links to the images, lists, image-level '
                    'labels, masks, class names. Images without any annotation are left out.')
    parser.add_argument('--coco_root', required=True, type=str,
                        help='folder with annotations/instances_train2014.json and instances_val2014.json, and the '
                             'images in train2014/ and val2014/ or in images/train2014/ and images/val2014/')
    parser.add_argument('--out', default='COCO', type=str, metavar='ROOT',
                        help='folder to write, the --voc12_root of the other scripts: new, empty, or made by this '
                             'script before (default: %(default)s)')
    parser.add_argument('--names', default=os.path.join(HERE, 'coco_names.txt'), type=str, metavar='FILE',
                        help='text file to write, the --class_names of the other scripts: one class a line, by '
                             'ascending category id (default: %(default)s)')
    parser.add_argument('--masks', action='store_true',
                        help=f'write {GT_FOLDER}/ too: palette PNGs, 0 background, class index from 1, for '
                             'evaluation.py; masks that are there already are kept, so an interrupted run goes on')
    parser.add_argument('--overwrite', action='store_true', help='make masks again that are there already')
    parser.add_argument('--year', default=2014, type=int, help='the year in the names above (default: %(default)s)')
    parser.add_argument('--num_workers', default=8, type=int,
                        help='processes for the masks; 0 works in the main one (default: %(default)s)')
    return parser


# ----- outlines: a list of float32 (n, 2) polygons, x and y in pixels, or int64 (runs,) run lengths -----

def decode_counts(text):
    """Run lengths (list of int) of COCO's compressed RLE string.

    A character is 48 plus 6 bits: the lower 5 belong to a number, least significant first, the top one says that the
    number goes on. Bit 4 of the last group is the sign. From index 3 on the number is the difference to the run
    length two places before.
    """
    counts, value, shift = [], 0, 0
    for char in text:
        bits = ord(char) - 48
        value |= (bits & 0x1f) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def read_outline(segmentation, h, w):
    """Outline of the json's `segmentation`: polygons [[x, y, x, y, ...], ...], or an RLE object {'size': [h, w],
    'counts': list or compressed string} of an image of h x w pixels. Raises ValueError."""
    if isinstance(segmentation, dict):
        counts = segmentation['counts']
        counts = np.array(decode_counts(counts) if isinstance(counts, str) else counts, np.int64)
        if segmentation['size'] != [h, w] or counts.sum() != h * w or counts.min() < 0:
            raise ValueError(f'the run lengths do not fill the {h} x {w} pixels of the image')
        return counts
    if not segmentation or any(len(polygon) % 2 or len(polygon) < 6 for polygon in segmentation):
        raise ValueError('a polygon needs an even count of numbers, 6 or more')
    return [np.array(polygon, np.float32).reshape(-1, 2) for polygon in segmentation]


def fill_runs(counts, h, w):
    """bool (h, w) mask of run lengths, int64 (runs,): zeros and ones in turn, zeros first, column after column."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(w, h).T


def fill_polygons(polygons, h, w):
    """bool (h, w) union of polygons, float32 (n, 2) x, y; pixel (row, column) covers column..column + 1, row..row + 1.

    A pixel is in where its centre is. cv2.fillPoly takes in the line around too, which would make every object half a
    pixel wider on all sides; so it draws on a grid FINE times as fine, of which the centres are kept.
    """
    mask = np.zeros((h, w), bool)
    points = np.concatenate(polygons)
    left, top = np.clip(np.floor(points.min(axis=0)), 0, (w, h)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (w, h)).astype(int)
    fine = np.zeros(((bottom - top) * FINE, (right - left) * FINE), np.uint8)
    if fine.size:
        for polygon in polygons:      # one by one: within a call, fillPoly leaves out what two polygons share
            cv2.fillPoly(fine, [np.round((polygon - (left, top)) * FINE).astype(np.int32)], 1)
        mask[top:bottom, left:right] = fine[FINE // 2::FINE, FINE // 2::FINE] > 0
    return mask


def paint_objects(h, w, objects):
    """uint8 (h, w) label map: 0 background, else the class index. objects: list of (class index, is a crowd, outline).

    Crowds first, then objects by falling area in pixels, so that what is small stays visible; of equals the later
    one is on top.
    """
    layers = []
    for index, crowd, outline in objects:
        mask = fill_polygons(outline, h, w) if isinstance(outline, list) else fill_runs(outline, h, w)
        layers.append((not crowd, -np.count_nonzero(mask), index, mask))
    labels = np.zeros((h, w), np.uint8)
    for _, _, index, mask in sorted(layers, key=lambda layer: layer[:2]):
        labels[mask] = index
    return labels


def write_mask(picture, folder):
    """Writes folder/NAME.png. picture: (NAME, h, w, objects)."""
    name, h, w, objects = picture
    save_label_map(os.path.join(folder, name + '.png'), paint_objects(h, w, objects))


# ----- annotations -----

def find_split(coco_root, split, year):
    """(instances file, image folder) of a split. Raises BadInput where one of them is missing."""
    path = os.path.join(coco_root, 'annotations', f'instances_{split}{year}.json')
    check_file(path, '--coco_root')
    folders = [os.path.join(coco_root, *inner, f'{split}{year}') for inner in ((), ('images',))]
    for folder in folders:
        if os.path.isdir(folder):
            return path, folder
    raise BadInput(f'no such folder: {folders[0]}, nor {folders[1]} (--coco_root)')


def read_json(path, with_masks):
    """Reads an instances file: (class names, by ascending category id; dict file name of the image -> (h, w, objects)).
    objects: as in `paint_objects`; outlines are None without masks. Raises BadInput for any other content."""
    where = ''
    try:
        with open(path, encoding='utf-8') as file:
            data = json.load(file)
        categories = {entry['id']: ' '.join(entry['name'].split()) for entry in data['categories']}
        index_of = {number: index for index, number in enumerate(sorted(categories), 1)}
        images = {entry['id']: (entry['file_name'], entry['height'], entry['width'], []) for entry in data['images']}
        for entry in data['annotations']:
            where = f'annotation {entry.get("id")}: '
            _, h, w, objects = images[entry['image_id']]
            outline = read_outline(entry['segmentation'], h, w) if with_masks else None
            objects.append((index_of[entry['category_id']], bool(entry.get('iscrowd')), outline))
    except KeyError as error:
        raise BadInput(f'{path} (--coco_root) is no complete instances file: {where}{error} is missing') from error
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f'{path} (--coco_root) is no instances file of COCO: {where}{error}') from error
    names = [categories[number] for number in index_of]
    if not 1 <= len(set(names)) == len(names) < IGNORE or 'background' in names:
        raise BadInput(f'{path} (--coco_root) has {len(names)} categories; 1 to {IGNORE - 1} are possible, of '
                       'different names, and none may be called background')
    return names, {file: (h, w, objects) for file, h, w, objects in images.values()}


def read_split(path, folder, with_masks):
    """Reads a split: (class names, dict image name -> (path, h, w, objects), sorted by name), without images that have
    no object. Raises BadInput for images that are missing, or whose name does not suit a list."""
    print(f'reading {path}')
    class_names, images = read_json(path, with_masks)
    odd = [file for file in images if not re.fullmatch(r'[\w-][\w.-]*\.jpe?g', file, re.IGNORECASE)]
    if odd:
        raise BadInput(f'{path} (--coco_root) has the file name {odd[0]!r}; plain names are needed: NAME.jpg, without '
                       'folders and blanks')
    missing = [file for file in images if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise BadInput(f'{len(missing)} of the {len(images)} images of {path} are not in {folder} (--coco_root), the '
                       f'first: {missing[0]}')
    pictures = {os.path.splitext(file)[0]: (os.path.join(folder, file), *images[file]) for file in sorted(images)
                if images[file][-1]}
    print(f'{len(pictures)} images; {len(images) - len(pictures)} more without any annotation are left out')
    return class_names, pictures


def main(args):
    check_range(args, 0, 256, 'num_workers')
    check_out(args.out, MARKER)
    sources = [find_split(args.coco_root, split, args.year) for split in SPLITS]
    (class_names, train), (val_names, val) = (read_split(*source, args.masks) for source in sources)
    if class_names != val_names or train.keys() & val.keys():
        raise BadInput(f'{sources[0][0]} and {sources[1][0]} (--coco_root) do not belong together: categories differ, '
                       'or an image is in both')
    pictures = {**train, **val}
    labels = {name: np.zeros(len(class_names), np.float32) for name in pictures}
    for name, (_, _, _, objects) in pictures.items():
        labels[name][[index - 1 for index, _, _ in objects]] = 1.

    make_dir(os.path.dirname(os.path.abspath(args.names)), '--names')
    files = {os.path.join(IMG_FOLDER, name + '.jpg'): picture[0] for name, picture in pictures.items()}
    write_root(args.out, MARKER, files, labels, class_names, dict(zip(SPLITS, (train, val))))
    write_lines(args.names, class_names)
    print(f'{len(labels)} images of {len(class_names)} classes in {args.out}, class names in {args.names}')
    if args.masks:
        folder = os.path.join(args.out, GT_FOLDER)
        make_dir(folder, '--out')
        todo = [(name, *picture[1:]) for name, picture in pictures.items()
                if args.overwrite or not os.path.isfile(os.path.join(folder, name + '.png'))]
        for _ in parallel_map(functools.partial(write_mask, folder=folder), todo, args.num_workers, 'masks'):
            pass
        print(f'{len(todo)} masks written to {folder}, {len(pictures) - len(todo)} already there')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
