"""How the scripts put their parts together: optimizer, transforms, modes, and the lines that people parse."""
import random
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

import evaluation
import infer_seg
import train_aff
import train_SEAM
import train_seg
from conftest import golden
from network import resnet38_aff, resnet38_deeplab, resnet38_SEAM
from network.affinity import AffinityHead
from network.base import Network
from network.seam import SEAMHead
from tool import imutils, torchutils, training
from tool.cli import BadInput
from training_runs import STARTS, start
from voc12.data import VOC12AffDataset


@pytest.fixture(scope='module')
def started(tmp_path_factory):
    """script -> (loader, Checkpoint) of a training with the default flags at its first step."""
    return {script: start(script, tmp_path_factory.mktemp(script)) for script in STARTS}


def transforms_of(started, script):
    loader, _ = started[script]
    return loader.dataset.dataset.transforms


# ----- the optimizer and the batches -----

@pytest.mark.parametrize('script, lr, momentum, batch_size, max_step, lr_steps', [
    ('train_SEAM', 0.01, 5e-4, 8, 1322 * 8, 1322 * 8), ('train_aff', 0.01, 5e-4, 8, 1322 * 8, 1322 * 8),
    ('train_seg', 0.001, 0.9, 10, 20000, 20001)])
def test_optimizer_of_the_published_runs(started, script, lr, momentum, batch_size, max_step, lr_steps):
    loader, checkpoint = started[script]
    optimizer, batches = checkpoint.optimizer, loader.batch_sampler
    groups = optimizer.param_groups
    np.testing.assert_allclose([group['initial_lr'] / lr for group in groups], [1, 2, 10, 20])
    assert [group['weight_decay'] for group in groups] == [5e-4, 0, 5e-4, 0]
    assert {(group['momentum'], group['dampening'], group['nesterov']) for group in groups} == {(momentum, 0, False)}
    assert (optimizer.max_step, optimizer.lr_steps, optimizer.power) == (max_step, lr_steps, 0.9)
    assert (batches.start, batches.max_step, batches.batch_size) == (0, max_step, batch_size)
    for group, expected in zip(groups, checkpoint.net.get_parameter_groups()):
        assert list(map(id, group['params'])) == list(map(id, expected))


@pytest.mark.parametrize('script', STARTS)
def test_batches_are_shuffled_from_the_first_epoch_on(started, script):
    batches = started[script][0].batch_sampler
    first = [index for epoch, index in next(iter(batches))]
    assert sorted(first) != list(range(len(first))) and len(set(first)) == batches.batch_size
    assert np.ptp(first) > 5000


# ----- transforms -----

def test_seam_crops_are_padded_with_the_mean_colour(started):
    """The long side is 448 or more, so the white image reaches from the top of the crop to the bottom."""
    img = transforms_of(started, 'train_SEAM')(Image.new('RGB', (100, 400), 'white'))
    assert img.shape == (3, 448, 448) and img.dtype == torch.float32
    padding = (img == 0).all(dim=0)
    assert (img[:, ~padding] > 0).all() and torch.equal(padding, padding[:1].expand(448, 448))
    assert 448 / 4 <= (~padding[0]).sum() <= 768 / 4


def test_affinity_crops_are_padded_with_black(started):
    img, scores = Image.new('RGB', (60, 40), 'white'), np.ones((40, 60, 4), np.float32)
    for transform in transforms_of(started, 'train_aff'):
        img, scores = transform(img, scores)
    black = -np.array(imutils.MEAN) / imutils.STD
    assert img.shape == (448, 448, 3) and scores.shape == (56, 56, 4)
    assert (np.abs(img - black).max(axis=-1) < 1e-6).sum() == 448 ** 2 - 40 * 60
    assert scores.sum() == pytest.approx(4 * 40 * 60 / 64)


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_colour_jitter(started, script):
    chain = transforms_of(started, script)
    steps = chain.transforms if script == 'train_SEAM' else [getattr(step, 'transform', None) for step in chain]
    jitter, = [step for step in steps if isinstance(step, ColorJitter)]
    assert tuple(jitter.brightness) == tuple(jitter.contrast) == tuple(jitter.saturation) == (0.7, 1.3)
    assert tuple(jitter.hue) == (-0.1, 0.1)


def test_seam_mirrors_half_of_the_images(started):
    flip, = [step for step in transforms_of(started, 'train_SEAM').transforms if isinstance(step, RandomHorizontalFlip)]
    assert flip.p == 0.5


