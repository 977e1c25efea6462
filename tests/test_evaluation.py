"""The evaluation against the reference's numbers."""
import csv
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
from conftest import GOLDEN, golden
from helpers import done, refused, run
from tool import image_files, metrics, visualization


@pytest.fixture(scope='module')
def g():
    return golden('g09_evaluation')


def cams(g, name):
    return {int(key): g[f'pred:{name}:{key}'] for key in g[f'keys:{name}']}


VOC = 20


def score(g, thresholds):
    matrices = sum(metrics.confusion_curve(g[f'gt:{name}'], cams(g, name), thresholds, VOC) for name in g['names'])
    return metrics.class_measures(matrices)[0]


def test_curve_equals_the_reference_at_all_60_thresholds(g):
    np.testing.assert_array_equal(evaluation.CURVE, g['curve_thresholds'])
    iou = score(g, evaluation.CURVE)
    np.testing.assert_allclose(iou, g['curve_iou_percent_per_class'], rtol=1e-12, atol=0)
    np.testing.assert_allclose(iou.mean(axis=1), g['curve_miou_percent'], rtol=1e-12)


def test_one_threshold(g):
    iou = score(g, np.array([0.26]))[0]
    np.testing.assert_allclose(iou, g['npy_t0.26_iou_percent'], rtol=1e-12)


def test_png(g):
    matrix = sum(metrics.confusion(g[f'gt:{name}'], g[f'png:{name}'], VOC) for name in g['names'])
    iou = metrics.class_measures(matrix)[0]
    np.testing.assert_allclose(iou, g['png_iou_percent'], rtol=1e-12)
    np.testing.assert_allclose(iou.mean(), g['png_miou_percent'], rtol=1e-12)


def test_a_score_equal_to_the_threshold_is_background():
    matrix = metrics.confusion_curve(np.array([[4, 4]]), {3: np.float32([[0.26, 0.27]])}, np.array([0.26]), VOC)[0]
    assert matrix[4, 0] == 1 and matrix[4, 4] == 1 and matrix.sum() == 2


def test_negative_threshold_lets_absent_classes_win():
    """The reference compares all 20 classes: absent ones have score 0."""
    matrix = metrics.confusion_curve(np.array([[4]]), {3: np.float32([[-0.5]])}, np.array([-0.1]), VOC)[0]
    assert matrix[4, 1] == 1


def test_predictions_that_are_no_class_count_against_the_truth_only():
    matrix = metrics.confusion(np.array([[1, 1, 255]]), np.array([[1, 255, 1]]), VOC)
    assert metrics.class_measures(matrix)[0][1] == pytest.approx(50)


def test_counters_hold_more_than_32_bits():
    matrix = metrics.confusion(np.array([[1]]), np.array([[1]]), VOC) * 3_000_000_000
    assert (matrix + matrix)[1, 1] == 6_000_000_000


def test_workers_give_the_same_sums_as_one_process(g, tmp_path):
    names = []
    for copy in range(12):
        for name in g['names']:
            names.append(f'{name}_{copy}')
            for kind, folder in (('gt', 'gt'), ('pred', 'pred')):
                os.makedirs(tmp_path / folder, exist_ok=True)
                os.symlink(os.path.join(GOLDEN, 'g09_png', f'{name}_{kind}.png'),
                           tmp_path / folder / f'{names[-1]}.png')
    one, two = (evaluation.evaluate(names, tmp_path / 'pred', tmp_path / 'gt', 'png', np.zeros(1), 20, workers)[0]
                for workers in (0, 8))
    assert (one == two).all() and one.sum() == 12 * sum((g[f'gt:{name}'] != 255).sum() for name in g['names'])


def test_means_over_the_classes_present_and_over_chosen_ones():
    matrix = np.zeros((5, 5), np.int64)         # 3 classes and the background; class 3 is predicted and nowhere
    matrix[0, 0], matrix[1, 1], matrix[1, 3], matrix[2, 2], matrix[2, 0] = 6, 3, 1, 1, 1
    means = metrics.mean_measures(matrix, chosen=[1, 2])
    assert means['mIoU'] == pytest.approx((600 / 7 + 75 + 50 + 0) / 4)
    assert means['mIoU_present'] == pytest.approx((600 / 7 + 75 + 50) / 3)
    assert means['mIoU_chosen'] == pytest.approx(62.5) and means['mFN'] == pytest.approx(37.5)
    assert metrics.mean_measures(matrix)['mFP'] == pytest.approx(100 / 7 / 3)       # of those present


