"""Retraining (DeepLabv1) against the published code's outputs."""
import importlib.util
import json
import os
import random

import numpy as np
import pytest
import torch

from conftest import GOLDEN, close, filled, golden
from fill_weights import checksum
from infer_seg import multi_scale_probability, write_results
from network.resnet38_deeplab import Net
from tool import imutils, metrics
from tool.crf import SEGMENTATION_CRF, crf_inference
from tool.image_files import read_label_map
from tool.outputs import ResultFolder
from tool.score_files import load_scores
from tool.torchutils import PolyOptimizer, poly_lr
from train_seg import segmentation_loss
from training_runs import start
from voc12.data import VOC12SegDataset

ROOT = os.path.join(GOLDEN, 'retrain_voc')
HAS_PYDENSECRF = importlib.util.find_spec('pydensecrf') is not None


@pytest.fixture(scope='module')
def net():
    return filled(Net())


# ----- the network -----

def test_names_shapes_and_order_of_the_released_file(net):
    with open(os.path.join(GOLDEN, 'g12_fill_checksums.json')) as file:
        expected = json.load(file)
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == expected['shapes']
    assert list(net.state_dict()) == list(expected['shapes'])
    assert checksum(net.state_dict()) == expected['checksums']
    assert [name for name, _ in net.named_parameters()] == expected['module_order']


def test_fresh_values_of_the_head():
    with open(os.path.join(GOLDEN, 'g12_fill_checksums.json')) as file:
        expected = json.load(file)['fresh_init_mean_std_min_max']
    state = Net().state_dict()
    for name, (_, std, low, high) in expected.items():
        assert abs(state[name].std(unbiased=False) - std) <= 0.01 * std or len(state[name]) < 32, name
    bias = state['cls_conv.bias']
    assert bias.abs().max() <= 512 ** -.5 and bias.unique().numel() == 21


@torch.no_grad()
def test_forward(net):
    g = golden('g12_deeplab_forward')
    img = torch.from_numpy(imutils.HWC_to_CHW(imutils.normalize(g['x_uint8'])).copy())[None]
    taps = {}
    layers = {'conv_fov': net.conv_fov, 'bn_fov': net.bn_fov, 'conv_fov2': net.conv_fov2, 'bn_fov2': net.bn_fov2,
              'cls_conv': net.cls_conv}
    hooks = [layer.register_forward_hook(lambda _, __, out, name=name: taps.update({name: out.clone()}))
             for name, layer in layers.items()]
    out = net.eval()(img)
    for hook in hooks:
        hook.remove()
    assert list(out.shape) == list(g['out_shape'])
    close(taps['cls_conv'], g['logits_lowres'], 1e-4)
    close(out[:, :, :8, :8], g['out_corner'], 1e-4)
    close(out[:, :, ::4, ::4], g['out_sub'], 1e-4)
    close(torch.stack([out[0, :, -1, -1], out[0, :, 0, -1], out[0, :, -1, 0]]), g['out_last_row_col'], 1e-4)
    for name in ('conv_fov', 'bn_fov', 'conv_fov2', 'bn_fov2'):
        close(taps[name][:, ::32], g[name + '_sub'], 1e-4)
    assert (out[0].argmax(dim=0).numpy() != g['out_argmax']).sum() <= 3


# ----- a training step -----

