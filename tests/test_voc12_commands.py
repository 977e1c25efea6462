"""What every command in voc12/ promises: it runs from any folder, ends bad input with one line and exit code 2, leaves
sys.path alone when imported, and needs no torch."""
import glob
import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from voc12 import make_toy

LISTS = 'VOC2012/ImageSets/Segmentation'
# command -> flags of a run that works in the folder `data`, and those that spoil it: the last one is named
RUNS = {
    'make_toy': ('--out toy --count 2 --size 48 48', '--count 1'),
    'make_lists': ('--voc12_root VOC2012 --out_dir lists', '--voc12_root nowhere'),
    'make_cls_labels': (f'--voc12_root VOC2012 --train_list {LISTS}/train.txt --val_list {LISTS}/val.txt --out cls.npy',
                        '--val_list nowhere.txt'),
    'make_seg_aug': ('--sbd_root sbd --voc12_root VOC2012 --num_workers 0', '--sbd_root nowhere'),
    'make_custom': ('--images VOC2012/JPEGImages --labels labels.csv --out custom', '--labels nowhere.csv'),
    'make_coco': ('--coco_root coco --out COCO --names names.txt --masks --num_workers 0', '--coco_root nowhere'),
    'export_coco': ('--label_dir VOC2012/SegmentationClass --voc12_root VOC2012 --out coco.json --num_workers 0',
                    '--label_dir nowhere'),
    'check': (f'--voc12_root VOC2012 --list {LISTS}/val.txt --cls_labels none.npy', '--list nowhere.txt'),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with a toy set, an SBD release and a COCO whose images are those of the toy set, and a CSV file."""
    root = tmp_path_factory.mktemp('data')
    make_toy.main(make_toy.get_args_parser().parse_args(['--out', str(root / 'VOC2012'), '--count', '4', '--size', '48',
                                                         '48', '--classes', '1']))
    (root / 'sbd' / 'cls').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / 'sbd' / f'{split}.txt').write_text((root / LISTS / f'{split}.txt').read_text())
    images = sorted(os.listdir(root / 'VOC2012' / 'JPEGImages'))
    (root / 'labels.csv').write_text(''.join(f'{image},cat\n' for image in images))
    (root / 'coco' / 'annotations').mkdir(parents=True)
    (root / 'coco' / 'train2014').symlink_to(root / 'VOC2012' / 'JPEGImages')
    (root / 'coco' / 'annotations' / 'instances_train2014.json').write_text(json.dumps({
        'categories': [{'id': 1, 'name': 'cat'}],
        'images': [{'id': 1, 'file_name': images[0], 'height': 48, 'width': 48}],
        'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': [[1, 1, 9, 1, 9, 9]]}]}))
    return root


def run(command, flags, cwd):
    if command == 'export_coco':
        pytest.importorskip('pycocotools')
    return subprocess.run([sys.executable, os.path.join(ROOT, 'voc12', command + '.py'), *flags.split()], cwd=cwd,
                          capture_output=True, text=True, timeout=60)


def test_every_command_is_tried():
    commands = {'check', 'export_coco', *(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'voc12', 'make_*.py')))}
    assert set(RUNS) == commands


@pytest.mark.parametrize('command', RUNS)
def test_command_runs_from_any_folder(command, data):
    process = run(command, RUNS[command][0], data)
    assert process.returncode == 0 and not process.stderr, process.stdout + process.stderr


@pytest.mark.parametrize('command', RUNS)
def test_bad_input_is_one_line_that_names_the_flag_and_exit_code_2(command, data):
    before = sorted(data.rglob('*'))
    process = run(command, ' '.join(RUNS[command]), data)
    assert process.returncode == 2 and process.stderr.count('\n') == 1, process.stderr
    assert process.stderr.startswith(f'{command}.py: error: ') and RUNS[command][1].split()[0] in process.stderr
    assert sorted(data.rglob('*')) == before


def test_importing_a_command_needs_no_torch_and_leaves_the_path_alone():
    modules = ', '.join(f'voc12.{command}' for command in RUNS)
    code = f'import sys; path = list(sys.path); import {modules}; sys.exit("torch" in sys.modules or sys.path != path)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_nothing_but_tests_imports_a_command():
    for folder in ('.', 'voc12', 'tool', 'network'):
        for path in glob.glob(os.path.join(ROOT, folder, '*.py')):
            with open(path, encoding='utf-8') as file:
                found = re.findall(r'^\s*(?:from|import) voc12(?:\.| import )(make_\w+|check\b|export_coco)', file.read(), re.M)
            assert not found, path
