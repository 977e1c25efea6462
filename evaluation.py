"""Steps 3 and 6: mIoU of label maps or of score dicts, or its curve over the background score. See the README."""
import argparse
import csv
import functools
import io
import math
import os
import time

import numpy as np

from tool import image_files, score_files, visualization
from tool.cli import BadInput, check_dir, check_file, check_range, exit_on_bad_input, make_dir, str2bool
from tool.files import atomic_write
from tool.image_files import IGNORE
from tool.metrics import class_measures, confusion, confusion_curve, mean_measures
from tool.workers import parallel_map
from voc12.canonical import describe_list
from voc12.lists import GT_FOLDER, load_class_names, load_img_name_list
from voc12.masks import ground_truth_warnings

CURVE = np.arange(60) / 100                      # background scores of the curve


def matching_alpha(score):
    """The CRF exponent a at which the background of a map's value `score` equals it: (1 - score)^a = score."""
    return math.log(score) / math.log(1 - score)


def score_image(name, args, thresholds):
    """(int64 (thresholds, K+1, K+1) confusion of one image, has 255, has an object)."""
    num_classes = len(load_class_names(args.class_names))
    gt_path = os.path.join(args.gt_dir, name + '.png')
    gt = image_files.read_label_map(gt_path, '--gt_dir')
    path = os.path.join(args.predict_dir, name + ('.png' if args.type == 'png' else '.npy'))
    if args.type == 'png':
        scores = {0: image_files.read_label_map(path, '--predict_dir')}
    else:
        scores = score_files.load_scores(path, '--predict_dir', 'crf' if args.type == 'crf' else 'cam')
    for key, array in scores.items():
        if array.shape != gt.shape:
            raise BadInput(f'{path} (--predict_dir) is {"x".join(map(str, array.shape))}, '
                           f'{gt_path} (--gt_dir) {"x".join(map(str, gt.shape))}')
        if key >= num_classes + (args.type == 'crf'):
            raise BadInput(f'{path} (--predict_dir) has the key {key}; there are {num_classes} classes (--class_names) '
                           f'and --type is {args.type}')
    if args.type == 'npy':
        matrices = confusion_curve(gt, scores, thresholds, num_classes)
    elif args.type == 'crf':
        pred = score_files.strongest_label(scores) if scores else np.zeros_like(gt)
        matrices = confusion(gt, pred, num_classes)[None]
    else:
        matrices = confusion(gt, scores[0], num_classes)[None]
    return matrices, (gt == IGNORE).any(), ((gt > 0) & (gt != IGNORE)).any()


def evaluate(names, args, thresholds):
    """int64 (thresholds, K+1, K+1) confusion over a list. Warns of ground truth that cannot be right."""
    total, any_ignored, any_object = 0, False, False
    work = functools.partial(score_image, args=args, thresholds=thresholds)
    for matrices, ignored, objects in parallel_map(work, names, args.num_workers, 'evaluation'):
        total += matrices
        any_ignored |= ignored
        any_object |= objects
    if not any_ignored and not args.class_names:        # other data may do without the border
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