@pytest.fixture(scope='module')
def steps():
    """Trains four steps on one batch, as the published training does with max_itr 3. Returns the results of each."""
    g = golden('g13_deeplab_step')
    net = Net()
    groups = net.get_parameter_groups()
    optimizer = PolyOptimizer([
        {'params': groups[0], 'lr': 0.001, 'weight_decay': 5e-4}, {'params': groups[1], 'lr': 0.002, 'weight_decay': 0},
        {'params': groups[2], 'lr': 0.01, 'weight_decay': 5e-4}, {'params': groups[3], 'lr': 0.02, 'weight_decay': 0},
    ], lr=0.001, weight_decay=5e-4, max_step=3, lr_steps=3 + 1, momentum=0.9)
    filled(net).train()
    for module in net.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.
    img, label = torch.from_numpy(g['img']), torch.from_numpy(g['label'])
    parameters = [{name: p.detach().clone() for name, p in net.named_parameters()}]
    rates, losses = [], []
    for step in range(4):
        optimizer.zero_grad()
        logits = net(img)
        losses.append(segmentation_loss(logits, label)['loss'])
        losses[-1].backward()
        if step == 0:
            first = {'logits': logits.detach(), 'grads': {n: p.grad.clone() for n, p in net.named_parameters()},
                     'buffers': {name: value.clone() for name, value in net.named_buffers()}}
        optimizer.step()
        rates.append([group['lr'] for group in optimizer.param_groups])
        parameters.append({name: p.detach().clone() for name, p in net.named_parameters()} if step < 2 else None)
    return g, net, optimizer, first, [loss.item() for loss in losses], rates, parameters


def limit(name, head, b7, early):
    """Returns the limit for the layer of a parameter: batch norm amplifies the rounding of early layers."""
    return early if name.startswith(('backbone.conv1a', 'backbone.b3', 'backbone.b5')) else \
        b7 if name.startswith('backbone.') else head


def test_nothing_is_frozen_and_the_groups_are_as_published(steps):
    g, net, optimizer, *_ = steps
    names = {id(p): name for name, p in net.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        assert [names[id(p)] for p in group['params']] == list(map(str, g[f'group{i}_names']))
        assert (group['initial_lr'], group['momentum'], group['weight_decay'], group['dampening'], group['nesterov']) \
            == tuple(g[f'initial_{key}'][i] for key in ('lr', 'momentum', 'weight_decay', 'dampening', 'nesterov'))
    assert all(p.requires_grad for p in net.parameters()) and all(module.training for module in net.modules())


def test_losses_and_learning_rates(steps):
    g, _, _, first, losses, rates, _ = steps
    for loss, expected, tolerance in zip(losses, g['loss_per_step'], (1e-5, 1e-4, 1e-3, 1e-3)):
        assert abs(loss - expected) <= tolerance * expected
    np.testing.assert_allclose(rates, g['lr_per_step'], rtol=1e-12)
    close(first['logits'][:, :, ::8, ::8], g['logits_sub'], 1e-4)
    schedule = [[factor * poly_lr(0.001, int(step), int(g['sched_max']) + 1) for factor in (1, 2, 10, 20)]
                for step in g['sched_iter']]
    np.testing.assert_allclose(schedule, g['sched_lr'], rtol=1e-12)


def test_gradients(steps):
    g, _, _, first, *_ = steps
    norms = [first['grads'][str(name)].double().norm().item() for name in g['grad_names']]
    error = np.abs(np.array(norms) / g['grad_l2'] - 1)
    assert error.max() <= 4e-3 and np.median(error) <= 2e-4
    for key in g:
        if key.startswith('grad64:'):
            close(first['grads'][key[7:]].flatten()[:64], g[key], limit(key[7:], 1e-4, 1e-4, 2e-2))


def test_running_statistics_move_by_3e_4(steps):
    g, net, _, first, *_ = steps
    for key in g:
        if key.startswith('bn_after:'):
            name = key[9:]
            got = torch.stack([first['buffers'][f'{name}.running_{what}'][:32] for what in ('mean', 'var')])
            close(got, g[key], 1e-5)
            assert first['buffers'][name + '.num_batches_tracked'] == g['bn_nbt:' + name] == 1
            norm = net.get_submodule(name)
            assert [norm.momentum, norm.eps] == g['bn_const:' + name].tolist()


def test_updates(steps):
    g, *_, parameters = steps
    for key in g:
        if key.startswith('before64:'):
            name = key[9:]
            values = [p[name].flatten()[:64].double() for p in parameters[:3]]
            expected = [g[f'{when}64:{name}'].astype(np.float64) for when in ('before', 'after', 'after2_')]
            if name.endswith(('bn7.weight', 'bn_fov2.bias')):
                assert (values[0] == values[2]).all()       # in no group
                continue
            close(values[1] - values[0], expected[1] - expected[0], limit(name, 2e-3, 3e-3, 2e-2))
            close(values[2] - values[1], expected[2] - expected[1], limit(name, 5e-3, 1e-1, 1e-1))
    moved = [(parameters[1][str(name)].double() - parameters[0][str(name)].double()).norm().item()
             for name in g['grad_names']]
    np.testing.assert_allclose(moved, g['param_delta_l2'], rtol=4e-3)
    still = [name for name in parameters[0] if torch.equal(parameters[0][name], parameters[1][name])]
    assert still == list(map(str, g['unchanged_names'])) and len(still) == 78


def test_loss_of_ignored_pixels_alone_is_0_and_moves_nothing():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255))['loss']
    loss.backward()
    assert loss == 0 and not logits.grad.any()


