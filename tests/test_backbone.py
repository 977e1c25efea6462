"""What a network must offer: a small backbone of another kind takes part in all stages."""
import importlib

import pytest
import torch
from torch import nn

from helpers import done, run
from network import seam, slim_deeplab, slim_SEAM
from network.base import Network
from network.weights import load_weights
from tool import training
from tool.cli import BadInput, import_network

# stride 16, a linear layer, biases, another norm than batch norm
BACKBONE = '''
from torch import nn
from network.base import Network


class Backbone(Network):
    channels = {'conv4': 16, 'conv5': 24, 'conv6': 32}

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, stride=16, padding=3), nn.GELU())
        self.norm = nn.GroupNorm(4, 16)
        self.middle = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
        self.top = nn.Linear(24, 32)
        self.drop = nn.Dropout(0.5)
        self.not_training = [self.stem]

    def forward_as_dict(self, x):
        conv4 = self.norm(self.stem(x))
        conv5 = self.run(self.middle, conv4)
        conv6 = self.drop(self.top(conv5.movedim(1, -1))).movedim(-1, 1).relu()
        return {'conv4': conv4, 'conv5': conv5, 'conv6': conv6}
'''
NETWORK = '''
from mine import Backbone
from network.{file} import {head}


class Net({head}, Backbone):
    pass
'''


@pytest.fixture(scope='module', autouse=True)
def mine(tmp_path_factory):
    """A folder on PYTHONPATH with the modules mine, mine_SEAM and mine_aff."""
    folder = tmp_path_factory.mktemp('mine')
    (folder / 'mine.py').write_text(BACKBONE)
    (folder / 'mine_SEAM.py').write_text(NETWORK.format(file='seam', head='SEAMHead'))
    (folder / 'mine_aff.py').write_text(NETWORK.format(file='affinity', head='AffinityHead'))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def make(name, **options):
    return importlib.import_module(name).Net(**options)


def test_all_four_stages_run_with_it(tmp_path):
    lists = 'VOC2012/ImageSets/Segmentation/train.txt'
    done(run(tmp_path, 'voc12/make_toy', '--out', 'VOC2012', '--count', 6, '--size', 64, 72, '--classes', 3))
    train = ('--train_list', lists, '--batch_size', 2, '--max_epochs', 1, '--num_workers', 0, '--crop_size', 64,
             '--checkpointing')
    done(run(tmp_path, 'train_SEAM', *train, '--network', 'mine_SEAM', '--resize_long', 64, 80,
             '--session_name', 'seam'))
    done(run(tmp_path, 'infer_SEAM', '--network', 'mine_SEAM', '--weights', 'seam.pth', '--infer_list', lists,
             '--num_workers', 0, '--scales', 1, '--out_cam', 'cam', '--out_crf', 'crf'))
    done(run(tmp_path, 'train_aff', *train, '--network', 'mine_aff', '--la_crf_dir', 'crf_4.0',
             '--ha_crf_dir', 'crf_24.0', '--session_name', 'aff'))
    done(run(tmp_path, 'infer_aff', '--network', 'mine_aff', '--weights', 'aff.pth', '--infer_list', lists,
             '--num_workers', 0, '--cam_dir', 'cam'))
    names = (tmp_path / lists).read_text().split()
    assert sorted(path.stem for path in (tmp_path / 'out_rw').glob('*.png')) == sorted(names)


def test_heads_join_the_channels_of_the_backbone():
    net = make('mine_SEAM', num_classes=4)
    assert [tuple(net.get_parameter(name).shape[:2]) for name in net.new_heads] == [
        (5, 32), (64, 16), (128, 24), (192, 195)]


def test_parameter_groups_cover_linear_layers_and_biases_and_leave_the_norms_out():
    net = make('mine_SEAM')
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert [[names[id(parameter)] for parameter in group] for group in net.get_parameter_groups()] == [
        ['stem.0.weight', 'middle.0.weight', 'top.weight'], ['stem.0.bias', 'middle.0.bias', 'top.bias'],
        list(net.new_heads), []]
    groups = make('mine_SEAM', train_bn=True).get_parameter_groups()
    assert [len(group) for group in groups] == [3, 5, 4, 0]