def write_csv(path, header, rows):
    """Writes a table; says where."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode('utf-8'))
    print(f'wrote {path}')


def report_curve(thresholds, matrix, categories, args):
    """Prints the curve, its best point and the CRF exponents that go with it; writes log, CSV and picture."""
    means = mean_measures(matrix)                                       # of (thresholds,)
    for i, threshold in enumerate(thresholds):
        print(f'{i}/{len(thresholds)} background score: {threshold:.3f}\tmIoU: {means["mIoU"][i]:.3f}%')
    write_log(args.logfile, {key: value.tolist() for key, value in means.items()} | {'t': thresholds.tolist()},
              args.comment)
    write_csv(args.out_prefix + '_curve.csv', ['background_score', *means, *categories],
              np.column_stack([thresholds, *means.values(), class_measures(matrix)[0]]).round(4).tolist())
    picture = args.out_prefix + '_curve.png'
    if visualization.draw_curve(picture, thresholds, means['mIoU'], args.comment):
        print(f'wrote {picture}')
    else:
        print('no picture of the curve: pip install matplotlib to get one')
    best = means['mIoU'].argmax()
    score = thresholds[best]
    print(f'best: background score {score:.3f}\tmIoU: {means["mIoU"][best]:.3f}%, '
          f'{means["mIoU_present"][best]:.3f}% over the classes present')
    if 0 < score < 1:
        # as the paper's 4 and 24 stand to the 4.5 of its best background score, 0.26
        alpha = matching_alpha(score)
        print(f'it is that of CRF alpha {alpha:.1f}, where (1 - score)^alpha = score; one alpha below and one well '
              f'above it suit train_aff.py: --crf_alpha {.9 * alpha:.1f} {5.4 * alpha:.1f}')


def report_one(matrix, categories, args):
    """Prints and logs the IoU of every class and the means, in percent; writes the confusion matrix."""
    iou, means = class_measures(matrix)[0], mean_measures(matrix)
    for i, (category, value) in enumerate(zip(categories, iou)):
        print('%11s:%7.3f%%' % (category, value), end='\t' if i % 2 == 0 else '\n')
    print('\n' + '=' * 54)
    print('%11s:%7.3f%%  (%.3f%% over the classes present)' % ('mIoU', means['mIoU'], means['mIoU_present']))
    for key in ('mFP', 'mFN', 'accuracy'):
        print('%11s:%7.3f%%' % (key, means[key]))
    write_log(args.logfile, dict(zip(categories, iou.tolist())) | {key: float(means[key]) for key in means},
              args.comment)
    write_csv(args.out_prefix + '_confusion.csv', ['truth \\ prediction', *categories, 'no class'],
              [[name, *row] for name, row in zip([*categories, 'no class'], matrix.tolist())])


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--list', default='./VOC2012/ImageSets/Segmentation/train.txt', help='images to score')
    parser.add_argument('--predict_dir', default='./out_rw', help='folder of predictions, NAME.png or NAME.npy')
    parser.add_argument('--gt_dir', default='./VOC2012/' + GT_FOLDER, help='folder of ground truth, NAME.png')
    parser.add_argument('--class_names', help="names of the foreground classes, one a line; VOC's without it")
    parser.add_argument('--num_workers', default=8, type=int, help='processes; 0 works in the main one')
    # what is scored
    parser.add_argument('--type', default='png', choices=['png', 'npy', 'crf'],
                        help='png: label maps; npy: CAM dicts, keys from 0; crf: CRF dicts, where 0 is the background')
    parser.add_argument('--t', type=float, help='background score, for --type npy without --curve')
    parser.add_argument('--curve', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
                        help='mIoU over the background scores of --t_list, for --type npy')
    parser.add_argument('--t_list', type=float, nargs='+', metavar='T',
                        help='background scores of the curve, ascending; 0.00 to 0.59 without it')
    # outputs
    parser.add_argument('--logfile', default='./evallog.txt', help='the result is appended to this file')
    parser.add_argument('--comment', required=True, help='a line for the log file')
    parser.add_argument('--out_prefix', help='of the files _confusion.csv or _curve.csv and _curve.png; not given: '
                                             'the name of --predict_dir, beside the log file')
    return parser


def main(args):
    if (args.curve or args.t_list) and not (args.curve and args.type == 'npy'):
        raise BadInput('a curve, with or without --t_list, is made from score dicts: --type npy --curve True')
    if args.type == 'npy' and not args.curve and args.t is None:
        raise BadInput('--type npy needs a background score, --t, or --curve')
    if args.t_list and sorted(args.t_list) != args.t_list:
        raise BadInput('--t_list must ascend')
    check_range(args, 0, 256, 'num_workers')
    folder = os.path.dirname(os.path.abspath(args.logfile))
    make_dir(folder, '--logfile')
    if args.out_prefix is None:
        args.out_prefix = os.path.join(folder, os.path.basename(os.path.abspath(args.predict_dir)))
    make_dir(os.path.dirname(os.path.abspath(args.out_prefix)), '--out_prefix')
    check_dir(args.predict_dir, '--predict_dir')
    check_dir(args.gt_dir, '--gt_dir')
    class_names = load_class_names(args.class_names)
    names = load_img_name_list(args.list, '--list')
    for name in names:
        check_file(os.path.join(args.gt_dir, name + '.png'), '--gt_dir')
        if args.type == 'png':
            check_file(os.path.join(args.predict_dir, name + '.png'), '--predict_dir')
        else:
            score_files.find_scores(os.path.join(args.predict_dir, name + '.npy'), '--predict_dir')
    print(f'{args.list}: {describe_list(names, class_names)}')
    for warning in ground_truth_warnings(args.gt_dir, names, class_names):
        print(f'warning: {warning}')

    categories = ['background', *class_names]
    if args.curve:
        thresholds = np.array(args.t_list) if args.t_list else CURVE
        report_curve(thresholds, evaluate(names, args, thresholds), categories, args)
    else:
        report_one(evaluate(names, args, np.array([args.t or 0.]))[0], categories, args)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
