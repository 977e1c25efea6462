"""The demo's table and picture, and the trivial answers that they are compared with.

    python tool/report.py trivial --cam_dir CAMS --out_dir DIR          label maps that know nothing but the labels
    python tool/report.py table --logfile evallog.txt                   what evaluation.py has logged, as a table
    python tool/report.py tables --logfile LOG --out PREFIX             the tables of tool/tables.sh, as CSV and markdown
    python tool/report.py picture --out result.png ...                  image, ground truth and results, side by side
"""
import argparse
import ast
import os
import sys

import numpy as np
from PIL import Image

# `python tool/report.py` puts tool/ on the path, not the repository root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool import imutils, visualization
from tool.pyutils import atomic_write, exit_on_bad_input, make_dir

MEASURES = ('mIoU', 'mIoU_present', 'mFP', 'mFN', 'accuracy')
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
            cam_dict = imutils.load_scores(os.path.join(args.cam_dir, file), '--cam_dir', 'cam')
            key, cam = next(iter(cam_dict.items()))
            labels = np.full(cam.shape, key + 1 if kind == 'labels' else 0)
            imutils.save_label_map(os.path.join(folder, file.replace('.npy', '.png')), labels)


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
    markdown table with mean and standard deviation over the seeds beside what is published."""
    rows = {}       # (table, row) -> list of dicts, one a seed
    for comment, numbers in read_log(args.logfile):
        table, row, seed = comment.split(' | ')
        best = int(np.argmax(numbers['mIoU'])) if isinstance(numbers['mIoU'], list) else None
        result = {key: numbers[key] if best is None else numbers[key][best] for key in MEASURES}
        rows.setdefault((table, row), []).append({'seed': seed, 't': '' if best is None else numbers['t'][best], **result})
    csv_lines = ['table,row,seed,background_score,' + ','.join(MEASURES)]
    text = []
    for (table, row), results in rows.items():
        csv_lines += [f'{table},"{row}",{r["seed"]},{r["t"]},' + ','.join(f'{r[key]:.4f}' for key in MEASURES)
                      for r in results]
        if not any(f'**Table: {table}**' in line for line in text):
            text += ['', f'**Table: {table}** ({len(results)} seeds)', '',
                     '| row | background score | mIoU | mIoU, classes present | mFP | mFN | published |',
                     '|---|---|---|---|---|---|---|']
        scores = ', '.join(f'{r["t"]:.2f}' for r in results if r['t'] != '')
        cells = [f'{np.mean(values):.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else '')
                 for values in ([r[key] for r in results] for key in ('mIoU', 'mIoU_present', 'mFP', 'mFN'))]
        text.append(f'| {row} | {scores} | {" | ".join(cells)} | {PUBLISHED.get((table, row.split(",")[0]), "see the paper")} |')
    for end, lines in (('.csv', csv_lines), ('.md', text[1:])):
        with atomic_write(args.out + end) as file:
            file.write('\n'.join(lines + ['']).encode())
    print('\n'.join(text[1:]))


def draw_picture(args):
    """A contact sheet, one row per name: image, ground truth, plain CAM, SEAM CAM, CRF, pseudo label."""
    with open(args.list, encoding='utf-8') as file:
        names = file.read().split()
    rows = []
    for name in names[:args.count]:
        img = np.asarray(imutils.read_image(os.path.join(args.voc12_root, 'JPEGImages', name + '.jpg')))
        cams = [imutils.load_scores(os.path.join(folder, name + '.npy'), flag, 'cam')
                for folder, flag in ((args.plain_dir, '--plain_dir'), (args.cam_dir, '--cam_dir'))]
        crf = imutils.load_scores(os.path.join(args.crf_dir, name + '.npy'), '--crf_dir', 'crf')
        gt = imutils.read_label_map(os.path.join(args.voc12_root, 'SegmentationClass', name + '.png'), '--voc12_root')
        walk = imutils.read_label_map(os.path.join(args.rw_dir, name + '.png'), '--rw_dir')
        rows.append([img, visualization.labels_on_image(img, gt),
                     *(visualization.cam_on_image(img, np.stack(list(cam.values())).max(axis=0)) for cam in cams),
                     visualization.labels_on_image(img, imutils.strongest_label(crf)),
                     visualization.labels_on_image(img, walk)])
    titles = ['image', 'ground truth', 'plain CAM', 'SEAM CAM', 'SEAM + CRF', 'random walk']
    sheet = visualization.contact_sheet(rows, titles)
    with atomic_write(args.out) as file:
        Image.fromarray(sheet).save(file, format='PNG', optimize=True)


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
    picture = commands.add_parser('picture')
    picture.add_argument('--voc12_root', required=True, help='data root, with JPEGImages/ and SegmentationClass/')
    picture.add_argument('--list', required=True, help='image names, one a line')
    picture.add_argument('--count', default=5, type=int, help='how many of them')
    picture.add_argument('--plain_dir', required=True, help='CAM dicts of the plain classifier')
    picture.add_argument('--cam_dir', required=True, help='CAM dicts of SEAM')
    picture.add_argument('--crf_dir', required=True, help='CRF dicts')
    picture.add_argument('--rw_dir', required=True, help='pseudo labels of the random walk')
    picture.add_argument('--out', required=True, help='PNG to write')
    picture.set_defaults(main=draw_picture)
    return parser


if __name__ == '__main__':
    with exit_on_bad_input():
        arguments = get_args_parser().parse_args()
        arguments.main(arguments)
