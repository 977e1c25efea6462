"""Steps 3 and 6: mIoU of label maps or of score dicts, or its curve over the background score. See the README."""
import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import time

import numpy as np
from tqdm import tqdm

from tool import imutils
from tool.pyutils import BadInput, check_dir, check_file, check_range, exit_on_bad_input, make_dir, str2bool
from voc12.lists import CAT_LIST, GT_FOLDER, IGNORE, NUM_CLASSES, load_img_name_list

CATEGORIES = ['background'] + CAT_LIST
OTHER = len(CATEGORIES)                          # the bin of values that are no class
CURVE = np.arange(60) / 100                      # background scores of the curve


def confusion(gt, pred):
    """int64 (22, 22) pixel counts, rows ground truth, columns prediction, last bin: no class. 255 in gt is left out."""
    counted = gt != IGNORE
    gt, pred = np.minimum(gt[counted], OTHER).astype(np.int64), np.minimum(pred[counted], OTHER).astype(np.int64)
    return np.bincount(gt * (OTHER + 1) + pred, minlength=(OTHER + 1) ** 2).reshape(OTHER + 1, OTHER + 1)


def confusion_curve(gt, scores, thresholds):
    """int64 (thresholds, 22, 22): `confusion` of a CAM dict at each of the ascending background scores, in one pass.

    A pixel belongs to its best class (the lowest of equals; absent classes compete with 0) where that score is
    strictly above the threshold, compared in float32, and else to the background.
    """
    stack = np.zeros((NUM_CLASSES, *gt.shape), np.float32)
    for key, class_map in scores.items():
        stack[key] = class_map
    best = stack.argmax(axis=0)
    thresholds = thresholds.astype(np.float32)
    # at how many of the thresholds, counted from the lowest, does the class win?
    wins = np.searchsorted(thresholds, stack.max(axis=0), side='left')
    counted = gt != IGNORE
    bins = (len(thresholds) + 1, OTHER + 1, OTHER + 1)
    index = np.ravel_multi_index((wins[counted], np.minimum(gt[counted], OTHER), best[counted] + 1), bins)
    histogram = np.bincount(index, minlength=np.prod(bins)).reshape(bins)
    # the class wins at threshold number i where wins > i
    curve = histogram[::-1].cumsum(axis=0)[::-1][1:]
    curve[:, :, 0] = histogram.sum(axis=(0, 2)) - curve.sum(axis=2)
    return curve


def intersection_over_union(matrix):
    """float64 (..., 21) IoU of int64 (..., 22, 22) confusion; 0 for a class that is nowhere."""
    true_positive = np.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - true_positive
    return (true_positive / (union + 1e-10))[..., :OTHER]


def mean_iou(matrix):
    """mIoU in percent of (..., 22, 22) confusion: over all 21 classes, as the reference, and over those that
    occur in the ground truth (fewer in a small data set)."""
    iou = intersection_over_union(matrix) * 100
    present = matrix.sum(axis=-1)[..., :OTHER] > 0
    return iou.mean(axis=-1), (iou * present).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)


def score_image(name, args, thresholds):
    """(int64 (thresholds, 22, 22) confusion of one image, has 255, has an object)."""
    gt_path = os.path.join(args.gt_dir, name + '.png')
    gt = imutils.read_label_map(gt_path, '--gt_dir')
    path = os.path.join(args.predict_dir, name + ('.png' if args.type == 'png' else '.npy'))
    if args.type == 'png':
        scores = {0: imutils.read_label_map(path, '--predict_dir')}
    else:
        scores = imutils.load_scores(path, '--predict_dir', 'crf' if args.type == 'crf' else 'cam')
    for key, array in scores.items():
        if array.shape != gt.shape:
            raise BadInput(f'{path} (--predict_dir) is {"x".join(map(str, array.shape))}, '
                           f'{gt_path} (--gt_dir) {"x".join(map(str, gt.shape))}')
        if key >= NUM_CLASSES + (args.type == 'crf'):
            raise BadInput(f'{path} (--predict_dir) has the key {key}, which is no class of --type {args.type}')
    if args.type == 'npy':
        matrices = confusion_curve(gt, scores, thresholds)
    elif args.type == 'crf':
        matrices = confusion(gt, imutils.strongest_label(scores) if scores else np.zeros_like(gt))[None]
    else:
        matrices = confusion(gt, scores[0])[None]
    return matrices, (gt == IGNORE).any(), ((gt > 0) & (gt != IGNORE)).any()


