"""`bench.py voc`: runs the scripts themselves, steps 1 to 9 of the README, on drawings of VOC's sizes and tags.

Networks have random weights and a learning rate that leaves them as they are: maps and labels mean nothing, the times
are those of a real run. Rates are of the steady state: the first fifth of a script's batches does not count, nor do
those that its loader prepares at the start. `waits` is the share of that time in which the script waits for its loader;
`busy`, from nvidia-smi, the share in which the GPU had work. evaluation.py has no such loader: its rate is that of the
whole command, with the start of Python.
"""
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from tool.cli import BadInput, check_range
from tool.text_files import write_text

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
NETS = {64: 'resnet38', 16: 'slim'}
TRAIN_AUG, TRAIN, VAL = 10582, 1464, 1449       # images of VOC's lists
EPOCHS, MOST_DRAWN = 2, 100                     # in this benchmark; a drawing takes 0.3 s
COLUMNS = 'step', 'images/s', 'waits', 'busy', 'peak GiB', 'images on VOC', 'hours on VOC', 'command'


def draw_data(root, count, size):
    """`count` images with annotations and masks, of which the first MOST_DRAWN are drawn and the others their links;
    every fourth one is on val.txt, the others on train.txt."""
    subprocess.run([sys.executable, os.path.join(ROOT, 'voc12/make_toy.py'), '--out', root, '--classes', '20',
                    '--count', str(min(count, MOST_DRAWN)), '--size', *map(str, size)], check=True)
    names = [f'2007_{number + 1:06}' for number in range(count)]
    for number, name in enumerate(names[MOST_DRAWN:]):
        for stem, extension in (('JPEGImages', '.jpg'), ('Annotations', '.xml'), ('SegmentationClass', '.png')):
            os.link(f'{root}/{stem}/{names[number % MOST_DRAWN]}{extension}', f'{root}/{stem}/{name}{extension}')
    for split, some in (('val', names[::4]), ('train', [name for name in names if name not in names[::4]])):
        write_text(f'{root}/ImageSets/Segmentation/{split}.txt', '\n'.join(some))


def list_steps(args):
    """Steps 1 to 9: (name, images a batch, or 0 without a loader; images on VOC, script, flags), for a folder with the
    data root `root` in it."""
    net, (_, w) = NETS[args.width], args.size or (375, 500)
    train, val = ('root/ImageSets/Segmentation/' + split for split in ('train.txt', 'val.txt'))
    crop = 448 * w // 500 // 8 * 8
    workers = f'--num_workers {args.num_workers}'
    device = 'cuda:0' if args.device.type == 'cuda' else 'cpu'         # one GPU, if there are several
    run = f'--voc12_root root {workers} --device {device} --amp {args.amp}'
    training = f'{run} --train_list {train} --crop_size {crop} --lr 1e-6'
    seam, aff, seg = (f'--network network.{net}_{head}' for head in ('SEAM', 'aff', 'deeplab'))
    xml = '--cls_labels none'                   # the XML is read
    scoring = f'{workers} --gt_dir root/SegmentationClass'
    return [
        ('1 SEAM training', 8, 8 * TRAIN_AUG, 'train_SEAM.py', f'{training} {xml} {seam} --session_name SEAM '
         f'--resize_long {crop} {crop * 768 // 448} --max_epochs {EPOCHS}'),
        ('2 CAM and CRF', 1, TRAIN_AUG, 'infer_SEAM.py',
         f'{run} {xml} {seam} --weights SEAM.pth --infer_list {train} --out_cam cam --out_crf crf'),
        ('3 evaluation, CAM', 0, TRAIN, 'evaluation.py',
         f'{scoring} --list {train} --predict_dir cam --type npy --curve True --comment CAM'),
        ('4 AffinityNet training', 8, 8 * TRAIN_AUG, 'train_aff.py', f'{training} {aff} --session_name aff '
         f'--la_crf_dir crf_4.0 --ha_crf_dir crf_24.0 --max_epochs {EPOCHS}'),
        ('5 random walk', 1, TRAIN_AUG, 'infer_aff.py',
         f'{run} {aff} --weights aff.pth --infer_list {train} --cam_dir cam --out_rw out_rw'),
        ('6 evaluation, walk', 0, TRAIN, 'evaluation.py',
         f'{scoring} --list {train} --predict_dir out_rw --comment walk'),
        ('7 retraining', 10, 10 * 20000, 'train_seg.py', f'{training} {seg} --session_name seg --label_dir out_rw '
         f'--max_iters {max(args.count * EPOCHS * 3 // 40, 4)}'),
        ('8 segmentation', 1, VAL, 'infer_seg.py',
         f'{run} {seg} --weights seg.pth --infer_list {val} --out_seg out_seg'),
        ('9 evaluation, segmentation', 0, VAL, 'evaluation.py',
         f'{scoring} --list {val} --predict_dir out_seg --comment segmentation')]