def test_affinity_mirrors_image_and_labels_together_by_the_same_draws(started):
    """Each sample draws its crop, horizontally first, and then one bit; other draws would make other runs."""
    left = np.zeros((448, 448, 3), np.uint8)
    left[:, :224] = 255
    random.seed(0)
    expected = [(random.randint(0, 0), random.randint(0, 0), random.getrandbits(1))[2] for _ in range(12)]
    random.seed(0)
    mirrored = []
    for _ in range(12):
        img, scores = Image.fromarray(left), np.float32(left[..., :2] > 0)
        for transform in transforms_of(started, 'train_aff'):
            img, scores = transform(img, scores)
        sides = [part[:, -1].sum() > part[:, 0].sum() for part in (img, scores)]
        assert sides[0] == sides[1]
        mirrored.append(int(sides[0]))
    assert mirrored == expected and 3 <= sum(expected) <= 9


def test_random_long_side_includes_both_limits(started):
    resize = transforms_of(started, 'train_SEAM').transforms[0]
    assert (resize.min_long, resize.max_long) == (448, 768)
    random.seed(0)
    img, small = Image.new('RGB', (3, 6)), imutils.RandomResizeLong(7, 9)
    assert {small(img).size[1] for _ in range(50)} == {7, 8, 9}


def test_segmentation_normalises_in_float32_to_the_bit(started, monkeypatch, tmp_path):
    def stop(*_, transform, **__):
        raise InterruptedError(transform)

    (tmp_path / 'x.pth').touch()
    monkeypatch.setattr(infer_seg, 'VOC12ImageDataset', stop)
    flags = ['--weights', str(tmp_path / 'x.pth'), '--out_seg', str(tmp_path), '--crf', 'off']
    with pytest.raises(InterruptedError) as stopped:
        infer_seg.main(infer_seg.get_args_parser().parse_args(flags))
    transform, = stopped.value.args

    img = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    mean, std = np.float32(imutils.MEAN), np.float32(imutils.STD)
    expected = (img.astype(np.float32) / np.float32(255) - mean) / std
    assert (expected != imutils.normalize(img)).mean() > 0.3        # of double precision
    assert np.array_equal(transform(Image.fromarray(img)), expected)
    assert np.array_equal(transforms_of(started, 'train_seg')[3](img, None)[0], expected)
    assert np.array_equal(train_seg.normalize_whole_image(Image.fromarray(img)), imutils.HWC_to_CHW(expected))


def test_crf_dicts_in_another_order_are_refused(tmp_path):
    for folder in ('JPEGImages', 'la', 'ha'):
        (tmp_path / folder).mkdir()
    Image.new('RGB', (48, 48)).save(tmp_path / 'JPEGImages/a.jpg')
    (tmp_path / 'list.txt').write_text('a\n')
    for folder, keys in (('la', (0, 1, 2)), ('ha', (0, 2, 1))):
        np.save(tmp_path / folder / 'a.npy', {key: np.full((48, 48), 1 / 3, np.float32) for key in keys})
    la, ha = str(tmp_path / 'la'), str(tmp_path / 'ha')
    with pytest.raises(BadInput) as refusal:
        VOC12AffDataset(str(tmp_path / 'list.txt'), la, ha, 48, str(tmp_path))[0]
    for text in ('a.npy', '[0, 1, 2]', '[0, 2, 1]', '--la_crf_dir', '--ha_crf_dir'):
        assert text in str(refusal.value)
    assert VOC12AffDataset(str(tmp_path / 'list.txt'), la, la, 48, str(tmp_path))[0][0] == 'a'


# ----- networks -----

@pytest.mark.parametrize('script', STARTS)
def test_first_step_finds_the_network_in_training_mode(started, script):
    net = started[script][1].net
    assert net.training
    frozen = set(net.frozen_norms()) if script != 'train_seg' else set()
    assert frozen or script == 'train_seg'
    for module in net.modules():
        assert module.training == (module not in frozen)
    assert all(not parameter.requires_grad for layer in net.not_training for parameter in layer.parameters())


@pytest.mark.parametrize('module, data, key', [
    (resnet38_SEAM, 'g02_seam_losses', 'dropout_modules'), (resnet38_aff, 'g07_aff_forward', 'trainB_dropout_modules'),
    (resnet38_deeplab, 'g13_deeplab_step', 'dropout_modules')])
def test_dropout_layers_and_their_rates(module, data, key):
    with torch.device('meta'):
        net = module.Net()
    found = [(name, type(layer).__name__, layer.p) for name, layer in net.named_modules()
             if isinstance(layer, torch.nn.modules.dropout._DropoutNd)]
    rows = [str(row).replace('dropout1 ', 'dropout ').split() for row in golden(data)[key]]
    assert sorted(found) == sorted((row[0], row[1] if len(row) == 3 else 'Dropout2d', float(row[-1])) for row in rows)


class NoBackbone(Network):
    channels = {'conv4': 512, 'conv5': 1024, 'conv6': 4096}


