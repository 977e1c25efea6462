"""The shape of the repository: layers, flags, help."""
import ast
import glob
import importlib
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from helpers import fresh_imports, refused, run

SCRIPTS = ('train_SEAM', 'infer_SEAM', 'train_aff', 'infer_aff', 'train_seg', 'infer_seg', 'evaluation')
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


def test_inference_does_not_import_torchvision():
    """Importing it takes nearly as long as importing torch, in every process. (Networks of timm import it anyway.)"""
    code = 'import infer_SEAM, infer_aff, infer_seg, network.resnet38_SEAM, sys; sys.exit("torchvision" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def test_shared_flags_have_one_default():
    # training resumes from a file; the recipes of retraining, its test protocol and its CRF are others
    differ_on_purpose = {'--network', '--session_name', '--infer_list', '--resume', '--batch_size', '--lr',
                         '--momentum', '--scales', '--crf'}
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
                       session_name='resnet38_SEAM', crop_size=448, voc12_root='VOC2012', tblog_dir='./tblog',
                       resize_long=[448, 768], transform=['rescale'], scale_factor=0.3, topk_ratio=0.2, er_weight=1,
                       ecr_weight=1, rvmin_weight=1, pcm='on', dropout=1, train_bn=False, classifier_only=False,
                       momentum=None, accum=1, amp='off', log_every=50),
    'infer_SEAM': dict(network='network.resnet38_SEAM', infer_list='voc12/train.txt', num_workers=8,
                       voc12_root='VOC2012', out_cam=None, out_crf=None, out_cam_pred=None, out_cam_pred_alpha=0.26,
                       scales=[0.5, 1.0, 1.5, 2.0], crf_alpha=[4.0, 24.0], flip=1, map='cam_rv', pcm='on', amp='off',
                       cam_dtype='float32', cam_format='npy', tag_threshold=None),
    'train_aff': dict(batch_size=8, max_epoches=8, network='network.resnet38_aff', lr=0.01, num_workers=8,
                      wt_dec=5e-4, train_list='voc12/train_aug.txt', val_list='voc12/val.txt',
                      session_name='resnet38_aff', crop_size=448, voc12_root='VOC2012', momentum=None, accum=1,
                      amp='off', log_every=50),
    'infer_aff': dict(network='network.resnet38_aff', infer_list='voc12/val.txt', num_workers=8, voc12_root='VOC2012',
                      alpha=6, out_rw='out_rw', beta=8, logt=6, crf=False, ignore_below=0, ignore_crf=None, amp='off'),
    'train_seg': dict(batch_size=10, max_iters=20000, lr=0.001, momentum=0.9, wt_dec=5e-4, crop_size=448,
                      scale_range=[0.5, 1.5], hsv=[10, 10, 10], network='network.resnet38_deeplab', freeze_bn=False,
                      bn_momentum=3e-4, accum=1, amp='off'),
    'infer_seg': dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=1, crf=True, infer_list='voc12/val.txt', tile=None,
                      amp='off'),
    'evaluation': dict(list='./VOC2012/ImageSets/Segmentation/train.txt', predict_dir='./out_rw',
                       gt_dir='./VOC2012/SegmentationClass', logfile='./evallog.txt', type='png', t=None, curve=False),
}


@pytest.mark.parametrize('script', SCRIPTS)
def test_defaults_of_the_reference(script):
    parser = parser_of(script)
    assert {name: parser.get_default(name) for name in REFERENCE_DEFAULTS[script]} == REFERENCE_DEFAULTS[script]


REQUIRED = {'train_SEAM': set(), 'infer_SEAM': set(), 'train_aff': {'la_crf_dir', 'ha_crf_dir'},
            'infer_aff': {'weights', 'cam_dir'}, 'train_seg': {'label_dir'}, 'infer_seg': {'weights'},
            'evaluation': {'comment'}}


