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
from voc12.canonical import describe_list, find_canonical
from voc12.lists import CAT_LIST, GT_FOLDER, load_class_names, load_img_name_list
from voc12.masks import ground_truth_warnings

CURVE = np.arange(60) / 100                      # background scores of the curve, as in the reference
LONG_CURVE = np.arange(100) / 100


def score_image(name, args, thresholds, num_classes):
    """Of one image: int64 (thresholds, K+1, K+1) confusion, and int64 (256,) pixels of each value in its ground truth
    and in its label map (--type png; 0 for score dicts)."""
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
    gt_values, pred_values = np.bincount(gt.ravel(), minlength=256), np.zeros(256, np.int64)
    if args.type == 'npy':
        return confusion_curve(gt, scores, thresholds, num_classes), gt_values, pred_values
    if args.type == 'crf':
        pred = score_files.strongest_label(scores) if scores else np.zeros_like(gt)
    else:
        pred = scores[0]
        pred_values = np.bincount(pred.ravel(), minlength=256)
    return confusion(gt, pred, num_classes)[None], gt_values, pred_values


def warn_of_values(gt_values, pred_values, num_classes, args):
    """Prints what cannot be right about the values of label maps, from int64 (256,) counts of their pixels."""
    if not gt_values[IGNORE] and not args.class_names:        # other data may do without the border
        print(f'warning: no file of {args.gt_dir} (--gt_dir) on the list has a pixel of 255, the border of VOC; '
              'it may have been overwritten with predictions')
    if not gt_values[1:IGNORE].any():
        print(f'warning: no file of {args.gt_dir} (--gt_dir) on the list has an object')
    for what, values in ((f'{args.gt_dir} (--gt_dir)', gt_values),
                         (f'{args.predict_dir} (--predict_dir)', pred_values)):
        # 255 is known: ignored in ground truth, "no class" in predictions
        beyond = [value for value in np.flatnonzero(values) if num_classes < value < IGNORE]
        if beyond:
            numbers = ', '.join(map(str, beyond[:10])) + (', ...' if len(beyond) > 10 else '')
            print(f'warning: {what} has label values beyond the {num_classes} classes (--class_names), which count as '
                  f'"no class": {numbers}, in {values[beyond].sum():,} pixels')


def evaluate(names, args, thresholds):
    """int64 (thresholds, K+1, K+1) confusion over a list. Warns of label maps that cannot be right."""
    num_classes = len(load_class_names(args.class_names))
    total, gt_values, pred_values = 0, 0, 0
    work = functools.partial(score_image, args=args, thresholds=thresholds, num_classes=num_classes)
    for matrices, gt_counts, pred_counts in parallel_map(work, names, args.num_workers, 'evaluation'):
        total += matrices
        gt_values += gt_counts
        pred_values += pred_counts
    warn_of_values(gt_values, pred_values, num_classes, args)
    return total


# ----- results -----

def write_log(path, numbers, comment):
    """Appends the time, the comment, the numbers in percent and a ruler to the log file."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(time.strftime('%Y-%m-%d %H:%M:%S') + f'\t{" ".join(comment.split())}\n')
        file.write('  '.join(f'{key}:{value}' for key, value in numbers.items()) + '\n')
        file.write('=====================================\n')


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode('utf-8'))


def write_results(args, result, log, end, header, rows):
    """Writes `result` (dict) and a larger table as CSV, and the log file's entry. Returns what could not be written, as
    text: the result is printed all the same."""
    faults = []
    for write, path, *content in ((write_csv, args.out_prefix + '_result.csv', result, [result.values()]),
                                  (write_csv, args.out_prefix + end, header, rows),
                                  (write_log, args.logfile, log, args.comment)):
        try:
            write(path, *content)
        except BadInput as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f'cannot write {path}: {error.strerror}')
    return faults


def matching_alpha(score):
    """The CRF exponent a at which the background of a map's value `score` equals it: (1 - score)^a = score."""
    return math.log(score) / math.log(1 - score)


