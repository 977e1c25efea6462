"""Makes the tables of the paper on any data root: trains, infers and evaluates what their rows need, for each seed.

    python tool/tables.py --table 1 --seeds 0 1 2                       baseline to random walk, as the paper's table 1
    python tool/tables.py --table all --toy                             five tables in miniature, on drawings
    python tool/tables.py --lite0 --voc12_root ROOT --train_list LIST   with EfficientNet-Lite0, for a CPU
    python tool/tables.py --table 1 --rows SEAM walk --resume           some rows; keeps finished work

In --out, tables.csv has the numbers of each row and seed, and tables.md their means and standard deviations. The files
of training and inference are in one folder for each seed, named after their flags. mIoU, mFP and mFN are means over
--mean_classes or, without it, over the classes present. The plateau is the width of the range of background scores
whose mIoU is at least 95% of the best.
"""
import argparse
import collections
import functools
import json
import os
import re
import shlex
import statistics
import sys

if not __package__:        # run as a script: Python puts tool/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, exit_on_bad_input, make_dir
from tool.commands import ROOT, run_child
from tool.files import file_digest, set_aside
from tool.image_lists import load_img_name_list
from tool.outputs import SETTINGS, read_settings
from tool.table_checks import check_data, check_numbers, check_scripts
from tool.text_files import read_csv, write_csv, write_text

GT_FOLDER, AUG_GT_FOLDER = 'SegmentationClass', 'SegmentationClassAug'

# train, infer: flags of train_SEAM.py and infer_SEAM.py. scored: cam, crf_ALPHA or walk on --list; seg or seg_truth, a
# network retrained on the labels of the walk or on ground truth, on --val_list
Row = collections.namedtuple('Row', 'table name train infer scored', defaults=('', '', 'cam'))
BASELINE = '--classifier_only', '--map cam'
HEADER = ('**Table: {}**\n\n| row | seeds | best background score | plateau | mIoU | mFP | mFN | published mIoU |\n'
          '|---|---|---|---|---|---|---|---|\n')
COLUMNS = ['table', 'row', 'seed', 'list', 'images', 'background_score', 'plateau', 'mIoU', 'mFP', 'mFN', 'accuracy']

# (train, infer, scored) -> mIoU of the paper's ResNet38 on VOC 2012 train. The paper does not state the alpha of its
# CRF. Its number stands at 4, the default that suits its best background score; at the alpha with the best result here,
# it would flatter this code
PUBLISHED = {(*BASELINE, 'cam'): '47.43', ('', '', 'cam'): '55.41', ('', '', 'crf_4.0'): '56.83 (alpha not stated)',
             ('', '', 'walk'): '63.61'}
PAPER_FLAGS = 'network', 'network_aff', 'backbone', 'scales', 'alphas', 'mean_classes'   # with others, no PUBLISHED
FREE_FLAGS = 'table', 'rows', 'seeds', 'resume', 'out', 'voc12_root', 'num_workers', 'device'   # may change on resume
SHARED_FLAGS = 'voc12_root', 'class_names', 'num_workers', 'device', 'backbone'     # of all scripts with a network

# defaults with --toy and in the demo, which has fewer drawings. Image sizes and crops are a seventh of the paper's; at
# these test scales objects are as large as in training; AffinityNet needs larger crops. The feature maps are half as
# wide as VOC's, so the walk takes fewer steps, and high affinities get more weight
TOY = {'out': 'tables_toy', 'train_list': None, 'network': 'network.slim_SEAM', 'network_aff': 'network.slim_aff',
       'network_seg': 'network.slim_deeplab', 'weights': None, 'scales': [0.25, 0.5, 0.75], 'alphas': [2.0, 4.0, 8.0],
       'num_workers': 1,
       'pretrain': '--classifier_only --train_bn --dropout 0 --momentum 0.9 --lr 0.03 --batch_size 16 '
                   '--max_epochs 25'.split(),
       'train': '--resize_long 64 112 --crop_size 64'.split(),
       'train_aff': '--crop_size 128 --momentum 0.9 --lr 0.02 --max_epochs 3'.split(),
       'walk': '--alpha 2.5 --beta 16 --logt 4'.split(),
       'train_seg': '--crop_size 96 --scale_range 0.4 0.7 --batch_size 8 --max_iters 25 --lr 0.003 '
                    '--bn_momentum 0.2'.split(),
       'seg': '--scales 0.5'.split()}
