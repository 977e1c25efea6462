"""Steps 3, 6 and 9: evaluates label maps, CRF dicts, or CAM dicts at one or many background scores.

Reads predictions and ground truth. Prints the mIoU, appends it to --logfile, and writes tables, <out_prefix>_*.csv.
"""
import argparse
import contextlib
import csv
import functools
import os
import time

import numpy as np

from tool import image_files, score_files, visualization
from tool.cli import BadInput, HelpFormatter, check_dir, check_file, check_range, exit_on_bad_input, make_dir, str2bool
from tool.image_files import IGNORE
from tool.metrics import class_measures, confusion, confusion_curve, mean_measures
from tool.outputs import check_class_names, warn_of_older_files
from tool.text_files import read_csv, write_csv
from tool.thresholds import MOST, exponent_of, exponents_to_start_with
from tool.workers import parallel_map
from voc12.canonical import describe_list, find_canonical
from voc12.lists import CAT_LIST, GT_FOLDER, load_class_names, load_img_name_list
from voc12.masks import ground_truth_warnings

CURVE = np.arange(60) / 100                      # background scores of the curve, as in the reference
LONG_CURVE = np.arange(100) / 100
IMAGES_AT_ONCE = 8


def score_image(name, predict_dir, gt_dir, kind, thresholds, num_classes):
    """Evaluates one image; kind: png, npy or crf, see --type. Returns its confusion matrices, int64 (thresholds, K+1,
    K+1), and how many pixels have each value, int64 (2, 256): in the ground truth and, where that is not 255, in the
    label map (0 for score dicts)."""
    gt_path = os.path.join(gt_dir, name + '.png')
    gt = image_files.read_label_map(gt_path, '--gt_dir')
    path = os.path.join(predict_dir, name + ('.png' if kind == 'png' else '.npy'))
    if kind == 'png':
        scores = {0: image_files.read_label_map(path, '--predict_dir')}
    else:
        scores = score_files.load_scores(path, '--predict_dir', 'crf' if kind == 'crf' else 'cam')
    last_key = num_classes if kind == 'crf' else num_classes - 1
    for key, array in scores.items():
        if array.shape != gt.shape:
            raise BadInput(f'{path} (--predict_dir) is {"x".join(map(str, array.shape))}, '
                           f'{gt_path} (--gt_dir) {"x".join(map(str, gt.shape))}')
        if key > last_key:
            raise BadInput(f'{path} (--predict_dir) has the key {key}; there are {num_classes} classes (--class_names) '
                           f'and --type is {kind}')
    values = np.stack([np.bincount(gt.ravel(), minlength=256), np.zeros(256, np.int64)])
    if kind == 'npy':
        return confusion_curve(gt, scores, thresholds, num_classes), values
    if kind == 'crf':
        pred = score_files.strongest_label(scores) if scores else np.zeros_like(gt)
    else:
        pred = scores[0]
        values[1] = np.bincount(pred[gt != IGNORE], minlength=256)
    return confusion(gt, pred, num_classes)[None], values


def warn_of_values(values, categories, chosen, predict_dir, gt_dir):
    """Prints warnings about label maps that are probably wrong. values: int64 (2, 256), see `score_image`; categories:
    names of the background and the classes; chosen: indices of --mean_classes, or None."""
    truth, num_classes = values[0], len(categories) - 1
    if not truth[IGNORE] and categories[1:] == CAT_LIST:    # other data may do without the border
        print(f'warning: no file of {gt_dir} (--gt_dir) on the list has a pixel of 255, the border of VOC; '
              'it may have been overwritten with predictions')
    if not truth[1:IGNORE].any():
        print(f'warning: no file of {gt_dir} (--gt_dir) on the list has an object')
    missing = [categories[index] for index in chosen or () if not truth[index]]
    if missing:
        print(f'warning: no file of {gt_dir} (--gt_dir) on the list has {", ".join(missing)} (--mean_classes), '
              'whose IoU of 0 is part of the mean')
    if values[1, IGNORE]:
        share = 100 * values[1, IGNORE] / values[1].sum()
        print(f'{share:.3g}% of the scored pixels are {IGNORE} in {predict_dir} (--predict_dir), which counts as wrong')
    for what, counts in zip((f'{gt_dir} (--gt_dir)', f'{predict_dir} (--predict_dir)'), values):
        beyond = [value for value in np.flatnonzero(counts) if num_classes < value < IGNORE]
        if beyond:
            numbers = ', '.join(map(str, beyond[:10])) + (', ...' if len(beyond) > 10 else '')
            print(f'warning: {what} has label values beyond the {num_classes} classes (--class_names), which count as '
                  f'"no class": {numbers}, in {counts[beyond].sum():,} pixels')


