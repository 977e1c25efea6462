"""Weight files: the ImageNet `.params`, released-style `.pth`, checkpoints of other code, and what is no weights."""
import json
import os
import sys

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from network import resnet38_aff, resnet38_SEAM, resnet38d, slim_aff, slim_SEAM
from network.weights import choose_memory_format, load_weights
from params_writer import write_v0
from tool.cli import BadInput


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """(path, arrays) of a full-size V0 file in the real names and shapes: 193 tensors, 437 MB."""
    with open(os.path.join(GOLDEN, 'g10_mxnet_names.json')) as file:
        names = json.load(file)
    rng = np.random.default_rng(0)
    arrays = {'arg:linear1000_weight': (1000, 4096), 'arg:linear1000_bias': (1000,)}
    arrays.update({mx: names['torch_shapes'][name] for mx, name in names['mapping'].items() if name})
    arrays = {mx: rng.random(shape, dtype=np.float32) for mx, shape in arrays.items()}
    path = str(tmp_path_factory.mktemp('imagenet') / 'ilsvrc-cls_rna-a1_cls1000_ep-0001.params')
    write_v0(path, arrays)
    assert os.path.getsize(path) == 436_873_620
    yield path, {names['mapping'].get(mx): array for mx, array in arrays.items()}
    os.unlink(path)


def test_every_mxnet_name_maps_as_in_the_reference():
    with open(os.path.join(GOLDEN, 'g10_mxnet_names.json')) as file:
        mapping = json.load(file)['mapping']
    assert {mx: resnet38d._torch_name(mx) for mx in mapping} == mapping


@pytest.mark.parametrize('name', ['arg:res9_weight', 'arg:fc8_weight', 'arg:bn2a_branch2a_weight', 'bn7', '',
                                  'arg:res2b12_branch2a_weight'])
def test_unknown_mxnet_name_is_refused(name):
    with pytest.raises(ValueError, match='unknown parameter'):
        resnet38d._torch_name(name)


@pytest.mark.parametrize('module', [resnet38_SEAM, resnet38_aff])
def test_full_size_params_file_into_the_full_network(imagenet, module, capsys):
    path, arrays = imagenet
    net = module.Net()
    load_weights(net, path, new_heads=net.new_heads)
    state = net.state_dict()
    loaded = [name for name in arrays if name]
    assert len(loaded) == 191 and all((state[name].numpy() == arrays[name]).all() for name in loaded)
    assert 'weights: 191 tensors' in capsys.readouterr().out


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_released_style_pth(tmp_path, prefix):
    source, net = slim_SEAM.Net(), slim_SEAM.Net()
    # files of PyTorch 0.4 lack num_batches_tracked
    torch.save({prefix + name: value for name, value in source.state_dict().items() if 'num_batches' not in name},
               tmp_path / 'released.pth')
    load_weights(net, str(tmp_path / 'released.pth'))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in net.state_dict().items())


