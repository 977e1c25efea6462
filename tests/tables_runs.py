"""Runs tool/tables.py without running the scripts that it starts."""
import csv
import os
import shutil
import sys

import numpy as np
import pytest

from tool import tables
from voc12.lists import CAT_LIST


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A function that runs tables.py in a folder with a blank in its name. It returns the commands, without Python
    and folders."""
    root = tmp_path / 'my data'
    for folder in ('ImageSets/Segmentation', 'SegmentationClass', 'SegmentationClassAug', 'JPEGImages'):
        (root / folder).mkdir(parents=True)
    names = {'train': 'ab', 'aug': 'abcdefghijkl', 'val': 'xy'}
    for name in names['aug'] + 'xy':
        (root / f'JPEGImages/{name}.jpg').write_text('')
        (root / f'SegmentationClassAug/{name}.png').write_text('')
    for name in 'abxy':
        (root / f'SegmentationClass/{name}.png').write_text('')
    for key, listed in names.items():
        (root / f'ImageSets/Segmentation/{key}.txt').write_text('\n'.join(listed))
    np.save(root / 'labels.npy', {name: np.eye(len(CAT_LIST))[0] for name in names['aug']})
    (root / 'start.pth').write_text('')
    log, listed = [], ['train']

    def run_child(command):
        log.append([os.path.basename(command[1]), *command[2:]])
        if command[1].endswith('make_toy.py'):
            made = os.path.join(command[command.index('--out') + 1], 'ImageSets', 'Segmentation')
            shutil.copytree(root / 'ImageSets/Segmentation', made)
        if command[1].endswith('evaluation.py'):
            prefix = command[command.index('--out_prefix') + 1]
            seed = int(os.path.basename(os.path.dirname(prefix))[len('seed'):])
            miou = 50 + seed if 'cam' in prefix else 60
            result = {'list': listed[0], 'images': 2, 'background_score': .25 if 'cam' in prefix else '',
                      'plateau': .4 if 'cam' in prefix else '', 'mIoU': 10, 'mIoU_present': miou, 'mFP': 20, 'mFN': 30,
                      'accuracy': 90}
            with open(prefix + '_result.csv', 'w', newline='') as file:
                writer = csv.DictWriter(file, result)
                writer.writeheader()
                writer.writerow(result)

    def start(*flags):
        log.clear()
        tables.run.cache_clear()        # as in a process of its own
        monkeypatch.setattr(sys, 'argv', [
            'tables.py', '--voc12_root', str(root), '--train_list', str(root / 'ImageSets/Segmentation/aug.txt'),
            '--cls_labels', str(root / 'labels.npy'), '--weights', str(root / 'start.pth'),
            '--out', str(tmp_path / 'out'), *flags])
        tables.main(tables.parse_args())
        return log

    monkeypatch.setattr(tables, 'run_child', run_child)
    start.listed, start.log = listed, log
    return start