def suggest_alphas(score, num_images):
    """A line on the exponents that go with the best background score, in (0, 1), of so many images: they stand to its
    own as the paper's 4, 24 and 6 stand to the 4.5 of its best background score, 0.26."""
    alpha = matching_alpha(score)
    low, high, walk = (max(factor * alpha, .1) for factor in (.9, 5.4, 1.35))
    images = 'image' if num_images == 1 else 'images'
    return (f'it is that of CRF alpha {alpha:.1f}, where (1 - score)^alpha = score. From the ground truth of '
            f'{num_images:,} {images}, one alpha below and one well above it suit train_aff.py: --crf_alpha {low:.1f} '
            f'{high:.1f}, and infer_aff.py --alpha {walk:.1f} is where to start with the random walk')


def report_curve(thresholds, matrix, categories, chosen, result, args):
    """Reports the curve, its best point and the exponents that go with it. Returns what could not be written."""
    means = mean_measures(matrix, chosen)                               # of (thresholds,)
    ranked = means['mIoU' if chosen is None else 'mIoU_chosen']
    count = len(args.t_list or CURVE)
    # the reference's curve ends at 0.59; where it has its best point near there, it goes on
    shown = len(thresholds) if ranked[:count].argmax() >= count - 10 else count
    best = ranked[:shown].argmax()
    score, good = thresholds[best], thresholds[ranked >= 0.95 * ranked[best]]
    highest = {key: round(value[best].item(), 4) for key, value in means.items()}
    result |= {'background_score': score, 'plateau': round(good.max() - good.min(), 4), **highest}
    curve = {key: value[:shown] for key, value in means.items()}
    log = {'best_background_score': score, **{'best_' + key: value for key, value in highest.items()},
           **{key: value.tolist() for key, value in curve.items()}, 't': thresholds[:shown].tolist()}
    table = np.column_stack([thresholds[:shown], *curve.values(), class_measures(matrix)[0][:shown]])
    faults = write_results(args, result, log, '_curve.csv', ['background_score', *curve, *categories],
                           table.round(4).tolist())
    for i, miou in enumerate(curve['mIoU']):
        print(f'{i}/{count if i < count else shown} background score: {thresholds[i]:.3f}\tmIoU: {miou:.3f}%')
    picture = args.out_prefix + '_curve.png'
    print(visualization.draw_curve(picture, thresholds[:shown], ranked[:shown], args.comment) or f'wrote {picture}')
    text = f'mIoU: {result["mIoU"]:.3f}%, {result["mIoU_present"]:.3f}% over the classes present'
    if chosen is not None:
        text += f', {result["mIoU_chosen"]:.3f}% over {", ".join(args.mean_classes)}'
    print(f'best: background score {score:.3f}\t{text}')
    if 0 < score < 1:
        print(suggest_alphas(score, result['images']))
    return faults


def report_one(matrix, categories, chosen, result, args):
    """Reports the IoU of every class and the means, in percent. Returns what could not be written."""
    iou, means = class_measures(matrix)[0], mean_measures(matrix, chosen)
    means = {key: float(value) for key, value in means.items()}
    result |= {'background_score': args.t if args.type == 'npy' else '', 'plateau': '',
               **{key: round(value, 4) for key, value in means.items()}}
    faults = write_results(args, result, dict(zip(categories, iou.tolist())) | means, '_confusion.csv',
                           ['truth \\ prediction', *categories, 'no class'],
                           [[name, *row] for name, row in zip([*categories, 'no class'], matrix.tolist())])
    for i, (category, value) in enumerate(zip(categories, iou)):
        print('%11s:%7.3f%%' % (category, value), end='\t' if i % 2 == 0 else '\n')
    print('\n' + '=' * 54)
    print('%11s:%7.3f%%  (%.3f%% over the classes present)' % ('mIoU', means['mIoU'], means['mIoU_present']))
    if chosen is not None:
        print('%11s:%7.3f%%  over %s' % ('mIoU', means['mIoU_chosen'], ', '.join(args.mean_classes)))
    for key in ('mFP', 'mFN', 'accuracy'):
        print('%11s:%7.3f%%' % (key, means[key]))
    return faults


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
                        help='background scores of the curve, ascending; 0.00 to 0.59 without it, and on to 0.99 where '
                             'the best is near the end')
    parser.add_argument('--mean_classes', nargs='+', metavar='NAME',
                        help='average over these classes too, and pick the best background score, mFP and mFN by them: '
                             'background cat dog ...')
    # outputs
    parser.add_argument('--logfile', default='./evallog.txt', help='the result is appended to this file')
    parser.add_argument('--comment', required=True, help='a line for the log file')
    parser.add_argument('--out_prefix', help='of the files _result.csv, and _confusion.csv or _curve.csv and '
                                             '_curve.png; not given: the name of --predict_dir, beside the log file')
    return parser


