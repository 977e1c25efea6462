"""What a researcher changes in the method, and what has to follow or to refuse."""
import os

import numpy as np
import pytest
import torch

from conftest import ROOT
from helpers import LIST, SEAM, done, names_of, refused, run
from network import resnet38d, seam
from tool.cli import BadInput
from tool.image_files import read_label_map
from tool.outputs import ResultFolder
from voc12.data import VOC12SegDataset

SMALL = '--train_list', LIST, '--batch_size', 2, '--num_workers', 0, '--crop_size', 64


@pytest.fixture(scope='module')
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp('edits')
    done(run(folder, 'voc12/make_toy', '--out', 'VOC2012', '--count', 4, '--size', 64, 72, '--classes', 3))
    return folder


def test_fitting_the_classifier_is_refused_with_another_pooling_before_anything_is_written(drawings, monkeypatch):
    monkeypatch.setattr(seam, 'class_scores', lambda cam: cam.amax(dim=(2, 3)))
    before = sorted(os.listdir(drawings))
    refused(run(drawings, 'train_SEAM', *SMALL, '--network', SEAM, '--fit_classifier'), '--fit_classifier',
            'network/seam.py')
    assert sorted(os.listdir(drawings)) == before


def test_layers_in_place_of_pcm_idle_without_it():
    with open(os.path.join(ROOT, 'network', 'seam.py')) as file:
        code, old = file.read(), 'self.from_scratch_layers = ['
    assert code.count(old) == 1
    scope = {'__name__': 'network.edited'}
    exec(code.replace(old, 'self.attention = nn.MultiheadAttention(4, 1)\n        ' + old + 'self.attention, '), scope)
    net = type('Net', (scope['SEAMHead'], resnet38d.SlimNet), {})(pcm=False)
    new = {name for name, parameter in net.named_parameters() if parameter.requires_grad} & set(net.new_heads)
    assert 'attention.in_proj_weight' in net.new_heads and new == {'fc8.weight'}


def test_label_maps_of_another_format_need_two_methods_of_the_data_set(drawings, tmp_path, monkeypatch):
    for name in names_of(drawings):
        np.save(tmp_path / f'{name}.npy', read_label_map(drawings / f'VOC2012/SegmentationClass/{name}.png', ''))
    monkeypatch.setattr(VOC12SegDataset, 'label_path', lambda self, name: str(tmp_path / f'{name}.npy'))
    monkeypatch.setattr(VOC12SegDataset, 'read_label', lambda self, name, size=None: np.load(self.label_path(name)))
    done(run(drawings, 'train_seg', *SMALL, '--label_dir', tmp_path, '--max_iters', 1, '--network',
             'tiny_deeplab', '--session_name', tmp_path / 'seg'))
    assert torch.load(tmp_path / 'seg.pth', weights_only=True)


def test_results_with_a_new_extension_are_compared_with_their_settings(tmp_path):
    folder = ResultFolder(str(tmp_path), '--out_heat', '.jpg', {'scales': [1]})
    folder.open(['a'], resume=False)
    with folder.writing('a') as path, open(path, 'wb') as file:
        file.write(b'a picture')
    folder.open(['a'], resume=True)
    with pytest.raises(BadInput, match='scales'):
        ResultFolder(str(tmp_path), '--out_heat', '.jpg', {'scales': [2]}).open(['a'], resume=True)
