"""train_seg.py and infer_seg.py through the command line: the chain, resume, ranks, parts of batches, bad input."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_deeplab
import tiny_SEAM
from conftest import ROOT
from helpers import LIST, done, names_of, refused, run
from tool import training
from tool.image_files import read_label_map, save_label_map
from tool.score_files import load_scores

TRUTH = 'VOC2012/SegmentationClass'
NETWORK = 'tiny_deeplab'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set with 9 training images, and weights to start from."""
    root = tmp_path_factory.mktemp('retraining')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 12, '--size', 64, 72, '--classes', 3))
    torch.manual_seed(0)
    torch.save(tiny_deeplab.Net().state_dict(), root / 'start.pth')
    return root


def train(root, session, *more):
    return run(root, 'train_seg', '--train_list', LIST, '--label_dir', TRUTH, '--crop_size', 64, '--batch_size', 4,
               '--max_iters', 4, '--num_workers', 0, '--network', NETWORK, '--weights', 'start.pth', '--session_name',
               session, *more)


@pytest.fixture(scope='module')
def plain(data):
    done(train(data, 'plain'))
    return weights(data / 'plain.pth')


def weights(path):
    return torch.load(path, weights_only=True)


def test_chain_from_labels_to_a_score(data, plain, tmp_path):
    done(run(data, 'infer_seg', '--network', NETWORK, '--weights', 'plain.pth', '--infer_list', LIST, '--scales', .5, 1,
             '--out_seg', tmp_path / 'seg', '--out_prob', tmp_path / 'prob', '--num_workers', 1))
    for name in names_of(data):
        img = Image.open(tmp_path / f'seg/{name}.png')
        prob = load_scores(str(tmp_path / f'prob/{name}.npy'), '', 'crf')
        assert img.mode == 'P' and len(prob) == 21
        assert (np.stack(list(prob.values())).argmax(axis=0) == np.asarray(img)).all()
    again = run(data, 'infer_seg', '--network', NETWORK, '--weights', 'plain.pth', '--infer_list', LIST, '--scales', .5,
                1, '--out_seg', tmp_path / 'seg', '--resume', '--num_workers', 0)
    assert '9 of 9 images are finished' in done(again)
    done(run(data, 'evaluation', '--list', LIST, '--predict_dir', tmp_path / 'seg', '--gt_dir', TRUTH, '--comment', 'x',
             '--logfile', tmp_path / 'log.txt'))


def test_running_statistics_of_a_short_run_follow_the_batches_with_a_larger_bn_momentum(data, plain):
    done(train(data, 'quick', '--bn_momentum', .5))
    quick, start = weights(data / 'quick.pth'), weights(data / 'start.pth')
    moved, little = ((net['bn_fov.running_var'] - start['bn_fov.running_var']).abs().mean() for net in (quick, plain))
    assert moved > 100 * little > 0


def test_images_without_ground_truth_and_without_crf(data, plain, tmp_path):
    (tmp_path / 'JPEGImages').mkdir()
    name = names_of(data)[0]
    shutil.copy(data / f'VOC2012/JPEGImages/{name}.jpg', tmp_path / 'JPEGImages/2008_000006.jpg')
    (tmp_path / 'test.txt').write_text('2008_000006\n')
    done(run(data, 'infer_seg', '--network', NETWORK, '--weights', 'plain.pth', '--voc12_root', tmp_path,
             '--infer_list', tmp_path / 'test.txt', '--scales', 1, '--flip', 0, '--crf', 'off', '--num_workers', 0,
             '--out_seg', tmp_path / 'seg'))
    assert Image.open(tmp_path / 'seg/2008_000006.png').size == Image.open(data / f'{TRUTH}/{name}.png').size


def test_images_of_a_few_pixels(data, plain, tmp_path):
    (tmp_path / 'JPEGImages').mkdir()
    (tmp_path / 'list.txt').write_text('a\nb\n')
    for name, size in (('a', (1, 1)), ('b', (40, 3))):
        Image.new('RGB', size).save(tmp_path / f'JPEGImages/{name}.jpg')
    done(run(data, 'infer_seg', '--network', NETWORK, '--weights', 'plain.pth', '--voc12_root', tmp_path,
             '--infer_list', tmp_path / 'list.txt', '--scales', .1, 1, '--num_workers', 0, '--out_seg',
             tmp_path / 'seg'))
    assert [Image.open(tmp_path / f'seg/{name}.png').size for name in 'ab'] == [(1, 1), (40, 3)]