def add_up(results):
    """Returns the sums of the matrices and of the values of several results of `score_image`."""
    matrices = values = 0
    for some_matrices, some_values in results:
        matrices += some_matrices
        values += some_values
    return matrices, values


def score_images(names, score):
    return add_up(map(score, names))


def evaluate(names, predict_dir, gt_dir, kind, thresholds, num_classes, num_workers):
    """Returns the sums over a list of images of what `score_image` returns."""
    score = functools.partial(score_image, predict_dir=predict_dir, gt_dir=gt_dir, kind=kind, thresholds=thresholds,
                              num_classes=num_classes)
    # a process adds up some images: with 254 classes and a curve, the matrices of a single one take 52 MB
    some = [names[start:start + IMAGES_AT_ONCE] for start in range(0, len(names), IMAGES_AT_ONCE)]
    return add_up(parallel_map(functools.partial(score_images, score=score), some, num_workers, 'evaluation',
                               IMAGES_AT_ONCE))


# ----- results -----

def add_to_log(path, text):
    """Raises BadInput where the log file cannot be written."""
    try:
        with open(path, 'a', encoding='utf-8', errors='backslashreplace') as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f'cannot write {path} (--logfile): {error.strerror}') from error


def warn_of_other_result(path, result):
    """Warns if the file of an earlier result, which is replaced now, is one of other images or predictions."""
    with contextlib.suppress(OSError, UnicodeError, IndexError, csv.Error):
        before = read_csv(path)[0]
        differ = [f'{key} was {before[key]}, is {result[key]}' for key in ('list', 'images', 'predict_dir')
                  if before.get(key, str(result[key])) != str(result[key])]
        if differ:
            print(f'warning: {path} is replaced by a result of other data ({"; ".join(differ)}); another --out_prefix '
                  'keeps both')


def write_results(out_prefix, logfile, comment, result, log, end, table, lines):
    """Writes the dict `result` and a larger table, (header, rows), as CSV files, appends the dict `log` to the log
    file, and prints the lines. If a CSV file cannot be written, the rest is still done before BadInput is raised."""
    entry = [f'{time.strftime("%Y-%m-%d %H:%M:%S")}\t{" ".join(comment.split())}',
             '  '.join(f'{key}:{value}' for key, value in log.items()), '=' * 37]
    warn_of_other_result(out_prefix + '_result.csv', result)
    try:
        write_csv(out_prefix + '_result.csv', result, [result.values()])
        write_csv(out_prefix + end, *table)
    finally:
        try:
            add_to_log(logfile, '\n'.join(entry) + '\n')
        finally:
            print('\n'.join(lines))


def suggest_alphas(score, num_images):
    """Returns a line that suggests exponents for the best background score, in (0, 1), of so many images."""
    low, high, walk = exponents_to_start_with(score)
    images = 'image' if num_images == 1 else 'images'
    return (f'it corresponds to CRF alpha {exponent_of(score):.1f}, where (1 - score)^alpha = score. Judged by the '
            f'ground truth of {num_images:,} {images}, start with one alpha below and one well above it, at most '
            f'{MOST:g}, for train_aff.py, --crf_alpha {low:.1f} {high:.1f}, and with infer_aff.py --alpha {walk:.1f}')