class RichHead(Network):
    """A head of what people add: a norm, attention, a gain and an embedding of positions that are bare parameters, a
    bias, a matrix that is not called a weight."""
    kind = 'SEAM'

    def __init__(self, num_classes=3, train_bn=False):
        super().__init__()
        self.before = nn.GroupNorm(4, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.position = nn.Parameter(torch.zeros(1, 32, 1))
        self.gain = nn.Parameter(torch.ones(32))
        self.mixing = nn.Parameter(torch.eye(32))
        self.norm_of_head = nn.BatchNorm1d(32)
        self.fc8 = nn.Linear(32, 1 + num_classes)
        self.from_scratch_layers = [self.before, self.attention, self.position, self.gain, self.mixing,
                                    self.norm_of_head, self.fc8]
        self.classifier_layers = [self.fc8]
        self.set_options(train_bn, False, 1.0)

    def forward(self, x):
        f = self.before(self.forward_as_dict(x)['conv6']).flatten(2) + self.position         # (N, 32, hw)
        f = (f.movedim(1, -1) @ self.mixing).transpose(0, 1)                                  # (hw, N, 32)
        f = self.attention(f, f, f)[0].mean(dim=0) * self.gain                                # (N, 32)
        return self.fc8(self.norm_of_head(f))


def rich_net():
    torch.manual_seed(0)
    return type('Net', (RichHead, importlib.import_module('mine').Backbone), {})()


def test_every_parameter_of_a_new_head_trains_at_the_rates_of_new_layers():
    net = rich_net().train()
    new = {name: p for name, p in net.named_parameters() if not name.startswith(('stem.', 'norm.', 'middle.', 'top.'))}
    assert len(new) == 13 and net.norm_of_head.training and not net.norm.training
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = net.get_parameter_groups()
    assert [[names[id(parameter)] for parameter in group] for group in groups[2:]] == [
        ['position', 'mixing', 'attention.in_proj_weight', 'attention.out_proj.weight', 'fc8.weight'],
        ['gain', 'before.weight', 'before.bias', 'attention.in_proj_bias', 'attention.out_proj.bias',
         'norm_of_head.weight', 'norm_of_head.bias', 'fc8.bias']]
    optimizer = torch.optim.SGD([{'params': group} for group in groups], lr=1.)
    before = {name: parameter.detach().clone() for name, parameter in new.items()}
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in new.items())


def test_a_file_may_lack_a_new_head_or_its_classifier_whatever_is_in_it(tmp_path):
    net, path = rich_net(), str(tmp_path / 'w.pth')
    assert {'norm_of_head.running_var', 'position', 'fc8.bias'} < set(net.new_heads)
    assert net.classifier == ('fc8.weight', 'fc8.bias')
    training.save_weights(net, path, leave_out=net.new_heads)
    load_weights(net, path, new_heads=net.new_heads)
    training.save_weights(net, path, leave_out=('position', *net.new_heads[-2:]))
    with pytest.raises(BadInput, match='missing: position'):
        load_weights(net, path, new_heads=net.new_heads)
    training.save_weights(net, path, leave_out=net.classifier)
    load_weights(net, path, reset=net.classifier)


def test_norms_of_deeplab_s_head_are_new_and_in_no_group_as_published():
    net = slim_deeplab.Net()
    assert {'bn_fov.weight', 'bn_fov2.running_mean', 'cls_conv.bias', 'conv_fov2.weight'} < set(net.new_heads)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group] for group in net.get_parameter_groups()]
    assert groups[1:] == [[], ['conv_fov.weight', 'conv_fov2.weight', 'cls_conv.weight'], ['cls_conv.bias']]
    assert groups[0] and all(name.startswith('backbone.') and 'bn' not in name for name in groups[0])


@pytest.mark.parametrize('name, kind, right', [
    ('mine_SEAM', 'SEAM', True), ('mine_SEAM', 'affinity', False), ('mine_aff', 'affinity', True),
    ('json', 'SEAM', False), ('network.slim_deeplab', 'segmentation', True), ('network.slim_deeplab', 'SEAM', False)])
def test_a_network_says_its_kind(name, kind, right):
    if right:
        assert import_network(name, kind).kind == kind
    else:
        with pytest.raises(BadInput, match=rf'{name} .*--network.*{kind}'):
            import_network(name, kind)


def test_other_norms_are_frozen_as_batch_norm_is():
    net = make('mine_aff').train()
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {'stem.0.weight', 'stem.0.bias', 'norm.weight', 'norm.bias'}
    assert all(parameter.requires_grad for parameter in make('mine_aff', train_bn=True).train().parameters())


def test_dropout_factor_acts_on_all_rates():
    assert make('mine_SEAM', dropout=0.5).drop.p == 0.25
    net = slim_SEAM.Net(dropout=0.)
    assert net.dropout7.p == net.b6.dropout_2b1.p == 0 and slim_SEAM.Net().b6.dropout_2b1.p == 0.3


# ----- half precision -----

def test_sums_of_pcm_beyond_the_range_of_fp16():
    """Above 65,504 positions, a 1024x2048 image at scale 2, the refined map became infinite."""
    cam, f = torch.ones(1, 2, 70000), torch.ones(1, 1, 70000)
    with torch.autocast('cpu', torch.float16):
        mean = seam.weighted_mean(cam, f, f[..., :3])
    assert torch.allclose(mean, torch.ones(1, 2, 3), rtol=1e-3)


def test_scale_of_pcm_s_sums_leaves_float32_as_it_is():
    torch.manual_seed(0)
    cam, f = torch.rand(1, 2, 33000), torch.nn.functional.normalize(torch.rand(1, 4, 33000), dim=1)
    affinity = f.transpose(1, 2) @ f[..., :5]
    plain = cam @ affinity / (affinity.sum(dim=1, keepdim=True) + 1e-5)
    assert torch.equal(seam.weighted_mean(cam, f, f[..., :5]), plain)


@torch.no_grad()
def test_classes_do_not_tie_in_half_precision(monkeypatch):
    torch.manual_seed(0)
    seen = []
    monkeypatch.setattr(seam, 'normalize_cam_for_pcm', lambda cam: seen.append(cam) or cam.clamp(0, 1))
    with torch.autocast('cpu', torch.bfloat16):
        slim_SEAM.Net().eval()(torch.randn(1, 3, 64, 64))
    assert seen[0].dtype == torch.float32 and len(seen[0].unique()) > 0.99 * seen[0].numel()
