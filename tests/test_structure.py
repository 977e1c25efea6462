"""The shape of the repository: layers, flags, help."""
import ast
import glob
import importlib
import os
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPTS = ('train_SEAM', 'infer_SEAM', 'train_aff', 'infer_aff', 'evaluation')
# what a folder may import of ours; the scripts may import all three
ALLOWED = {'tool': {'tool'}, 'network': {'tool', 'network'}, 'voc12': {'tool', 'voc12'}}


def own_imports(path):
    """Top-level names of this repository that a file imports."""
    with open(path) as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return names & (set(ALLOWED) | set(SCRIPTS))


@pytest.mark.parametrize('folder', ALLOWED)
def test_layers(folder):
    files = glob.glob(os.path.join(ROOT, folder, '*.py'))
    assert files
    for path in files:
        assert own_imports(path) <= ALLOWED[folder], path


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_script_imports_another(script):
    assert own_imports(os.path.join(ROOT, script + '.py')) <= set(ALLOWED)


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def test_shared_flags_have_one_default():
    differ_on_purpose = {'--network', '--session_name', '--infer_list', '--resume'}     # training resumes from a file
    seen = {}
    for script in SCRIPTS:
        for action in parser_of(script)._actions:
            for flag in set(action.option_strings) - differ_on_purpose - {'-h', '--help'}:
                setting = (action.default, action.type, action.nargs)
                assert seen.setdefault(flag, (setting, script))[0] == setting, f'{flag}: {script} and {seen[flag][1]}'


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_flag_has_help(script):
    assert all(action.help for action in parser_of(script)._actions)


REFERENCE_DEFAULTS = {
    'train_SEAM': dict(batch_size=8, max_epoches=8, network='network.resnet38_SEAM', lr=0.01, num_workers=8,
                       wt_dec=5e-4, train_list='voc12/train_aug.txt', val_list='voc12/val.txt',
                       session_name='resnet38_SEAM', crop_size=448, voc12_root='VOC2012', tblog_dir='./tblog'),
    'infer_SEAM': dict(network='network.resnet38_SEAM', infer_list='voc12/train.txt', num_workers=8,
                       voc12_root='VOC2012', out_cam=None, out_crf=None, out_cam_pred=None, out_cam_pred_alpha=0.26,
                       scales=[0.5, 1.0, 1.5, 2.0], crf_alpha=[4.0, 24.0]),
    'train_aff': dict(batch_size=8, max_epoches=8, network='network.resnet38_aff', lr=0.01, num_workers=8,
                      wt_dec=5e-4, train_list='voc12/train_aug.txt', val_list='voc12/val.txt',
                      session_name='resnet38_aff', crop_size=448, voc12_root='VOC2012'),
    'infer_aff': dict(network='network.resnet38_aff', infer_list='voc12/val.txt', num_workers=8, voc12_root='VOC2012',
                      alpha=6, out_rw='out_rw', beta=8, logt=6, crf=False),
    'evaluation': dict(list='./VOC2012/ImageSets/Segmentation/train.txt', predict_dir='./out_rw',
                       gt_dir='./VOC2012/SegmentationClass', logfile='./evallog.txt', type='png', t=None, curve=False),
}


@pytest.mark.parametrize('script', SCRIPTS)
def test_defaults_of_the_reference(script):
    parser = parser_of(script)
    assert {name: parser.get_default(name) for name in REFERENCE_DEFAULTS[script]} == REFERENCE_DEFAULTS[script]


REQUIRED = {'train_SEAM': set(), 'infer_SEAM': set(), 'train_aff': {'la_crf_dir', 'ha_crf_dir'},
            'infer_aff': {'weights', 'cam_dir'}, 'evaluation': {'comment'}}


@pytest.mark.parametrize('script', SCRIPTS)
def test_required_flags(script):
    assert {action.dest for action in parser_of(script)._actions if action.required} == REQUIRED[script]


@pytest.mark.parametrize('flag, script', [('--curve', 'evaluation'), ('--crf', 'infer_aff')])
def test_true_and_false_mean_what_they_say(flag, script):
    base = {'evaluation': ['--comment', 'x'], 'infer_aff': ['--weights', 'x', '--cam_dir', 'x']}[script]
    for given, expected in (([], False), ([flag], True), ([flag, 'True'], True), ([flag, 'False'], False)):
        assert getattr(parser_of(script).parse_args(base + given), flag[2:]) is expected


def test_max_epochs_in_both_spellings():
    for spelling in ('--max_epochs', '--max_epoches'):
        assert parser_of('train_SEAM').parse_args([spelling, '3']).max_epoches == 3


@pytest.mark.parametrize('script', SCRIPTS + (
    'voc12/make_toy', 'voc12/make_lists', 'voc12/make_cls_labels', 'voc12/make_seg_aug', 'voc12/make_coco',
    'voc12/make_custom', 'voc12/check'))
def test_help_from_any_folder(script, tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, script + '.py'), '--help'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage:') and not done.stderr
    assert not os.listdir(tmp_path)