def test_suggested_alphas_stand_to_the_best_score_as_the_paper_s():
    line = evaluation.suggest_alphas(.26, 1464)
    assert '--crf_alpha 4.0 24.2' in line and 'infer_aff.py --alpha 6.0' in line and '1,464 images' in line


# ----- the script -----

@pytest.fixture
def data(tmp_path):
    """Two images of 4x4: half background, half class 1, a pixel of 255; label maps equal to it, CAMs that are right
    below a background score of 0.9."""
    gt = np.zeros((4, 4), np.uint8)
    gt[:2], gt[0, 0] = 1, 255
    for folder in ('gt', 'pred', 'cam'):
        (tmp_path / folder).mkdir()
    for name in 'ab':
        image_files.save_label_map(str(tmp_path / f'gt/{name}.png'), gt)
        image_files.save_label_map(str(tmp_path / f'pred/{name}.png'), np.minimum(gt, 1))
        np.save(tmp_path / f'cam/{name}.npy', {0: np.where(gt > 0, .9, .5).astype(np.float32)})
    (tmp_path / 'list.txt').write_text('a\nb\n')
    return tmp_path


def score_script(data, *args, kind='png'):
    return run(data, 'evaluation', '--list', 'list.txt', '--gt_dir', 'gt', '--predict_dir', 'pred' if kind == 'png' else
               'cam', '--comment', 'x', '--num_workers', 0, '--type', kind, *args)


def read_result(path):
    with open(path, encoding='utf-8', newline='') as file:
        return next(csv.DictReader(file))


@pytest.mark.parametrize('folder, flag', [('gt', '--gt_dir'), ('pred', '--predict_dir')])
def test_label_values_beyond_the_classes_are_warned_of(data, folder, flag):
    labels = np.array(Image.open(data / folder / 'a.png'))
    labels[3] = [21, 254, 254, 255]
    image_files.save_label_map(str(data / folder / 'a.png'), labels)
    lines = [line for line in done(score_script(data)).splitlines() if 'beyond' in line]
    assert len(lines) == 1 and lines[0].startswith(f'warning: {folder} ({flag})')
    assert '21, 254, in 3 pixels' in lines[0] and '20 classes' in lines[0]


def test_predictions_of_another_class_list_are_warned_of(data):
    (data / 'names.txt').write_text('cat\n')
    image_files.save_label_map(str(data / 'pred/b.png'), np.arange(16).reshape(4, 4))
    assert '2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..., in 14 pixels' in done(score_script(data, '--class_names', 'names.txt'))


@pytest.mark.parametrize('key', ['class_names', 'cam_dir class_names'])
def test_results_of_another_class_list_are_refused(data, key):
    (data / 'names.txt').write_text('cat\n')
    (data / 'pred/settings.json').write_text(json.dumps({'scales': [1], key: ['cat']}))
    refused(score_script(data), 'pred', '--predict_dir', 'cat', '--class_names', 'aeroplane, bicycle')
    done(score_script(data, '--class_names', 'names.txt'))
    (data / 'pred/settings.json').write_text(json.dumps({'scales': [1]}))
    done(score_script(data))


def test_share_of_255_in_predictions_is_told(data):
    image_files.save_label_map(str(data / 'pred/b.png'), np.full((4, 4), 255))
    out = done(score_script(data))
    assert 'warning: pred' not in out          # it can be meant
    assert [line for line in out.splitlines() if '50%' in line and 'pred (--predict_dir)' in line and 'wrong' in line]
    (data / 'pred/b.png').write_bytes((data / 'gt/b.png').read_bytes())     # 255 where the ground truth has it
    assert '(--predict_dir)' not in done(score_script(data))


@pytest.mark.parametrize('kind', ['png', 'npy'])
def test_missing_files_are_counted(data, kind):
    (data / 'list.txt').write_text('a\nb\nc\nd\n')
    for name in 'cd':
        (data / f'gt/{name}.png').write_bytes((data / 'gt/a.png').read_bytes())
    flags = ['--curve'] if kind == 'npy' else []
    folder = {'png': 'pred', 'npy': 'cam'}[kind]
    line = refused(score_script(data, *flags, kind=kind), '2 of the 4 images', 'list.txt', f'{folder}/c.{kind}',
                   '--predict_dir')
    assert '--gt_dir' not in line and not list(data.glob('*.csv'))
    (data / 'gt/d.png').unlink()
    (data / 'gt/d.png').symlink_to(data / 'moved.png')
    refused(score_script(data, *flags, kind=kind), '2 of the 4 images', '1 of the 4 images', 'moved.png', '--gt_dir')