def read_loads(path):
    """Returns [(time, share in 0..1 in which the GPU had work)] of a file that nvidia-smi wrote."""
    loads = []
    with open(path, encoding='utf-8') as file:
        for moment, _, percent in (line.strip().partition(', ') for line in file):
            if percent.isdigit():           # not "[N/A]", as for a part of a GPU
                loads.append((datetime.datetime.strptime(moment, '%Y/%m/%d %H:%M:%S.%f').timestamp(),
                              int(percent) / 100))
    return loads


def run_script(script, flags, folder, on_gpu, timed):
    """Runs a script in a folder. Returns (seconds, what timed.py has recorded if `timed`, what `read_loads` returns).
    Raises BadInput with the end of its output where it fails."""
    record, load, output = (os.path.join(folder, name) for name in ('record.json', 'load.txt', 'output.txt'))
    command = [sys.executable, *([os.path.join(HERE, 'timed.py'), record] if timed else []), os.path.join(ROOT, script),
               *shlex.split(flags)]
    print(f'+ python {script} {flags}', flush=True)
    start = time.time()
    with open(output, 'w', encoding='utf-8') as told, open(load, 'w', encoding='utf-8') as loads:
        gpu = os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]
        sampler = subprocess.Popen(['nvidia-smi', '-i', gpu, '--query-gpu=timestamp,utilization.gpu', '-lms', '500',
                                    '--format=csv,noheader,nounits'],
                                   stdout=loads) if on_gpu and shutil.which('nvidia-smi') else None
        try:
            code = subprocess.run(command, cwd=folder, stdout=told, stderr=told, check=False).returncode
        finally:
            if sampler:
                sampler.terminate()
                sampler.wait()
    seconds = time.time() - start
    if code:
        with open(output, encoding='utf-8') as told:
            raise BadInput(f'{script} ended with exit code {code}: {told.read()[-3000:]}')
    if not timed:
        return seconds, None, []
    with open(record, encoding='utf-8') as told:
        return seconds, json.load(told), read_loads(load)


def steady_state(batches, per_batch, shares, prepared=0):
    """(images a second, share of the time in which the script waits for its loader, mean share of the GPU or None)
    after the first fifth of its batches, or after those `prepared` at the start if these are more; at most half of them
    are left out. batches: list of [time, seconds waited]; shares: see `read_loads`."""
    first = min(max(len(batches) // 5, prepared), len(batches) // 2)
    start, end = batches[first][0], batches[-1][0]
    waited = sum(seconds for _, seconds in batches[first + 1:])
    busy = [share for moment, share in shares if start <= moment <= end]
    return ((len(batches) - 1 - first) * per_batch / (end - start), waited / (end - start),
            statistics.mean(busy) if busy else None)


def print_row(cells):
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def bench_voc(args):
    """Prints and returns a row for each step, of COLUMNS. A step that fails has "failed" in place of a rate."""
    if args.width not in NETS:
        raise BadInput(f'--width {args.width}: the scripts have networks of {" and ".join(map(str, NETS))}')
    check_range(args, 24, 10 ** 5, 'count')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        draw_data(f'{folder}/root', args.count, args.size or (375, 500))
        for name, per_batch, on_voc, script, flags in list_steps(args):
            row = [name, 'failed', '-', '-', '-', on_voc, '-', f'python {script} {flags}']
            rows.append(row)
            try:
                seconds, record, shares = run_script(script, flags, folder, args.on_gpu, per_batch > 0)
            except BadInput as error:           # the other steps are worth measuring
                print(error)
                continue
            if record:
                rate, waits, busy = steady_state(record['batches'], per_batch, shares, 2 * args.num_workers)
                row[2:5] = f'{waits:.0%}', '-' if busy is None else f'{busy:.0%}', f'{record["peak"] / 2 ** 30:.2f}'
            else:
                on_val = -(-args.count // 4)
                rate = (on_val if on_voc == VAL else args.count - on_val) / seconds
            row[1], row[6] = f'{rate:.3g}', f'{on_voc / rate / 3600:.2f}'
            print_row(row[:-1])
    print()
    print_row(COLUMNS[:-1])
    print('|---' * len(COLUMNS[:-1]) + '|')
    for row in rows:
        print_row(row[:-1])
    return rows