# ----- training data -----

def same_pixels(img, expected):
    """Asserts that uint8 arrays agree, except for one grey level in one of 10,000 values, which OpenCV rounds
    differently on another processor."""
    differ = np.abs(img.astype(int) - expected)
    assert differ.max() <= 1 and differ.mean() <= 1e-4


@pytest.fixture(scope='module')
def transforms(tmp_path_factory):
    """The transforms of train_seg.py with the defaults, but for the golden crop size."""
    loader, _ = start('train_seg', tmp_path_factory.mktemp('start'), '--crop_size', golden('g14_retrain_data')['crop'])
    return loader.dataset.dataset.transforms


@pytest.mark.parametrize('case', range(6))
def test_training_sample(transforms, case):
    g = golden('g14_retrain_data')
    image, seed = g['case_image_seed'][case]
    name = str(g['names'][image])
    data = VOC12SegDataset(os.path.join(ROOT, 'list.txt'), ROOT, os.path.join(ROOT, 'pseudo'), transforms=transforms)
    random.seed(int(seed))
    got, img, label = data[list(data.img_name_list).index(name)]
    assert got == name and img.dtype == torch.float32 and label.dtype == torch.int64
    close(img[:, ::3, ::3], g[f'c{case}:image_sub3'], 1e-6)
    assert np.abs(img.double().sum(dim=(1, 2)).numpy() - g[f'c{case}:image_ch_sum']).max() < 0.02   # one grey level
    assert (label.numpy() == g[f'c{case}:label']).all()
    # the steps in between
    random.seed(int(seed))
    pair = g[name + ':rgb_decoded'], g[name + ':pseudo']
    pair = transforms[0](*pair)
    assert (pair[0] == (g[f'c{case}:hsv'])).all()
    pair = transforms[2](*transforms[1](*pair))
    same_pixels(pair[0], g[f'c{case}:scaled'])
    assert (pair[1] == g[f'c{case}:scaled_label']).all()


def test_hsv_jitter_and_scale_units():
    g = golden('g14_retrain_data')
    for deltas, expected in zip(g['unit_hsv_deltas'], g['unit_hsv_out']):
        with pytest.MonkeyPatch.context() as patch:
            draws = iter(deltas.tolist())
            patch.setattr(random, 'randint', lambda low, high: next(draws))
            assert (imutils.JitterHSV(10, 10, 10)(g['unit_hsv_rgb'], None)[0] == expected).all()
    for k, u in enumerate(g['unit_resize_u']):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, 'random', lambda: float(u))
            img, label = imutils.RandomScale(0.5, 1.5)(g['unit_resize_rgb'], g['unit_resize_label'])
        same_pixels(img, g[f'unit_resize_out{k}'])
        assert (label == g[f'unit_resize_lab{k}']).all()


def test_sizes_of_the_test_scales():
    g = golden('g14_retrain_data')
    for (h, w), expected in zip(g['sizes_hw'], g['sizes_test']):
        sizes = [imutils.rescale(np.zeros((h, w), np.float32), scale).shape for scale in (.5, .75, 1, 1.25, 1.5, 1.75)]
        assert sizes == [tuple(size) for size in expected.tolist()]


# ----- test protocol -----

