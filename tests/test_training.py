"""Resume, seeds, ranks and parts of batches: all of them end with the weights of the plain run."""
import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

import tiny_aff
import tiny_SEAM
import train_SEAM
from conftest import ROOT
from helpers import AFF, LIST, SEAM, done, names_of, refused, run
from tool import cli, metrics, pyutils, torchutils, training, visualization
from voc12.lists import load_labels

VALIDATE = {'train_SEAM': ('--val_every', 1, '--val_list', 'VOC2012/ImageSets/Segmentation/val.txt'), 'train_aff': ()}
NEGATIVES = {'train_SEAM': ('--cls_labels', 'negatives.npy'), 'train_aff': ()}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set of 8 training images, weights to start from, and CRF files for AffinityNet."""
    root = tmp_path_factory.mktemp('training')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 11, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((tiny_SEAM, 'seam'), (tiny_aff, 'aff')):
        net = module.Net()
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}_start.pth'))
    rng = np.random.default_rng(0)
    for folder in ('la', 'ha'):
        (root / folder).mkdir()
        for name in names_of(root):
            from PIL import Image
            w, h = Image.open(root / f'VOC2012/JPEGImages/{name}.jpg').size
            scores = np.float32(rng.random((3, h // 16 + 1, w // 16 + 1)) ** 4).repeat(16, 1).repeat(16, 2)[:, :h, :w]
            np.save(root / folder / f'{name}.npy', dict(enumerate(scores / scores.sum(axis=0))))
    names, held_out = names_of(root), (root / LIST.replace('train', 'val')).read_text().split()
    labels = load_labels(names + held_out, 'none.npy', str(root / 'VOC2012'))
    np.save(root / 'negatives.npy', {name: label * (name not in names[::2]) for name, label in labels.items()})
    (root / 'four.txt').write_text('\n'.join(names[:4]))
    return root


def flags(script, session, *more):
    start = 'seam' if script == 'train_SEAM' else 'aff'
    own = ('--resize_long', 48, 64) if start == 'seam' else ('--la_crf_dir', 'la', '--ha_crf_dir', 'ha')
    return ('--train_list', LIST, '--crop_size', 48, '--batch_size', 4, '--max_epochs', 2, '--num_workers', 0,
            '--network', SEAM if start == 'seam' else AFF, '--weights', f'{start}_start.pth', '--session_name', session,
            *own, *more)


@pytest.fixture(scope='module')
def plain(data):
    """The final weights of an undisturbed run of each script."""
    for script in ('train_SEAM', 'train_aff'):
        done(run(data, script, *flags(script, f'plain_{script}')))
    return {script: weights(data / f'plain_{script}.pth') for script in ('train_SEAM', 'train_aff')}


ONE_STEP = '--train_list', 'four.txt', '--max_epochs', 1


@pytest.fixture(scope='module')
def one_step(data):
    """The weights after one step with the defaults."""
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'one_step', *ONE_STEP)))
    return weights(data / 'one_step.pth')


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b, start):
    """How far two results are apart, as a share of the way that training went (Euclidean, all parameters)."""
    def length(first, second):
        return torch.cat([(first[name] - second[name]).double().flatten() for name in first]).norm()
    return (length(a, b) / length(a, start)).item()


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
    """Training without end; comes back when until() is true."""
    line = shlex.join(map(str, flags('train_SEAM', session, '--max_epochs', 10000, '--num_workers', 1, *more)))
    print(line, file=trainer.stdin, flush=True)
    while not until():
        assert trainer.poll() is None, trainer.stdout.read()
        time.sleep(.05)


def wait_for_the_end(trainer):
    """What the training printed, the line with the exit code included."""
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
    assert f'exit code {128 + number}\n' in out and '--resume goes on' in out and 'Traceback' not in out
    assert weights(data / f'signal{number}_last.pth')['step'] >= 1


def test_killed_loader_worker_is_told_and_the_checkpoint_stays(data, trainer):
    start_training(trainer, 'orphan', (data / 'orphan_last.pth').exists, '--save_every', 1)
    for child in subprocess.run(['pgrep', '-P', str(trainer.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    out = wait_for_the_end(trainer)
    assert 'loader' in out and 'killed' in out and 'exit code 2\n' in out
    assert weights(data / 'orphan_last.pth')['step'] >= 1


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


def test_log_goes_on_without_its_terminal(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.EIO, 'Input/output error')
    log = pyutils.Logger(str(tmp_path / 'x'))
    monkeypatch.setattr(pyutils.tqdm, 'write', write)
    log('a line')
    assert (tmp_path / 'x.log').read_text() == 'a line\n'


def test_records_behind_the_checkpoint_are_taken_out_on_resume(tmp_path):
    log = pyutils.Logger(str(tmp_path / 'x'))
    for step in range(4):
        log.record({'step': step})
    with open(tmp_path / 'x.jsonl', 'a') as file:
        file.write('{"step": 4, "lo')           # the kill came here
    log = pyutils.Logger(str(tmp_path / 'x'), step=2)
    log.record({'step': 2})
    assert [json.loads(line)['step'] for line in (tmp_path / 'x.jsonl').read_text().splitlines()] == [0, 1, 2]
    pyutils.Logger(str(tmp_path / 'x'))
    assert not (tmp_path / 'x.jsonl').read_text()


def test_new_run_says_which_files_of_an_earlier_one_it_replaces(tmp_path, capsys):
    session = str(tmp_path / 'x')
    for step, ends, words in ((None, (), ()), (None, ('.pth',), ('x.pth', '--session_name')),
                              (None, ('.pth', '_last.pth'), ('x.pth', 'x_last.pth', 'x.log', '--resume')), (5, (), ())):
        for end in ends:
            (tmp_path / ('x' + end)).touch()
        training.open_log(session, step, [])
        out = capsys.readouterr().out
        assert ('warning' in out) == bool(words) and all(word in out for word in words)


def test_every_session_has_a_tensorboard_folder_and_a_resumed_one_hides_later_steps(tmp_path, monkeypatch):
    opened = []
    writer = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: opened.append((folder, purge_step)))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', writer)
    for session, step in (('a', 0), ('runs/a', 0), ('../runs//a', 7), ('/runs/a', 0)):
        visualization.open_writer('tb', session, step, print)
    assert opened == [('tb/a', 0), ('tb/runs/a', 0), ('tb/runs/a', 7), ('tb/runs/a', 0)]


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
                                        spelled, '--voc12_root', data / 'VOC2012')))
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
    assert (data / 'memory_last.pth').read_bytes() == b'before'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_full_disk_under_the_log_is_one_line_and_the_run_goes_on(data):
    (data / 'nolog.log').symlink_to('/dev/full')
    out = done(run(data, 'train_SEAM', *flags('train_SEAM', 'nolog', *ONE_STEP)))
    assert out.count('warning: cannot write nolog.log (--session_name): No space left on device') == 1
    assert 'Iter:    0/    1' in out and (data / 'nolog.pth').is_file()


@pytest.mark.parametrize('transform', ['rotation', 'translation'])
def test_rotated_views_are_not_deterministic(data, transform):
    refused(run(data, 'train_SEAM', *flags('train_SEAM', 'x', '--deterministic', '--transform', 'rescale', transform)),
            '--deterministic', transform)


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


@pytest.fixture(scope='module')
def still(data):
    """The weights of runs without dropout, which draws other masks for parts of a batch and for ranks. The random
    networks amplify rounding: small steps. Half of SEAM's images are negatives, which may fill a part or a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout2d, 'forward', lambda self, x: x)
        for script in ('train_SEAM', 'train_aff'):
            done(run(data, script, *flags(script, f'still_{script}', '--lr', 1e-3, *NEGATIVES[script])))
    return {script: (weights(data / f'still_{script}.pth'), weights(data / f'{start}_start.pth'))
            for script, start in (('train_SEAM', 'seam'), ('train_aff', 'aff'))}


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_parts_of_a_batch_add_up_to_the_batch(data, still, script, monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout2d, 'forward', lambda self, x: x)
    done(run(data, script, *flags(script, 'parts', '--accum', 4, '--lr', 1e-3, *NEGATIVES[script])))
    whole, start = still[script]
    assert distance(whole, weights(data / 'parts.pth'), start) < 1e-3       # a wrong factor makes this 0.1 and more