@pytest.mark.parametrize('name', ['logs', 'logs/', 'new/'])
def test_a_folder_as_logfile_is_refused_before_the_work(data, name):
    (data / 'logs').mkdir()
    refused(score_script(data, '--logfile', name), '--logfile', 'folder')
    assert not list(data.glob('*.csv'))


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_under_the_log_loses_no_result(data):
    result = score_script(data, '--logfile', '/dev/full', '--out_prefix', 'kept')
    refused(result, '/dev/full', 'No space left')
    assert 'accuracy:100.000%' in result.stdout
    assert read_result(data / 'kept_result.csv')['mIoU_present'] == '100.0'
    assert (data / 'kept_confusion.csv').is_file()


def test_a_comment_that_is_no_utf_8_loses_no_result(data):
    byte = os.fsdecode(b'\xe9')             # as Python reads it from a command line
    done(score_script(data, '--comment', 'caf' + byte))
    assert 'caf\\udce9' in (data / 'evallog.txt').read_text(encoding='utf-8')
    assert read_result(data / 'pred_result.csv')['comment'] == 'caf\\udce9'


def test_a_csv_that_cannot_be_written_loses_no_result(data):
    (data / 'pred_result.csv').mkdir()
    result = score_script(data)
    refused(result, 'pred_result.csv')
    assert 'accuracy:100.000%' in result.stdout and 'mIoU_present:' in (data / 'evallog.txt').read_text()


def test_a_result_of_other_predictions_or_images_is_not_replaced_in_silence(data):
    other = data / 'other/pred'
    shutil.copytree(data / 'pred', other)
    (data / 'one.txt').write_text('a\n')
    moved = '--predict_dir', other
    for flags, words in (((), ()), ((), ()), (moved, ('pred', other)), (moved, ()),
                         ((*moved, '--list', 'one.txt'), ('2', '1')), (('--out_prefix', 'third'), ())):
        lines = [line for line in done(score_script(data, *flags)).splitlines() if '--out_prefix' in line]
        assert len(lines) == bool(words) and all(str(word) in lines[0] for word in ('pred_result.csv', *words) if words)
    (data / 'third_result.csv').write_bytes(b'\xff')
    done(score_script(data, '--out_prefix', 'third'))


@pytest.mark.parametrize('flags', [['--t', 'nan'], ['--t', 'inf'], ['--curve', '--t_list', '0.1', 'nan']])
def test_background_scores_that_are_no_numbers(data, flags):
    refused(score_script(data, *flags, kind='npy'), '--t', flags[-1])


def test_curve_goes_on_where_its_best_point_is_near_the_end(data):
    out = done(score_script(data, '--curve', '--t', 0.3, kind='npy'))
    assert 'warning: --t 0.3 has no effect' in out
    lines = [line for line in out.splitlines() if 'background score: ' in line and '/' in line]
    assert len(lines) == 100 and lines[0].startswith('0/60 ') and lines[59].startswith('59/60 background score: 0.590')
    assert lines[99].startswith('99/100 background score: 0.990')
    result = read_result(data / 'cam_result.csv')
    assert (result['background_score'], result['plateau'], result['images']) == ('0.5', '0.39', '2')
    assert len((data / 'cam_curve.csv').read_text().splitlines()) == 101


def test_curve_ends_at_059_elsewhere(data):
    for name in 'ab':
        cam = np.load(data / f'cam/{name}.npy', allow_pickle=True).item()[0]
        np.save(data / f'cam/{name}.npy', {0: cam - .3})
    out = done(score_script(data, '--curve', kind='npy'))
    assert out.count('/60 background score') == 60 and '/100' not in out


def test_mean_over_chosen_classes(data):
    out = done(score_script(data, '--mean_classes', 'background', 'bird'))
    assert 'mIoU: 50.000%  over background, bird' in out
    assert read_result(data / 'pred_result.csv')['mIoU_chosen'] == '50.0'
    assert out.count('warning: no file of gt (--gt_dir) on the list has bird (--mean_classes)') == 1
    assert '(--mean_classes)' not in done(score_script(data, '--mean_classes', 'background', 'aeroplane'))
    refused(score_script(data, '--mean_classes', 'bird', 'unicorn'), '--mean_classes unicorn')


def test_a_formula_in_the_comment_does_not_end_the_curve(data):
    pytest.importorskip('matplotlib')
    line = visualization.draw_curve(str(data / 'c.png'), np.array([0., 1]), np.array([1., 2]), r'a $\frac$ b')
    assert line.startswith('wrote') and (data / 'c.png').is_file()
    assert 'warning: no picture' in visualization.draw_curve(str(data / 'no/c.png'), np.zeros(1), np.zeros(1), '')