@pytest.fixture(scope='module')
def test_net():
    g = golden('g15_retrain_test')
    net = filled(Net())
    with torch.no_grad():
        net.cls_conv.weight.mul_(float(g['cls_conv_weight_factor']))
        net.cls_conv.bias.copy_(torch.from_numpy(g['cls_conv_bias']))
    return net.eval()


def read(name):
    return imutils.read_image(os.path.join(ROOT, 'JPEGImages', name + '.jpg'))


def test_rescaled_images_of_the_test_protocol():
    g = golden('g14_retrain_data')
    for name in ('2007_000001', '2007_000002'):
        img = imutils.normalize(np.asarray(read(name), np.float32))
        assert (imutils.rescale(img, 1) == img).all()
        for scale, step, key in ((1, 3, 'image'), (0.5, 1, 'image_0.5_sub3'), (1.25, 1, 'image_1.25_sub3')):
            got = imutils.HWC_to_CHW(imutils.rescale(img, scale))
            close(got[:, ::3, ::3], g[f'val:{name}:{key}'], 1e-6)


@pytest.mark.parametrize('name', ['2007_000001', '2007_000002'])
@pytest.mark.skipif(not HAS_PYDENSECRF, reason='pydensecrf is not installed')
def test_probabilities_and_labels(test_net, tmp_path, name):
    g = golden('g15_retrain_test')
    passes = []
    hook = test_net.register_forward_hook(lambda _, args, out: passes.append((list(args[0].shape), out.numpy())))
    img = imutils.normalize(np.asarray(read(name), np.float32))
    prob = multi_scale_probability(test_net, img, g['scales'].tolist())
    hook.remove()
    assert [shape for shape, _ in passes] == g[name + ':input_shapes'].tolist()
    for k, (_, out) in enumerate(passes):
        close(out[0, :, ::16, ::16], g[f'{name}:out{k}_sub16'], 1e-4)
    close(prob[:, ::4, ::4], g[name + ':prob_sub4'], 1e-4)
    assert (prob.argmax(axis=0) != g[name + ':prob_argmax']).sum() <= 3

    assert (imutils.denormalize(imutils.HWC_to_CHW(img)) == g[name + ':crf_image']).all()
    label_folder, prob_folder = (ResultFolder(str(tmp_path), '', extension, {}) for extension in ('.png', '.npy'))
    write_results('a', prob, img, label_folder, prob_folder, True, 'pydensecrf', 'cpu')
    posterior = np.stack(list(load_scores(prob_folder.file('a'), '', 'crf').values()))
    assert np.abs(posterior[:, ::4, ::4] - g[name + ':crf_sub4']).max() <= 2e-3
    label = read_label_map(label_folder.file('a'), '')
    assert (label != g[name + ':label']).sum() <= g[name + ':crf_margin_below_1e-3']


@pytest.mark.skipif(not HAS_PYDENSECRF, reason='pydensecrf is not installed')
def test_crf_of_recorded_probabilities():
    g = golden('g15_retrain_test')
    posterior = crf_inference(g['raw_img'], g['raw_probs'], SEGMENTATION_CRF.iterations,
                              kernels=SEGMENTATION_CRF.kernels)
    assert np.abs(posterior[:, ::2, ::2] - g['raw_out_sub2']).max() <= 1e-5
    assert (posterior.argmax(axis=0) == g['raw_argmax']).all()
    in_torch = crf_inference(g['raw_img'], g['raw_probs'], SEGMENTATION_CRF.iterations,
                             kernels=SEGMENTATION_CRF.kernels, backend='torch')
    assert np.abs(in_torch - posterior).max() <= 1e-3


def test_evaluation_of_the_recorded_labels():
    g = golden('g15_retrain_test')
    matrix = sum(metrics.confusion(imutils.read_label_map(os.path.join(ROOT, 'SegmentationClass', name + '.png'), ''),
                                   g[name + ':label'], 20) for name in ('2007_000001', '2007_000002'))
    iou = metrics.class_measures(matrix)[0]
    np.testing.assert_allclose([*iou, metrics.mean_measures(matrix)['mIoU']], g['miou_log_percent'], atol=1e-9)
