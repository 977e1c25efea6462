"""tool/tables.py: which commands it runs, and what it makes of their numbers. The commands do not run here."""
import csv
import os
import sys

import pytest

import infer_SEAM
import train_aff
import train_SEAM
from tool import image_lists, tables
from tool.cli import BadInput


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs tables.py in a folder with a blank in its name; returns its commands, without Python and the folder."""
    root = tmp_path / 'my data'
    (root / 'ImageSets/Segmentation').mkdir(parents=True)
    (root / 'SegmentationClass').mkdir()
    for name in 'ab':
        (root / f'SegmentationClass/{name}.png').write_text('')
    (root / 'ImageSets/Segmentation/train.txt').write_text('a\nb\n')
    (root / 'aug.txt').write_text('a\nb\nc\n')
    (root / 'start.pth').write_text('')
    log, listed = [], ['train']

    def run_child(command):
        log.append([os.path.basename(command[1]), *command[2:]])
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
        monkeypatch.setattr(sys, 'argv', ['tables.py', '--voc12_root', str(root), '--train_list', str(root / 'aug.txt'),
                                          '--weights', str(root / 'start.pth'), '--out', str(tmp_path / 'out'), *flags])
        tables.main(tables.parse_args())
        return log

    monkeypatch.setattr(tables, 'run_child', run_child)
    start.listed, start.log = listed, log
    return start


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


def test_what_the_random_walk_is_made_from(commands, tmp_path):
    log = commands('--rows', 'random walk', '--alphas', '24', '4', '--train', '--lr 0.1', '--train_aff=--seed 3',
                   '--infer', '--amp bf16', '--walk', '--alpha 3')
    # the images to score are a and b; c is trained on
    assert scripts(log) == ['train_SEAM.py', *['infer_SEAM.py'] * 4, 'train_aff.py', 'infer_aff.py', 'evaluation.py']
    train_seam, cam, crf, other_cam, other_crf, train_aff, walk, _ = log
    out = str(tmp_path / 'out/seed0')
    assert '--lr' in train_seam and ['--alpha', '3'] == walk[-2:]
    assert '--amp' in cam and '--amp' in crf and '--amp' not in walk
    assert train_aff[train_aff.index('--la_crf_dir') + 1] == f'{out}/crf_4.0'
    assert train_aff[train_aff.index('--ha_crf_dir') + 1] == f'{out}/crf_24.0'
    assert cam[cam.index('--out_cam') + 1] == walk[walk.index('--cam_dir') + 1] == crf[crf.index('--cam_dir') + 1]
    others = other_cam[other_cam.index('--infer_list') + 1]
    assert image_lists.load_img_name_list(others) == ['c'] and others in other_crf


def test_affinitynet_can_have_a_list_of_its_own(commands, tmp_path):
    own = str(tmp_path / 'my data/ImageSets/Segmentation/train.txt')
    log = commands('--rows', 'random walk', '--aff_list', own)
    assert scripts(log).count('infer_SEAM.py') == 2         # of the images to score alone
    command = log[scripts(log).index('train_aff.py')]
    assert train_aff.get_args_parser().parse_args(command[1:]).train_list == own


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


def test_resume_with_other_settings_is_refused(commands):
    commands('--rows', 'SEAM')
    with pytest.raises(BadInput, match=r'--scales was \[0.5, 1.0, 1.5, 2.0\], is \[1.0\]'):
        commands('--rows', 'SEAM', '--resume', '--scales', '1')
    commands('--rows', 'SEAM', '--resume', '--device', 'cpu', '--seeds', '3')


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


@pytest.mark.parametrize('flags', [('--lite0',), ('--aff_list', 'list.txt')])
def test_toy_has_its_own_settings_and_images(commands, flags, capsys):
    with pytest.raises(SystemExit):
        commands('--toy', *flags)
    assert '--toy has its own' in capsys.readouterr().err


def test_weights_without_a_value_are_left_to_the_network(commands):
    assert '--weights' not in commands('--rows', 'baseline', '--weights')[0]


@pytest.mark.parametrize('flags, word', [
    (['--rows', 'xyz'], '--rows xyz'), (['--list', 'missing.txt'], '--list'), (['--weights', 'no.pth'], '--weights'),
    (['--seeds', '0', '0'], '--seeds 0 0'), (['--alphas', '4', '4.01'], '--alphas 4.0 4.0'),
    (['--scales', '0'], '--scales')])
def test_bad_flags_are_refused_before_anything_runs(commands, flags, word):
    with pytest.raises(BadInput, match=word):
        commands(*flags)
    assert not commands.log


def test_missing_masks_are_noticed_before_anything_runs(commands, tmp_path):
    (tmp_path / 'my data/SegmentationClass/b.png').unlink()
    with pytest.raises(BadInput, match='no such file: .*SegmentationClass/b.png .--voc12_root'):
        commands()
    assert not commands.log


def test_flags_for_the_scripts_that_are_not_whole(commands, capsys):
    with pytest.raises(SystemExit):
        commands('--train', '--lr "1')
    assert 'argument --train' in capsys.readouterr().err


def test_a_failing_script_stops_the_tables_with_one_line(tmp_path, capfd):
    script = tmp_path / 'fails.py'
    script.write_text('print("what it says"); raise SystemExit(3)')
    with pytest.raises(BadInput, match='fails.py ended with exit code 3.*--resume'):
        tables.run_child([sys.executable, str(script)])
    assert 'what it says' in capfd.readouterr().out
