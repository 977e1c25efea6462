"""The paper's tables, row by row, on any data root: trains, infers and scores what the rows need, seed by seed.

    python tool/tables.py --table 1 --seeds 0 1 2                       baseline to random walk, as the paper's table 1
    python tool/tables.py --table all --toy                             all tables in miniature, on the demo's drawings
    python tool/tables.py --table 1 --rows SEAM walk --resume           some rows; finished work of before stays

In --out, tables.csv has the numbers of each row and seed, tables.md their means and standard deviations; what training
and inference write lies there too, named by the flags it was made with. mIoU, mFP and mFN are means over the classes of
--mean_classes, else over those present. The plateau is the range of background scores whose mIoU is at least 95% of
the best.
"""
import argparse
import collections
import csv
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)        # `python tool/tables.py` puts tool/ on the path, not the repository root

from tool.cli import BadInput, check_file, check_range, exit_on_bad_input, make_dir
from tool.files import atomic_write, file_digest
from tool.lists import load_img_name_list

# train, infer: flags of train_SEAM.py and infer_SEAM.py. step: what is scored: the CAMs, their CRF at `alpha`, or the
# random walk. published: mIoU of the paper's ResNet38 on VOC 2012 train
Row = collections.namedtuple('Row', 'table name train infer step alpha published', defaults=('', '', 'cam', None, None))
BASELINE = {'train': '--classifier_only', 'infer': '--map cam'}
COLUMNS = ['table', 'row', 'seed', 'list', 'images', 'background_score', 'plateau', 'mIoU', 'mFP', 'mFN', 'accuracy']

# the demo's settings; the affinity network needs larger crops than SEAM on such small images
TOY = {'out': 'tables_toy', 'network': 'network.slim_SEAM', 'network_aff': 'network.slim_aff',
       'scales': [0.25, 0.5, 0.75], 'alphas': [2.0, 4.0, 8.0], 'num_workers': 1,
       'train': '--resize_long 64 112 --crop_size 64', 'train_aff': '--crop_size 128 --momentum 0.9 --max_epochs 5',
       'walk': '--alpha 4 --beta 16 --logt 4'}


def list_rows(scales, alphas):
    """All rows of all tables, in order. To add one, name its table and the flags that make it."""
    return [
        Row('1', 'baseline', **BASELINE, published=47.43),
        Row('1', '+ ER', '--pcm off --ecr_weight 0 --rvmin_weight 0', '--map cam'),
        Row('1', '+ PCM and ECR', '--topk_ratio 1'),
        Row('1', '+ hard-example mining (SEAM)', published=55.41),
        # the paper does not say at which alpha: 4 is the one near its best background score
        *(Row('1', f'+ CRF, alpha {alpha:.1f}', step='crf', alpha=alpha, published=56.83 if alpha == 4 else None)
          for alpha in alphas),
        Row('1', 'random walk', step='walk', published=63.61),
        Row('refinement', 'CAM', **BASELINE, published=47.43),
        Row('refinement', 'gradcam', '--classifier_only', '--map gradcam'),
        Row('refinement', 'gradcam++', '--classifier_only', '--map gradcam++'),
        Row('refinement', 'SEAM', published=55.41),
        Row('activation', 'baseline', **BASELINE),
        Row('activation', 'SEAM'),
        *(Row('scale', f'{scale}', infer=f'--scales {scale}') for scale in scales),
        Row('scale', 'all', published=55.41),
        Row('transform', 'rescale', published=55.41),
        *(Row('transform', kind, f'--transform {kind}') for kind in ('flip', 'rotation', 'translation'))]


# ----- the commands -----

def run_child(command):
    """Runs a command to its end; what it prints stays visible. Raises BadInput where it fails."""
    print('+', shlex.join(command), flush=True)
    child = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:       # the child got it too, and saves its checkpoint
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise BadInput(f'{os.path.basename(command[1])} ended with exit code {code}, see above; the same command with '
                       '--resume goes on')


