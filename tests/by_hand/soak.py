"""Kills and disturbs runs at random moments: a longer version of test_resume.py and test_results.py.

    python tests/by_hand/soak.py [--rounds 1] [--seed 0] [--runs cam crf rw]

Each round kills (-9) every kind of run at random moments, continues it, and compares the result with that of a run
that was left alone, byte for byte. Then: a disk that fills up, an output folder that cannot be written, a killed loader
process, a checkpoint that is cut. A round is about 25 kills in 6 minutes. Prints one line a fault, exit code 1 with a
failure.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIST = 'VOC2012/ImageSets/Segmentation/train.txt'
TRAIN = f'--train_list {LIST} --crop_size 48 --batch_size 4 --max_epochs 6 --num_workers 1 --save_every 2'.split()
RUNS = {        # name -> (command, the flag of its output)
    'seam': (['train_SEAM.py', *TRAIN, *'--network network.slim_SEAM --resize_long 48 64'.split()], '--session_name'),
    'cam': (['infer_SEAM.py', '--infer_list', LIST, *'--network network.slim_SEAM --weights plain/seam.pth --scales 1 '
             '--num_workers 1'.split()], '--out_cam'),
    'crf': (['infer_SEAM.py', '--infer_list', LIST, *'--network network.slim_SEAM --weights plain/seam.pth --scales 1 '
             '--num_workers 0 --crf_workers 1 --crf_alpha 4 24'.split()], '--out_crf'),
    'aff': (['train_aff.py', *TRAIN, *'--network network.slim_aff --la_crf_dir plain/crf_4.0 --ha_crf_dir '
             'plain/crf_24.0'.split()], '--session_name'),
    'rw': (['infer_aff.py', '--infer_list', LIST, *'--network network.slim_aff --weights plain/aff.pth --cam_dir '
            'plain/cam --num_workers 1'.split()], '--out_rw'),
}


def start(work, name, out, *more, **options):
    command, flag = RUNS[name]
    command = [sys.executable, os.path.join(ROOT, command[0]), *command[1:], flag, f'{out}/{name}', *more]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    """(exit code, last line of stderr)."""
    error = process.communicate(timeout=600)[1].strip().split('\n')[-1]
    return process.returncode, error


def results(work, out, name):
    """relative path -> bytes of what a run leaves; of trainings, the weights."""
    if name in ('seam', 'aff'):
        weights = torch.load(os.path.join(work, out, name + '.pth'), weights_only=True)
        return {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
    found = {}
    for folder in sorted(entry for entry in os.listdir(os.path.join(work, out)) if entry.split('_')[0] == name):
        for file in sorted(os.listdir(os.path.join(work, out, folder))):
            if not file.startswith('.'):        # what a killed process was writing
                with open(os.path.join(work, out, folder, file), 'rb') as opened:
                    content = opened.read()
                # the journal's lines are in the order of the work, and an empty one is where it went on
                found[f'{folder}/{file}'] = sorted(content.split()) if file == 'finished.txt' else content
    return found


def more_flags(work, name):
    """--resume; of a training, where it has left a checkpoint."""
    checkpoint = os.path.join(work, 'killed', name + '_last.pth')
    return ['--resume'] if name not in ('seam', 'aff') or os.path.isfile(checkpoint) else []


def kill_and_go_on(work, name, seconds):
    """Kills a run again and again at random moments, six times at most, and lets it end. Returns how often it died."""
    shutil.rmtree(os.path.join(work, 'killed'), ignore_errors=True)
    died = 0
    for _ in range(6):
        process = start(work, name, 'killed', *more_flags(work, name), start_new_session=True)
        time.sleep(random.uniform(0.1, 0.8) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)      # loader and CRF processes too, as a pre-empted node does
            died += 1
        process.communicate()
        if process.returncode == 0:
            break
    code, error = finish(start(work, name, 'killed', *more_flags(work, name)))
    assert code == 0, error
    assert results(work, 'killed', name) == results(work, 'plain', name), 'another result'
    return died


def fill_disk(work, name):
    limit = 100 if name == 'rw' else 20000      # bytes of a file; label maps are small

    def limit_file_size():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # the loader's shared memory is a file too
    code, error = finish(start(work, name, 'full', '--num_workers', '0', preexec_fn=limit_file_size))
    assert code == 2 and 'cannot write' in error, (code, error)
    assert not [file for _, _, files in os.walk(os.path.join(work, 'full')) for file in files
                if file.endswith(('.pth', '.npy', '.png')) and os.path.getsize(os.path.join(_, file)) >= limit]


def no_folder(work, name):
    code, error = finish(start(work, name, '/sys/seam'))
    assert code == 2 and 'error' in error, (code, error)


def kill_loader(work):
    """The run ends with one line; going on gives the plain result."""
    shutil.rmtree(os.path.join(work, 'killed'), ignore_errors=True)
    process = start(work, 'seam', 'killed', '--save_every', '1')
    while not os.path.isfile(os.path.join(work, 'killed', 'seam_last.pth')):
        time.sleep(.05)
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    code, error = finish(process)
    assert code == 2 and 'loader process was killed' in error, (code, error)
    code, error = finish(start(work, 'seam', 'killed', '--resume'))
    assert code == 0 and results(work, 'killed', 'seam') == results(work, 'plain', 'seam'), error


def cut_checkpoint(work):
    path = os.path.join(work, 'killed', 'seam_last.pth')
    os.truncate(path, os.path.getsize(path) // 2)
    code, error = finish(start(work, 'seam', 'killed', '--resume'))
    assert code == 2 and 'seam_last.pth (--resume)' in error, (code, error)


def main(args):
    random.seed(args.seed)
    failures = 0

    def attempt(title, function, *arguments):
        nonlocal failures
        try:
            result = function(*arguments)
            print(title, '' if result is None else result, 'ok', flush=True)
        except AssertionError as error:
            failures += 1
            print(title, 'FAILED:', error, flush=True)

    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, os.path.join(ROOT, 'voc12/make_toy.py'), '--out', 'VOC2012', '--count', '24',
                        '--size', '64', '64', '--classes', '3'], cwd=work, check=True, stdout=subprocess.DEVNULL)
        seconds = {}
        for name in RUNS:
            begin = time.time()
            code, error = finish(start(work, name, 'plain'))
            assert code == 0, error
            seconds[name] = time.time() - begin
        for number in range(args.rounds):
            for name in args.runs:
                attempt(f'round {number}: {name}, deaths:', kill_and_go_on, work, name, seconds[name])
        for name in args.runs:
            attempt(f'full disk: {name}', fill_disk, work, name)
            attempt(f'no folder: {name}', no_folder, work, name)
        if 'seam' in args.runs:
            attempt('killed loader', kill_loader, work)
            attempt('cut checkpoint', cut_checkpoint, work)
    print(f'{failures} failures')
    return failures > 0


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', default=1, type=int)
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--runs', default=list(RUNS), choices=list(RUNS), nargs='+', help='the runs that are disturbed')
    sys.exit(main(parser.parse_args()))