def test_legacy_serialisation_of_old_pytorch(tmp_path):
    source, net = slim_SEAM.Net(), slim_SEAM.Net()
    torch.save(source.state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    load_weights(net, str(tmp_path / 'old.pth'))
    assert torch.equal(net.fc8.weight, source.fc8.weight)


def saved(tmp_path, weights):
    torch.save(weights, tmp_path / 'w.pth')
    return str(tmp_path / 'w.pth')


def tiny_net(num_classes=20):
    """The parts of a network that `load_weights` needs."""
    fc8, f9 = torch.nn.Conv2d(4, 1 + num_classes, 1, bias=False), torch.nn.Conv2d(4, 4, 1, bias=False)
    return network({'bn7': torch.nn.BatchNorm2d(4), 'fc8': fc8, 'f9': f9}, ('fc8.weight',), ('fc8.weight', 'f9.weight'))


def network(layers, classifier=(), new_heads=()):
    net = torch.nn.ModuleDict(layers)
    net.classifier, net.new_heads, net.rename_pretrained = classifier, new_heads, lambda weights: weights
    net.backbone_name = None
    return net


def refused(path, *words, net=None):
    """Asserts that load_weights raises a BadInput of one line with the file name and `words`."""
    with pytest.raises(BadInput) as caught:
        load_weights(net or tiny_net(), str(path))
    text = str(caught.value)
    assert text.isprintable()
    for word in (os.path.basename(path), *words):
        assert word in text, text


def test_backbone_alone_needs_the_new_heads_named(tmp_path):
    net = slim_SEAM.Net()
    path = saved(tmp_path, {n: v for n, v in net.state_dict().items() if n not in net.new_heads})
    load_weights(net, path, new_heads=net.new_heads)
    with pytest.raises(ValueError, match=r'missing: fc8.weight, f8_3.weight, f8_4.weight, f9.weight'):
        load_weights(net, path)


def test_a_part_of_the_heads_is_not_enough(tmp_path):
    net = slim_SEAM.Net()
    path = saved(tmp_path, {n: v for n, v in net.state_dict().items() if n != 'fc8.weight'})
    with pytest.raises(ValueError, match='missing: fc8.weight'):
        load_weights(net, path, new_heads=net.new_heads)


def test_a_seam_file_does_not_fit_the_affinity_network_and_leaves_it_alone(tmp_path):
    net = slim_aff.Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    problems = r'w\.pth.*missing: f8_5.weight.*unexpected: fc8.weight.*other shape: f9.weight'
    with pytest.raises(ValueError, match=problems):
        load_weights(net, saved(tmp_path, slim_SEAM.Net().state_dict()), new_heads=net.new_heads)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ----- files that are no weights -----

@pytest.mark.parametrize('content, words', [
    (b'', 'empty'), (b'not weights\n', "'not weights"),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 422\n', 'git lfs pull'),
    (b'\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning', 'web page'),
    (b'\xef\xbb\xbf<html>', 'web page'), (b'{"error": {"code": 403}}', 'text')])
@pytest.mark.parametrize('name', ['w.pth', 'w.params'])
def test_a_file_that_is_no_weights_is_told_by_its_content(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, 'weights', words)


@pytest.mark.parametrize('content', [b'PK\x03\x04 half a zip', b'\x80\2}q\0.', bytes(300), b'\x12\1\0\0\0\0\0\0\1'])
def test_damaged_weights_are_one_line(tmp_path, content):
    (tmp_path / 'w.pth').write_bytes(content)
    refused(tmp_path / 'w.pth', 'weights')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, zipped):
    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/exploded',)
    torch.save({'conv1a.weight': Bomb()}, tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    refused(tmp_path / 'w.pth', 'code', 'posix.system' if zipped else '')
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('content, words', [
    (torch.nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'), ([torch.zeros(1)], 'a list'), ({}, 'an empty dict'),
    ({'a': torch.zeros(1), 'best': np.float64(.5)}, 'multiarray.scalar'), ({'a\x1b[2J': torch.zeros(1)}, r'a\x1b'),
    ({'state_dict': {}, 'epoch': 3}, "'state_dict', 'epoch'"), ({'state_dict': None}, "'state_dict'"),
    (torch.optim.SGD([torch.zeros(1)], .1).state_dict(), "'state', 'param_groups'"),
    ({'ema': {'a': torch.zeros(1)}, 'step': 3}, "torch.load('OLD.pth')['ema']"),
    ({'model': {'a': torch.zeros(1)}, 'state_dict': {'a': torch.ones(1)}}, "torch.load('OLD.pth')['model']")])
def test_checkpoints_without_weights_and_whole_networks_say_what_is_needed(tmp_path, content, words):
    refused(saved(tmp_path, content), '(--weights)', words)


# ----- checkpoints, and names with more in front -----

@pytest.mark.parametrize('entry', ['state_dict', 'model', 'model_state_dict'])
def test_weights_in_a_checkpoint_are_found(tmp_path, entry, capsys):
    source, net = tiny_net(), tiny_net()
    load_weights(net, saved(tmp_path, {entry: source.state_dict(), 'optimizer': {'state': {}}, 'epoch': 3}))
    line = capsys.readouterr().out.split('\n')[0]
    assert all(word in line for word in (f"'{entry}'", f'{tmp_path}/w.pth', "'optimizer', 'epoch'"))
    assert torch.equal(net['fc8'].weight, source['fc8'].weight)


@pytest.mark.parametrize('prefix', ['module.', 'module.module.', '_orig_mod.', '_orig_mod.module.', 'model.', 'net.'])
def test_wrappers_of_the_names_are_dropped(tmp_path, prefix, capsys):
    source, net = tiny_net(), tiny_net()
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    load_weights(net, saved(tmp_path, {'model': {'n_averaged': torch.tensor(3), **weights}}))
    first = ', '.join(sorted(set(prefix.split('.')[:-1])))
    assert any(first in line and 'w.pth' in line for line in capsys.readouterr().out.split('\n'))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in net.state_dict().items())


def test_compiled_parts_of_a_network_are_read(tmp_path):
    source, net = tiny_net(), tiny_net()
    load_weights(net, saved(tmp_path, {name.replace('bn7.', 'bn7._orig_mod.'): value
                                       for name, value in source.state_dict().items()}))
    assert torch.equal(net['bn7'].running_var, source['bn7'].running_var)


def test_a_name_with_and_without_a_wrapper_is_refused(tmp_path):
    weights = tiny_net().state_dict()
    refused(saved(tmp_path, {**weights, 'module.fc8.weight': weights['fc8.weight']}), 'fc8.weight twice')


def test_a_name_of_the_network_itself_is_no_wrapper(tmp_path):
    source, net = (network({'model': torch.nn.Linear(1, 1)}) for _ in range(2))
    load_weights(net, saved(tmp_path, source.state_dict()))
    assert torch.equal(net['model'].weight, source['model'].weight)


@pytest.mark.parametrize('zipped', [True, False])
def test_weights_as_a_gpu_saves_them_load_on_a_cpu(tmp_path, zipped, monkeypatch):
    source, net, path = tiny_net(), tiny_net(), str(tmp_path / 'w.pth')
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:1')
        torch.save({'model': source.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match='CUDA'):
        torch.load(path, weights_only=True)
    load_weights(net, path)
    assert torch.equal(net['fc8'].weight, source['fc8'].weight) and net['fc8'].weight.device.type == 'cpu'


def test_mxnet_weights_are_told_by_their_content(tmp_path):
    write_v0(tmp_path / 'w.pth', {'arg:conv1a_weight': np.zeros((64, 3, 3, 3), np.float32)})
    refused(tmp_path / 'w.pth', 'missing: b2.', 'other shape: conv1a.weight (64, 3, 3, 3) for (16, 3, 3, 3)',
            net=slim_SEAM.Net())


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    source, net = slim_SEAM.Net(), slim_SEAM.Net()
    save_file({name: value for name, value in source.state_dict().items() if 'num_batches' not in name},
              tmp_path / 'model.safetensors')
    load_weights(net, str(tmp_path / 'model.safetensors'))
    assert torch.equal(net.fc8.weight, source.fc8.weight)


SAFETENSORS = b'\x58\0\0\0\0\0\0\0{"conv1a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def test_damaged_safetensors_are_refused(tmp_path):
    pytest.importorskip('safetensors')
    (tmp_path / 'model.safetensors').write_bytes(SAFETENSORS)
    refused(tmp_path / 'model.safetensors', '--weights')


def test_safetensors_without_the_package_name_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    (tmp_path / 'w.pth').write_bytes(SAFETENSORS)
    refused(tmp_path / 'w.pth', 'pip install safetensors')


# ----- values -----

@pytest.mark.parametrize('module', [slim_SEAM, slim_aff])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite_are_named(tmp_path, module, value):
    weights, net = module.Net().state_dict(), module.Net()
    before = net.f9.weight.clone()
    for name in ('bn7.running_var', 'f9.weight'):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[-1] = value
    refused(saved(tmp_path, weights), 'bn7.running_var, f9.weight', net=net)
    assert torch.equal(net.f9.weight, before)


def test_huge_weights_are_finite_though_their_sum_is_not(tmp_path):
    weights = tiny_net().state_dict()
    weights['bn7.running_var'].fill_(3e38)
    load_weights(tiny_net(), saved(tmp_path, weights))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats_are_converted(tmp_path, dtype):
    source, net = tiny_net(), tiny_net()
    load_weights(net, saved(tmp_path, {name: value.to(dtype) for name, value in source.state_dict().items()}))
    assert net['fc8'].weight.dtype == torch.float32
    assert torch.equal(net['fc8'].weight, source['fc8'].weight.to(dtype).float())


def test_a_double_beyond_float32_is_infinite(tmp_path):
    weights = tiny_net().state_dict()
    weights['bn7.bias'] = weights['bn7.bias'].double() + 1e300
    refused(saved(tmp_path, weights), 'bn7.bias')


@pytest.mark.parametrize('change, words', [
    (lambda tensor: tensor.to(torch.int8), 'fc8.weight (torch.int8, '), (lambda tensor: tensor.to_sparse(), 'sparse'),
    (lambda tensor: tensor.to('meta'), 'meta'), (lambda tensor: tensor.to(torch.complex64), 'complex64')])
def test_tensors_of_another_kind_are_named(tmp_path, change, words):
    weights = tiny_net().state_dict()
    weights['fc8.weight'] = change(weights['fc8.weight'])
    refused(saved(tmp_path, weights), 'fc8.weight', words)


# ----- classifiers -----

def test_a_classifier_without_background_is_told_and_can_be_reset(tmp_path):
    net = tiny_net()
    weights = {name: value for name, value in net.state_dict().items() if name not in net.new_heads}
    weights['fc8.weight'] = net['fc8'].weight[1:].clone()
    path = saved(tmp_path, weights)
    refused(path, 'fc8.weight', '20 outputs', '20 classes',
            '--reset_head')
    load_weights(net, path, new_heads=net.new_heads, reset=net.classifier)


def test_a_classifier_of_other_classes_counts_outputs(tmp_path):
    path = saved(tmp_path, tiny_net(num_classes=5).state_dict())
    refused(path, 'fc8.weight', '6 outputs', '20 classes', '--class_names', '--reset_head')


@pytest.mark.parametrize('device, amp, training, last', [
    ('cpu', 'off', False, True), ('cpu', 'bf16', False, True), ('cpu', 'off', True, False),
    ('cpu', 'bf16', True, False), ('cuda', 'off', False, False), ('cuda', 'bf16', False, True),
    ('cuda', 'off', True, False), ('cuda', 'fp16', True, True)])
def test_memory_format_is_the_one_that_was_measured_to_be_faster(device, amp, training, last):
    plain, grouped = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, groups=2)
    for net, expected in ((plain, last), (grouped, False)):
        chosen = choose_memory_format(net, torch.device(device), amp, training)
        assert (chosen == torch.channels_last) == expected
