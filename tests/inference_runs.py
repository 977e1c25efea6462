"""Short runs of infer_SEAM.py and infer_aff.py that several test files compare with."""
import functools
import shutil

import pytest
import torch

import tiny_aff
import tiny_SEAM
from helpers import AFF, LIST, SEAM, done, run
from tool import outputs, torchutils, training


@functools.cache
def run_inference(root):
    root.mkdir()
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 10, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((tiny_SEAM, 'seam'), (tiny_aff, 'aff')):
        net = module.Net()
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}.pth'))
    done(cams(root, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred'))
    done(walk(root))
    return root


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set, random networks, and undisturbed results: cam, crf_4.0, crf_24.0, pred, rw. They are made once in a
    process; each test file has a copy."""
    undisturbed = run_inference(tmp_path_factory.getbasetemp() / 'undisturbed')
    return shutil.copytree(undisturbed, tmp_path_factory.mktemp('inference'), dirs_exist_ok=True)


def cams(root, *more):
    return run(root, 'infer_SEAM', '--network', SEAM, '--weights', 'seam.pth', '--infer_list', LIST, '--scales', 1,
               '--num_workers', 0, *more)


def walk(root, *more):
    return run(root, 'infer_aff', '--network', AFF, '--weights', 'aff.pth', '--infer_list', LIST, '--cam_dir', 'cam',
               '--out_rw', 'rw', '--num_workers', 0, *more)


def contents(folder):
    """Returns a dict name -> bytes of the files in a folder, without the journal, which depends on the order of the
    work, and without temporary files of a killed process."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != outputs.JOURNAL and not path.name.startswith('.')}
