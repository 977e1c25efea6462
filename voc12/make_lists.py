"""Writes the image lists that training and inference read, from the VOC 2012 devkit and its SBD augmentation.

    python voc12/make_lists.py --voc12_root VOC2012 --sbd_root benchmark_RELEASE
    python voc12/make_lists.py --voc12_root VOC2012 --seg_aug SegmentationClassAug

Writes train.txt, val.txt, test.txt (if the devkit has it) and train_aug.txt, and says for each whether it is the list
that SEAM used. A line is `/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png`, a form that other weakly supervised
code also reads; this repository reads only the first column. Lines are sorted by name.
"""
import argparse
import os
import sys

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_dir, exit_on_bad_input, make_dir
from voc12.canonical import CANONICAL, compare_names
from voc12.data_root import write_lines
from voc12.lists import (ANNOT_FOLDER, AUG_GT_FOLDER, IMG_FOLDER, LIST_FOLDER, join_first, get_img_path, read_names,
                         read_sbd, stems)

ONE_COLUMN = ('test', 'all_annotated')      # lists in which some or all images have no mask


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--voc12_root', default='VOC2012', help='folder VOC2012 of the devkit')
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--sbd_root', help='folder benchmark_RELEASE of SBD, or the folder dataset in it; train_aug '
                                           'becomes VOC train plus SBD train and val, minus VOC val')
    source.add_argument('--seg_aug', help='folder of PNG masks, also relative to --voc12_root; train_aug becomes VOC '
                                          'train plus all images with a mask, minus VOC val')
    parser.add_argument('--all_annotated', action='store_true',
                        help='also write all_annotated.txt, every image with an XML annotation, minus VOC val and '
                             'test; these are more images than SEAM was trained on')
    parser.add_argument('--out_dir', default=os.path.dirname(os.path.abspath(__file__)),
                        help='folder for the lists (default: the folder of this script)')
    return parser


def names_of_sbd(sbd_root):
    """Returns the set of the names in SBD's lists."""
    folder, names = read_sbd(sbd_root)
    masks = os.path.join(folder, 'cls')
    missing = sorted(names - stems(masks, '.mat', '--sbd_root')) if os.path.isdir(masks) else []
    if missing:
        print(f'warning: {len(missing)} names of SBD without a mask in {masks}: {join_first(missing)}')
    return names


def collect_lists(args):
    """Returns a dict list name -> set of image names, for all lists that the flags allow."""
    folder = os.path.join(args.voc12_root, LIST_FOLDER)
    keys = ['train', 'val', 'test']
    if not os.path.isfile(os.path.join(folder, 'test.txt')):
        keys.remove('test')
        print(f'test.txt is not written: {folder} has no test.txt, which is in the test part of the devkit')
    lists = {key: read_names(os.path.join(folder, key + '.txt'), '--voc12_root') for key in keys}

    if args.sbd_root:
        lists['train_aug'] = (names_of_sbd(args.sbd_root) | lists['train']) - lists['val']
    elif args.seg_aug:
        masks = args.seg_aug if os.path.isdir(args.seg_aug) else os.path.join(args.voc12_root, args.seg_aug)
        lists['train_aug'] = (stems(masks, '.png', '--seg_aug') | lists['train']) - lists['val']
    else:
        print('train_aug.txt is not written: it needs --sbd_root (the SBD release) or --seg_aug (its masks as PNG)')
        if os.path.isdir(os.path.join(args.voc12_root, AUG_GT_FOLDER)):
            print(f'the data root has such masks: use --seg_aug {AUG_GT_FOLDER}')
    if args.all_annotated:
        annotated = stems(os.path.join(args.voc12_root, ANNOT_FOLDER), '.xml', '--voc12_root')
        images = {name for name in annotated if os.path.isfile(get_img_path(name, args.voc12_root))}
        lists['all_annotated'] = images - lists['val'] - lists.get('test', set())
    for key, names in lists.items():
        if not names:
            raise BadInput(f'{key}.txt would be empty: check {folder} and {ANNOT_FOLDER} (--voc12_root)')
    return lists


def main(args):
    check_dir(os.path.join(args.voc12_root, IMG_FOLDER), '--voc12_root')
    lists = collect_lists(args)      # all of them before the first is written, so an error leaves the old ones
    make_dir(args.out_dir, '--out_dir')
    for key, names in lists.items():
        names = sorted(names)
        path = os.path.join(args.out_dir, key + '.txt')
        lines = [f'/{IMG_FOLDER}/{name}.jpg' for name in names]
        if key not in ONE_COLUMN:
            lines = [f'{line} /{AUG_GT_FOLDER}/{name}.png' for line, name in zip(lines, names)]
        write_lines(path, lines)
        verdict = compare_names(names, key) if key in CANONICAL else 'a list that SEAM did not use'
        print(f'{path}: {len(names)} names, {verdict}')
        missing = [name for name in names if not os.path.isfile(get_img_path(name, args.voc12_root))]
        if missing:
            print(f'warning: {path}: {len(missing)} names without an image in {IMG_FOLDER}: {join_first(missing)}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
