"""The networks against the reference's outputs, and their file format."""
import json
import os

import pytest
import torch

from conftest import GOLDEN, close, golden
from fill_weights import checksum
from network import resnet38_SEAM, resnet38_aff, resnet38d, seam, slim_SEAM, slim_aff
from tool.affinity_pairs import fit_radius, pair_indices


def tensor(array):
    return torch.from_numpy(array)


@pytest.mark.parametrize('which', ['resnet38_SEAM', 'resnet38_aff'])
def test_filled_weights_have_the_golden_checksums(which, seam_net, aff_net):
    with open(os.path.join(GOLDEN, 'g00_fill_checksums.json')) as file:
        expected = json.load(file)[which]
    assert checksum((seam_net if which == 'resnet38_SEAM' else aff_net).state_dict()) == expected


def test_backbone_has_the_released_names_and_shapes():
    with open(os.path.join(GOLDEN, 'g10_mxnet_names.json')) as file:
        expected = json.load(file)['torch_shapes']
    assert {name: list(value.shape) for name, value in resnet38d.Net().state_dict().items()} == expected


@torch.no_grad()
@pytest.mark.parametrize('i', [0, 1, 2])
def test_seam_forward(seam_net, i):
    g = golden('g01_seam_forward')
    cam, cam_rv = seam_net(tensor(g[f'x{i}']))
    close(cam, g[f'cam{i}'], 1e-4)
    close(cam_rv, g[f'cam_rv{i}'], 1e-4)


@torch.no_grad()
def test_seam_forward_larger_input(seam_net):
    g = golden('g01_seam_forward')
    cam, cam_rv = seam_net(tensor(g['x_big']))
    close(cam[:, :, ::4, ::4], g['cam_big_sub'], 1e-4)
    close(cam_rv[:, :, ::4, ::4], g['cam_rv_big_sub'], 1e-4)


@torch.no_grad()
def test_backbone_taps(seam_net):
    g = golden('g01_seam_forward')
    taps = seam_net.forward_as_dict(tensor(g[f'x{g["mid_index"]}']))
    assert list(taps) == ['conv3', 'conv4', 'conv5', 'conv6']
    for name, tap in taps.items():
        assert list(tap.shape) == list(g[name + '_shape'])
        close(tap[:, ::tap.shape[1] // 32], g[name + '_sub'], 1e-4)
        close([tap.double().mean(), tap.double().std(unbiased=False)], g[name + '_mean_std'], 1e-4)
    close(seam_net.fc8(taps['conv6']), g['fc8_out'], 1e-4)
    torch.testing.assert_close(resnet38d.Net.forward(seam_net, tensor(g[f'x{g["mid_index"]}'])), taps['conv6'])


@torch.no_grad()
def test_pcm_alone_and_its_input(seam_net):
    g = golden('g01_seam_forward')
    close(seam.normalize_cam_for_pcm(tensor(g['fc8_out'])), g['pcm_in_cam_d_norm'], 1e-4)
    close(seam_net.PCM(tensor(g['pcm_in_cam_d_norm']), tensor(g['pcm_in_f'])), g['pcm_out'], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize('i', [0, 1, 2, 3])
def test_affinity_forward(aff_net, i):
    g = golden('g07_aff_forward')
    x = tensor(g[f'x{i}'])
    close(aff_net(x), g[f'aff{i}'], 1e-4)
    dense = aff_net(x, to_dense=True)
    if f'dense{i}' in g:
        close(dense, g[f'dense{i}'], 1e-4)
    else:
        close(dense[::3, ::3], g[f'dense{i}_sub'], 1e-4)


@pytest.mark.parametrize('i', [0, 1, 2, 3])
def test_pair_table(i):
    g = golden('g07_aff_forward')
    h, w = (-(-side // 8) for side in g['sizes'][i])
    radius = fit_radius(h, w)
    ind_from, ind_to = pair_indices(h, w, radius)
    assert radius == g[f'radius{i}']
    assert (ind_from == g[f'ind_from{i}']).all() and (ind_to.reshape(-1) == g[f'ind_to{i}']).all()


@torch.no_grad()
def test_affinity_of_a_tiny_image_has_no_pairs():
    """The reference crashes on images whose short side is at most 32 px."""
    net = slim_aff.Net().eval()
    assert net(torch.zeros(1, 3, 24, 60)).shape[1] == 0
    assert torch.equal(net(torch.zeros(1, 3, 5, 60), to_dense=True), torch.eye(8))


@pytest.mark.parametrize('net', [resnet38_SEAM.Net, resnet38_aff.Net])
def test_parameter_groups_are_the_reference_s(net):
    g = golden('g02_seam_losses' if net is resnet38_SEAM.Net else 'g07_aff_forward')
    net = net()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for i, group in enumerate(net.get_parameter_groups()):
        assert [names[id(parameter)] for parameter in group] == list(g[f'group{i}_names'])


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_mode_switch_freezes_and_returns_the_network(mode):
    net = resnet38_SEAM.Net()
    assert getattr(net, mode)() is net
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == \
        set(golden('g02_seam_losses')['requires_grad_false_names'])
    assert not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert net.training == (mode == 'train')


def test_train_bn_frees_batch_norm_and_early_layers():
    net = slim_SEAM.Net(train_bn=True).train()
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert net.bn7.training
    grouped = {id(p) for group in net.get_parameter_groups() for p in group}
    assert grouped == {id(p) for p in net.parameters()}


def test_slim_networks_have_the_same_names():
    for slim, full in ((slim_SEAM, resnet38_SEAM), (slim_aff, resnet38_aff)):
        assert list(slim.Net().state_dict()) == list(full.Net().state_dict())
    assert sum(p.numel() for p in slim_SEAM.Net().parameters()) < 7e6


def test_background_of_a_released_checkpoint_is_channel_0():
    assert resnet38_SEAM.Net().fc8.weight.shape == (21, 4096, 1, 1)
    assert slim_SEAM.Net(num_classes=3).fc8.weight.shape[0] == 4
