"""Parts of batches and ranks: all of them end with the weights of the plain run."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from helpers import done, refused, run
from tool import torchutils
from training_runs import ONE_STEP, data, flags, one_step, weights

VALIDATE = {'train_SEAM': ('--val_every', 1, '--val_list', 'VOC2012/ImageSets/Segmentation/val.txt'), 'train_aff': ()}
NEGATIVES = {'train_SEAM': ('--cls_labels', 'negatives.npy'), 'train_aff': ()}


def distance(a, b, start):
    """Distance of two results, as a share of the distance that training moved (Euclidean, all parameters)."""
    def length(first, second):
        return torch.cat([(first[name] - second[name]).double().flatten() for name in first]).norm()
    return (length(a, b) / length(a, start)).item()


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


def test_finished_training_has_no_batches_left_when_its_list_is_shorter():
    batches = torchutils.StepBatches(10, 4, 8, 6, seed=3)
    assert len(batches) == 0 and list(batches) == []


def test_classifier_is_fitted_to_every_image_once_whatever_batches_and_ranks(monkeypatch):
    for rank, batch_size in (('0', 4), ('1', 4), ('1', 10), ('1', 3)):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', '2')
        batches = torchutils.list_batches(10, batch_size)
        assert [key for batch in batches for key in batch] == [(0, index) for index in range(10)]
        assert len(batches[0]) == batch_size


def test_recomputed_blocks_give_the_same_weights(data, one_step):
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'again', '--checkpointing', *ONE_STEP)))
    assert distance(one_step, weights(data / 'again.pth'), weights(data / 'seam_start.pth')) < 1e-5
