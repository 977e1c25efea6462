"""Trainings that stop and go on: all of them end with the weights of the plain run."""
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import tiny_aff
from conftest import ROOT
from helpers import LIST, done, refused, run
from tool import cli, torchutils, training
from training_runs import ONE_STEP, data, flags, plain, same, weights


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_run_stopped_by_sigterm_and_resumed_ends_with_the_same_weights(data, plain, script, monkeypatch):
    """Every step asks for the stop, so each is followed by a save and a resume, with other numbers of workers."""
    monkeypatch.setattr(training.StopOnSignal, '__enter__', lambda self: setattr(self, 'number', 15) or self)
    monkeypatch.setattr(training.StopOnSignal, '__exit__', lambda *_: None)
    session = f'stopped_{script}'
    for step in range(4):
        resume = ('--resume', '--num_workers', step % 3) if step else ()
        result = run(data, script, *flags(script, session, *resume))
        assert result.returncode == 143 and f'after {step + 1} steps' in result.stdout
        assert weights(data / f'{session}_last.pth')['step'] == step + 1
    done(run(data, script, *flags(script, session, '--resume')))
    assert same(plain[script], weights(data / f'{session}.pth'))
    log = (data / f'{session}.log').read_text()
    assert log.count('Iter:    0/    4') == 1 and log.count('torch') == 5


