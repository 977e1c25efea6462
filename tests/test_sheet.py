"""The sheet of background thresholds of tool/visualization.py, and the exponents that go with a threshold."""
import numpy as np
import pytest
from PIL import Image

import evaluation
import infer_aff
import infer_SEAM
from tool import thresholds, visualization
from tool.cli import BadInput

CELL = 160
ROW = CELL + 14        # with the name of the image above it


@pytest.mark.parametrize('threshold, exponent', [(.5, 1), (.26, 4.47), (.28, 3.87), (.09, 25.5)])
def test_the_exponent_of_a_threshold_and_back(threshold, exponent):
    assert thresholds.exponent_of(threshold) == pytest.approx(exponent, rel=.01)
    assert thresholds.threshold_of(thresholds.exponent_of(threshold)) == pytest.approx(threshold, abs=1e-9)


@pytest.mark.parametrize('exponent', [.01, 1, 4, 24, 100])
def test_threshold_and_exponent_give_the_same_background(exponent):
    x = thresholds.threshold_of(exponent)
    assert 0 < x < 1 and (1 - x) ** exponent == pytest.approx(x)


def test_the_paper_s_exponents_are_those_of_its_best_threshold():
    assert np.round(thresholds.exponents_to_start_with(.26)).tolist() == [4, 24, 6]


@pytest.mark.parametrize('threshold', [1e-6, .01, .02, .05, .1, .5, .9, .95, .99])
def test_suggested_exponents_are_such_as_the_scripts_take(threshold):
    low, high, walk = (f'{exponent:.1f}' for exponent in thresholds.exponents_to_start_with(threshold))
    assert f'--crf_alpha {low} {high}' in evaluation.suggest_alphas(threshold, 9)
    infer_SEAM.check_args(infer_SEAM.get_args_parser().parse_args(
        ['--cam_dir', '.', '--out_crf', 'crf', '--crf_alpha', low, high]))
    infer_aff.check_args(infer_aff.get_args_parser().parse_args(
        ['--weights', __file__, '--cam_dir', '.', '--alpha', walk]))


@pytest.fixture
def root(tmp_path):
    """Three images a, b, c of 10 x 10; a has the classes 7 and 11, b none, c one class."""
    (tmp_path / 'JPEGImages').mkdir()
    (tmp_path / 'cam').mkdir()
    (tmp_path / 'SegmentationClass').mkdir()
    for name in 'abc':
        Image.new('RGB', (10, 10), (90, 90, 90)).save(tmp_path / f'JPEGImages/{name}.jpg')
    scores = np.linspace(-.05, .85, 10, dtype=np.float32)[None].repeat(10, axis=0)     # columns: -0.05, 0.05 ... 0.85
    np.save(tmp_path / 'cam/a.npy', {7: scores * (scores < .5), 11: scores * (scores > .5)})
    np.save(tmp_path / 'cam/b.npy', {})
    np.save(tmp_path / 'cam/c.npy', {0: scores[:, ::-1]})
    (tmp_path / 'list.txt').write_text('a\nb\nc\n')
    return tmp_path


def draw(root, *flags):
    """Runs the command in this process; returns the sheet as uint8 (H, W, 3)."""
    visualization.main(visualization.get_args_parser().parse_args([
        '--voc12_root', str(root), '--list', str(root / 'list.txt'), '--cam_dir', str(root / 'cam'),
        '--out', str(root / 'sheet.png'), *map(str, flags)]))
    return np.asarray(Image.open(root / 'sheet.png'))


