"""Tables of results, and the trivial answers that they are compared with.

    python tool/report.py trivial --cam_dir CAMS --out_dir DIR          label maps that know nothing but the labels
    python tool/report.py table --logfile evallog.txt                   what evaluation.py has logged, as a table
    python tool/report.py tables --logfile LOG --out PREFIX             those of tool/tables.sh, as CSV and markdown
"""
import argparse
import ast
import os
import sys

import numpy as np

# `python tool/report.py` puts tool/ on the path, not the repository root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool import image_files, score_files
from tool.cli import exit_on_bad_input, make_dir
from tool.files import atomic_write

MEASURES = ('mIoU', 'mFP', 'mFN', 'accuracy')
# mIoU on VOC 2012 train
PUBLISHED = {('1', 'baseline'): 47.43, ('1', '+ hard-example mining (SEAM)'): 55.41, ('1', '+ CRF'): 56.83,
             ('1', 'random walk'): 63.61, ('transform', 'rescale'): 55.41, ('scale', 'all'): 55.41,
             ('refinement', 'CAM'): 47.43, ('refinement', 'SEAM'): 55.41}


def write_trivial(args):
    """For each CAM dict, two label maps: all background, and the image's first class everywhere."""
    for kind in ('background', 'labels'):
        folder = os.path.join(args.out_dir, kind)
        make_dir(folder, '--out_dir')
        for file in sorted(name for name in os.listdir(args.cam_dir) if name.endswith('.npy')):
            cam_dict = score_files.load_scores(os.path.join(args.cam_dir, file), '--cam_dir', 'cam')
            key, cam = next(iter(cam_dict.items()))
            labels = np.full(cam.shape, key + 1 if kind == 'labels' else 0)
            image_files.save_label_map(os.path.join(folder, file.replace('.npy', '.png')), labels)


def read_log(path):
    """Entries of evaluation.py's log file, in order: (comment, dict of numbers or lists in percent)."""
    with open(path, encoding='utf-8') as file:
        lines = file.read().splitlines()
    return [(head.split('\t', 1)[1], {key: ast.literal_eval(value) for key, value in
                                      (field.rsplit(':', 1) for field in numbers.split('  '))})
            for head, numbers in zip(lines[0::3], lines[1::3])]


def print_table(args):
    """A markdown table: one row per log entry; of a curve, the best background score over the classes present."""
    print('| result | background score | mIoU, all classes | mIoU, classes present |')
    print('|---|---|---|---|')
    for comment, numbers in read_log(args.logfile):
        miou, present = numbers['mIoU'], numbers['mIoU_present']
        score = ''
        if isinstance(miou, list):
            best = int(np.argmax(present))
            miou, present, score = miou[best], present[best], f'{numbers["t"][best]:.2f}'
        print(f'| {comment} | {score} | {miou:.1f} | {present:.1f} |')


def write_tables(args):
    """The tables of tool/tables.sh from the log, whose comments are `table | row | seed`: a CSV of all numbers, and a
    markdown table with mean and standard deviation over the seeds beside what is published. The plateau of a curve is
    the range of background scores whose mIoU is at least 95% of the best. Means are over the classes that are there."""
    rows = {}       # (table, row) -> list of dicts, one a seed
    for comment, numbers in read_log(args.logfile):
        table, row, seed = comment.split(' | ')
        best = int(np.argmax(numbers['mIoU'])) if isinstance(numbers['mIoU'], list) else None
        result = {key: numbers[key] if best is None else numbers[key][best] for key in ('mIoU_present', *MEASURES)}
        # of the classes; the others add nothing to the means
        share = result['mIoU'] / result['mIoU_present'] if result['mIoU'] else 1
        result.update({key: result[key] / share for key in ('mIoU', 'mFP', 'mFN')})
        result.update(seed=seed, t='' if best is None else numbers['t'][best], plateau='')
        if best is not None:
            good = [t for t, miou in zip(numbers['t'], numbers['mIoU']) if miou >= 0.95 * max(numbers['mIoU'])]
            result['plateau'] = round(good[-1] - good[0], 4)
        rows.setdefault((table, row), []).append(result)
    csv_lines = ['table,row,seed,background_score,plateau,' + ','.join(MEASURES)]
    text = []
    tables = list(dict.fromkeys(table for table, _ in rows))
    for (table, row), results in sorted(rows.items(), key=lambda item: tables.index(item[0][0])):   # as they came
        results.sort(key=lambda result: int(result['seed']))
        csv_lines += [f'{table},"{row}",{r["seed"]},{r["t"]},{r["plateau"]},'
                      + ','.join(f'{r[key]:.4f}' for key in MEASURES) for r in results]
        if not any(f'**Table: {table}**' in line for line in text):
            text += ['', f'**Table: {table}** ({len(results)} seeds)', '',
                     '| row | best background score | plateau | mIoU | mFP | mFN | published mIoU |',
                     '|---|---|---|---|---|---|---|']
        scores, plateaus = (', '.join(f'{r[key]:.2f}' for r in results if r[key] != '') for key in ('t', 'plateau'))
        cells = [f'{np.mean(values):.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else '')
                 for values in ([r[key] for r in results] for key in ('mIoU', 'mFP', 'mFN'))]
        published = PUBLISHED.get((table, row.split(',')[0]), 'see the paper')
        text.append(f'| {row} | {scores} | {plateaus} | {" | ".join(cells)} | {published} |')
    for end, lines in (('.csv', csv_lines), ('.md', text[1:])):
        with atomic_write(args.out + end) as file:
            file.write('\n'.join(lines + ['']).encode())
    print('\n'.join(text[1:]))


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    trivial = commands.add_parser('trivial')
    trivial.add_argument('--cam_dir', required=True, help='CAM dicts, for the names, sizes and classes')
    trivial.add_argument('--out_dir', required=True, help='writes background/ and labels/ in it')
    trivial.set_defaults(main=write_trivial)
    table = commands.add_parser('table')
    table.add_argument('--logfile', required=True, help='log file of evaluation.py')
    table.set_defaults(main=print_table)
    tables = commands.add_parser('tables')
    tables.add_argument('--logfile', required=True, help='log file of evaluation.py, written by tool/tables.sh')
    tables.add_argument('--out', required=True, help='prefix of the .csv and .md to write')
    tables.set_defaults(main=write_tables)
    return parser


if __name__ == '__main__':
    with exit_on_bad_input():
        arguments = get_args_parser().parse_args()
        arguments.main(arguments)
