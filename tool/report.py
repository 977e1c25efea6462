"""Makes a table of the results of evaluation.py, and trivial label maps to compare them with.

    python tool/report.py table --logfile evallog.txt
    python tool/report.py trivial --cam_dir CAMS --out_dir DIR
"""
import argparse
import os
import re
import sys

import numpy as np

if not __package__:        # run as a script: Python puts tool/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool import image_files, score_files
from tool.cli import BadInput, HelpFormatter, check_dir, exit_on_bad_input, make_dir
from tool.image_lists import get_img_path, read_lines
from tool.outputs import results_in


def write_trivial(args):
    """Writes two label maps for each CAM file: all background, and the first class of the image everywhere, or
    background if it has none."""
    check_dir(args.cam_dir, '--cam_dir')
    files = map(os.path.basename, results_in(args.cam_dir, ('.npy', '.npz')))
    names = sorted({os.path.splitext(file)[0] for file in files})
    if not names:
        raise BadInput(f'no CAM files, NAME.npy or NAME.npz, in {args.cam_dir} (--cam_dir)')
    for kind in ('background', 'labels'):
        make_dir(os.path.join(args.out_dir, kind), '--out_dir')
    for name in names:
        cam_dict = score_files.load_scores(os.path.join(args.cam_dir, name + '.npy'), '--cam_dir', 'cam')
        if cam_dict:
            key, cam = next(iter(cam_dict.items()))
            label, size = key + 1, cam.shape
        elif args.voc12_root:
            label, size = 0, image_files.read_image(get_img_path(name, args.voc12_root)).size[::-1]
        else:
            print(f'warning: {name} is left out, because its CAM file in {args.cam_dir} (--cam_dir) has no class, and '
                  'so no size; name the data root with --voc12_root to read the size of its image')
            continue
        for kind, value in (('background', 0), ('labels', label)):
            image_files.save_label_map(os.path.join(args.out_dir, kind, name + '.png'), np.full(size, value))


def print_table(args):
    """Prints a markdown table with a row for each entry of evaluation.py's log file; of a curve, its best point."""
    rows, skipped = [], 0
    for entry in '\n'.join(read_lines(args.logfile, '--logfile')).split('=' * 37):
        head, _, numbers = entry.strip().rpartition('\n')               # time and comment; NAME:NUMBER  NAME:NUMBER
        comment = ' '.join(head.partition('\t')[2].split())
        values = dict(re.findall(r'(\w+):([-+.e\d]+)(?=  |$)', numbers))
        best = 'best_' if 'best_mIoU' in values else ''
        try:
            miou, present = float(values[best + 'mIoU']), float(values[best + 'mIoU_present'])
            rows.append(f'| {comment} | {values.get("best_background_score", "")} | {miou:.1f} | {present:.1f} |')
        except (KeyError, ValueError):      # an entry of the original evaluation.py, or a damaged one
            skipped += bool(head)
    if skipped:
        print(f'warning: {skipped} entries of {args.logfile} (--logfile) are left out, because this evaluation.py did '
              'not write them')
    if not rows:
        raise BadInput(f'no result in {args.logfile} (--logfile)')
    print('| result | background score | mIoU, all classes | mIoU, classes present |\n|---|---|---|---|')
    print('\n'.join(rows))


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True)
    trivial = commands.add_parser('trivial', formatter_class=HelpFormatter,
                                  help='write trivial label maps: all background, and the first class everywhere')
    trivial.add_argument('--cam_dir', required=True, help='folder of CAM files, for the names, sizes and classes')
    trivial.add_argument('--voc12_root', help='data root, for the sizes of images whose CAM file has no class')
    trivial.add_argument('--out_dir', required=True, help='folder to write background/ and labels/ into')
    trivial.set_defaults(main=write_trivial)
    table = commands.add_parser('table', formatter_class=HelpFormatter,
                                help='print the results in a log file of evaluation.py as a markdown table')
    table.add_argument('--logfile', required=True, help='log file of evaluation.py')
    table.set_defaults(main=print_table)
    return parser


if __name__ == '__main__':
    with exit_on_bad_input():
        arguments = get_args_parser().parse_args()
        arguments.main(arguments)
