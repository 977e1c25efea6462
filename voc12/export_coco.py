"""Writes label maps as one file in the JSON format of MS COCO, for tools that read it.

    pip install pycocotools
    python voc12/export_coco.py --label_dir out_rw --voc12_root mydata --class_names mydata/class_names.txt \\
        --out instances_train2014.json

An annotation is one class of one image or, with --parts, one connected part of it. Neither is an instance: two dogs
that touch are one part, and a dog behind a pole is two. Outlines are compressed RLE, so every pixel is kept; `bbox` is
x, y, width, height in pixels, and `area` counts pixels. Category 1 is the first of --class_names. `file_name` is the
image in JPEGImages/ of --voc12_root: name this folder if a program asks for the images. An image without any object has
an entry without annotations. Pixels of 255, whose class is not known, are in no annotation, because the format has no
value for them; the command prints their number.
"""
import argparse
import functools
import json
import os
import sys

import cv2
import numpy as np

try:
    from pycocotools import mask as coco_mask
except ImportError:                 # reported when the command runs; --help works without
    coco_mask = None

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_range, exit_on_bad_input, make_dir
from tool.files import atomic_write
from tool.image_files import IGNORE, decode_image, read_label_map
from tool.outputs import check_class_names
from tool.workers import parallel_map
from voc12.lists import check_images, get_img_path, load_class_names, load_img_name_list, stems
from voc12.masks import wrong_values


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--label_dir', required=True, metavar='DIR', help='folder of the label maps, NAME.png')
    parser.add_argument('--voc12_root', required=True, metavar='ROOT', help='data root of their images')
    parser.add_argument('--class_names', metavar='FILE',
                        help="text file with the names of the foreground classes, one per line (default: VOC's 20)")
    parser.add_argument('--list', metavar='FILE',
                        help='list of the images to write (default: every label map in --label_dir)')
    parser.add_argument('--parts', action='store_true',
                        help='write one annotation per connected part of a class (default: one per class of an image)')
    parser.add_argument('--out', required=True, metavar='JSON', help='file to write')
    parser.add_argument('--num_workers', default=8, type=int, help='number of processes; 0 uses the main process')
    return parser


def split_labels(labels, parts):
    """Yields (class index, bool (H, W) mask) for each annotation of a label map, uint8 (H, W): each class except 0 and
    255 or, with `parts`, each of its parts, whose pixels touch at a side or a corner."""
    for index in np.setdiff1d(labels, (0, IGNORE)).tolist():
        mask = labels == index
        if parts:
            count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            yield from ((index, numbers == number) for number in range(1, count))
        else:
            yield index, mask


def describe_label_map(name, label_dir, voc12_root, num_classes, parts):
    """Returns for one image (its entry in the JSON, list of its annotations, number of its pixels of 255), without ids.
    parts: see `split_labels`. Raises BadInput for a label map that does not fit the image or the classes."""
    path, image_path = os.path.join(label_dir, name + '.png'), get_img_path(name, voc12_root)
    labels = read_label_map(path, '--label_dir')
    h, w = labels.shape
    if decode_image(image_path, f'the image {image_path} (--voc12_root)', lambda img: img.size) != (w, h):
        raise BadInput(f'{path} (--label_dir) is {h}x{w}, and its image {image_path} (--voc12_root) is not')
    beyond = wrong_values(labels, num_classes)
    if beyond:
        raise BadInput(f'{path} (--label_dir) has the value {next(iter(beyond))}; there are {num_classes} classes '
                       '(--class_names)')
    annotations = []
    for index, mask in split_labels(labels, parts):
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        annotations.append({'category_id': index, 'iscrowd': 0, 'area': int(coco_mask.area(rle)),
                            'bbox': coco_mask.toBbox(rle).tolist(),
                            'segmentation': {'size': [h, w], 'counts': rle['counts'].decode('ascii')}})
    image = {'file_name': os.path.basename(image_path), 'height': h, 'width': w}
    return image, annotations, np.count_nonzero(labels == IGNORE)


def main(args):
    check_range(args, 0, 256, 'num_workers')
    if coco_mask is None:
        raise BadInput('this command needs pycocotools, which is not installed: pip install pycocotools')
    class_names = load_class_names(args.class_names)
    check_class_names(args.label_dir, '--label_dir', class_names)
    if args.list:
        names = list(dict.fromkeys(load_img_name_list(args.list, '--list')))         # a name may be there twice
    else:
        names = sorted(stems(args.label_dir, '.png', '--label_dir'))
    if not names:
        raise BadInput(f'no label map, NAME.png, in {args.label_dir} (--label_dir)')
    check_images(names, args.list or args.label_dir, args.voc12_root)
    make_dir(os.path.dirname(os.path.abspath(args.out)), '--out')

    what = 'connected part' if args.parts else 'image and class'
    data = {'info': {'description': f'one annotation for each {what}; these are not instances'},
            'categories': [{'id': index, 'name': name, 'supercategory': ''}
                           for index, name in enumerate(class_names, 1)],
            'images': [], 'annotations': []}
    work = functools.partial(describe_label_map, label_dir=args.label_dir, voc12_root=args.voc12_root,
                             num_classes=len(class_names), parts=args.parts)
    empty = ignored = 0
    for number, (image, annotations, unknown) in enumerate(parallel_map(work, names, args.num_workers, 'labels'), 1):
        data['images'].append({'id': number, **image})
        for annotation in annotations:
            data['annotations'].append({'id': len(data['annotations']) + 1, 'image_id': number, **annotation})
        empty += not annotations
        ignored += unknown
    with atomic_write(args.out) as file:
        file.write(json.dumps(data).encode('ascii'))
    print(f'{args.out}: {len(data["annotations"]):,} annotations, one for each {what}, of {len(names):,} images; '
          f'{empty:,} of the images have no object')
    if ignored:
        print(f'{ignored:,} pixels of {IGNORE} are in no annotation; programs that read the file see background there')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