@pytest.fixture(scope='module')
def ranks(data, tmp_path_factory):
    """What two ranks print through torchrun, gloo on the CPU, that train for several steps with one script and then,
    meeting at another port, with the other; they share the validation."""
    commands = [[os.path.join(ROOT, script + '.py'), *map(str, flags(script, f'ranks_{script}', '--lr', 1e-3,
                                                                     '--log_every', 3, *NEGATIVES[script],
                                                                     *VALIDATE[script]))]
                for script in ('train_SEAM', 'train_aff')]
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    code = tmp_path_factory.mktemp('ranks') / 'still.py'
    code.write_text(f"""
import os, runpy, sys, torch
torch.nn.Dropout2d.forward = lambda self, x: x
sys.path.insert(0, {ROOT!r})
for sys.argv in {commands}:
    runpy.run_path(sys.argv[0], run_name='__main__')
    os.environ.update(MASTER_PORT='{port}', TORCHELASTIC_USE_AGENT_STORE='False')
""")
    result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', code],
                            cwd=data, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


def test_only_the_first_rank_prints_and_nothing_is_warned_of(ranks):
    assert ranks.stdout.count('Iter:    0/    4') == ranks.stdout.count('Iter:    3/    4') == 2      # of both scripts
    assert ranks.stdout.count('images 3, masks 3') == 2         # a validation of train_SEAM.py after each epoch
    assert 'FutureWarning' not in ranks.stderr and 'process_group' not in ranks.stderr


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_two_ranks_equal_one(data, still, ranks, script):
    shown, alone = (json.loads((data / f'{session}_{script}.jsonl').read_text().splitlines()[0])
                    for session in ('ranks', 'still'))
    for name in alone:          # the losses of all ranks' images, not of the first's alone
        if 'loss' in name or 'cnt' in name:
            assert shown[name] == pytest.approx(alone[name], rel=1e-3), name
    whole, start = still[script]
    assert distance(whole, weights(data / f'ranks_{script}.pth'), start) < 1e-3


