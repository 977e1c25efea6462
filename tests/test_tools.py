"""Optimizer, transforms and batch-norm calibration; the first two against the reference's numbers."""
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import GOLDEN, close, golden
from network.slim_SEAM import Net
from tool import files, image_files, imutils, text_files, torchutils


def test_poly_optimizer_over_12_steps():
    g = golden('g03_poly_optimizer')
    lr, wt_dec, max_step = float(g['lr']), float(g['wt_dec']), int(g['max_step'])
    params = [torch.nn.Parameter(torch.from_numpy(g[f'p{i}_init'])) for i in range(5)]
    optimizer = torchutils.PolyOptimizer([
        {'params': params[0:1], 'lr': lr, 'weight_decay': wt_dec},
        {'params': params[1:2], 'lr': 2 * lr, 'weight_decay': 0},
        {'params': params[2:3], 'lr': 10 * lr, 'weight_decay': wt_dec},
        {'params': params[3:4], 'lr': 20 * lr, 'weight_decay': 0}, {'params': params[4:5]},
    ], lr=lr, weight_decay=wt_dec, max_step=max_step)
    for key in ('lr', 'momentum', 'dampening', 'weight_decay', 'nesterov'):
        np.testing.assert_allclose([group[key] for group in optimizer.param_groups], g['initial_group_' + key])
    assert optimizer.power == g['poly_power']
    for step in range(12):
        for i, param in enumerate(params):
            param.grad = torch.from_numpy(g[f'p{i}_grads'][step])
        optimizer.step()
        lr_used = [group['lr'] for group in optimizer.param_groups]
        np.testing.assert_allclose(lr_used, g['lr_per_step'][step], rtol=1e-12)
        assert optimizer.global_step == g['global_step_after'][step]
        for i, param in enumerate(params):
            close(param.detach(), g[f'p{i}_after_steps'][step], 1e-6)


def test_momentum_can_be_what_was_meant():
    optimizer = torchutils.PolyOptimizer([torch.nn.Parameter(torch.zeros(1))], 0.1, 5e-4, 10, momentum=0.9)
    assert optimizer.param_groups[0]['momentum'] == 0.9


def test_long_side_resize_sizes():
    g = golden('g11_resize')
    for i, wh in enumerate(g['wh']):
        for j, long_side in enumerate(g['target_long']):
            resize = imutils.RandomResizeLong(int(long_side), int(long_side))
            assert resize(Image.new('RGB', tuple(wh))).size == tuple(g['resize_long_wh'][i, j])


def test_multi_scale_sizes():
    g = golden('g11_resize')
    for i, wh in enumerate(g['wh']):
        for s, scale in enumerate(g['msf_scales']):
            if g['msf_wh'][i, s, 0] > 0:
                assert imutils.resize(Image.new('RGB', tuple(wh)), scale).size == tuple(g['msf_wh'][i, s])


def test_resized_pixels():
    g = golden('g11_resize')
    img = image_files.read_image(os.path.join(GOLDEN, 'images', g['resize_pixels_src'][0] + '.jpg'))
    long_side = int(g['resize_pixels_long'])
    assert (np.asarray(imutils.RandomResizeLong(long_side, long_side)(img)) == g['resize_pixels_rgb']).all()


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_normalize(dtype):
    g = golden('g11_resize')
    out = imutils.normalize(g['norm_in_' + dtype])
    assert out.dtype == np.float32 and (out == g['norm_out_' + dtype]).all()


def test_normalize_table_has_the_value_of_every_byte():
    img = np.arange(256, dtype=np.uint8)[None, ::-1, None].repeat(3, axis=2)        # mirrored: not contiguous
    expected = ((img / 255. - imutils.MEAN) / imutils.STD).astype(np.float32)
    assert (imutils.normalize(img) == expected).all()


def test_random_crop_boxes():
    g = golden('g11_resize')
    for i, seed in enumerate(g['rc_seeds']):
        for j, (h, w, crop) in enumerate(g['rc_cases_hwcrop'].tolist()):
            random.seed(int(seed))
            assert imutils.get_random_crop_box((h, w), crop) == tuple(g['rc_box_cont_tblr_img_tblr'][i, j])


def test_calibration_gives_every_norm_the_statistics_of_its_input():
    torch.manual_seed(0)
    net, batches = Net(), torch.rand(2, 2, 3, 32, 32)
    torchutils.calibrate_batch_norm(net, batches)
    seen = []
    net.eval().bn7.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    # the layers before bn7 now use the mean statistics of both batches, so its own fit up to their difference
    mean = torch.cat(seen).mean(dim=(0, 2, 3))
    assert (mean - net.bn7.running_mean).abs().mean() < 0.2 * torch.cat(seen).std()
    assert net.bn7.momentum == 0.1


def test_atomic_write_leaves_the_old_file_and_no_litter_when_it_fails(tmp_path):
    (tmp_path / 'x').write_text('old')
    with pytest.raises(RuntimeError):
        with files.atomic_write(str(tmp_path / 'x')) as file:
            file.write(b'half')
            raise RuntimeError
    assert (tmp_path / 'x').read_text() == 'old' and os.listdir(tmp_path) == ['x']


def test_atomic_write_to_the_longest_name_that_a_file_can_have(tmp_path):
    name = '花' * 83 + '.npy'                    # 253 of 255 bytes
    with files.atomic_write(str(tmp_path / name)) as file:
        file.write(b'whole')
        assert [path.name[0] for path in tmp_path.iterdir()] == ['.']
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_csv_files_are_read_as_they_were_written(tmp_path):
    rows = [['a, b', 'c "d"'], ['ü', 'file \udcff']]
    text_files.write_csv(str(tmp_path / 'x.csv'), ['first', 'second'], rows)
    first, second = text_files.read_csv(str(tmp_path / 'x.csv'))
    assert list(first.values()) == rows[0]
    assert second == {'first': 'ü', 'second': 'file \\udcff'}       # a byte of a file name that is no utf-8