# ----- pictures -----

def test_a_strip_too_wide_for_jpeg_is_made_smaller(tmp_path):
    visualization.save_picture(str(tmp_path / 'x.jpg'), [np.zeros((4, 3000, 3), np.uint8)] * 80, ['x'] * 80)
    assert 60000 < Image.open(tmp_path / 'x.jpg').width <= 65500


class Writer:
    """In place of TensorBoard's, whose log lies in a folder that cannot be written, or on a disk that becomes full."""

    def __init__(self, folder=None, purge_step=None):
        if folder:
            raise PermissionError(13, 'Permission denied')

    def add_scalar(self, *_):
        raise OSError(28, 'No space left on device')


def test_a_tensorboard_log_that_cannot_be_written_is_one_notice(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    log = []
    assert visualization.open_writer('tb', 'runs/x', 0, log.append) is None
    assert log == [f'warning: no TensorBoard log in {os.path.join("tb", "runs", "x")} (--tblog_dir): Permission denied']
    visualization.write_cams(Writer(), 0, {'loss': 1.}, torch.zeros(3, 2, 2), torch.ones(1), *torch.zeros(2, 2, 2, 2))
    out = capsys.readouterr().out
    assert out.startswith('warning: ') and 'No space left' in out and out.count('\n') == 1


def test_sheet_leaves_blank_what_is_missing(data):
    (data / 'root/JPEGImages').mkdir(parents=True)
    os.rename(data / 'gt', data / 'root/SegmentationClass')
    for name in 'ab':
        Image.new('RGB', (4, 4)).save(data / f'root/JPEGImages/{name}.jpg')
    (data / 'list.txt').write_bytes(b'\xef\xbb\xbfa\r\n/JPEGImages/b.jpg x\r\nc\r\n')
    (data / 'root/SegmentationClass/b.png').unlink()
    (data / 'cam/a.npy').unlink()
    image_files.save_label_map(str(data / 'pred/b.png'), np.zeros((2, 2)))
    flags = '--voc12_root', 'root', '--cam_dir', 'cam', '--label_dir', 'pred', '--out', 'sheet.png', '--list'
    out = done(run(data, 'tool/visualization', *flags, 'list.txt')).splitlines()
    assert [re.search(r'left out: .*?(--\w+)', line)[1] for line in out] == ['--cam_dir', '--voc12_root', '--label_dir',
                                                                         '--voc12_root']
    assert 'c.jpg' in out[-1]
    assert Image.open(data / 'sheet.png').size == (4 * 160, 24 + 2 * (14 + 160))
    (data / 'none.txt').write_text('c\n')
    refused(run(data, 'tool/visualization', *flags, 'none.txt'), 'none.txt')
    refused(run(data, 'tool/visualization', *flags, 'list.txt', '--count', 0), '--count')


# ----- tool/report.py -----

def test_trivial_answers_of_npz_and_of_images_without_class(data):
    np.savez(data / 'cam/c.npz', **{'0': np.ones((3, 5), np.float32)})
    np.save(data / 'cam/a.npy', {})
    (data / 'cam/._b.npy').write_bytes(b'of macOS')
    out = done(run(data, 'tool/report', 'trivial', '--cam_dir', 'cam', '--out_dir', 'out'))
    assert out.startswith('warning: a ') and '--voc12_root' in out
    assert sorted(os.listdir(data / 'out/labels')) == ['b.png', 'c.png']
    assert (np.asarray(Image.open(data / 'out/labels/c.png')) == np.ones((3, 5))).all()
    refused(run(data, 'tool/report', 'trivial', '--cam_dir', 'gt', '--out_dir', 'out'), 'gt', '--cam_dir')


def test_table_of_a_log_with_entries_of_the_original(data):
    (data / 'evallog.txt').write_text('2020-04-01 10:00:00\tlr 0.1\nbackground:0.9  mIoU:55.4  \n' + '=' * 37 + '\n')
    refused(run(data, 'tool/report', 'table', '--logfile', 'evallog.txt'), 'no result', 'evallog.txt')
    done(score_script(data, '--comment', 'two\nlines'))
    done(score_script(data, '--curve', kind='npy'))
    out = done(run(data, 'tool/report', 'table', '--logfile', 'evallog.txt')).splitlines()
    assert out[0].startswith('warning: 1 entries of evallog.txt')
    assert out[3:] == ['| two lines |  | 9.5 | 100.0 |', '| x | 0.5 | 9.5 | 100.0 |']