def test_batch_that_does_not_divide(data):
    refused(run(data, 'train_SEAM', *flags('train_SEAM', 'odd', '--accum', 3)), '--batch_size 4', '--accum 3')


def test_batches_are_permutations_shared_by_the_ranks(monkeypatch):
    def batches(start=0):
        return list(torchutils.StepBatches(10, 4, start, 6, seed=3))
    whole = batches()
    for epoch in range(3):
        seen = [index for batch in whole[2 * epoch:2 * epoch + 2] for index in batch]
        assert len(set(seen)) == 8 and {e for e, _ in seen} == {epoch}
    assert whole[0] != whole[2] and batches(3) == whole[3:]
    parts = []
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', '2')
        parts.append(batches())
        assert list(torchutils.StepBatches(10, 4, 0, 6, seed=3, share=False)) == whole      # to calibrate batch norm
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]


def test_classifier_is_fitted_to_every_image_once_whatever_batches_and_ranks(monkeypatch):
    for rank, batch_size in (('0', 4), ('1', 4), ('1', 10), ('1', 3)):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', '2')
        batches = torchutils.list_batches(10, batch_size)
        assert [key for batch in batches for key in batch] == [(0, index) for index in range(10)]
        assert len(batches[0]) == batch_size


def test_record_of_every_print_step(data, plain):
    record, last = [json.loads(line) for line in (data / 'plain_train_SEAM.jsonl').read_text().splitlines()]
    assert last['step'] == 3
    assert record['step'] == 0 and record['epoch'] == 0 and record['lr'] == 0.01 and record['memory_gib'] > 0
    assert {'loss', 'loss_cls1', 'loss_er', 'loss_ecr2', 'mAP', 'images_per_second'} <= set(record)
    head = (data / 'plain_train_SEAM.log').read_text().splitlines()
    first = next(line for line in head if line.startswith('Iter:'))
    assert 'lr=0.01' in head[0] and f'torch {torch.__version__}' in head[1] and 'revision' in head[1]
    assert re.match(r'Iter: +0/ +4 loss:(\d\.\d{4} ?){4}imps:[\d.]+ Fin:.* lr: 0\.0100 mAP: [\d.]+$', first)


def test_loss_that_is_not_finite_names_step_and_images(data):
    result = run(data, 'train_SEAM', *flags('train_SEAM', 'huge', '--lr', 100, '--momentum', 0.99, '--max_epochs', 30))
    line = refused(result, ' step ', 'loss_cls', '2007_')
    assert not (data / 'huge.pth').exists() and '--lr' in line


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_half_precision_trains(data, script):
    done(run(data, script, *flags(script, 'half', '--amp', 'bf16', *ONE_STEP)))
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(data / 'half.pth').values())


def test_recomputed_blocks_give_the_same_weights(data, one_step):
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'again', '--checkpointing', *ONE_STEP)))
    assert distance(one_step, weights(data / 'again.pth'), weights(data / 'seam_start.pth')) < 1e-5


# ----- the switches of the objective -----

def views(n=2, size=32):
    torch.manual_seed(0)
    label = torch.tensor([[1., 0, 1], [0, 1, 0]])[:n]
    return [torch.randn(n, 4, side, side) for side in (size, size, int(size * .3), int(size * .3))], label


def test_weights_of_terms_act_in_the_sum():
    maps, label = views()
    full = train_SEAM.seam_loss(*maps, label)
    none = train_SEAM.seam_loss(*maps, label, er_weight=0, ecr_weight=0, rvmin_weight=0)
    assert none['loss'] == (full['loss_cls1'] + full['loss_cls2']) / 2
    double = train_SEAM.seam_loss(*maps, label, er_weight=2, ecr_weight=3)
    expected = full['loss_cls'] + 2 * full['loss_er'] + 3 * full['loss_ecr']
    assert double['loss'].item() == pytest.approx(expected.item())


