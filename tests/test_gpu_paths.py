"""What runs on GPUs, as far as it can be tested without one: on a fake cuda device, whose tensors have a device, a type
and a shape but no values, an operand that was left on the CPU is an error."""
import functools

import pytest
import torch

import infer_aff
import infer_SEAM
import train_aff
import train_SEAM
from network import resnet38_aff, resnet38_SEAM, seam, slim_aff, slim_SEAM
from tool import devices, views
from tool.affinity_pairs import fit_radius

fake_tensor = pytest.importorskip('torch._subclasses.fake_tensor')


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """A fake cuda device of fake tensors, with autocast and without cuDNN, whose grid_sample has no fake."""
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)
    with torch.backends.cudnn.flags(enabled=False), fake_tensor.FakeTensorMode():
        yield


def on_gpu(make, **options):
    with torch.device('cuda'):
        return make(**options)


def images(n=2, h=96, w=80):
    return torch.randn(n, 3, h, w, device='cuda')


def check(*tensors, dtype=torch.float32):
    for tensor in tensors:
        assert tensor.device.type == 'cuda' and tensor.dtype == dtype


@pytest.mark.parametrize('options, settings', [
    ({}, {}), ({'pcm': False}, {}), ({'train_bn': True}, {}), ({'checkpointing': True}, {'amp': 'bf16'}),
    ({}, {'draw': functools.partial(train_SEAM.draw_view, transform=['rescale', 'flip'])}),
    ({}, {'objective': functools.partial(train_SEAM.seam_loss, topk_ratio=1)}), ({}, {'draw': None}),
    ({}, {'amp': 'fp16'})])
def test_training_of_seam(options, settings):
    net = on_gpu(slim_SEAM.Net, **options).train()
    terms, *cams = train_SEAM.forward_losses(net, images(), torch.zeros(2, 20, device='cuda'), **settings)
    check(*terms.values(), *cams)


def test_validation_of_seam():
    with torch.no_grad():
        scores, maps = train_SEAM.scores_and_maps(on_gpu(slim_SEAM.Net).eval(), images(1))
    check(scores, *maps)


@pytest.mark.parametrize('make', [resnet38_SEAM.Net, resnet38_aff.Net])
def test_networks_at_full_width(make):
    outputs = on_gpu(make).train()(images(8, 448, 448))
    check(*(outputs if isinstance(outputs, tuple) else [outputs]))


def test_rotated_and_moved_view():
    theta = views.draw_theta(2, 96, 80, 20., 15.).to('cuda')
    check(train_SEAM.second_view(images(), theta=theta))


@pytest.mark.parametrize('amp, checkpointing', [('off', False), ('bf16', True), ('fp16', False)])
def test_training_of_affinity_net(amp, checkpointing):
    net = on_gpu(slim_aff.Net, checkpointing=checkpointing).train()
    with devices.autocast(torch.device('cuda'), amp):
        aff = net(images()).float()
    labels = [torch.ones_like(aff)] * 3
    check(*train_aff.affinity_loss(aff, *labels, train_aff.pair_counts(labels)).values())


@pytest.mark.parametrize('kind', ['cam', 'cam_rv', 'gradcam', 'gradcam++'])
def test_maps_of_inference(kind, monkeypatch):
    monkeypatch.setattr(seam, 'PCM_BYTES', 4 * 2 * 120 * 7)     # seven columns at a time
    # a backward pass has no fake
    monkeypatch.setattr(torch.autograd, 'grad', lambda score, leaf, retain_graph: (torch.zeros_like(leaf),))
    with torch.no_grad():
        check(*infer_SEAM.class_maps(on_gpu(slim_SEAM.Net).eval(), images(), kind))


def test_random_walk(monkeypatch):
    # sparse products have no fake: a dense one on the same device
    monkeypatch.setattr(torch.Tensor, 'to_sparse_csr', lambda matrix: torch.zeros(matrix.shape, device=matrix.device))
    with torch.no_grad():
        aff = on_gpu(slim_aff.Net).eval()(images(1))
        check(infer_aff.random_walk(torch.rand(3, 12, 10, device='cuda'), aff, fit_radius(12, 10), 8, 6))


@pytest.mark.parametrize('amp, half', [('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_scores_and_pcm_are_float32_where_the_rest_is_half(amp, half):
    net = on_gpu(slim_SEAM.Net).eval()
    with devices.autocast(torch.device('cuda'), amp), torch.no_grad():
        check(net.forward_as_dict(images())['conv5'], dtype=half)
        check(*net.class_maps(images()))


# ----- several GPUs -----

@pytest.mark.parametrize('name, count, wrapped', [('cuda', 4, True), ('cuda', 1, False), ('cuda:1', 4, False),
                                                  ('cpu', 4, False)])
def test_batches_spread_over_all_visible_gpus_unless_one_is_named(monkeypatch, name, count, wrapped):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    net = torch.nn.Linear(1, 1)
    assert isinstance(devices.parallel(net, torch.device(name)), torch.nn.DataParallel) == wrapped
