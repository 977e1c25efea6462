"""All stages on a small set of drawings, and single runs on copies of it that a test may damage."""
import functools
import shutil

import pytest

from helpers import AFF, LIST, SEAM, done, run, shell


@functools.cache
def run_all_stages(root):
    root.mkdir()
    out = {}
    out['toy'] = done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 12, '--size', 64, 72,
                          '--classes', 3))
    lists = LIST
    small = ['--train_list', lists, '--crop_size', 64, '--batch_size', 4, '--num_workers', 0]
    seam = [*small, '--network', SEAM, '--resize_long', 64, 80]
    out['pretrain'] = done(run(root, 'train_SEAM', *seam, '--max_epochs', 1, '--classifier_only',
                               '--train_bn', '--session_name', 'runs/pre'))
    out['seam'] = done(shell(root, 'train_SEAM', *seam, '--max_epoches', 1, '--weights', 'runs/pre.pth',
                             '--session_name', 'runs/seam', '--val_list', 'unused.txt'))
    out['infer'] = done(run(root, 'infer_SEAM', '--network', SEAM, '--weights', 'runs/seam.pth',
                            '--infer_list', lists, '--scales', 0.5, 1, '--out_cam', 'out/cam', '--out_crf', 'out/crf',
                            '--out_cam_pred', 'out/cam_pred', '--num_workers', 1))
    out['curve'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/cam', '--comment', 'seam cam',
                            '--type', 'npy', '--curve', 'True'))
    out['crf'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/crf_4.0', '--comment', 'crf',
                          '--type', 'crf'))
    out['aff'] = done(run(root, 'train_aff', *small, '--network', AFF, '--weights', 'runs/pre_backbone.pth',
                          '--la_crf_dir', 'out/crf_4.0', '--ha_crf_dir', 'out/crf_24.0', '--max_epochs', 1,
                          '--session_name', 'runs/aff'))
    out['walk'] = done(run(root, 'infer_aff', '--network', AFF, '--weights', 'runs/aff.pth', '--infer_list', lists,
                           '--cam_dir', 'out/cam', '--out_rw', 'out/rw', '--num_workers', 0))
    out['png'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/rw', '--comment', 'walk',
                          '--type', 'png', '--curve', 'False'))
    return root, out


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    """A folder in which every stage has run on the output of the one before, and a dict stage -> its stdout. The stages
    run once in a process; each test file has a copy."""
    root, out = run_all_stages(tmp_path_factory.getbasetemp() / 'stages')
    return shutil.copytree(root, tmp_path_factory.mktemp('pipeline'), dirs_exist_ok=True), out


@pytest.fixture
def voc(pipeline, tmp_path):
    """A folder with a copy of the toy set that a test may damage."""
    shutil.copytree(pipeline[0] / 'VOC2012', tmp_path / 'VOC2012')
    return tmp_path


def set_list(voc, names):
    (voc / 'list.txt').write_text('\n'.join(names))


def train(voc, *args):
    return run(voc, 'train_SEAM', '--network', SEAM, '--train_list', 'list.txt', '--crop_size', 32, '--batch_size', 1,
               '--num_workers', 0, '--resize_long', 32, 40, '--max_epochs', 1, '--classifier_only',
               '--session_name', 'run', *args)