@pytest.mark.parametrize('script', SCRIPTS)
def test_required_flags(script):
    assert {action.dest for action in parser_of(script)._actions if action.required} == REQUIRED[script]


@pytest.mark.parametrize('flag, script', [('--curve', 'evaluation'), ('--crf', 'infer_aff'), ('--crf', 'infer_seg')])
def test_true_and_false_mean_what_they_say(flag, script):
    base = {'evaluation': ['--comment', 'x'], 'infer_aff': ['--weights', 'x', '--cam_dir', 'x'],
            'infer_seg': ['--weights', 'x']}[script]
    for given, expected in (([flag], True), ([flag, 'True'], True), ([flag, 'on'], True), ([flag, 'False'], False)):
        assert getattr(parser_of(script).parse_args(base + given), flag[2:]) is expected


def test_help_states_each_default_once_and_what_is_required():
    text = ' '.join(parser_of('infer_aff').format_help().split())
    assert '(default: None)' not in text
    assert 'not a CRF folder (required)' in text and 'suppresses weak affinities more (default: 8)' in text
    assert '(default: 0.5 1.0 1.5 2.0)' in ' '.join(parser_of('infer_SEAM').format_help().split())


def test_max_epochs_in_both_spellings():
    for spelling in ('--max_epochs', '--max_epoches'):
        assert parser_of('train_SEAM').parse_args([spelling, '3']).max_epoches == 3


# ----- what every command promises -----

COMMANDS = sorted(path[len(ROOT) + 1:-3] for folder in ('', 'tool', 'voc12')
                  for path in glob.glob(os.path.join(ROOT, folder, '*.py')) if '__main__' in open(path).read())
# flags of which the last names a file or a folder that is not there; those of voc12/ are in test_voc12_commands.py
NOT_THERE = {
    'train_SEAM': '--train_list nowhere.txt',
    'infer_SEAM': '--out_cam cam --weights nowhere.pth',
    'train_aff': '--la_crf_dir . --ha_crf_dir nowhere',
    'infer_aff': '--cam_dir . --weights nowhere.pth',
    'train_seg': '--label_dir . --train_list nowhere.txt',
    'infer_seg': '--out_seg seg --weights nowhere.pth',
    'evaluation': '--comment x --predict_dir . --gt_dir . --list nowhere.txt',
    'tool/label_photos': '--images . --out out --labels nowhere.csv',
    'tool/report': 'table --logfile nowhere.log',
    'tool/tables': '--list nowhere.txt',
    'tool/visualization': '--voc12_root . --out x.png --list nowhere.txt',
}


OUR_FOLDERS = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tests', 'by_hand')]


@pytest.mark.parametrize('command', COMMANDS)
def test_help_from_any_folder(command, tmp_path, monkeypatch):
    """As in a process of its own: nothing of ours is imported, and the path has only the folder of the command."""
    own = [os.path.dirname(os.path.join(ROOT, command))]
    monkeypatch.setattr(sys, 'path', own + [path for path in sys.path if path and path not in OUR_FOLDERS])
    with fresh_imports():
        shown = run(tmp_path, command, '--help')
    assert shown.returncode == 0 and shown.stdout.startswith('usage:') and not shown.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_flag_is_refused_in_one_line_below_the_usage(command, tmp_path):
    result = run(tmp_path, command, '--nonsense', '1')
    assert refused(result, 'error:') and result.stderr.startswith('usage:') and not os.listdir(tmp_path)


@pytest.mark.parametrize('command', sorted(command for command in COMMANDS if not command.startswith('voc12/')))
def test_missing_file_is_refused_in_one_line_that_names_it_and_its_flag(command, tmp_path):
    *_, flag, path = flags = NOT_THERE[command].split()
    result = run(tmp_path, command, *flags)
    refused(result, 'error:', flag, path)
    assert len(result.stderr.splitlines()) == 1 and not os.listdir(tmp_path)