class Pipeline:
    """The commands of one seed, and the paths of what they make. A command that has run is not run again."""

    def __init__(self, args, seed):
        self.args, self.seed, self.done = args, seed, set()
        self.root, self.train_list, self.list = args.voc12_root, args.train_list, args.list
        self.weights = self.weights_aff = args.weights
        self.classes = ['--class_names', args.class_names] if args.class_names else []
        self.workers = ['--num_workers', args.num_workers]
        self.labels = ['--cls_labels', args.cls_labels] if args.cls_labels else []
        if args.toy:
            self.make_toy()

    def path(self, *parts):
        """Of a result, named by the flags that it is made with."""
        return os.path.join(self.args.out, re.sub(r'[^\w.+]+', '_', ' '.join(parts)).strip('_') + f'_seed{self.seed}')

    def run(self, script, *flags, resume=False):
        command = [sys.executable, os.path.join(ROOT, script), *map(str, flags), *['--resume'] * resume]
        if tuple(command) not in self.done:
            run_child(command)
            self.done.add(tuple(command))

    def run_network(self, script, network, weights, *flags, resume):
        """One of the four scripts with a network; weights None: its own."""
        device = ['--device', self.args.device] if self.args.device else []
        start = ['--weights', weights] if weights else []
        self.run(script, '--voc12_root', self.root, '--network', network, *start, *device, *self.workers, *self.classes,
                 *flags, resume=resume)

    def run_training(self, script, session, network, weights, *flags):
        """A training that may have been stopped before, or be finished: its script decides. Returns its weights."""
        self.run_network(script, network, weights, '--train_list', self.train_list, *flags, '--seed', self.seed,
                         '--session_name', session, resume=self.args.resume and os.path.isfile(session + '_last.pth'))
        return session + '.pth'

    def make_toy(self):
        """Drawings, and a classifier pretrained on them in place of ImageNet's."""
        self.root, session = self.path('toy'), self.path('pretrained')
        self.train_list = self.list = os.path.join(self.root, 'ImageSets', 'Segmentation', 'train.txt')
        if not (self.args.resume and os.path.isfile(self.list)):
            self.run('voc12/make_toy.py', '--out', self.root, '--count', self.args.count, '--size', 192, 224,
                     '--seed', self.seed, *(self.classes or ['--classes', 4]))
        self.weights = self.run_training(
            'train_SEAM.py', session, self.args.network, None, *shlex.split(self.args.train), '--classifier_only',
            '--train_bn', '--dropout', 0, '--momentum', 0.9, '--lr', 0.03, '--batch_size', 16, '--max_epochs', 25)
        self.weights_aff = session + '_backbone.pth'

    def infer(self, names, train_flags, *flags, resume):
        """Steps 1 and 2: trains SEAM where need be, and infers a list."""
        weights = self.run_training('train_SEAM.py', self.path('seam', train_flags), self.args.network, self.weights,
                                    *self.labels, *shlex.split(self.args.train), *shlex.split(train_flags))
        self.run_network('infer_SEAM.py', self.args.network, weights, *self.labels, '--infer_list', names,
                         '--scales', *self.args.scales, *shlex.split(self.args.infer), *flags, resume=resume)

    def cams(self, train_flags='', infer_flags=''):
        """Returns the folder of CAMs of the list to score."""
        folder = self.path('cam', train_flags, infer_flags)
        self.infer(self.list, train_flags, *shlex.split(infer_flags), '--out_cam', folder, resume=self.args.resume)
        return folder

    def crfs(self):
        """Returns the folders of SEAM's CRF scores of both lists, in order of alpha."""
        prefix, alphas = self.path('crf'), self.args.alphas
        flags = '--out_crf', prefix, '--crf_alpha', *alphas
        self.infer(self.train_list, '', *flags, resume=self.args.resume)
        if not set(load_img_name_list(self.list)) <= set(load_img_name_list(self.train_list)):
            self.infer(self.list, '', *flags, resume=True)      # into the same folders
        return [f'{prefix}_{alpha:.1f}' for alpha in alphas]

    def walk(self):
        """Steps 4 and 5. Returns the folder of label maps."""
        crfs, cams, folder = self.crfs(), self.cams(), self.path('walk')
        weights = self.run_training('train_aff.py', self.path('aff'), self.args.network_aff, self.weights_aff,
                                    '--la_crf_dir', crfs[0], '--ha_crf_dir', crfs[-1],
                                    *shlex.split(self.args.train_aff))
        self.run_network('infer_aff.py', self.args.network_aff, weights, '--infer_list', self.list, '--cam_dir', cams,
                         '--out_rw', folder, *shlex.split(self.args.infer), *shlex.split(self.args.walk),
                         resume=self.args.resume)
        return folder

    def score(self, row):
        """Makes what a row needs and evaluates it. Returns the dict of its _result.csv."""
        if row.step == 'crf':
            folder, kind = self.crfs()[self.args.alphas.index(row.alpha)], ['crf']
        elif row.step == 'walk':
            folder, kind = self.walk(), ['png']
        else:
            folder, kind = self.cams(row.train, row.infer), ['npy', '--curve', 'True']
        chosen = ['--mean_classes', *self.args.mean_classes] if self.args.mean_classes else []
        self.run('evaluation.py', '--list', self.list, '--gt_dir', os.path.join(self.root, 'SegmentationClass'),
                 '--predict_dir', folder, '--out_prefix', folder, '--comment', os.path.basename(folder), '--logfile',
                 os.path.join(self.args.out, 'evallog.txt'), *self.workers, *self.classes, *chosen, '--type', *kind)
        return read_csv(folder + '_result.csv')[0]


