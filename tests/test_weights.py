"""Weight files: the ImageNet `.params` and released-style `.pth`."""
import json
import os

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from network import resnet38_aff, resnet38_SEAM, resnet38d, slim_aff, slim_SEAM
from network.weights import load_weights
from params_writer import write_v0


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


@pytest.mark.parametrize('content', [b'', b'not weights', b'PK\x03\x04 half a zip'])
def test_a_file_that_is_no_weights(tmp_path, content):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'cannot read the weights .*w\.pth'):
        load_weights(slim_SEAM.Net(), str(tmp_path / 'w.pth'))


def test_a_pickle_with_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/exploded',)
    path = saved(tmp_path, {'conv1a.weight': Bomb()})
    with pytest.raises(ValueError, match='cannot read the weights'):
        load_weights(slim_SEAM.Net(), path)
    assert not (tmp_path / 'exploded').exists()
