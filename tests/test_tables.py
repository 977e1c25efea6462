"""tool/tables.py: which commands it runs, and what it makes of their numbers. They run in one test alone."""
import csv
import importlib
import os
import shutil
import sys

import pytest
import torch

import infer_SEAM
import train_aff
import train_SEAM
from tables_runs import commands
from tool import image_lists, tables
from tool.cli import BadInput
from voc12 import make_toy


def scripts(log):
    return [command[0] for command in log]


def sessions(log):
    return [os.path.basename(command[command.index('--session_name') + 1]) for command in log
            if '--session_name' in command]


def test_tables_share_trainings(commands):
    log = commands('--table', 'all')
    assert sorted(sessions(log)) == sorted(
        ['seam_classifier_only', 'seam_pcm_off_ecr_weight_0_rvmin_weight_0', 'seam_topk_ratio_1', 'seam', 'aff',
         'seam_transform_flip', 'seam_transform_rotation', 'seam_transform_translation'])
    assert len(set(map(tuple, log))) == len(log)


def images(command):
    return image_lists.load_img_name_list(command[command.index('--infer_list') + 1])


def test_what_the_random_walk_is_made_from(commands, tmp_path):
    log = commands('--rows', 'random walk', '--alphas', '24', '4', '9', '--train', '--lr 0.1', '--train_aff=--seed 3',
                   '--infer', '--amp bf16', '--walk', '--alpha 3')
    assert scripts(log) == ['train_SEAM.py', 'infer_SEAM.py', 'infer_SEAM.py', 'train_aff.py', 'infer_aff.py',
                            'evaluation.py']
    train_seam, cam, crf, train_aff, walk, _ = log
    out = str(tmp_path / 'out/seed0')
    assert '--lr' in train_seam and ['--alpha', '3'] == walk[-2:]
    assert '--amp' in cam and '--amp' in crf and '--amp' not in walk
    assert crf[crf.index('--crf_alpha') + 1:] == ['4.0', '24.0']
    assert train_aff[train_aff.index('--la_crf_dir') + 1] == f'{out}/crf_4.0'
    assert train_aff[train_aff.index('--ha_crf_dir') + 1] == f'{out}/crf_24.0'
    assert cam[cam.index('--out_cam') + 1] == walk[walk.index('--cam_dir') + 1] == crf[crf.index('--cam_dir') + 1]
    assert images(cam) == images(crf) == list('abcdefghijkl') and images(walk) == ['a', 'b']


def test_affinitynet_can_have_a_list_of_its_own(commands, tmp_path):
    own = tmp_path / 'own.txt'
    own.write_text('\n'.join('bcdefghij'))
    log = commands('--rows', 'random walk', '--aff_list', str(own))
    command = log[scripts(log).index('train_aff.py')]
    assert train_aff.get_args_parser().parse_args(command[1:]).train_list == str(own)
    # the CAM of image a, which AffinityNet does not need, is made for the walk
    assert [images(command) for command in log if command[0] == 'infer_SEAM.py'] == [
        list('bcdefghij'), list('bcdefghij'), ['a']]