def test_learns(data, tmp_path):
    """On drawings, in a few steps from random weights, the loss falls."""
    out = done(train(data, tmp_path / 'long', '--max_iters', 12, '--lr', .01, '--log_every', 1, '--scale_range', 1, 1))
    losses = [float(line.split('loss:')[1].split()[0]) for line in out.splitlines() if line.startswith('Iter:')]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_stopped_and_resumed_run_ends_with_the_same_bits(data, plain, monkeypatch):
    monkeypatch.setattr(training.StopOnSignal, '__enter__', lambda self: setattr(self, 'number', 15) or self)
    monkeypatch.setattr(training.StopOnSignal, '__exit__', lambda *_: None)
    for step in range(4):
        stopped = train(data, 'stopped', *(('--resume', '--num_workers', step % 2) if step else ()))
        assert stopped.returncode == 143, stopped.stderr
    monkeypatch.undo()
    done(train(data, 'stopped', '--resume'))
    assert all(torch.equal(value, plain[name]) for name, value in weights(data / 'stopped.pth').items())


def distance(a, b, start):
    """Distance of a from b, in units of the distance that training moved."""
    moved = sum((b[name].double() - start[name]).square().sum() for name in b)
    return (sum((a[name].double() - b[name]).square().sum() for name in b) / moved).sqrt().item()


def test_recomputed_blocks_count_a_batch_once_in_batch_norm(data, plain):
    done(train(data, 'checkpointing', '--checkpointing'))
    again, start = weights(data / 'checkpointing.pth'), weights(data / 'start.pth')
    assert distance(again, plain, start) < 1e-3
    for name in plain:
        if 'running' in name:
            torch.testing.assert_close(again[name], plain[name], rtol=1e-3, atol=1e-5)
        if 'tracked' in name:
            assert again[name] == plain[name] == 4


