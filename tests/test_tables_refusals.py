"""tool/tables.py: what it refuses before anything runs, and the scripts that it runs."""
import argparse
import collections
import os
import shutil
import signal
import sys

import numpy as np
import pytest

from tables_runs import commands
from tool import image_lists, tables
from tool.cli import BadInput
from voc12.lists import CAT_LIST


def test_resume_with_other_settings_is_refused(commands):
    commands('--rows', 'SEAM')
    with pytest.raises(BadInput, match=r'--scales .*\[0.5, 1.0, 1.5, 2.0\].*\[1.0\]'):
        commands('--rows', 'SEAM', '--resume', '--scales', '1')
    commands('--rows', 'SEAM', '--resume', '--device', 'cpu', '--seeds', '3')


@pytest.mark.parametrize('flags', [('--lite0',), ('--aff_list', 'list.txt')])
def test_toy_has_its_own_settings_and_images(commands, flags, capsys):
    with pytest.raises(SystemExit):
        commands('--toy', *flags)
    assert '--toy' in capsys.readouterr().err


@pytest.mark.parametrize('flags, word', [
    (['--rows', 'xyz'], '--rows xyz'), (['--list', 'missing.txt'], '--list'), (['--weights', 'no.pth'], '--weights'),
    (['--seeds', '0', '0'], '--seeds 0 0'), (['--alphas', '4', '4.01'], '--alphas 4.0 4.0'),
    (['--scales', '0'], '--scales')])
def test_bad_flags_are_refused_before_anything_runs(commands, flags, word):
    with pytest.raises(BadInput, match=word):
        commands(*flags)
    assert not commands.log


@pytest.mark.parametrize('path, words', [
    ('SegmentationClass/b.png', ['SegmentationClass/b.png', '--voc12_root', '--list']),
    ('SegmentationClass/y.png', ['SegmentationClass/y.png', '--voc12_root', '--val_list']),
    ('SegmentationClassAug/c.png', ['SegmentationClassAug/c.png', '--train_gt', 'make_seg_aug.py', 'voc12/README.md']),
    ('JPEGImages/l.jpg', ['JPEGImages/l.jpg', '--voc12_root', 'aug.txt']),
    ('JPEGImages/y.jpg', ['JPEGImages/y.jpg', '--voc12_root', 'val.txt'])])
def test_missing_files_are_noticed_before_anything_runs(commands, tmp_path, path, words):
    (tmp_path / 'my data' / path).unlink()
    with pytest.raises(BadInput) as refusal:
        commands('--table', '1', 'retrain')
    assert all(word in str(refusal.value) for word in words) and not commands.log


def test_masks_of_a_part_of_the_training_list_are_not_enough(commands, tmp_path):
    shutil.rmtree(tmp_path / 'my data/SegmentationClassAug')
    with pytest.raises(BadInput) as refusal:
        commands('--table', 'retrain')
    assert all(word in str(refusal.value) for word in ('SegmentationClass/c.png', '10 of 12', 'make_seg_aug.py'))
    assert not commands.log


def test_images_without_a_label_are_noticed_before_anything_runs(commands, tmp_path):
    labels = {name: np.eye(len(CAT_LIST))[0] for name in 'abcdefghijk'}
    np.save(tmp_path / 'my data/labels.npy', labels)
    with pytest.raises(BadInput, match='image l .*labels.npy'):
        commands()
    assert not commands.log


@pytest.mark.parametrize('flags, words', [
    (['--walk', '--alhpa 3'], ['--walk', '--alhpa']),
    (['--infer', '--map nothing'], ['--infer', '--map']),
    (['--train_aff', '--crop_size 100'], ['--train_aff', '--crop_size 100']),
    (['--train_seg', '--scale_range 2 1'], ['--train_seg', '--scale_range']),
    (['--seg', '--crf maybe'], ['--seg', '--crf']),
    (['--train_aff', '--batch_size 13'], ['--train_aff', '12 images', '--batch_size 13']),
    (['--network_aff', 'network.resnet38_afff'], ['network.resnet38_afff']),
    (['--network_seg', 'network.slim_SEAM'], ['network.slim_SEAM']),
    (['--mean_classes', 'background', 'cats'], ['--mean_classes cats'])])
def test_what_a_later_script_would_refuse_is_refused_before_anything_runs(commands, flags, words):
    with pytest.raises(BadInput) as refusal:
        commands('--table', '1', 'retrain', *flags)
    assert all(word in str(refusal.value) for word in words) and not commands.log


def test_networks_and_lists_of_rows_that_are_not_asked_for_do_not_matter(commands, tmp_path):
    (tmp_path / 'my data/ImageSets/Segmentation/val.txt').unlink()
    commands('--rows', 'SEAM', '--network_aff', 'nothing', '--network_seg', 'nothing')


def test_flags_for_the_scripts_that_are_not_whole(commands, capsys):
    with pytest.raises(SystemExit):
        commands('--train', '--lr "1')
    assert 'argument --train' in capsys.readouterr().err


def test_a_failing_script_stops_the_tables_with_one_line(tmp_path, capfd):
    script = tmp_path / 'fails.py'
    script.write_text('print("what it says"); raise SystemExit(3)')
    with pytest.raises(BadInput, match='fails.py .*3.*--resume'):
        tables.run_child([sys.executable, str(script)])
    assert 'what it says' in capfd.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_script_and_ignored_ones_do_not(tmp_path, number):
    script = tmp_path / 'child.py'
    script.write_text(f"""
import os, signal, sys, time
def end(*_):
    sys.exit(5)
if signal.getsignal({number}) != signal.SIG_IGN:
    signal.signal({number}, end)
os.kill(os.getppid(), {number})
time.sleep(float(sys.argv[1]))
""")
    with pytest.raises(BadInput, match='exit code 5'):
        tables.run_child([sys.executable, str(script), '60'])
    before = signal.signal(number, signal.SIG_IGN)
    try:
        tables.run_child([sys.executable, str(script), '.2'])
    finally:
        signal.signal(number, before)


def test_lists_of_one_file_name_are_all_processed(tmp_path, monkeypatch):
    processed = []

    def run_child(command):
        processed.append(image_lists.load_img_name_list(command[command.index('--infer_list') + 1]))
    monkeypatch.setattr(tables, 'run_child', run_child)
    tables.run.cache_clear()
    args = argparse.Namespace(out=str(tmp_path), seed=0, resume=False, made=collections.defaultdict(set),
                              **dict.fromkeys(tables.SHARED_FLAGS))
    os.makedirs(tables.result_path(args))
    for folder, names in (('first', 'a'), ('second', 'ab'), ('third', 'abc')):
        path = tmp_path / folder / 'train.txt'
        path.parent.mkdir()
        path.write_text('\n'.join(names))
        tables.infer(args, 'infer_SEAM.py', str(path), [str(tmp_path / 'cam')])
    assert processed == [['a'], ['b'], ['c']]