# defaults with --lite0: training on VOC's photographs at less than half their size; 130 steps with 1,040 of them
LITE0 = {'network': 'network.timm_SEAM', 'network_aff': 'network.timm_aff', 'network_seg': 'network.timm_deeplab',
         'weights': None, 'scales': [0.75, 1.0], 'alphas': [0.7, 1.1, 4.0],
         'train': '--fit_classifier --momentum 0.9 --lr 0.001 --dropout 0 --resize_long 128 224 --crop_size 128 '
                  '--scale_factor 0.5 --max_epochs 1'.split(),
         'train_aff': '--crop_size 192 --momentum 0.9 --lr 0.01 --max_epochs 2'.split(),
         'infer': '--flip 0'.split(),
         'walk': '--alpha 1.1 --logt 4'.split(),
         'train_seg': '--crop_size 192 --batch_size 8 --max_iters 80 --lr 0.002 --bn_momentum 0.05'.split(),
         'seg': '--scales 0.5 0.75'.split()}


def list_rows(scales, alphas):
    """Returns all rows of all tables, in order. To add one, name its table and the flags that make it."""
    return [
        Row('1', 'baseline', *BASELINE),
        Row('1', '+ ER', '--pcm off --ecr_weight 0 --rvmin_weight 0', '--map cam'),
        Row('1', '+ PCM and ECR', '--topk_ratio 1'),
        Row('1', '+ hard-example mining (SEAM)'),
        *(Row('1', f'+ CRF, alpha {alpha:.1f}', scored=f'crf_{alpha:.1f}') for alpha in alphas),
        Row('1', 'random walk', scored='walk'),
        Row('retrain', 'retrained', scored='seg'),
        Row('retrain', 'retrained on ground truth', scored='seg_truth'),
        Row('refinement', 'CAM', *BASELINE),
        Row('refinement', 'gradcam', '--classifier_only', '--map gradcam'),
        Row('refinement', 'gradcam++', '--classifier_only', '--map gradcam++'),
        Row('refinement', 'SEAM'),
        Row('activation', 'baseline', *BASELINE),
        Row('activation', 'SEAM'),
        *(Row('scale', f'{scale}', infer=f'--scales {scale}') for scale in scales),
        Row('scale', 'all'),
        Row('transform', 'rescale'),
        *(Row('transform', kind, f'--transform {kind}') for kind in ('flip', 'rotation', 'translation'))]


# ----- the commands -----

@functools.cache                    # a command that several rows need runs once
def run(script, *flags):
    run_child([sys.executable, os.path.join(ROOT, script), *map(str, flags)])


def pass_on(args, *names):
    """Returns those of these flags that have a value, as words of a script's command. The script has the same flags."""
    words = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            words += ['--' + name, *(value if isinstance(value, list) else [value])]
    return words


def result_path(args, *words):
    """Returns a path in the folder of the seed, named after the words: what it is, and flags."""
    name = re.sub(r'[^\w.+]+', '_', ' '.join(words)).strip('_')
    return os.path.join(args.out, f'seed{args.seed}', name)


def train(args, script, session, *flags):
    """Runs a training, with --resume if there is a checkpoint. Returns the path of its weights."""
    resume = ['--resume'] if args.resume and os.path.isfile(session + '_last.pth') else []
    run(script, *pass_on(args, *SHARED_FLAGS, 'train_list', 'seed'), *flags, '--session_name', session, *resume)
    return session + '.pth'


def infer(args, script, names, folders, *flags):
    """Runs inference on a list of images, without those that this run has already put into all of these folders."""
    wanted = load_img_name_list(names)
    todo = [name for name in wanted if not all(name in args.made[folder] for folder in folders)]
    if not todo:
        return
    if len(todo) < len(wanted):
        # the path of each remaining list is different, because `run` does not repeat a command
        rest = f'after {len(args.made[folders[0]])} the rest of'
        names = result_path(args, os.path.basename(folders[0]), rest, os.path.basename(names))
        write_text(names, ''.join(f'{name}.jpg\n' for name in todo))       # names with blanks need an extension
    for folder in folders:
        args.made[folder].update(todo)
    resume = ['--resume'] if args.resume else []
    run(script, *pass_on(args, *SHARED_FLAGS), '--infer_list', names, *flags, *resume)


