"""Devices without a GPU: patched device counts, drivers and cards, and what a GPU or another system leaves."""
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch

from conftest import ROOT
from helpers import refused, run
from tool import cli, devices, torchutils, training
from tool.cli import BadInput


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs PyTorch finds, their compute capability, and what the build was made for."""
    def pretend(count, capability=(8, 0), architectures=('sm_75', 'sm_90', 'compute_90')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: f'card {index}')
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
    return pretend


@pytest.fixture
def rank_1_of_2(monkeypatch):
    for name, value in (('RANK', 1), ('WORLD_SIZE', 2), ('LOCAL_RANK', 1)):
        monkeypatch.setenv(name, str(value))


def test_trained_batch_norm_takes_one_of_several_gpus(gpus, capsys):
    gpus(4)
    device = devices.get_device(None, one_gpu=True)
    assert device == torch.device('cuda:0') and devices.count_replicas(device) == 1
    out = capsys.readouterr().out
    assert '4 GPUs' in out and '--train_bn' in out and out.count('\n') == 1
    assert devices.count_replicas(devices.get_device(None)) == 4


def test_bf16_on_several_gpus_needs_torchrun(gpus):
    gpus(2)
    with pytest.raises(BadInput, match='--amp bf16 .* torchrun'):
        devices.check_replicas(torch.device('cuda'), 'bf16')
    devices.check_replicas(torch.device('cuda:0'), 'bf16')
    devices.check_replicas(torch.device('cuda'), 'fp16')


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_flags_of_the_devices_are_checked_before_the_old_log_is_emptied(gpus, tmp_path, script):
    gpus(2)
    (tmp_path / 'x.log').write_text('the last run')
    crf = ('--la_crf_dir', '.', '--ha_crf_dir', '.') if script == 'train_aff' else ()
    refused(run(tmp_path, script, '--session_name', 'x', '--amp', 'bf16', *crf), '--amp bf16', 'torchrun')
    assert (tmp_path / 'x.log').read_text() == 'the last run'


def test_old_driver_is_told_in_one_line(gpus, monkeypatch, capsys):
    def old_driver():
        warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\n'
                      'Please update. (Triggered internally at CUDAFunctions.cpp:119.)')
        return False
    gpus(0)
    monkeypatch.setattr(torch.cuda, 'is_available', old_driver)
    assert devices.get_device(None) == torch.device('cpu')
    out, err = capsys.readouterr()
    assert out.count('\n') == 1 and 'driver on your system is too old' in out and 'CPU' in out
    assert not err and 'Triggered' not in out
    with pytest.raises(BadInput, match='--device cuda: .*too old'):
        devices.get_device('cuda')


def test_card_below_the_architectures_of_the_build(gpus, capsys):
    gpus(1, capability=(6, 1))
    assert devices.get_device(None) == torch.device('cpu')
    assert 'card 0 has compute capability 6.1' in (line := capsys.readouterr().out) and 'needs 7.5' in line
    with pytest.raises(BadInput, match='--device cuda:0: card 0'):
        devices.get_device('cuda:0')


@pytest.mark.parametrize('capability, architectures', [((7, 5), ['sm_75']), ((12, 0), ['sm_90', 'compute_90']),
                                                       ((9, 0), ['gfx90a']), ((9, 0), ['sm_90a'])])
def test_cards_of_the_build_are_used(gpus, capsys, capability, architectures):
    gpus(1, capability, architectures)
    assert devices.get_device(None) == torch.device('cuda') and not capsys.readouterr().out


def test_every_rank_has_a_gpu_of_its_own(gpus, rank_1_of_2):
    gpus(2)
    assert devices.get_device(None) == devices.get_device('cuda') == torch.device('cuda:1')
    with pytest.raises(BadInput, match='--device cuda:1'):
        devices.get_device('cuda:1')
    gpus(1)
    with pytest.raises(BadInput, match='1 GPUs are visible'):
        devices.get_device(None)


def test_gpus_draw_different_dropout_masks(monkeypatch):
    generators = tuple(torch.Generator().manual_seed(0) for _ in range(3))
    monkeypatch.setattr(torch.cuda, 'default_generators', generators)

    def draw(step):
        devices.seed_gpus(7, step, 0)
        return [generator.initial_seed() for generator in generators]
    assert draw(5) == draw(5) and len(set(draw(5))) == 3
    assert draw(5)[0] == draw(6)[0] == 0 and draw(5)[1] != draw(6)[1]       # the first has the seed of set_seed


ALLOCATION = ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
              'allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)')


@pytest.mark.parametrize('error, expected', [
    (MemoryError(), True), (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), True),
    (RuntimeError(ALLOCATION), True), (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), True),
    (RuntimeError('std::bad_alloc'), True), (OSError(12, 'Cannot allocate memory'), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False), (OSError(28, 'No space left'), False),
    (ValueError('out of memory'), False)])
def test_errors_of_memory(error, expected):
    assert cli.is_out_of_memory(error) is expected


def test_pytorch_on_this_machine_says_so_too():
    with pytest.raises(Exception) as caught:
        torch.empty(2 ** 60)
    assert cli.is_out_of_memory(caught.value)


@pytest.mark.parametrize('described, untracked, expected', [
    ('abc', '', 'abc'), ('abc-dirty', '', 'abc-dirty'), ('abc', 'network/mine.py', 'abc-dirty'), ('', '', 'unknown')])
def test_code_that_is_not_in_git_is_dirty(monkeypatch, described, untracked, expected):
    def git(command, **_):
        return types.SimpleNamespace(stdout=described if 'describe' in command else untracked)
    monkeypatch.setattr(subprocess, 'run', git)
    assert devices.describe_revision() == expected


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert devices.describe_revision() == 'unknown'


def test_windows_has_no_sigchld_and_no_resource():
    code = ('import signal, sys\ndel signal.SIGCHLD\nsys.modules["resource"] = None\n'
            'import train_SEAM, train_aff\nfrom tool import devices\nassert devices.peak_memory() == 0\n')
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr


def test_bad_item_of_a_batch_comes_out_of_a_loader_process():
    batches = torch.utils.data.DataLoader(torchutils.SeededDataset(_Odd(), 0), num_workers=1,
                                          batch_sampler=[[(0, 0), (0, 2)], [(0, 2), (0, 3)]],
                                          collate_fn=torchutils.collate, multiprocessing_context='spawn')
    read = torchutils.read_batches(batches)
    assert next(read).tolist() == [0, 2]
    with pytest.raises(BadInput, match='^3.jpg is odd$'):
        next(read)


class _Odd(torch.utils.data.Dataset):
    def __getitem__(self, index):
        if index % 2:
            raise BadInput(f'{index}.jpg is odd')
        return index


def test_what_workers_start_with_can_be_pickled():
    assert pickle.loads(pickle.dumps((torchutils.collate, training.outlive_sigterm)))