@pytest.mark.parametrize('head, layers', [
    (SEAMHead, {'fc8': (2 / (4096 + 21)) ** .5, 'f8_3': (2 / 512) ** .5, 'f8_4': (2 / 1024) ** .5,
                'f9': 4 * (2 / (195 + 192)) ** .5}),
    (AffinityHead, {'f8_3': (2 / 512) ** .5, 'f8_4': (2 / 1024) ** .5, 'f8_5': (2 / 4096) ** .5,
                    'f9': 4 * (2 / (448 + 448)) ** .5})])
def test_fresh_values_of_the_new_layers(head, layers):
    """std of Xavier's uniform and of Kaiming's normal values; a uniform value is at most sqrt(3) std."""
    torch.manual_seed(0)
    net = type('Net', (head, NoBackbone), {})()
    assert [name for name, _ in net.named_parameters()] == [name + '.weight' for name in layers]
    for name, std in layers.items():
        weight = net.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(std, rel=0.015) and abs(weight.mean()) < 0.03 * std, name
        assert (weight.abs().max() <= 3 ** .5 * std) == (name in ('fc8', 'f9')), name


# ----- lines that people parse -----

def progress_line(means, losses, counts=()):
    lines, records = [], []

    def log(line):
        lines.append(line)

    log.record = records.append
    timer = types.SimpleNamespace(report=lambda step, max_step, size: (step + size / 10 + .04, '2020-05-01 12:34:56'))
    optimizer = types.SimpleNamespace(param_groups=[{'lr': 0.00996}, {'lr': 1}])
    batches = torchutils.StepBatches(10582, 8, 0, 10576, 0)
    training.report_progress(log, timer, batches, optimizer, 1350, means, losses, counts)
    assert {key: value for key, value in records[0].items() if key != 'memory_gib'} == {
        'step': 1350, 'epoch': 1, **means, 'lr': 0.00996, 'images_per_second': pytest.approx(1351.84)}
    return lines


def test_progress_line_of_seam():
    means = {'loss_cls1': 9., 'loss_ecr': .32104, 'loss': 1.16276, 'loss_er': .01089, 'loss_cls': .83083}
    line = 'Iter: 1350/10576 loss:1.1628 0.8308 0.0109 0.3210 imps:1351.8 Fin:2020-05-01 12:34:56 lr: 0.0100'
    assert progress_line(means, train_SEAM.PRINTED_LOSSES) == [line]
    assert progress_line({**means, 'mAP': 61.25}, train_SEAM.PRINTED_LOSSES) == [line + ' mAP: 61.2']
    assert progress_line({'loss': .5, 'mAP': None}, train_SEAM.PRINTED_LOSSES) == [
        'Iter: 1350/10576 loss:0.5000 imps:1351.8 Fin:2020-05-01 12:34:56 lr: 0.0100']


def test_progress_line_of_affinity_net():
    means = {'neg_loss': 1.02722, 'bg_loss': 1.23896, 'fg_loss': .94502, 'loss': 1.05961, 'neg_cnt': 707.4,
             'bg_cnt': 68., 'fg_cnt': 593.}
    assert progress_line(means, train_aff.PRINTED_LOSSES, train_aff.COUNTS) == [
        'Iter: 1350/10576 loss:1.0596 1.2390 0.9450 1.0272 imps:1351.8 cnt:68 593 707 '
        'Fin:2020-05-01 12:34:56 lr: 0.0100']


def test_lines_of_an_evaluation():
    matrix = np.zeros((5, 5), np.int64)         # 3 classes and the background; class 3 is predicted and nowhere
    matrix[0, 0], matrix[1, 1], matrix[1, 3], matrix[2, 2], matrix[2, 0] = 6, 3, 1, 1, 1
    names = ['background', 'aeroplane', 'bicycle', 'a bird']
    classes = [' background: 85.714%\t  aeroplane: 75.000%', '    bicycle: 50.000%\t     a bird:  0.000%', '=' * 54]
    mean = '       mIoU: 52.679%  (70.238% over the classes present)'
    assert evaluation.report_one(matrix, names, None)[3] == [
        *classes, mean, '        mFP:  4.762%', '        mFN: 25.000%', '   accuracy: 83.333%']
    assert evaluation.report_one(matrix, names, [1, 2])[3] == [
        *classes, mean, '       mIoU: 62.500%  over aeroplane, bicycle',
        '        mFP:  0.000%', '        mFN: 37.500%', '   accuracy: 83.333%']
    lines = evaluation.report_curve(np.array([.1, .25]), np.stack([matrix, matrix]), names, None, 2)[3]
    assert lines == ['0/2 background score: 0.100\tmIoU: 52.679%', '1/2 background score: 0.250\tmIoU: 52.679%',
                     'best: background score 0.100\tmIoU: 52.679%, 70.238% over the classes present']