def cell_of(sheet, row, column):
    """The ten pixels of an image's row, left to right, in a cell."""
    header = sheet.shape[0] % ROW
    return sheet[header + row * ROW + ROW - CELL // 2, column * CELL + 3:(column + 1) * CELL - 3][7::15]


def test_shares_changes_and_exponents_are_in_the_table(root, capsys):
    draw(root, '--t', .6, .2, .4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    # 7, 5 and 3 of 10 columns are above; 0.2 is that of exponent 7.2
    assert rows == [['0.20', '70.0%', '20.0%', '6.5', '38.9', '9.7'], ['0.40', '50.0%', '20.0%', '1.6', '9.7', '2.4'],
                    ['0.60', '30.0%', '0.5', '3.0', '0.8']]


def test_a_cell_shows_what_a_threshold_labels_and_in_white_what_the_next_one_does_not(root):
    sheet = draw(root, '--t', .2, .6)
    assert sheet.shape[1] == 4 * CELL and sheet.shape[0] // ROW == 2         # image, CAM and two thresholds; a and c
    low, high = cell_of(sheet, 0, 2), cell_of(sheet, 0, 3)
    white, background = [172] * 3, [54] * 3             # of grey 90; class 11, value 12 of a label map, is (64, 0, 128)
    assert (np.abs(low[:2] - np.float32(background)) < 3).all()
    assert (np.abs(low[4:6] - np.float32(white)) < 3).all()
    assert (np.abs(low[8:] - np.float32([77, 45, 109])) < 3).all()
    assert (np.abs(high[8:] - np.float32([77, 45, 109])) < 3).all()
    assert (np.abs(high[:6] - np.float32(background)) < 3).all()


def test_images_without_a_class_are_passed_over_and_counted(root, capsys):
    draw(root, '--t', .5, '--count', 2)
    out = capsys.readouterr().out
    assert '; 1 without a class' in out and 'mean of 2 images' in out
    (root / 'list.txt').write_text('b\n')
    with pytest.raises(BadInput, match='list.txt .--list.*--cam_dir'):
        draw(root, '--t', .5)


def test_a_seed_chooses_images_at_random_and_the_same_ones_again(root):
    for name in 'abc':
        Image.new('RGB', (10, 10), (80 * 'abc'.index(name),) * 3).save(root / f'JPEGImages/{name}.jpg')
    first = {seed: cell_of(draw(root, '--count', 1, '--seed', seed), 0, 0)[0, 0].item() for seed in range(8)}
    assert len(set(first.values())) > 1
    assert all(cell_of(draw(root, '--count', 1, '--seed', seed), 0, 0)[0, 0] == value for seed, value in first.items())


@pytest.mark.parametrize('flags', [['--t', 0], ['--t', 1], ['--t', .5, '--label_dir', '.'],
                                   ['--t', .5, '--cam_dir', 'x', 'y']])
def test_thresholds_that_cannot_be_drawn_are_refused(flags, root):
    with pytest.raises(BadInput, match='--t '):
        draw(root, *flags)


def test_cams_that_do_not_fit_their_image_are_refused(root):
    Image.new('RGB', (10, 11)).save(root / 'JPEGImages/a.jpg')
    with pytest.raises(BadInput, match='a.npy .--cam_dir.*11x10'):
        draw(root, '--t', .5)


# ----- the pictures of infer_SEAM.py -----

@pytest.mark.parametrize('given, expected', [
    (([1, 4], False, .26), [.5, .28]), (([], True, .26), [.26]), (([1], True, .4), [.4, .5]), (([], False, .6), [.6])])
def test_pictures_show_labels_at_the_thresholds_that_the_run_uses(given, expected):
    scores = infer_SEAM.scores_of_pictures(*given)
    assert np.round(scores, 2).tolist() == expected


def test_a_picture_has_the_labels_of_every_threshold(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(visualization, 'save_picture', lambda *picture: shown.append(picture))
    cam_dict = {1: np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)}
    infer_SEAM.save_picture('x.jpg', np.full((10, 10, 3), 90, np.uint8), cam_dict, ['cat', 'dog'], [.5, .2])
    (_, pictures, titles), = shown
    assert titles == ['image', 'dog', 'at 0.50', 'at 0.20']
    assert [(picture[..., 1] > 27).sum() for picture in pictures[2:]] == [50, 80]   # class 2 is (0, 128, 0)