@pytest.mark.parametrize('own', [(), ('--aff_list', 'own.txt')])
def test_no_image_gets_its_cam_crf_or_walk_twice(commands, tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.txt').write_text('\n'.join('bcdefghij'))
    log = commands('--table', '1', 'retrain', 'refinement', 'scale', *own)
    seen = [(command[command.index(flag) + 1], name) for command in log if '--infer_list' in command
            for flag in ('--out_cam', '--out_crf', '--out_rw', '--out_seg') if flag in command
            for name in images(command)]
    assert len(seen) == len(set(seen))
    assert {name for folder, name in seen if folder.endswith('/walk')} == set('abcdefghijkl')


def test_training_on_ground_truth_takes_the_masks_of_all_images(commands, tmp_path):
    log = commands('--table', 'retrain', '--rows', 'truth')
    assert scripts(log) == ['train_seg.py', 'infer_seg.py', 'evaluation.py']
    train, _, evaluation = log
    assert train[train.index('--label_dir') + 1] == str(tmp_path / 'my data/SegmentationClassAug')
    assert evaluation[evaluation.index('--gt_dir') + 1] == str(tmp_path / 'my data/SegmentationClass')
    (tmp_path / 'my data/SegmentationClassAug').rename(tmp_path / 'elsewhere')
    log = commands('--table', 'retrain', '--rows', 'truth', '--train_gt', str(tmp_path / 'elsewhere'))
    assert str(tmp_path / 'elsewhere') in log[0]


def test_no_image_goes_twice_through_a_network_for_its_crf(commands, tmp_path):
    log = commands('--rows', 'SEAM', 'CRF')
    assert [command[0] for command in log if '--weights' in command] == ['train_SEAM.py', 'infer_SEAM.py']
    assert scripts(log).count('infer_SEAM.py') == 2 and scripts(log).count('evaluation.py') == 3


def test_means_and_deviations_over_seeds_beside_what_is_published(commands, tmp_path):
    commands('--rows', 'SEAM', 'walk', '--seeds', '1', '0')
    lines = (tmp_path / 'out/tables.md').read_text().splitlines()
    assert lines[0] == '**Table: 1**'
    assert lines[-2:] == [
        '| + hard-example mining (SEAM) | 0, 1 | 0.25, 0.25 | 0.40, 0.40 | 50.5 ± 0.7 | 20.0 ± 0.0 | 30.0 ± 0.0 '
        '| 55.41 |',
        '| random walk | 0, 1 |  |  | 60.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 | 63.61 |']
    assert '1,+ hard-example mining (SEAM),1,train,2,0.25,0.4,51,20,30,90' in (tmp_path / 'out/tables.csv').read_text()


def test_the_published_crf_stands_at_one_alpha_and_says_that_the_paper_names_none(commands, tmp_path):
    commands('--rows', 'CRF')
    low, high = (tmp_path / 'out/tables.md').read_text().splitlines()[-2:]
    assert low.endswith('| 56.83 (alpha not stated) |') and high.endswith('|  |')


@pytest.mark.parametrize('flags, listed', [((), ''), (('--toy',), ''), (('--mean_classes', 'cat'), 'train'),
                                           (('--network', 'network.slim_SEAM'), 'train'), (('--scales', '1'), 'train')])
def test_published_numbers_stand_only_where_they_belong(commands, tmp_path, flags, listed):
    commands.listed[0] = listed
    commands('--rows', 'SEAM', *flags)
    assert '55.41' not in (tmp_path / 'out/tables.md').read_text()


def test_new_run_puts_the_results_of_an_earlier_one_aside(commands, tmp_path):
    """When the new run was stopped, --resume mixed both in one table."""
    commands('--rows', 'SEAM', '--seeds', '0', '1')
    (tmp_path / 'out/seed0/seam_last.pth').write_text('')
    commands('--rows', 'SEAM', '--seeds', '0')
    assert not (tmp_path / 'out/seed0/seam_last.pth').exists()
    assert (tmp_path / 'out/seed0_earlier/seam_last.pth').exists() and (tmp_path / 'out/seed1').exists()
    with pytest.raises(BadInput):           # two forgotten --resume do not cost the first results
        commands('--rows', 'SEAM', '--seeds', '0')
    assert (tmp_path / 'out/seed0_earlier/seam_last.pth').exists()
    with open(tmp_path / 'out/tables.csv', newline='') as file:
        assert [row['seed'] for row in csv.DictReader(file)] == ['0']


def test_resume_keeps_the_rows_of_before_and_hands_the_flag_on(commands, tmp_path):
    commands('--rows', 'SEAM')
    (tmp_path / 'out/seed0/seam_last.pth').write_text('')
    log = commands('--rows', 'baseline', 'walk', '--resume')
    assert {command[0]: command.count('--resume') for command in log} == {
        'train_SEAM.py': 1, 'infer_SEAM.py': 1, 'train_aff.py': 0, 'infer_aff.py': 1, 'evaluation.py': 0}
    with open(tmp_path / 'out/tables.csv', newline='') as file:
        rows = [row['row'] for row in csv.DictReader(file)]
    assert rows == ['baseline', '+ hard-example mining (SEAM)', 'random walk']
    commands('--rows', 'baseline')      # anew
    assert (tmp_path / 'out/tables.csv').read_text().count('\n') == 2


def test_toy_has_the_demo_s_settings_and_flags_that_are_given_win(commands):
    log = commands('--toy', '--rows', 'baseline', '--scales', '1')
    assert scripts(log) == ['make_toy.py', 'train_SEAM.py', 'train_SEAM.py', 'infer_SEAM.py', 'evaluation.py']
    infer = log[3]
    assert infer[infer.index('--scales') + 1] == '1.0' and 'network.slim_SEAM' in infer
    assert '--weights' not in log[1] and log[2][log[2].index('--weights') + 1].endswith('seed0/pretrained.pth')


def test_lite0_has_settings_of_its_own_and_flags_are_added_to_them(commands):
    log = commands('--lite0', '--weights', '--rows', 'SEAM', '--train=--lr 0.5 --max_epochs 3', '--scales', '1')
    train = train_SEAM.get_args_parser().parse_args(log[0][1:])
    assert (train.network, train.weights, train.fit_classifier) == ('network.timm_SEAM', None, True)
    assert (train.lr, train.max_epoches, train.momentum) == (.5, 3, .9)
    infer = infer_SEAM.get_args_parser().parse_args(log[1][1:])
    assert (infer.scales, infer.flip) == ([1.], 0)


def test_weights_without_a_value_are_left_to_the_network(commands):
    assert '--weights' not in commands('--rows', 'baseline', '--weights')[0]


def test_retraining_where_only_a_part_of_the_training_list_has_official_masks(tmp_path, monkeypatch):
    """As on VOC: SegmentationClass has masks of the lists to score, SegmentationClassAug of all training images."""
    root, lists_of, log = tmp_path / 'root', tmp_path / 'root/ImageSets/Segmentation', []
    make_toy.main(make_toy.get_args_parser().parse_args(['--out', str(root), '--count', '8', '--size', '48', '64',
                                                         '--classes', '2']))
    torch.set_num_threads(1)        # the images are too small for two
    shutil.copytree(root / 'SegmentationClass', root / 'SegmentationClassAug')
    names = (lists_of / 'train.txt').read_text().split()
    (lists_of / 'train_aug.txt').write_text('\n'.join(names))
    (lists_of / 'train.txt').write_text('\n'.join(names[:2]))
    for name in names[2:]:
        (root / f'SegmentationClass/{name}.png').unlink()

    def run_child(command):     # in this process, for starting Python takes longer than all else
        log.append(command)
        script = importlib.import_module(os.path.basename(command[1])[:-3])
        monkeypatch.setattr(sys, 'argv', command[1:])
        try:
            script.main(script.get_args_parser().parse_args(command[2:]))
        except SystemExit as end:
            assert not end.code

    monkeypatch.setattr(tables, 'run_child', run_child)
    tables.run.cache_clear()
    out = tmp_path / 'out'
    short = '--batch_size 4 --max_epochs 1 --crop_size '
    monkeypatch.setattr(sys, 'argv', [
        'tables.py', '--table', '1', 'retrain', '--rows', 'SEAM', 'walk', 'retrained', '--voc12_root', str(root),
        '--train_list', str(lists_of / 'train_aug.txt'), '--cls_labels', 'none', '--out', str(out), '--weights',
        '--network', 'network.slim_SEAM', '--network_aff', 'network.slim_aff', '--network_seg', 'network.slim_deeplab',
        '--scales', '1', '--num_workers', '0', '--device', 'cpu',
        f'--train={short} 32 --resize_long 32 48 --tblog_dir {tmp_path}', f'--train_aff={short} 40',
        '--train_seg=--batch_size 4 --max_iters 1 --crop_size 32', '--infer=--flip 0', '--walk=--logt 2',
        '--seg=--scales 1 --flip 0 --crf off'])
    tables.main(tables.parse_args())
    assert [(record['row'], record['images']) for record in tables.read_csv(out / 'tables.csv')] == [
        ('+ hard-example mining (SEAM)', '2'), ('random walk', '2'), ('retrained', '2'),
        ('retrained on ground truth', '2')]
    assert len({tuple(command) for command in log}) == len(log)
    assert sorted(path.stem for path in (out / 'seed0/walk').glob('*.png')) == names