def check_args(args):
    if (args.curve or args.t_list) and not (args.curve and args.type == 'npy'):
        raise BadInput('a curve, with or without --t_list, is made from score dicts: --type npy --curve True')
    if args.type == 'npy' and not args.curve and args.t is None:
        raise BadInput('--type npy needs a background score, --t, or --curve')
    for name in ('t', 't_list'):
        if getattr(args, name) is not None:
            check_range(args, -1000, 1000, name)
    if args.t_list and sorted(args.t_list) != args.t_list:
        raise BadInput('--t_list must ascend')
    check_range(args, 0, 256, 'num_workers')
    if os.path.isdir(args.logfile) or not os.path.basename(args.logfile):
        raise BadInput(f'--logfile names a folder, {args.logfile}: name a file in it')
    folder = os.path.dirname(os.path.abspath(args.logfile))
    make_dir(folder, '--logfile')
    if args.out_prefix is None:
        args.out_prefix = os.path.join(folder, os.path.basename(os.path.abspath(args.predict_dir)))
    make_dir(os.path.dirname(os.path.abspath(args.out_prefix)), '--out_prefix')
    check_dir(args.predict_dir, '--predict_dir')
    check_dir(args.gt_dir, '--gt_dir')


def check_files(names, args):
    """Raises BadInput where a file of the list is missing, or the log cannot be written: before the work."""
    for name in names:
        check_file(os.path.join(args.gt_dir, name + '.png'), '--gt_dir')
        if args.type == 'png':
            check_file(os.path.join(args.predict_dir, name + '.png'), '--predict_dir')
        else:
            score_files.find_scores(os.path.join(args.predict_dir, name + '.npy'), '--predict_dir')
    try:
        with open(args.logfile, 'a', encoding='utf-8'):
            pass
    except OSError as error:
        raise BadInput(f'cannot write {args.logfile} (--logfile): {error.strerror}') from error


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    categories = ['background', *class_names]
    for name in args.mean_classes or ():
        if name not in categories:
            raise BadInput(f'--mean_classes {name}: no such class; there are {", ".join(categories)}')
    names = load_img_name_list(args.list, '--list')
    check_files(names, args)
    print(f'{args.list}: {describe_list(names, class_names)}')
    for warning in ground_truth_warnings(args.gt_dir, names, class_names):
        print(f'warning: {warning}')

    canonical = find_canonical(names) if list(class_names) == CAT_LIST else None
    result = {'comment': args.comment, 'list': canonical or '', 'images': len(names)}
    chosen = [categories.index(name) for name in args.mean_classes] if args.mean_classes else None
    if args.curve:
        thresholds = np.array(args.t_list) if args.t_list else LONG_CURVE
        faults = report_curve(thresholds, evaluate(names, args, thresholds), categories, chosen, result, args)
    else:
        faults = report_one(evaluate(names, args, np.array([args.t or 0.]))[0], categories, chosen, result, args)
    if faults:
        raise BadInput('; '.join(faults))


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