def test_no_mining_is_the_plain_mean():
    x = torch.rand(2, 3, 5, 5)
    assert train_SEAM.hard_example_mean(x, 1).item() == pytest.approx(x.mean().item())


def test_rotation_by_90_degrees_turns_the_map():
    x = torch.rand(1, 2, 9, 9)
    theta = torch.tensor([[[0., -1, 0], [1, 0, 0]]])
    turned = train_SEAM.second_view(x, 1, theta=theta)
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-5)


def test_drawn_maps_keep_lengths_and_bounds():
    theta = train_SEAM.draw_theta(500, 40, 60, max_rotation=20, max_translation=15)
    shift = theta[:, :, 2] * torch.tensor([59., 39]) / 2                    # pixels
    assert 14 < shift.abs().max() <= 15
    x, y = theta[:, :, 0] * torch.tensor([59., 39]) / 59, theta[:, :, 1] * torch.tensor([59., 39]) / 39
    assert torch.allclose(x.norm(dim=1), torch.ones(500), atol=1e-5)
    assert torch.allclose((x * y).sum(dim=1), torch.zeros(500), atol=1e-5)
    angle = torch.rad2deg(torch.atan2(x[:, 1], x[:, 0]))
    assert 18 < angle.abs().max() <= 20


def test_what_comes_from_outside_does_not_count():
    """Moved by half the image: whatever stands in the part that is no image changes no loss."""
    maps, label = views()
    theta = torch.tensor([[[1., 0, 1], [0, 1, 0]]]).expand(2, 2, 3)
    view = lambda x: train_SEAM.second_view(x, 1, theta=theta)
    cam1, cam_rv1 = maps[:2]
    cam2, cam_rv2 = torch.rand(2, 4, 32, 32), torch.rand(2, 4, 32, 32)
    cam2[..., 0, 0] = cam_rv2[..., 0, 0] = 9        # the extremes that the normalisation sees stay in the image
    cam2[..., 1, 0] = cam_rv2[..., 1, 0] = 0
    inside = view(torch.ones(2, 1, 32, 32)) > 0.999
    assert 0.4 < inside.float().mean() < 0.6
    first = train_SEAM.seam_loss(cam1, cam_rv1, cam2, cam_rv2, label, view, inside)
    cam2[..., 20:], cam_rv2[..., 20:] = .5, .25
    second = train_SEAM.seam_loss(cam1, cam_rv1, cam2, cam_rv2, label, view, inside)
    for term in ('loss_er', 'loss_ecr1', 'loss_ecr2'):
        assert first[term] == second[term]


@pytest.mark.parametrize('switch', [
    ('--transform', 'flip'), ('--transform', 'rotation'), ('--transform', 'translation'),
    ('--transform', 'rescale', 'flip', 'rotation', 'translation'), ('--pcm', 'off', '--ecr_weight', 0),
    ('--topk_ratio', 1), ('--scale_factor', .5)])
def test_switches_train_and_differ_from_the_default(data, one_step, switch):
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'switched', *ONE_STEP, *switch)))
    switched, start = weights(data / 'switched.pth'), weights(data / 'seam_start.pth')
    assert not same(switched, one_step)
    heads_moved = not torch.equal(switched['f9.weight'], start['f9.weight'])
    assert heads_moved == ('--pcm' not in switch)


# ----- classification quality -----

def test_average_precision_by_hand():
    scores = np.array([[.9, .1], [.8, .2], [.7, .3], [.6, .4]])
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(metrics.average_precision(scores, labels), [(1 + 2 / 3) / 2 * 100, 100])


def test_class_without_images_does_not_count():
    meter = metrics.ClassificationMeter()
    meter.add(torch.tensor([[.9, .5], [.1, .4]]), torch.tensor([[1., 0], [0, 0]]))
    assert meter.pop() == (100, 50)


def test_a_classifier_that_knows_nothing_is_warned_of(tmp_path):
    log = pyutils.Logger(str(tmp_path / 'x'))
    for quality in ((20., 10.), (20., 10.), (80., 10.)):
        train_SEAM.warn_of_poor_training(log, {'loss_er': 1e-5, 'loss_ecr': .4, 'mAP': quality[0]}, quality[1])
    text = (tmp_path / 'x.log').read_text()
    assert text.count('mean average precision') == 1 and text.count('ER has collapsed') == 1
    assert 'lower --lr' not in text