def make_toy(args):
    """Makes drawings, and trains a classifier on them that replaces the ImageNet weights."""
    args.voc12_root, session = result_path(args, 'toy'), result_path(args, 'pretrained')
    lists = os.path.join(args.voc12_root, 'ImageSets', 'Segmentation')
    args.list = args.train_list = os.path.join(lists, 'train.txt')
    args.val_list = os.path.join(lists, 'val.txt')
    if not (args.resume and os.path.isfile(args.list)):
        run('voc12/make_toy.py', '--out', args.voc12_root, '--size', 192, 224, *pass_on(args, 'count', 'seed'),
            *(pass_on(args, 'class_names') or ['--classes', 4]))
    args.weights = train(args, 'train_SEAM.py', session, *pass_on(args, 'network'), *args.train, *args.pretrain)
    args.weights_aff = session + '_backbone.pth'


def make_cams(args, names, train_flags='', infer_flags=''):
    """Steps 1 and 2: trains SEAM, and returns the folder of the CAMs of a list."""
    weights = train(args, 'train_SEAM.py', result_path(args, 'seam', train_flags),
                    *pass_on(args, 'network', 'weights', 'cls_labels'), *args.train, *train_flags.split())
    folder = result_path(args, 'cam', train_flags, infer_flags)
    infer(args, 'infer_SEAM.py', names, [folder], '--weights', weights,
          *pass_on(args, 'network', 'cls_labels', 'scales'), *args.infer, *infer_flags.split(), '--out_cam', folder)
    return folder


def make_crfs(args, names, alphas):
    """Makes the CRFs of SEAM's CAMs of a list. Returns their folders, one for each alpha."""
    cams, prefix = make_cams(args, names), result_path(args, 'crf')
    folders = [f'{prefix}_{alpha:.1f}' for alpha in alphas]
    infer(args, 'infer_SEAM.py', names, folders, '--cam_dir', cams, *args.infer, '--out_crf', prefix, '--crf_alpha',
          *alphas)
    return folders


def make_aff(args):
    """Step 4: AffinityNet, trained on the CRFs at the lowest and the highest alpha. Returns its weights."""
    folders = make_crfs(args, args.aff_list or args.train_list, sorted({args.alphas[0], args.alphas[-1]}))
    aff = argparse.Namespace(network=args.network_aff, weights=args.weights_aff, train_list=args.aff_list)
    return train(args, 'train_aff.py', result_path(args, 'aff'), *pass_on(aff, 'network', 'weights', 'train_list'),
                 '--la_crf_dir', folders[0], '--ha_crf_dir', folders[-1], *args.train_aff)


def make_walk(args, names):
    """Step 5: makes the pseudo labels of a list. Returns their folder."""
    weights, cams, folder = make_aff(args), make_cams(args, names), result_path(args, 'walk')
    infer(args, 'infer_aff.py', names, [folder], '--network', args.network_aff, '--weights', weights, '--cam_dir', cams,
          '--out_rw', folder, *args.walk)
    return folder


def truth_to_train_on(args):
    """Returns the folder of ground truth to retrain on. SegmentationClass of VOC has masks for only a part of
    train_aug."""
    augmented = os.path.join(args.voc12_root, AUG_GT_FOLDER)
    return args.train_gt or (augmented if os.path.isdir(augmented) else os.path.join(args.voc12_root, GT_FOLDER))


def make_segmentation(args, folder, labels):
    """Steps 7 and 8: trains a segmentation network on the label maps in `labels`, and runs it on --val_list."""
    seg = argparse.Namespace(network=args.network_seg, weights=args.weights_aff)
    weights = train(args, 'train_seg.py', folder + '_net', *pass_on(seg, 'network', 'weights'), '--label_dir', labels,
                    *args.train_seg)
    infer(args, 'infer_seg.py', args.val_list, [folder], *pass_on(seg, 'network'), '--weights', weights, '--out_seg',
          folder, *args.seg)


def score(args, row):
    """Makes what a row needs and evaluates it. Returns its _result.csv as a dict."""
    folder, truth = result_path(args, row.scored, row.train, row.infer), os.path.join(args.voc12_root, GT_FOLDER)
    names, kind = args.list, ['png']
    if row.scored == 'walk':
        make_walk(args, args.list)
    elif row.scored.startswith('seg'):
        names = args.val_list
        labels = truth_to_train_on(args) if row.scored == 'seg_truth' else make_walk(args, args.train_list)
        make_segmentation(args, folder, labels)
    elif row.scored == 'cam':
        make_cams(args, args.list, row.train, row.infer)
        kind = ['npy', '--curve', 'True']
    else:
        make_crfs(args, args.list, args.alphas)
        kind = ['crf']
    run('evaluation.py', *pass_on(args, 'num_workers', 'class_names', 'mean_classes'), '--list', names, '--type', *kind,
        '--gt_dir', truth, '--predict_dir', folder, '--out_prefix', folder,
        '--logfile', os.path.join(args.out, 'evallog.txt'), '--comment', os.path.relpath(folder, args.out))
    return read_csv(folder + '_result.csv')[0]