def report_curve(thresholds, matrices, categories, chosen, count):
    """Describes the mIoU over the background score, and its best point.

    thresholds: float64 (T,). The first `count` are always reported; if the best of them is one of their last ten, the
    rest is reported too. matrices: int64 (T, K+1, K+1); categories, chosen: see `warn_of_values`. Returns the measures
    at the best point and the curve, as dicts, the table for _curve.csv, and the lines to print."""
    means = mean_measures(matrices, chosen)                             # of (T,)
    ranked = means['mIoU' if chosen is None else 'mIoU_chosen']
    shown = len(thresholds) if ranked[:count].argmax() >= count - 10 else count
    best = ranked[:shown].argmax()
    score, good = thresholds[best], thresholds[ranked >= 0.95 * ranked[best]]
    curve = {key: value[:shown] for key, value in means.items()}
    at_best = {'background_score': score, 'plateau': round(good.max() - good.min(), 4),
               **{key: round(value[best].item(), 4) for key, value in means.items()}}
    table = np.column_stack([thresholds[:shown], *curve.values(), class_measures(matrices)[0][:shown]]).round(4)

    lines = [f'{i}/{count if i < count else shown} background score: {thresholds[i]:.3f}\tmIoU: {miou:.3f}%'
             for i, miou in enumerate(curve['mIoU'])]
    text = f'mIoU: {at_best["mIoU"]:.3f}%, {at_best["mIoU_present"]:.3f}% over the classes present'
    if chosen is not None:
        text += f', {at_best["mIoU_chosen"]:.3f}% over {", ".join(categories[index] for index in chosen)}'
    lines.append(f'best: background score {score:.3f}\t{text}')
    curve['t'] = thresholds[:shown]
    return at_best, curve, (['background_score', *means, *categories], table.tolist()), lines


def report_one(matrix, categories, chosen):
    """Describes the IoU of every class and the means, in percent. matrix: int64 (K+1, K+1); categories, chosen: see
    `warn_of_values`. Returns the means and the IoUs, as dicts, the table for _confusion.csv, and the lines to print."""
    iou = dict(zip(categories, class_measures(matrix)[0].tolist()))
    means = {key: value.item() for key, value in mean_measures(matrix, chosen).items()}
    rows = [[name, *row] for name, row in zip([*categories, 'no class'], matrix.tolist())]

    cells = [f'{name:>11}:{value:7.3f}%' for name, value in iou.items()]
    lines = ['\t'.join(cells[i:i + 2]) for i in range(0, len(cells), 2)] + ['=' * 54]
    lines.append(f'{"mIoU":>11}:{means["mIoU"]:7.3f}%  ({means["mIoU_present"]:.3f}% over the classes present)')
    if chosen is not None:
        names = ', '.join(categories[index] for index in chosen)
        lines.append(f'{"mIoU":>11}:{means["mIoU_chosen"]:7.3f}%  over {names}')
    lines += [f'{key:>11}:{means[key]:7.3f}%' for key in ('mFP', 'mFN', 'accuracy')]
    return means, iou, (['truth \\ prediction', *categories, 'no class'], rows), lines


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--list', default='./VOC2012/ImageSets/Segmentation/train.txt', help='list of the images to evaluate')
    add('--predict_dir', default='./out_rw', help='folder of the predictions, NAME.png or NAME.npy')
    add('--gt_dir', default='./VOC2012/' + GT_FOLDER, help='folder of the ground truth, NAME.png')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--num_workers', default=8, type=int, help='number of worker processes; 0 works in the main process')
    # what is scored
    add('--type', default='png', choices=['png', 'npy', 'crf'],
        help='what --predict_dir contains: png label maps, npy CAM dicts (class c has the key c - 1), crf CRF dicts '
             '(background has the key 0)')
    add('--t', type=float, help='background score in 0..1, for --type npy without --curve')
    add('--curve', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
        help='evaluate CAM dicts at all background scores of --t_list')
    add('--t_list', type=float, nargs='+', metavar='T',
        help='background scores of --curve, ascending. Default: 0.00 to 0.59, extended to 0.99 if the best one is '
             'close to 0.59')
    add('--mean_classes', nargs='+', metavar='NAME',
        help='classes for an additional mean, which then selects the best score, such as: background cat dog')
    # outputs
    add('--logfile', default='./evallog.txt', help='log file; the result is appended to it')
    add('--comment', required=True, help='name of this result in the log file')
    add('--out_prefix',
        help='prefix of the .csv and .png files. Default: the name of --predict_dir, beside the log file')
    return parser


