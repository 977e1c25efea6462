"""Writes the image-level labels of training and validation images, a pickled dict name -> float32 multi-hot.

    python voc12/make_cls_labels.py --voc12_root VOC2012

`cd voc12; python make_cls_labels.py --voc12_root VOC2012`, the command of the original release, does the same.
"""
import argparse
import collections
import os
import sys

import numpy as np
from tqdm import tqdm

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_dir, exit_on_bad_input
from tool.files import atomic_write
from tool.image_files import IGNORE, read_label_map
from voc12.canonical import compare_labels
from voc12.lists import (ANNOT_FOLDER, AUG_GT_FOLDER, GT_FOLDER, describe_unknown, join_first, label_from_xml,
                         load_class_names, load_img_name_list)
from voc12.masks import wrong_values

HERE = os.path.dirname(os.path.abspath(__file__))
REPO_ROOT = os.path.dirname(HERE)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--train_list', default='train_aug.txt',
                        help='list of the training images; a file name without folder is looked for in the working '
                             'directory, then beside this script')
    parser.add_argument('--val_list', default='val.txt',
                        help='list of the validation images, found in the same way')
    parser.add_argument('--out', default=os.path.join(HERE, 'cls_labels.npy'),
                        help='file to write (default: cls_labels.npy beside this script, where training looks for it)')
    parser.add_argument('--voc12_root', required=True,
                        help='folder VOC2012 of the devkit; a relative path that does not exist in the working '
                             'directory is looked for in the folder of the repository')
    parser.add_argument('--source', default='xml', choices=['xml', 'seg'],
                        help='xml: the objects of Annotations/, as in the original labels; seg: the masks of '
                             f'{AUG_GT_FOLDER}/ or, where that lacks one, {GT_FOLDER}/')
    parser.add_argument('--class_names',
                        help="text file with the names of the foreground classes, one per line (default: VOC's 20)")
    return parser


def find_list(path):
    """Returns the path of a list: a file name without folder that the working directory lacks is beside this script."""
    if not os.path.isfile(path) and not os.path.dirname(path):
        return os.path.join(HERE, path)
    return path


def find_root(voc12_root):
    """Returns the path of the data root, which may be relative to the working directory or to the repository."""
    in_repo = os.path.join(REPO_ROOT, voc12_root)
    if not os.path.isdir(voc12_root) and os.path.isdir(in_repo):
        print(f'no folder {voc12_root} in the working directory; using {in_repo} (--voc12_root)')
        return in_repo
    check_dir(voc12_root, '--voc12_root')
    return voc12_root


def label_from_mask(path, num_classes):
    """Returns the classes in a label map (0 background, 1..C, 255 ignored) as float32 (C,) multi-hot.
    Raises BadInput for an unreadable file, one with several channels, and values between C and 255."""
    mask = read_label_map(path, '--source seg')
    wrong = wrong_values(mask, num_classes)
    if wrong:
        raise BadInput(f'{path} (--source seg) contains {min(wrong)}; class indices are 0..{num_classes} and {IGNORE}')
    return np.isin(np.arange(1, num_classes + 1), mask).astype(np.float32)


def find_mask(name, voc12_root):
    """Returns the path of the mask of an image: that of the augmented set or, if there is none, the official one."""
    paths = [os.path.join(voc12_root, folder, name + '.png') for folder in (AUG_GT_FOLDER, GT_FOLDER)]
    for path in filter(os.path.isfile, paths):
        return path
    raise BadInput(f'no mask of image {name}: neither {paths[0]} nor {paths[1]} exists (--voc12_root, --source seg)')


def report(lists, labels, class_names):
    """Prints for each list the images per class, the images without any class, and whether it is one of SEAM's.

    lists: dict flag -> list of names; labels: dict name -> float32 (C,).
    """
    counts = [np.sum([labels[name] for name in names], axis=0).astype(int) for names in lists.values()]
    print('images per class' + ''.join(f'{flag:>14}' for flag in lists))
    for i, category in enumerate(class_names):
        print(f'{category:16}' + ''.join(f'{count[i]:14d}' for count in counts))
    print(f'{"images":16}' + ''.join(f'{len(names):14d}' for names in lists.values()))
    for flag, names in lists.items():
        print(f'{flag}: {compare_labels(names, labels)}')
        empty = [name for name in names if not labels[name].any()]
        if empty:
            print(f'warning: {flag}: {len(empty)} images have no class, so training uses them as negatives: '
                  f'{join_first(empty)}')


def main(args):
    lists = {flag: load_img_name_list(find_list(path), flag)
             for flag, path in (('--train_list', args.train_list), ('--val_list', args.val_list))}
    class_names = load_class_names(args.class_names)
    voc12_root = find_root(args.voc12_root)
    out = args.out if args.out.endswith('.npy') else args.out + '.npy'      # np.save does the same
    check_dir(os.path.dirname(os.path.abspath(out)), '--out')

    labels, unknown = {}, collections.Counter()
    names = dict.fromkeys(name for names in lists.values() for name in names)
    for name in tqdm(names, desc=f'labels from {args.source}', disable=None):           # a bar only on a terminal
        if args.source == 'seg':
            labels[name] = label_from_mask(find_mask(name, voc12_root), len(class_names))
        else:
            labels[name] = label_from_xml(os.path.join(voc12_root, ANNOT_FOLDER, name + '.xml'), class_names, unknown)
    with atomic_write(out) as file:
        np.save(file, labels, allow_pickle=True)
    report(lists, labels, class_names)
    if unknown:
        print(f'warning: {describe_unknown(unknown)}')
    print(f'{len(labels)} labels written to {out}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