# ----- the tables -----

def mean_and_deviation(values):
    text = f'{statistics.mean(values):.1f}'
    return f'{text} ± {statistics.stdev(values):.1f}' if len(values) > 1 else text


def markdown_row(row, records, published):
    """Returns a row of tables.md from its records, one for each seed. published: whether the paper's number may stand
    beside it if the list is VOC 2012 train."""
    cells = [row.name, ', '.join(record['seed'] for record in records)]
    for key in ('background_score', 'plateau'):
        cells.append(', '.join(f'{float(record[key]):.2f}' for record in records if record[key]))
    for key in ('mIoU', 'mFP', 'mFN'):
        cells.append(mean_and_deviation([float(record[key]) for record in records]))
    belongs = published and all(record['list'] == 'train' for record in records)
    cells.append(PUBLISHED.get((row.train, row.infer, row.scored), '') if belongs else '')
    return f'| {" | ".join(cells)} |\n'


def write_tables(records, args):
    """Writes tables.csv and tables.md. Returns the latter. records: dict (table, row, seed) -> line of tables.csv."""
    parser = get_args_parser()
    published = all(getattr(args, name) == parser.get_default(name) for name in PAPER_FLAGS)
    seeds = sorted({seed for _, _, seed in records}, key=int)
    lines, tables = [], {}
    for row in list_rows(args.scales, args.alphas):
        keys = [(row.table, row.name, seed) for seed in seeds]
        mine = [records[key] for key in keys if key in records]
        lines += [[record[column] for column in COLUMNS] for record in mine]
        if mine:
            tables.setdefault(row.table, HEADER.format(row.table))
            tables[row.table] += markdown_row(row, mine, published)
    write_csv(os.path.join(args.out, 'tables.csv'), COLUMNS, lines)
    markdown = '\n'.join(tables.values())
    write_text(os.path.join(args.out, 'tables.md'), markdown)
    return markdown


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # what to do
    tables = '1', 'refinement', 'activation', 'scale', 'transform', 'retrain', 'all'
    add('--table', default=['1'], nargs='+', choices=tables, help='tables to make; all means the first five')
    add('--rows', nargs='+', metavar='TEXT', help='make only the rows whose name contains one of these texts')
    add('--seeds', default=[0], type=int, nargs='+', help='seeds; every training is repeated with each of them')
    add('--toy', action='store_true', help='use the drawings, networks and settings of the demo')
    add('--lite0', action='store_true',
        help='EfficientNet-Lite0 of timm, and settings for about 1,000 photographs, as defaults; with another number '
             'add --train="--max_epochs N" and the same to --train_aff')
    add('--count', default=240, type=int, help='number of drawings, for --toy')
    add('--resume', action='store_true',
        help='keep finished work. Without it, everything is computed again, and seedN and tables.csv of an earlier run '
             'are renamed to seedN_earlier and tables_earlier.csv')
    add('--out', default='tables', help='folder to write all results to (default: tables, or tables_toy with --toy)')
    # data
    add('--voc12_root', default='VOC2012', help='data root; contains JPEGImages/ and SegmentationClass/')
    add('--train_list', default='voc12/train_aug.txt', help='list of the training images')
    add('--aff_list', help='list of the training images of AffinityNet. Default: --train_list')
    add('--list', help='list of the images to evaluate. Default: ImageSets/Segmentation/train.txt of the data root')
    add('--val_list', help='list of the images to evaluate retrained networks on. Default: val.txt beside --list')
    add('--train_gt',
        help='folder of label maps of the training images, for the row "retrained on ground truth". Default: '
             f'{AUG_GT_FOLDER} of the data root, which voc12/make_seg_aug.py makes, or {GT_FOLDER}')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--cls_labels', help='image-level labels, see train_SEAM.py')
    add('--mean_classes', nargs='+', metavar='NAME',
        help='classes to average over, see evaluation.py. Default: those present in the ground truth')
    # networks and settings
    add('--network', default='network.resnet38_SEAM', help='network of SEAM')
    add('--network_aff', default='network.resnet38_aff', help='network of AffinityNet')
    add('--network_seg', default='network.resnet38_deeplab', help='network that is retrained')
    add('--backbone', help='name of a timm model, for networks of timm')
    add('--weights', default='ilsvrc-cls_rna-a1_cls1000_ep-0001.params', nargs='?',
        help='pretrained weights that training starts from; give the flag without a value for networks that load '
             'their own')
    add('--scales', default=[0.5, 1.0, 1.5, 2.0], type=float, nargs='+',
        help='test scales, as factors of the image size')
    add('--alphas', default=[4.0, 24.0], type=float, nargs='+',
        help='background exponents of the CRFs; AffinityNet learns from the lowest and the highest')
    add('--num_workers', default=8, type=int, help='number of worker processes of every script')
    add('--device', help='device of every script that runs a network')
    # flags for the scripts; they come after those of --toy and --lite0, so they win
    more = functools.partial(add, action='extend', default=[], type=shlex.split, metavar='FLAGS')
    more('--pretrain', help='flags of the training that replaces ImageNet pretraining, for --toy')
    more('--train', help='more flags for train_SEAM.py: --train="--amp bf16 --accum 2"')
    more('--train_aff', help='more flags for train_aff.py')
    more('--infer', help='more flags for infer_SEAM.py')
    more('--walk', help='more flags for infer_aff.py')
    more('--train_seg', help='more flags for train_seg.py')
    more('--seg', help='more flags for infer_seg.py')
    return parser