def evaluate(names, args, thresholds):
    """int64 (thresholds, 22, 22) confusion over a list. Warns of ground truth that cannot be right."""
    total, any_ignored, any_object = 0, False, False
    work = functools.partial(score_image, args=args, thresholds=thresholds)
    # a process takes as long to start as 50 images to score
    workers = min(args.num_workers, multiprocessing.cpu_count(), len(names) // 50)
    with concurrent.futures.ProcessPoolExecutor(max(workers, 1), multiprocessing.get_context('spawn')) as pool:
        results = pool.map(work, names, chunksize=8) if workers > 1 else map(work, names)
        for matrices, ignored, objects in tqdm(results, total=len(names), desc='evaluation', dynamic_ncols=True):
            total += matrices
            any_ignored |= ignored
            any_object |= objects
    if not any_ignored:
        print(f'warning: no file of {args.gt_dir} (--gt_dir) on the list has a pixel of 255, the border of VOC; '
              'it may have been overwritten with predictions')
    if not any_object:
        print(f'warning: no file of {args.gt_dir} (--gt_dir) on the list has an object')
    return total


def write_log(path, result, comment):
    """Appends the time, the comment, the numbers in percent and a ruler to the log file."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(time.strftime('%Y-%m-%d %H:%M:%S') + f'\t{comment}\n')
        file.write('  '.join(f'{key}:{value}' for key, value in result.items()) + '\n')
        file.write('=====================================\n')


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--list', default='./VOC2012/ImageSets/Segmentation/train.txt', help='images to score')
    parser.add_argument('--predict_dir', default='./out_rw', help='folder of predictions, NAME.png or NAME.npy')
    parser.add_argument('--gt_dir', default='./VOC2012/' + GT_FOLDER, help='folder of ground truth, NAME.png')
    parser.add_argument('--logfile', default='./evallog.txt', help='the result is appended to this file')
    parser.add_argument('--comment', required=True, help='a line for the log file')
    parser.add_argument('--type', default='png', choices=['png', 'npy', 'crf'],
                        help='png: label maps; npy: CAM dicts, keys 0..19; crf: CRF dicts, keys 0..20')
    parser.add_argument('--t', type=float, help='background score, for --type npy without --curve')
    parser.add_argument('--curve', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
                        help='mIoU at the background scores 0.00 to 0.59, for --type npy')
    parser.add_argument('--num_workers', default=8, type=int, help='processes; 0 works in the main one')
    return parser


def main(args):
    if args.curve and args.type != 'npy':
        raise BadInput('--curve needs score dicts: --type npy')
    if args.type == 'npy' and not args.curve and args.t is None:
        raise BadInput('--type npy needs a background score, --t, or --curve')
    check_range(args, 0, 256, 'num_workers')
    make_dir(os.path.dirname(os.path.abspath(args.logfile)), '--logfile')
    check_dir(args.predict_dir, '--predict_dir')
    check_dir(args.gt_dir, '--gt_dir')
    names = load_img_name_list(args.list, '--list')
    for name in names:
        check_file(os.path.join(args.gt_dir, name + '.png'), '--gt_dir')
        check_file(os.path.join(args.predict_dir, name + ('.png' if args.type == 'png' else '.npy')), '--predict_dir')

    thresholds = CURVE if args.curve else np.array([args.t if args.type == 'npy' else 0])
    matrix = evaluate(names, args, thresholds)
    iou = intersection_over_union(matrix) * 100                         # (thresholds, 21)
    miou, miou_present = mean_iou(matrix)                               # (thresholds,)
    if args.curve:
        for i, threshold in enumerate(thresholds):
            print(f'{i}/{len(thresholds)} background score: {threshold:.3f}\tmIoU: {miou[i]:.3f}%')
        best = miou.argmax()
        print(f'best: background score {thresholds[best]:.3f}\tmIoU: {miou[best]:.3f}%, '
              f'{miou_present[best]:.3f}% over the classes present')
        write_log(args.logfile, {'mIoU': miou.tolist(), 'mIoU_present': miou_present.tolist()}, args.comment)
        return
    for i, (category, value) in enumerate(zip(CATEGORIES, iou[0])):
        print('%11s:%7.3f%%' % (category, value), end='\t' if i % 2 == 0 else '\n')
    print('\n' + '=' * 54)
    print('%11s:%7.3f%%  (%.3f%% over the classes present)' % ('mIoU', miou[0], miou_present[0]))
    write_log(args.logfile, dict(zip(CATEGORIES, iou[0].tolist()), mIoU=miou[0], mIoU_present=miou_present[0]),
              args.comment)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
