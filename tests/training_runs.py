"""Short trainings of SEAM and AffinityNet that several test files compare with, and starts of all trainings."""
import importlib

import numpy as np
import pytest
import torch

import tiny_aff
import tiny_SEAM
from helpers import AFF, LIST, SEAM, done, names_of, run
from tool import torchutils, training, visualization
from voc12.lists import load_labels


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set of 8 training images, weights to start from, and CRF files for AffinityNet."""
    root = tmp_path_factory.mktemp('training')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 11, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((tiny_SEAM, 'seam'), (tiny_aff, 'aff')):
        net = module.Net()
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}_start.pth'))
    rng = np.random.default_rng(0)
    for folder in ('la', 'ha'):
        (root / folder).mkdir()
        for name in names_of(root):
            from PIL import Image
            w, h = Image.open(root / f'VOC2012/JPEGImages/{name}.jpg').size
            scores = np.float32(rng.random((3, h // 16 + 1, w // 16 + 1)) ** 4).repeat(16, 1).repeat(16, 2)[:, :h, :w]
            np.save(root / folder / f'{name}.npy', dict(enumerate(scores / scores.sum(axis=0))))
    names, held_out = names_of(root), (root / LIST.replace('train', 'val')).read_text().split()
    labels = load_labels(names + held_out, 'none.npy', str(root / 'VOC2012'))
    np.save(root / 'negatives.npy', {name: label * (name not in names[::2]) for name, label in labels.items()})
    (root / 'four.txt').write_text('\n'.join(names[:4]))
    return root


def flags(script, session, *more):
    start = 'seam' if script == 'train_SEAM' else 'aff'
    own = ('--resize_long', 48, 64) if start == 'seam' else ('--la_crf_dir', 'la', '--ha_crf_dir', 'ha')
    return ('--train_list', LIST, '--crop_size', 48, '--batch_size', 4, '--max_epochs', 2, '--num_workers', 0,
            '--network', SEAM if start == 'seam' else AFF, '--weights', f'{start}_start.pth', '--session_name', session,
            *own, *more)


@pytest.fixture(scope='module')
def plain(data):
    """The final weights of an undisturbed run of each script."""
    for script in ('train_SEAM', 'train_aff'):
        done(run(data, script, *flags(script, f'plain_{script}')))
    return {script: weights(data / f'plain_{script}.pth') for script in ('train_SEAM', 'train_aff')}


ONE_STEP = '--train_list', 'four.txt', '--max_epochs', 1


@pytest.fixture(scope='module')
def one_step(data):
    """The weights after one step with the defaults."""
    done(run(data, 'train_SEAM', *flags('train_SEAM', 'one_step', *ONE_STEP)))
    return weights(data / 'one_step.pth')


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ----- starts: what main puts together -----

class Started(Exception):
    """Ends main at its first step. Its arguments are the loader and the Checkpoint."""


class UnreadSet:
    """Stands for the dataset of a training: 10,582 names, as in train_aug, and the transforms; no image is read."""

    def __init__(self, *_, transform=None, transforms=None, **__):
        self.transforms = transform or transforms
        self.img_name_list = [f'{index:05}' for index in range(10582)]
        self.labels = dict.fromkeys(self.img_name_list, np.eye(20, dtype=np.float32)[0])

    def __len__(self):
        return len(self.img_name_list)

    def sample_labels(self):
        return [np.uint8([0, 1])]

    def read_label(self, _):
        return np.uint8([0, 1])


STARTS = {'train_SEAM': ('VOC12ClsDataset', '--network', SEAM),
          'train_aff': ('VOC12AffDataset', '--network', AFF, '--la_crf_dir', '.', '--ha_crf_dir', '.'),
          'train_seg': ('VOC12SegDataset', '--network', 'tiny_deeplab', '--label_dir', '.')}


def start(script, folder, *more):
    """Runs main in a folder with the default flags, but for a tiny network, up to its first step.
    Returns (loader, Checkpoint)."""
    def stop(loader, meter, log, checkpoint, *_):
        raise Started(loader, checkpoint)

    module, (dataset, *required) = importlib.import_module(script), STARTS[script]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(module, dataset, UnreadSet)
        patch.setattr(module, 'training_steps', stop)
        patch.setattr(module, 'calibrate_batch_norm', lambda net, _: net.eval(), raising=False)
        patch.setattr(visualization, 'open_writer', lambda *_: None)
        with pytest.raises(Started) as started:
            module.main(module.get_args_parser().parse_args([*required, *map(str, more)]))
    return started.value.args