@pytest.fixture(scope='module')
def trainer(data):
    """A process, in a group of its own, that trains with the flags of each line: importing torch takes seconds."""
    script = os.path.join(ROOT, 'train_SEAM.py')
    code = f"""
import runpy, shlex, sys
sys.path.insert(0, {ROOT!r})
for line in sys.stdin:
    sys.argv = [{script!r}, *shlex.split(line)]
    try:
        runpy.run_path({script!r}, run_name='__main__')
    except SystemExit as stop:
        print('exit code', stop.code, flush=True)
"""
    process = subprocess.Popen([sys.executable, '-c', code], start_new_session=True, cwd=data, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    alarm = threading.Timer(400, process.kill)
    alarm.start()
    yield process
    alarm.cancel()
    process.kill()
    process.communicate()


def start_training(trainer, session, until, *more):
    """Starts a training without end. Returns when until() is true."""
    line = shlex.join(map(str, flags('train_SEAM', session, '--max_epochs', 10000, '--num_workers', 1, *more)))
    print(line, file=trainer.stdin, flush=True)
    while not until():
        assert trainer.poll() is None, trainer.stdout.read()
        time.sleep(.05)


def wait_for_the_end(trainer):
    """Returns what the training printed, with the line of its exit code."""
    lines = ['']
    while not lines[-1].startswith('exit code'):
        lines.append(trainer.stdout.readline())
        assert lines[-1], ''.join(lines)
    return ''.join(lines)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_whole_process_group_ends_the_step_and_saves(data, trainer, number):
    log = data / f'signal{number}.log'
    start_training(trainer, log.stem, lambda: log.exists() and 'Iter:' in log.read_text())
    os.killpg(trainer.pid, number)
    out = wait_for_the_end(trainer)
    assert f'exit code {128 + number}\n' in out and '--resume' in out and 'Traceback' not in out
    assert weights(data / f'signal{number}_last.pth')['step'] >= 1


def test_killed_loader_worker_is_told_and_the_checkpoint_stays(data, trainer):
    start_training(trainer, 'orphan', (data / 'orphan_last.pth').exists, '--save_every', 1)
    for child in subprocess.run(['pgrep', '-P', str(trainer.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    out = wait_for_the_end(trainer)
    assert 'loader' in out and 'killed' in out and 'exit code 2\n' in out
    assert weights(data / 'orphan_last.pth')['step'] >= 1


@pytest.mark.parametrize('write', [1, 3])
def test_worker_killed_while_the_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch, capsys, write):
    """PyTorch's zip writer passes on an error of the first write; later it raises one of its own."""
    class Signalled(io.BytesIO):
        writes = 0

        def write(self, content):
            self.writes += 1
            if self.writes == write:
                raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
            return super().write(content)

    monkeypatch.setattr(training, 'atomic_write', lambda path: contextlib.nullcontext(Signalled()))
    with pytest.raises(SystemExit) as end, cli.exit_on_bad_input():
        training.save_weights(torch.nn.Linear(2, 2), tmp_path / 'net.pth')
    assert end.value.code == 2 and '--num_workers' in capsys.readouterr().err


def test_training_under_nohup_goes_on_when_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.exit_code('cpu') == 0
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with training.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.exit_code('cpu') == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def test_error_nobody_catches_ends_the_loader_workers_too():
    code = """
import torch
from tool.training import outlive_sigterm
batches = iter(torch.utils.data.DataLoader(range(100), num_workers=1, worker_init_fn=outlive_sigterm))
next(batches)
raise RuntimeError('in the middle')
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and 'in the middle' in result.stderr


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_loader_processes_can_be_spawned(data, script, pickled):
    done(run(data, script, *flags(script, f'spawn_{script}', *ONE_STEP)))
    assert pickled


def test_workers_do_not_change_the_weights(data, plain):
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'workers', '--num_workers', 2)))
    assert same(plain['train_SEAM'], weights(data / 'workers.pth'))


def test_contradicting_flags_are_named(data, plain):
    refused(run(data, 'train_SEAM', *flags('train_SEAM', 'plain_train_SEAM', '--resume', '--lr', 0.02)),
            'plain_train_SEAM_last.pth', '--lr was 0.01')


def test_other_spellings_of_the_same_files_resume(data, plain):
    spelled = data / '..' / data.name / LIST
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'moved', '--resume', 'plain_train_SEAM_last.pth', '--train_list',
                                        spelled, '--voc12_root', data / 'VOC2012', '--weights', 'gone.pth')))
    assert same(plain['train_SEAM'], weights(data / 'moved.pth'))
    resume = '--resume', 'plain_train_aff_last.pth', '--train_list', spelled
    folders = '--la_crf_dir', 'la/', '--ha_crf_dir', data / 'ha'
    done(run(data, 'train_aff', *flags('train_aff', 'moved', *resume, *folders)))
    refused(run(data, 'train_aff', *flags('train_aff', 'moved', *resume, '--la_crf_dir', 'ha')),
            '--la_crf_dir ha', ' la ')


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A function that resumes a network from a checkpoint with (flags, digests of files), saved as a GPU saves it."""
    net = torch.nn.Linear(2, 1)
    optimizer = torchutils.PolyOptimizer(net.parameters(), 0.1, 0, 10, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()

    def make(net, optimizer, flags, train_list):
        return training.Checkpoint(str(tmp_path / 'x'), net, optimizer, torch.amp.GradScaler(enabled=False), flags,
                                   training.digest_inputs(train_list=train_list), save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        make(net, optimizer, {'lr': 0.1, 'train_list': 'old.txt'}, ['a', 'b', 'c']).save()

    def resume(lr, path, names):
        fresh = torch.nn.Linear(2, 1)
        again = torchutils.PolyOptimizer(fresh.parameters(), 0.1, 0, 10, momentum=0.9)
        make(fresh, again, {'lr': lr, 'train_list': path}, names).resume()
        assert torch.equal(fresh.weight, net.weight) and again.global_step == 1
    return str(tmp_path / 'x_last.pth'), resume


def test_checkpoint_of_a_gpu_resumes_on_a_cpu(checkpoint):
    path, resume = checkpoint
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match='CUDA'):
            torch.load(path, weights_only=True)
    resume(0.1, 'old.txt', ['a', 'b', 'c'])


def test_contents_of_a_list_count_and_not_its_path(checkpoint):
    path, resume = checkpoint
    resume(0.1, 'moved/old.txt', ['a', 'b', 'c'])
    for names in (['a', 'b', 'd'], ['b', 'a', 'c'], ['a', 'b', 'c', 'd']):
        with pytest.raises(cli.BadInput, match='--train_list old.txt'):
            resume(0.1, 'old.txt', names)


def test_images_may_be_taken_out_of_the_list(checkpoint, capsys):
    path, resume = checkpoint
    resume(0.1, 'old.txt', ['a', 'c'])
    assert '1 images fewer' in (out := capsys.readouterr().out) and '--train_list' in out
    resume(0.1, 'old.txt', ['a', 'b', 'c'])
    assert not capsys.readouterr().out


def test_checkpoint_without_digests_compares_the_paths(checkpoint):
    path, resume = checkpoint
    old = torch.load(path, map_location='cpu', weights_only=True)
    del old['inputs']
    torch.save(old, path)
    resume(0.1, 'old.txt', ['a', 'b', 'c'])
    with pytest.raises(cli.BadInput, match='--train_list was old.txt'):
        resume(0.1, 'new.txt', ['a', 'b', 'c'])


def test_digests_follow_the_contents():
    def digest(names, labels):
        return training.digest_inputs(train_list=names, cls_labels=labels)
    a, b = np.float32([0, 1]), np.float32([1, 0])
    first = digest(['x', 'y'], {'x': a, 'y': b})
    assert first == digest(['x', 'y'], {'y': b, 'x': a})
    assert first['train_list'] != digest(['y', 'x'], {})['train_list']      # the order of a list decides the batches
    assert first['images'][0] != digest(['x'], {'x': b})['images'][0]
    assert first['cls_labels'] != digest([], {'x': b, 'y': b})['cls_labels']


@pytest.mark.parametrize('script, error', [
    ('train_SEAM', torch.OutOfMemoryError('CUDA out of memory.')),
    ('train_aff', RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))])
def test_memory_that_runs_out_is_one_line_and_the_checkpoint_stays(data, script, error, monkeypatch):
    def step(*_):
        raise error
    monkeypatch.setattr(torch.optim.SGD, 'step', step)
    (data / 'memory_last.pth').write_bytes(b'before')
    refused(run(data, script, *flags(script, 'memory')), 'out of memory', '--accum', '--checkpointing', '--amp')
    assert (data / 'memory_last_earlier.pth').read_bytes() == b'before'


@pytest.mark.parametrize('damage', ['missing', 'cut', 'weights'])
def test_checkpoint_that_is_none(data, plain, tmp_path, damage):
    path = tmp_path / 'x_last.pth'
    if damage == 'cut':
        path.write_bytes((data / 'plain_train_SEAM_last.pth').read_bytes()[:100000])
    elif damage == 'weights':
        path.write_bytes((data / 'plain_train_SEAM.pth').read_bytes())
    words = ['go to --weights'] if damage == 'weights' else []
    refused(run(data, 'train_SEAM', *flags('train_SEAM', tmp_path / 'x', '--resume')), 'x_last.pth', '--resume', *words)


def test_failed_save_keeps_the_checkpoint_before(data, plain, monkeypatch, tmp_path):
    last = data / 'plain_train_SEAM_last.pth'
    before = last.read_bytes()

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(cli.BadInput, match='No space left'):
        training.save_weights(tiny_aff.Net(), str(last))
    assert last.read_bytes() == before and not list(data.glob('.plain*'))


def test_full_disk_keeps_the_weights_before(tmp_path, small_files):
    (tmp_path / 'x.pth').write_bytes(b'before')
    with pytest.raises(cli.BadInput, match='x.pth'):
        training.save_weights(tiny_aff.Net(), str(tmp_path / 'x.pth'))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('x.pth', b'before')]
