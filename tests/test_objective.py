"""The terms of the objective, the switches of train_SEAM.py, half precision, losses that are not finite."""
import pytest
import torch

import train_SEAM
from helpers import done, refused, run
from tool.views import draw_theta
from training_runs import ONE_STEP, data, flags, one_step, same, weights


@pytest.mark.parametrize('transform', ['rotation', 'translation'])
def test_rotated_views_are_not_deterministic(data, transform):
    refused(run(data, 'train_SEAM', *flags('train_SEAM', 'x', '--deterministic', '--transform', 'rescale', transform)),
            '--deterministic', transform)


def test_loss_that_is_not_finite_names_step_and_images(data):
    result = run(data, 'train_SEAM', *flags('train_SEAM', 'huge', '--lr', 100, '--momentum', 0.99, '--max_epochs', 30))
    line = refused(result, ' step ', 'loss_cls', '2007_')
    assert not (data / 'huge.pth').exists() and '--lr' in line


@pytest.mark.parametrize('script', ['train_SEAM', 'train_aff'])
def test_half_precision_trains(data, script):
    done(run(data, script, *flags(script, 'half', '--amp', 'bf16', *ONE_STEP)))
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(data / 'half.pth').values())


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
    theta = draw_theta(500, 40, 60, max_rotation=20, max_translation=15)
    shift = theta[:, :, 2] * torch.tensor([59., 39]) / 2                    # pixels
    assert 14 < shift.abs().max() <= 15
    x, y = theta[:, :, 0] * torch.tensor([59., 39]) / 59, theta[:, :, 1] * torch.tensor([59., 39]) / 39
    assert torch.allclose(x.norm(dim=1), torch.ones(500), atol=1e-5)
    assert torch.allclose((x * y).sum(dim=1), torch.zeros(500), atol=1e-5)
    angle = torch.rad2deg(torch.atan2(x[:, 1], x[:, 0]))
    assert 18 < angle.abs().max() <= 20


def test_what_comes_from_outside_does_not_count():
    """The second view is moved by half the image. Values in the part outside the image do not change the loss."""
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