# ----- the tables -----

def read_csv(path):
    """List of dicts, one a row."""
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def write_file(path, text):
    with atomic_write(path) as file:
        file.write(text.encode('utf-8'))


def mean_and_deviation(values):
    text = f'{statistics.mean(values):.1f}'
    return f'{text} ± {statistics.stdev(values):.1f}' if len(values) > 1 else text


def make_markdown(rows, records, published):
    """The tables as text, from the records of all their rows and seeds. published: whether the paper's numbers may
    stand beside those whose list is VOC 2012 train."""
    lines, table = [], None
    for row in rows:
        mine = [record for record in records if (record['table'], record['row']) == (row.table, row.name)]
        if not mine:
            continue
        if row.table != table:
            table = row.table
            lines += ['', f'**Table: {table}**', '',
                      '| row | seeds | best background score | plateau | mIoU | mFP | mFN | published mIoU |',
                      '|---|---|---|---|---|---|---|---|']
        cells = [row.name, ', '.join(record['seed'] for record in mine)]
        for key in ('background_score', 'plateau'):
            cells.append(', '.join(f'{float(record[key]):.2f}' for record in mine if record[key]))
        for key in ('mIoU', 'mFP', 'mFN'):
            cells.append(mean_and_deviation([float(record[key]) for record in mine]))
        belongs = published and row.published and all(record['list'] == 'train' for record in mine)
        lines.append('| ' + ' | '.join([*cells, str(row.published) if belongs else '']) + ' |')
    return '\n'.join(lines[1:]) + '\n'