def parse_args():
    """Parses the flags; --toy and --lite0 change the defaults of those that are not given."""
    parser = get_args_parser()
    args = parser.parse_args()
    if args.toy and (args.lite0 or args.aff_list):
        parser.error('--toy has its own settings and images: leave out --lite0 and --aff_list')
    parser.set_defaults(**(TOY if args.toy else LITE0 if args.lite0 else {}))
    args = parser.parse_args()
    if not args.toy:
        lists = os.path.join(args.voc12_root, 'ImageSets', 'Segmentation')
        args.list = args.list or os.path.join(lists, 'train.txt')
        args.val_list = args.val_list or os.path.join(lists, 'val.txt')
    args.alphas = sorted(args.alphas)
    return args


def choose_rows(args):
    """Returns the rows of --table and --rows. Raises BadInput."""
    chosen = [row for row in list_rows(args.scales, args.alphas) if row.table in args.table
              or ('all' in args.table and row.table != 'retrain')]
    for text in args.rows or ():
        if not any(text in row.name for row in chosen):
            raise BadInput(f'--rows {text}: no such row of --table {" ".join(args.table)}; there are '
                           + ', '.join(row.name for row in chosen))
    return [row for row in chosen if not args.rows or any(text in row.name for text in args.rows)]


def check_settings(args):
    """Writes the flags that the results depend on, files by their digest, into --out. Raises BadInput if --resume would
    keep results that were made with other flags."""
    settings = {name: file_digest(value) if isinstance(value, str) and os.path.isfile(value) else value
                for name, value in vars(args).items() if name not in FREE_FLAGS}
    before = read_settings(args.out) if args.resume else None
    differ = [f'--{name} was {before.get(name)}, is {value}' for name, value in settings.items()
              if before and before.get(name) != value]
    if differ:
        raise BadInput(f'{args.out} (--out) was made with other settings: {"; ".join(differ)}. Name another folder, or '
                       'leave --resume out to make it anew')
    write_text(os.path.join(args.out, SETTINGS), json.dumps(settings, indent=1))


def main(args):
    check_numbers(args)
    rows = choose_rows(args)
    scored = {row.scored for row in rows}
    check_scripts(args, scored, check_data(args, scored, truth_to_train_on(args)))
    make_dir(args.out, '--out')
    path, records = os.path.join(args.out, 'tables.csv'), {}
    if not args.resume:
        for earlier in *(os.path.join(args.out, f'seed{seed}') for seed in args.seeds), path:
            set_aside(earlier)
    check_settings(args)
    if os.path.isfile(path):
        records = {(record['table'], record['row'], record['seed']): record for record in read_csv(path)}
    for seed in args.seeds:
        of_seed = argparse.Namespace(**vars(args), seed=seed, weights_aff=args.weights,
                                     made=collections.defaultdict(set))         # folder -> names of its images
        make_dir(result_path(of_seed), '--out')
        if args.toy:
            make_toy(of_seed)
        for row in rows:
            result = score(of_seed, row)
            records[row.table, row.name, str(seed)] = {**result, 'table': row.table, 'row': row.name, 'seed': str(seed),
                                                       'mIoU': result.get('mIoU_chosen') or result['mIoU_present']}
            markdown = write_tables(records, args)
    print(f'\n{markdown}\nwrote {path} and tables.md')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(parse_args())
