"""Ranks and worker processes of inference, other systems, output that nobody reads."""
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT
from helpers import AFF, SEAM, done, names_of, refused
from inference_runs import cams, contents, data, walk
from jobs import Unsendable, fail
from tool import score_files, workers
from tool.cli import BadInput, exit_on_bad_input, is_killed_loader
from tool.on_error import Errors
from tool.torchutils import read_items


# ----- ranks and worker processes -----

def test_ranks_share_the_list_and_end_with_the_same_files(data, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        done(cams(data, '--out_cam', tmp_path / 'cam'))
    assert contents(tmp_path / 'cam') == contents(data / 'cam')
    monkeypatch.delenv('WORLD_SIZE')
    assert '7 of 7 images are finished' in done(cams(data, '--out_cam', tmp_path / 'cam', '--resume'))


def test_crf_workers_write_the_same_bytes(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_workers', 1))
    for alpha in ('4.0', '24.0'):
        assert contents(tmp_path / f'crf_{alpha}') == contents(data / f'crf_{alpha}')


def test_crf_in_torch_gives_the_same_scores(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_backend', 'torch'))
    for name in names_of(data):
        for alpha in ('4.0', '24.0'):
            ours, theirs = (score_files.load_scores(str(folder / f'crf_{alpha}/{name}.npy'), '', 'crf')
                            for folder in (tmp_path, data))
            assert list(ours) == list(theirs) and max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 1e-3


def test_error_in_a_worker_is_raised_and_no_more_is_submitted():
    with pytest.raises(ZeroDivisionError):
        with workers.BoundedPool(1) as pool:
            for number in (1, 0, 1):
                pool.submit(divmod, 1, number)


def test_errors_of_jobs_are_kept_under_the_names_of_their_images():
    for count in 0, 1:
        errors = Errors('skip', 'less')
        with workers.BoundedPool(count, errors) as pool:
            pool.submit(fail, MemoryError(), name='a')
            pool.submit(fail, BadInput('b is bad'), name='b')
            pool.submit(abs, -1, name='c')
        assert errors.lines == ['out of memory at the image a; what helps: less', 'b is bad'] and pool.results == [1]


def test_killed_worker_is_one_line_even_with_skip():
    errors = Errors('skip', '')
    with pytest.raises(BadInput, match='--crf_workers'):
        with workers.BoundedPool(1, errors) as pool:
            for name in 'abcdef':
                with errors.caught(name):
                    pool.submit(os._exit, 1, name=name)
    assert not errors.lines


def test_pool_does_not_run_away():
    with workers.BoundedPool(1) as pool:
        start = time.time()
        for _ in range(6):
            pool.submit(time.sleep, .1)
            assert len(pool._waiting) <= 2
    assert time.time() - start > .5


# ----- other systems -----

OTHER_SYSTEM = """
import multiprocessing, os, resource, sys
multiprocessing.set_start_method('spawn')
for name in 'sched_getaffinity', 'fork', 'forkpty':
    delattr(os, name)
sys.modules['resource'] = None
"""


@pytest.mark.parametrize('script', ['infer_SEAM', 'infer_aff'])
def test_without_fork_affinity_and_utf_8(data, tmp_path, script):
    (tmp_path / 'sitecustomize.py').write_text(OTHER_SYSTEM)
    (tmp_path / 'list.txt').write_text(names_of(data)[0])
    flags = {'infer_SEAM': ['--network', SEAM, '--weights', 'seam.pth', '--scales', '1', '--out_crf', tmp_path / 'out'],
             'infer_aff': ['--network', AFF, '--weights', 'aff.pth', '--cam_dir', 'cam', '--out_rw', tmp_path / 'out',
                           '--crf']}[script]
    done(subprocess.run([sys.executable, os.path.join(ROOT, script + '.py'), '--infer_list', tmp_path / 'list.txt',
                         *flags, '--num_workers', '1' if script == 'infer_SEAM' else '0', '--crf_workers', '1'],
                        cwd=data, capture_output=True, text=True,
                        env=dict(os.environ, PYTHONIOENCODING='cp1252',
                                 PYTHONPATH=f'{tmp_path}{os.pathsep}{os.environ["PYTHONPATH"]}')))
    assert len(list(tmp_path.glob('out*/2*'))) == (2 if script == 'infer_SEAM' else 1)


def test_loader_processes_of_the_walk_can_be_spawned(data, tmp_path, pickled):
    done(walk(data, '--out_rw', tmp_path / 'rw'))
    assert pickled


WRAPPED = "from tool.cli import exit_on_bad_input\nwith exit_on_bad_input():\n    "


@pytest.mark.parametrize('code', ['print("x" * 10 ** 6)', 'print("x")', 'print("x"); raise SystemExit(3)'])
def test_output_that_nobody_reads_ends_quietly(code):
    process = subprocess.Popen([sys.executable, '-c', WRAPPED + 'import time; time.sleep(.5); ' + code], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 141


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
@pytest.mark.parametrize('code', ['print("x" * 10 ** 6)', 'print("x")', 'print("x"); raise SystemExit(3)'])
def test_output_on_a_full_disk_is_one_line(code):
    with open('/dev/full', 'w') as full:
        result = subprocess.run([sys.executable, '-c', WRAPPED + code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                                text=True)
    assert 'cannot write the output: No space left' in refused(result)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize('code, expected', [
    ('print("x", flush=True)', 129), ('print("x", end="")', 0), ('print("x", end=""); raise SystemExit(143)', 143)])
def test_output_to_a_closed_terminal_ends_quietly_with_the_exit_code_of_the_run(code, expected):
    ours, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, '-c', WRAPPED + 'input(); ' + code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=terminal, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONUNBUFFERED=''))
    os.close(terminal)
    os.close(ours)
    assert process.communicate(b'\n')[1] == b'' and process.returncode == expected


def test_damaged_disk_is_no_closed_terminal():
    result = subprocess.run([sys.executable, '-c', f'{WRAPPED}raise OSError(5, "Input/output error")'], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1 and 'Input/output error' in result.stderr


@pytest.mark.parametrize('error, words', [
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), '--num_workers'),
    (RuntimeError('unable to allocate shared memory(shm) for file </torch_7>: Cannot allocate memory (12)'), '--shm'),
    (RuntimeError('unable to write to file </torch_7_8_9>: No space left on device (28)'), '--shm-size'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'out of memory'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'), 'out of memory')])
def test_errors_of_the_machine_are_one_line(error, words, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_bad_input():
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == 2 and words in line and line.count('\n') == 1


def test_loader_that_cannot_hand_over_its_item_ends_the_run():
    """As where /dev/shm is full; the script waited for ever."""
    items = read_items(Unsendable(), ['a', 'b'], Errors('stop', ''), 1, torch.device('cpu'), 'test')
    with pytest.raises(RuntimeError) as caught:
        list(items)
    assert is_killed_loader(caught.value)


def test_bug_in_a_loader_process_is_no_killed_process():
    error = 'RuntimeError("Caught RuntimeError in DataLoader worker process 0.")'
    result = subprocess.run([sys.executable, '-c', f'{WRAPPED}raise {error}'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and 'Traceback' in result.stderr


def test_console_that_lacks_a_character():
    result = subprocess.run([sys.executable, '-c', WRAPPED + 'print("gr\\u00fcn \\u65e5")'], cwd=ROOT,
                            env=dict(os.environ, PYTHONIOENCODING='ascii'), capture_output=True, text=True)
    assert done(result) == 'gr\\xfcn \\u65e5\n'