def write_tables(records, args):
    """Writes tables.csv and tables.md, which it returns. records: dict (table, row, seed) -> line of tables.csv."""
    rows = list_rows(args.scales, args.alphas)
    seeds = sorted({seed for _, _, seed in records}, key=int)
    ordered = [records[row.table, row.name, seed] for row in rows for seed in seeds
               if (row.table, row.name, seed) in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(ordered)
    write_file(os.path.join(args.out, 'tables.csv'), text.getvalue())
    # the paper's numbers are those of ResNet38, over the 21 classes of VOC
    published = args.network == 'network.resnet38_SEAM' and not args.class_names and not args.mean_classes
    markdown = make_markdown(rows, ordered, published)
    write_file(os.path.join(args.out, 'tables.md'), markdown)
    return markdown


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to do
    parser.add_argument('--table', default=['1'], nargs='+', help='1, refinement, activation, scale, transform, or all',
                        choices=['1', 'refinement', 'activation', 'scale', 'transform', 'all'])
    parser.add_argument('--rows', nargs='+', metavar='TEXT', help='only rows whose name has one of these texts in it')
    parser.add_argument('--seeds', default=[0], type=int, nargs='+', help='every training is repeated with each')
    parser.add_argument('--toy', action='store_true', help="the demo's drawings, networks and settings as defaults")
    parser.add_argument('--count', default=240, type=int, help='drawings, with --toy')
    parser.add_argument('--resume', action='store_true',
                        help='finished work stays; without it everything is made anew')
    parser.add_argument('--out', default='tables', help='folder of all results')
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root')
    parser.add_argument('--train_list', default='voc12/train_aug.txt', help='images to train on')
    parser.add_argument('--list', help='images to score; not given: ImageSets/Segmentation/train.txt of the data root')
    parser.add_argument('--class_names', help="names of the foreground classes, one a line; VOC's without it")
    parser.add_argument('--cls_labels', help='image-level labels')
    parser.add_argument('--mean_classes', nargs='+', metavar='NAME', help='average over these, see evaluation.py')
    # networks and settings
    parser.add_argument('--network', default='network.resnet38_SEAM', help='of SEAM')
    parser.add_argument('--network_aff', default='network.resnet38_aff', help='of AffinityNet')
    parser.add_argument('--weights', default='ilsvrc-cls_rna-a1_cls1000_ep-0001.params', nargs='?',
                        help='what training starts from; without a value none is named, for networks that bring theirs')
    parser.add_argument('--scales', default=[0.5, 1.0, 1.5, 2.0], type=float, nargs='+', help='test scales')
    parser.add_argument('--alphas', default=[4.0, 24.0], type=float, nargs='+',
                        help='CRF exponents; the lowest and the highest go to AffinityNet')
    parser.add_argument('--num_workers', default=8, type=int, help='of every script')
    parser.add_argument('--device', help='of every script that has a network')
    for flag, scripts in (('--train', 'train_SEAM.py'), ('--train_aff', 'train_aff.py'),
                          ('--infer', 'infer_SEAM.py and infer_aff.py'), ('--walk', 'infer_aff.py')):
        parser.add_argument(flag, default='', metavar='FLAGS', help=f'more flags for {scripts}: {flag}="--amp bf16"')
    return parser


def parse_args():
    """With --toy, the flags that are not given have the demo's values."""
    parser = get_args_parser()
    args = parser.parse_args()
    if args.toy:
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    elif args.list is None:
        args.list = os.path.join(args.voc12_root, 'ImageSets', 'Segmentation', 'train.txt')
    args.alphas = sorted(args.alphas)
    return args


def choose_rows(args):
    """The rows that are asked for. Raises BadInput."""
    chosen = [row for row in list_rows(args.scales, args.alphas) if row.table in args.table or 'all' in args.table]
    for text in args.rows or ():
        if not any(text in row.name for row in chosen):
            raise BadInput(f'--rows {text}: no such row of --table {" ".join(args.table)}; there are '
                           + ', '.join(row.name for row in chosen))
    return [row for row in chosen if not args.rows or any(text in row.name for text in args.rows)]


def check_settings(args):
    """Keeps in --out what the results there depend on, files by their content. Raises BadInput where they were made
    with other settings, with --resume."""
    settings = {name: getattr(args, name) for name in ('toy', 'count', 'network', 'network_aff', 'scales', 'alphas',
                                                       'mean_classes', 'train', 'train_aff', 'infer', 'walk')}
    for name in ('list', 'train_list', 'class_names', 'cls_labels'):
        path = getattr(args, name)
        settings[name] = file_digest(path) if path and os.path.isfile(path) else None
    path = os.path.join(args.out, 'settings.json')
    if args.resume and os.path.isfile(path):
        try:
            with open(path, encoding='utf-8') as file:
                before = dict(json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f'cannot read {path} (--out): {error}; leave --resume out to make all anew') from error
        differ = [f'--{name} was {before.get(name)}, is {value}' for name, value in settings.items()
                  if before.get(name) != value]
        if differ:
            raise BadInput(f'{args.out} (--out) was made with other settings: {"; ".join(differ)}. Name another '
                           'folder, or leave --resume out to make it anew')
    write_file(path, json.dumps(settings, indent=1))


def check_args(args):
    check_range(args, 0, 2 ** 31, 'seeds')
    check_range(args, 2, 10 ** 6, 'count')
    for flag in ('train', 'train_aff', 'infer', 'walk'):
        try:
            shlex.split(getattr(args, flag))
        except ValueError as error:
            raise BadInput(f'--{flag} {getattr(args, flag)}: {error}') from error
    if not args.toy:
        for name in ('list', 'train_list'):
            load_img_name_list(getattr(args, name), '--' + name)
        if args.weights:
            check_file(args.weights, '--weights')


def main(args):
    check_args(args)
    rows = choose_rows(args)
    make_dir(args.out, '--out')
    check_settings(args)
    path, records = os.path.join(args.out, 'tables.csv'), {}
    if args.resume and os.path.isfile(path):
        records = {(record['table'], record['row'], record['seed']): record for record in read_csv(path)}
    for seed in args.seeds:
        pipeline = Pipeline(args, seed)
        for row in rows:
            result = pipeline.score(row)
            records[row.table, row.name, str(seed)] = {**result, 'table': row.table, 'row': row.name, 'seed': str(seed),
                                                       'mIoU': result.get('mIoU_chosen') or result['mIoU_present']}
            markdown = write_tables(records, args)
    print(f'\n{markdown}\nwrote {path} and tables.md')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(parse_args())