def check_args(args):
    if (args.curve or args.t_list) and not (args.curve and args.type == 'npy'):
        raise BadInput('--curve and --t_list need CAM dicts: add --type npy --curve True')
    if args.type == 'npy' and not args.curve and args.t is None:
        raise BadInput('--type npy needs a background score (--t) or --curve')
    if args.t is not None and (args.type != 'npy' or args.curve):
        print(f'warning: --t {args.t} has no effect: it is for --type npy without --curve')
    check_range(args, -1000, 1000, 't', 't_list')
    if args.t_list and sorted(args.t_list) != args.t_list:
        raise BadInput(f'--t_list {args.t_list} must ascend')
    check_range(args, 0, 256, 'num_workers')
    if os.path.isdir(args.logfile) or not os.path.basename(args.logfile):
        raise BadInput(f'--logfile {args.logfile} is a folder: name a file in it')
    folder = os.path.dirname(os.path.abspath(args.logfile))
    make_dir(folder, '--logfile')
    if args.out_prefix is None:
        args.out_prefix = os.path.join(folder, os.path.basename(os.path.abspath(args.predict_dir)))
    make_dir(os.path.dirname(os.path.abspath(args.out_prefix)), '--out_prefix')
    check_dir(args.predict_dir, '--predict_dir')
    check_dir(args.gt_dir, '--gt_dir')


def check_files(names, args):
    """Raises BadInput before the work if files of the list are missing or the log file cannot be written."""
    missing = {'--gt_dir': [], '--predict_dir': []}             # the errors
    for name in names:
        for flag, errors in missing.items():
            try:
                path = os.path.join(args.gt_dir if flag == '--gt_dir' else args.predict_dir, name)
                if flag == '--predict_dir' and args.type != 'png':
                    score_files.find_scores(path + '.npy', flag)
                else:
                    check_file(path + '.png', flag)
            except BadInput as error:
                errors.append(error)
    told = [f'{len(errors):,} of the {len(names):,} images of {args.list} (--list) have no file in {flag}; the first: '
            f'{errors[0]}' for flag, errors in missing.items() if errors]
    if told:
        raise BadInput('; '.join(told))
    warn_of_older_files(args.predict_dir, names, '--predict_dir')
    add_to_log(args.logfile, '')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    categories = ['background', *class_names]
    for name in args.mean_classes or ():
        if name not in categories:
            raise BadInput(f'--mean_classes {name}: no such class; there are {", ".join(categories)}')
    check_class_names(args.predict_dir, '--predict_dir', class_names)
    chosen = [categories.index(name) for name in args.mean_classes] if args.mean_classes else None
    names = load_img_name_list(args.list, '--list')
    check_files(names, args)
    print(f'{args.list}: {describe_list(names, class_names)}')
    for warning in ground_truth_warnings(args.gt_dir, names, class_names):
        print(f'warning: {warning}')

    thresholds = np.array(args.t_list or LONG_CURVE) if args.curve else np.array([args.t or 0.])
    matrices, values = evaluate(names, args.predict_dir, args.gt_dir, args.type, thresholds, len(class_names),
                                args.num_workers)
    warn_of_values(values, categories, chosen, args.predict_dir, args.gt_dir)

    canonical = find_canonical(names) if categories[1:] == CAT_LIST else None
    result = {'comment': args.comment, 'list': canonical or '', 'images': len(names),
              'predict_dir': os.path.abspath(args.predict_dir)}
    if args.curve:
        at_best, curve, table, lines = report_curve(thresholds, matrices, categories, chosen,
                                                    len(args.t_list or CURVE))
        if 0 < at_best['background_score'] < 1:
            lines.append(suggest_alphas(at_best['background_score'], len(names)))
        log = {'best_' + key: value for key, value in at_best.items()}
        log |= {key: value.tolist() for key, value in curve.items()}
        write_results(args.out_prefix, args.logfile, args.comment, result | at_best, log, '_curve.csv', table, lines)
        print(visualization.draw_curve(args.out_prefix + '_curve.png', curve['t'],
                                       curve['mIoU_chosen' if chosen else 'mIoU'], args.comment))
    else:
        means, iou, table, lines = report_one(matrices[0], categories, chosen)
        result |= {'background_score': args.t if args.type == 'npy' else '', 'plateau': '',
                   **{key: round(value, 4) for key, value in means.items()}}
        write_results(args.out_prefix, args.logfile, args.comment, result, iou | means, '_confusion.csv', table, lines)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
