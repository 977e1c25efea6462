"""The maps of infer_SEAM.py: Grad-CAM, PCM, mirrored and large views."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infer_SEAM
import tiny_SEAM
from helpers import LIST, done, names_of
from inference_runs import cams, data
from tool import image_files, torchutils
from voc12.data import VOC12ClsDatasetMSF


# ----- maps -----

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    net = tiny_SEAM.Net()
    torchutils.calibrate_batch_norm(net, [torch.randn(4, 3, 64, 64)])
    return net.eval()


@pytest.mark.parametrize('plus', [False, True])
def test_closed_forms_of_grad_cam_equal_autograd(net, plus):
    x = torch.randn(1, 3, 64, 80)
    maps, our_scores = infer_SEAM.grad_cam(net, x, plus)
    features = net.forward_as_dict(x)['conv6'].detach().requires_grad_()
    scores = net.fc8(features).mean(dim=(2, 3))[0]
    assert torch.allclose(our_scores, scores)
    for k in range(3):
        g, = torch.autograd.grad(scores[k], features, retain_graph=True)            # (1, D, h, w)
        if plus:
            alpha = g ** 2 / (2 * g ** 2 + features.sum(dim=(2, 3), keepdim=True) * g ** 3)
            weight = (alpha * F.relu(g)).nan_to_num().sum(dim=(2, 3), keepdim=True)
        else:
            weight = g.sum(dim=(2, 3), keepdim=True)
        expected = F.relu((weight * features).sum(dim=1))
        assert torch.allclose(maps[:, k], expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_large_views_go_one_by_one_to_the_same_maps(net, monkeypatch):
    view = torch.randn(3, 64, 80)
    batches, cams = [], []
    hook = net.conv1a.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    for limit in view.numel(), view.numel() - 1:
        monkeypatch.setattr(infer_SEAM, 'LARGE_VIEW', limit)
        maps, _ = infer_SEAM.run_views(net, [view])
        cams.append(infer_SEAM.multi_scale_cam(maps, [view], [2, 5], (50, 60)))
    hook.remove()
    assert batches == [2, 1, 1] and np.abs(cams[0] - cams[1]).max() < 1e-5 * cams[0].max()


def test_pcm_in_blocks_equals_pcm_at_once(net, monkeypatch):
    x = torch.randn(2, 3, 64, 80)
    whole = net(x)[1].detach()
    from network import seam
    monkeypatch.setattr(seam, 'PCM_BYTES', 4 * 2 * 80 * 7)     # seven columns at a time
    with torch.no_grad():
        assert torch.allclose(net(x)[1], whole, rtol=1e-5, atol=1e-6)


def test_no_pcm_gives_the_plain_map_twice():
    with torch.no_grad():
        cam, cam_rv = tiny_SEAM.Net(pcm=False).eval()(torch.randn(1, 3, 32, 32))
    assert torch.equal(cam, cam_rv)


def test_flip_0_and_pcm_off_are_the_single_view_and_the_plain_cam(data, tmp_path):
    done(cams(data, '--out_cam', tmp_path / 'single', '--flip', 0))
    done(cams(data, '--out_cam', tmp_path / 'plain', '--map', 'cam'))
    done(cams(data, '--out_cam', tmp_path / 'off', '--pcm', 'off'))
    name = names_of(data)[0] + '.npy'
    assert (tmp_path / 'plain' / name).read_bytes() == (tmp_path / 'off' / name).read_bytes()
    single, plain, full = (np.load(folder / name, allow_pickle=True).item()
                           for folder in (tmp_path / 'single', tmp_path / 'plain', data / 'cam'))
    assert all(np.abs(single[key] - full[key]).max() > 1e-3 and np.abs(plain[key] - full[key]).max() > 1e-3
               for key in full)


# ----- images -----

def test_an_image_is_read_once_and_its_mirror_is_made_on_the_device(data, monkeypatch):
    """The views are not doubled in the loader, and the image for CRF and pictures is not decoded a second time."""
    monkeypatch.chdir(data)
    reads, read_image = [], image_files.read_image
    monkeypatch.setattr(image_files, 'read_image', lambda path, flag: reads.append(path) or read_image(path))
    dataset = VOC12ClsDatasetMSF(LIST, 'VOC2012', [0.5, 1], lambda img: np.asarray(img).transpose(2, 0, 1))
    name, img, views, label = dataset[0]
    assert name == names_of(data)[0] and len(reads) == 1
    w, h = Image.open(f'VOC2012/JPEGImages/{name}.jpg').size
    assert img.dtype == np.uint8 and img.shape == (h, w, 3) and img.flags.writeable
    assert [view.shape for view in views] == [(3, round(h / 2), round(w / 2)), (3, h, w)] and label.shape == (20,)
    assert (views[1].transpose(1, 2, 0) == img).all()


def test_mirrored_view_adds_the_mirrored_maps(net):
    view = torch.randn(3, 64, 80)
    both, one, other = (infer_SEAM.multi_scale_cam(infer_SEAM.run_views(net, [x], flip=flip)[0], [x], [2, 5], (64, 80))
                        for x, flip in ((view, True), (view, False), (view.flip(-1), False)))
    assert np.abs(both - (one + other[..., ::-1])).max() < 1e-5 * both.max()


def test_lowest_class_wins_a_tie_whatever_the_order_of_the_dict():
    ones = np.ones((2, 3), np.float32)
    assert (infer_SEAM.label_map({7: ones, 2: ones}, 0.5, (2, 3)) == 3).all()
