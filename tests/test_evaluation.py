"""The evaluation against the reference's numbers."""
import argparse
import os

import numpy as np
import pytest

import evaluation
from conftest import GOLDEN, golden
from tool import metrics, report


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
    args = argparse.Namespace(gt_dir=str(tmp_path / 'gt'), predict_dir=str(tmp_path / 'pred'), type='png',
                              class_names=None)
    one, two = (evaluation.evaluate(names, argparse.Namespace(**vars(args), num_workers=n), np.zeros(1))
                for n in (0, 8))
    assert (one == two).all() and one.sum() == 12 * sum((g[f'gt:{name}'] != 255).sum() for name in g['names'])


def test_tables_average_over_seeds_and_the_classes_present(tmp_path, capsys):
    log, t = tmp_path / 'log.txt', [0.1, 0.2, 0.3, 0.4]
    for seed, curve in (1, [10, 40, 38.5, 12]), (0, [20, 29, 30, 29]):      # over 20 classes, of which half are there
        means = {'mIoU': curve, 'mIoU_present': [2 * value for value in curve]}
        means.update({key: [5, 6, 7, 8] for key in ('mFP', 'mFN', 'accuracy')})
        evaluation.write_log(log, {**means, 't': t}, f'1 | baseline | {seed}')
    numbers = {'mIoU': 35., 'mIoU_present': 35., 'mFP': 1., 'mFN': 2., 'accuracy': 3.}
    evaluation.write_log(log, {'background': 50., **numbers}, '1 | + CRF, alpha 4.0 | 0')
    report.write_tables(argparse.Namespace(logfile=log, out=str(tmp_path / 'tables')))
    lines = (tmp_path / 'tables.md').read_text().splitlines()
    assert lines[0] == '**Table: 1** (2 seeds)'
    assert lines[-2:] == ['| baseline | 0.30, 0.20 | 0.20, 0.10 | 70.0 ± 14.1 | 13.0 ± 1.4 | 13.0 ± 1.4 | 47.43 |',
                          '| + CRF, alpha 4.0 |  |  | 35.0 | 1.0 | 2.0 | 56.83 |']
    assert '1,"baseline",1,0.2,0.1,80.0000,12.0000,12.0000,6.0000' in (tmp_path / 'tables.csv').read_text()
    assert capsys.readouterr().out.splitlines() == lines
