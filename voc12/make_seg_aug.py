"""Writes SegmentationClassAug, the masks of VOC's augmented training set: VOC's own, and those of SBD as PNG.

    python voc12/make_seg_aug.py --sbd_root benchmark_RELEASE --voc12_root VOC2012

The images are those of VOC train and val and of SBD train and val, 12,031 in all. If VOC has a mask of an image, it is
copied with its borders of 255; the other masks are SBD's, which have no borders. `make_lists.py --seg_aug
SegmentationClassAug` makes train_aug.txt from the folder.
"""
import argparse
import collections
import functools
import os
import shutil
import sys

import numpy as np
from scipy.io import loadmat

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_dir, check_range, exit_on_bad_input, make_dir
from tool.files import atomic_write
from tool.image_files import IGNORE, read_label_map, save_label_map
from tool.workers import parallel_map
from voc12.canonical import compare_names
from voc12.lists import AUG_GT_FOLDER, CAT_LIST, GT_FOLDER, LIST_FOLDER, read_names, read_sbd, stems

NUM_CLASSES = len(CAT_LIST)        # SBD has the classes of VOC, in the same order


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--sbd_root', required=True, help='folder benchmark_RELEASE of SBD, or dataset in it')
    parser.add_argument('--voc12_root', default='VOC2012', help='folder VOC2012 of the devkit')
    parser.add_argument('--out', help=f'folder for the masks (default: {AUG_GT_FOLDER} in --voc12_root)')
    parser.add_argument('--num_workers', default=8, type=int, help='number of processes; 0 uses the main process')
    parser.add_argument('--resume', action='store_true', help='keep the masks that an interrupted run has finished')
    return parser


def collect_sources(voc12_root, sbd_root):
    """Returns (dict image name -> path of its mask, a .png of VOC or a .mat of SBD; set of the names of VOC val).
    Raises BadInput if masks are missing."""
    dataset, sbd = read_sbd(sbd_root)
    train, val = (read_names(os.path.join(voc12_root, LIST_FOLDER, key + '.txt'), '--voc12_root')
                  for key in ('train', 'val'))
    voc = train | val
    gt_dir, cls_dir = os.path.join(voc12_root, GT_FOLDER), os.path.join(dataset, 'cls')
    official = stems(gt_dir, '.png', '--voc12_root')
    missing = sorted((voc | sbd - stems(cls_dir, '.mat', '--sbd_root')) - official)
    if missing:
        raise BadInput(f'{len(missing)} of the listed masks are missing, the first of image {missing[0]}: those of VOC '
                       f'belong in {gt_dir} (--voc12_root), those of SBD in {cls_dir} (--sbd_root)')
    return {name: os.path.join(gt_dir, name + '.png') if name in official else os.path.join(cls_dir, name + '.mat')
            for name in sorted(voc | sbd)}, val


def read_sbd_mask(path):
    """Reads the label map (H, W) in SBD's cls/NAME.mat, with the integer type of the file (uint8 in the release).

    The file has MATLAB's version 5, and a struct GTcls with the field Segmentation: 0 background, 1..20.
    Raises BadInput for every other content.
    """
    try:
        struct = np.asarray(loadmat(path, appendmat=False, variable_names=['GTcls']).get('GTcls'))      # (1, 1)
    except Exception as error:      # damaged files raise anything from zlib.error to IndexError
        raise BadInput(f'cannot read {path} (--sbd_root) as a MATLAB 5 file: {" ".join(str(error).split())}') from error
    if struct.size != 1 or 'Segmentation' not in (struct.dtype.names or ()):
        raise BadInput(f'{path} (--sbd_root) is no mask of SBD: it has no struct GTcls with a field Segmentation')
    labels = np.asarray(struct['Segmentation'].item())
    if labels.ndim != 2 or labels.dtype.kind not in 'ui':
        raise BadInput(f'{path} (--sbd_root): GTcls.Segmentation is {labels.dtype} of shape {labels.shape}, '
                       'not integers of shape (height, width)')
    return labels


def write_mask(source, out):
    """Writes the mask `source`, a .png of VOC or a .mat of SBD, as .png into the folder `out`. VOC's masks are copied
    byte for byte. Returns the extension of the source. Raises BadInput, also for values that are no class."""
    name, extension = os.path.splitext(os.path.basename(source))
    flag = '--sbd_root' if extension == '.mat' else '--voc12_root'
    labels = read_sbd_mask(source) if extension == '.mat' else read_label_map(source, flag)
    wrong = np.setdiff1d(labels, [*range(NUM_CLASSES + 1), IGNORE])
    if wrong.size:
        raise BadInput(f'{source} ({flag}) contains {wrong[0]}; class indices are 0..{NUM_CLASSES} and {IGNORE}')
    path = os.path.join(out, name + '.png')
    if extension == '.mat':
        save_label_map(path, labels)
    else:
        with open(source, 'rb') as official, atomic_write(path) as file:
            shutil.copyfileobj(official, file)
    return extension


def main(args):
    check_range(args, 0, 256, 'num_workers')
    check_dir(args.voc12_root, '--voc12_root')
    sources, val = collect_sources(args.voc12_root, args.sbd_root)
    out = args.out or os.path.join(args.voc12_root, AUG_GT_FOLDER)
    if os.path.realpath(out) == os.path.realpath(os.path.join(args.voc12_root, GT_FOLDER)):
        raise BadInput(f'{out} (--out) is the folder of the official masks, where SBD\'s must not be: name another')
    make_dir(out, '--out')

    # a mask gets its name when it is complete, so an existing one needs no check
    there = stems(out, '.png', '--out') if args.resume else set()
    todo = [path for name, path in sources.items() if name not in there]
    written = collections.Counter(parallel_map(functools.partial(write_mask, out=out), todo, args.num_workers, 'masks'))
    print(f'{out}: {written[".mat"]} masks converted from SBD, {written[".png"]} copied from VOC, '
          f'{len(sources) - len(todo)} already there')
    train_aug = stems(out, '.png', '--out') - val           # as make_lists.py --seg_aug will find it
    print(f'masks without those of VOC val: {len(train_aug)} names, {compare_names(train_aug, "train_aug")}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