@pytest.fixture(scope='module')
def frozen(data):
    """One step without dropout with batch norm frozen: what parts and ranks must repeat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, 'dropout', lambda x, *_: x)
        patch.setattr(torch.nn.functional, 'dropout2d', lambda x, *_: x)
        done(train(data, 'frozen', '--freeze_bn', '--max_iters', 1))
        done(train(data, 'parts', '--freeze_bn', '--max_iters', 1, '--accum', 2))
    return weights(data / 'frozen.pth')


def test_frozen_batch_norm_stays(data, frozen, plain):
    start = weights(data / 'start.pth')
    assert all(torch.equal(frozen[name], start[name]) for name in frozen if 'bn' in name)
    assert any(not torch.equal(plain[name], start[name]) for name in plain if 'running' in name)


def test_parts_of_a_batch_add_up_with_frozen_batch_norm(data, frozen):
    assert distance(weights(data / 'parts.pth'), frozen, weights(data / 'start.pth')) < 1e-4


def test_two_ranks_equal_one_with_frozen_batch_norm(data, frozen):
    script = ("import runpy, sys, torch\n"
              "torch.nn.functional.dropout = torch.nn.functional.dropout2d = lambda x, *_: x\n"
              f"sys.path.insert(0, {ROOT!r})\n"
              f"sys.argv[0] = {os.path.join(ROOT, 'train_seg.py')!r}\n"
              "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    flags = ('--train_list', LIST, '--label_dir', TRUTH, '--crop_size', '64', '--batch_size', '4', '--max_iters', '1',
             '--num_workers', '0', '--network', NETWORK, '--weights', 'start.pth', '--session_name', 'ranks',
             '--freeze_bn', '--device', 'cpu')
    ranks = [subprocess.Popen([sys.executable, '-c', script, *flags], cwd=data, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, 'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank),
                                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29713'}) for rank in range(2)]
    for rank in ranks:
        error = rank.communicate(timeout=200)[1]
        assert rank.returncode == 0, error
    assert distance(weights(data / 'ranks.pth'), frozen, weights(data / 'start.pth')) < 1e-4


def test_start_from_weights_of_the_backbone_or_of_another_network(data, tmp_path):
    torch.manual_seed(1)
    for net in (tiny_SEAM.Backbone(), tiny_SEAM.Net()):
        torch.save(net.state_dict(), tmp_path / 'other.pth')
        out = done(train(data, tmp_path / 'x', '--weights', tmp_path / 'other.pth', '--max_iters', 1, '--lr', 0))
        assert 'new, randomly initialised: conv_fov.weight' in out
        got = weights(tmp_path / 'x.pth')
        assert torch.equal(got['backbone.b4.conv_branch2a.weight'], net.b4.conv_branch2a.weight)


# ----- bad input -----

@pytest.mark.parametrize('change, words', [
    (lambda label: label * 0 + 21, ('label 21', '20 classes')), (lambda label: label[:-5], ('its image',))])
def test_label_map_that_cannot_be_trained_on(data, tmp_path, change, words):
    shutil.copytree(data / TRUTH, tmp_path / 'labels')
    name = names_of(data)[3]
    path = str(tmp_path / f'labels/{name}.png')
    save_label_map(path, change(read_label_map(path, '')))
    refused(train(data, tmp_path / 'x', '--label_dir', tmp_path / 'labels'), f'{name}.png', '--label_dir', *words)
    assert not (tmp_path / 'x.pth').exists()


def test_label_maps_of_0_and_255_alone_are_warned_of_and_one_of_255_everywhere_trains(data, plain, tmp_path):
    shutil.copytree(data / TRUTH, tmp_path / 'labels')
    path = str(tmp_path / f'labels/{names_of(data)[3]}.png')
    save_label_map(path, read_label_map(path, '') * 0 + 255)
    step = '--label_dir', tmp_path / 'labels', '--max_iters', 2
    assert 'warning' not in done(train(data, tmp_path / 'good', *step))
    for name in names_of(data):
        path = str(tmp_path / f'labels/{name}.png')
        save_label_map(path, (read_label_map(path, '') > 0) * 255)
    out = done(train(data, tmp_path / 'bad', *step))
    warning, = [line for line in out.splitlines() if 'warning' in line]
    assert '--label_dir' in warning and '0 and 255' in warning and out.index('warning') < out.index('Iter:')


@pytest.mark.parametrize('flags, words', [
    (('--label_dir', '.'), ('.png', '--label_dir')), (('--label_dir', 'none'), ('none', '--label_dir')),
    (('--batch_size', 100), ('9 images', '--batch_size')), (('--scale_range', 2, 1), ('--scale_range',)),
    (('--network', 'tiny_SEAM'), ('tiny_SEAM', 'segmentation')), (('--sync_bn',), ('--sync_bn',)),
    (('--backbone', 'resnet18'), ('--backbone resnet18', NETWORK))])
def test_flags_that_cannot_be(data, tmp_path, flags, words):
    refused(train(data, tmp_path / 'x', *flags), *words)


def test_frozen_batch_norm_of_random_weights_is_refused(data, tmp_path):
    refused(run(data, 'train_seg', '--train_list', LIST, '--label_dir', TRUTH, '--batch_size', 4, '--network', NETWORK,
                '--freeze_bn', '--session_name', tmp_path / 'x'), '--freeze_bn', '--weights')


def test_inference_without_outputs_and_with_other_weights(data, plain, tmp_path):
    flags = '--network', NETWORK, '--infer_list', LIST
    refused(run(data, 'infer_seg', *flags, '--weights', 'plain.pth'), '--out_seg', '--out_prob')
    torch.save(tiny_SEAM.Backbone().state_dict(), tmp_path / 'other.pth')
    refused(run(data, 'infer_seg', *flags, '--weights', tmp_path / 'other.pth', '--out_seg', tmp_path / 'seg'),
            'other.pth', 'missing: conv_fov.weight')


def test_probabilities_of_nan_are_no_background(data, tmp_path):
    broken = weights(data / 'start.pth')
    broken['backbone.bn7.running_var'] -= 2         # its root is NaN
    torch.save(broken, tmp_path / 'broken.pth')
    result = run(data, 'infer_seg', '--network', NETWORK, '--weights', tmp_path / 'broken.pth', '--infer_list', LIST,
                 '--scales', 1, '--crf', 'off', '--out_seg', tmp_path / 'seg', '--num_workers', 0)
    refused(result, 'NaN', '--weights', 'broken.pth')
    assert not list((tmp_path / 'seg').glob('*.png'))
