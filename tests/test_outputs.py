"""What inference writes: formats, pictures, CRF, labels and scores of the walk."""
import json

import numpy as np
import pytest
from PIL import Image

import infer_aff
from helpers import LIST, done, names_of, refused, run
from inference_runs import cams, contents, data, walk
from tool import crf, outputs, score_files, visualization


# ----- space, formats, pictures -----

def test_disk_that_will_not_do_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 2 ** 20}))
    folder = outputs.ResultFolder(str(tmp_path), '--out_cam', '.npy', {})
    check = outputs.SpaceCheck([folder], [str(number) for number in range(1000)])
    for number in range(12):
        (tmp_path / f'{number}.npy').write_bytes(bytes(2 ** 20))
        check.count_image()
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and all(word in out for word in ('990 images', '1.0 GiB', '0.0 GiB'))


def test_half_precision_files_and_npz_hold_the_same_scores(data, tmp_path):
    done(cams(data, '--out_cam', tmp_path / 'a', '--cam_dtype', 'float16', '--cam_format', 'npz'))
    for name in names_of(data):
        full = score_files.load_scores(str(data / f'cam/{name}.npy'), '', 'cam')
        half = score_files.load_scores(str(tmp_path / f'a/{name}.npy'), '', 'cam')      # finds NAME.npz
        assert list(full) == list(half)
        for key in full:
            assert np.abs(full[key] - half[key]).max() < 1e-3
    done(walk(data, '--cam_dir', tmp_path / 'a', '--out_rw', tmp_path / 'rw'))
    labels = [np.asarray(Image.open(folder / f'{names_of(data)[0]}.png')) for folder in (tmp_path / 'rw', data / 'rw')]
    assert (labels[0] != labels[1]).mean() < 0.01
    done(run(data, 'evaluation', '--list', LIST, '--predict_dir', tmp_path / 'a', '--type', 'npy', '--t', 0.2,
             '--comment', 'x', '--logfile', tmp_path / 'log'))


def test_pictures_of_the_first_images(data, tmp_path):
    done(cams(data, '--out_cam', tmp_path / 'cam', '--vis_dir', tmp_path / 'vis', '--vis_count', 3))
    done(walk(data, '--out_rw', tmp_path / 'rw', '--vis_dir', tmp_path / 'vis2', '--vis_count', 2))
    names = names_of(data)
    assert sorted(path.stem for path in (tmp_path / 'vis').iterdir()) == names[:3]
    assert sorted(path.stem for path in (tmp_path / 'vis2').iterdir()) == names[:2]
    assert Image.open(tmp_path / f'vis/{names[0]}.jpg').size[0] > 150


def test_label_of_an_earlier_run_is_not_drawn_for_an_image_that_was_skipped(data, tmp_path):
    name = names_of(data)[0]
    folder = outputs.ResultFolder(str(tmp_path / 'rw'), '--out_rw', '.png', {})
    folder.open([name], resume=False)
    (tmp_path / f'rw/{name}.png').write_bytes((data / f'rw/{name}.png').read_bytes())
    infer_aff.save_pictures([name], folder, str(data / 'VOC2012'), str(tmp_path))
    assert not (tmp_path / f'{name}.jpg').exists()
    with folder.writing(name):
        pass
    infer_aff.save_pictures([name], folder, str(data / 'VOC2012'), str(tmp_path))
    assert (tmp_path / f'{name}.jpg').exists()


def test_picture_that_cannot_be_drawn_stops_nothing(data, tmp_path, monkeypatch):
    def save_picture(*_):
        raise ValueError('too\nlarge')
    monkeypatch.setattr(visualization, 'save_picture', save_picture)
    out = done(cams(data, '--out_cam', tmp_path / 'cam', '--vis_dir', tmp_path / 'vis', '--vis_count', 2))
    assert out.count('warning: no picture of ') == 2 and 'too large' in out
    assert len(list((tmp_path / 'cam').glob('*.npy'))) == len(names_of(data))


def test_crf_from_finished_cams_equals_that_of_the_same_run(data, tmp_path):
    flags = ('--infer_list', LIST, '--cam_dir', 'cam', '--out_crf', tmp_path / 'crf', '--out_cam_pred',
             tmp_path / 'pred', '--num_workers', 0)
    done(run(data, 'infer_SEAM', *flags))
    for folder in 'crf_4.0', 'crf_24.0', 'pred':
        ours, theirs = contents(tmp_path / folder), contents(data / folder)
        assert json.loads(ours.pop(outputs.SETTINGS))['cam_dir scales'] == [1.0] and theirs.pop(outputs.SETTINGS)
        assert ours == theirs
    crf_settings = json.loads((tmp_path / 'crf_4.0' / outputs.SETTINGS).read_text())['crf']
    assert crf_settings == {'iterations': 10, 'sxy_gauss': 3, 'compat_gauss': 3, 'sxy_bilateral': 80, 'srgb': 13,
                            'compat_bilateral': 10}
    (tmp_path / 'crf_4.0' / f'{names_of(data)[0]}.npy').unlink()
    assert '6 of 7 images are finished' in done(run(data, 'infer_SEAM', *flags, '--resume'))
    refused(run(data, 'infer_SEAM', *flags, '--out_cam', 'cam2'), '--cam_dir', '--out_cam')
    refused(run(data, 'infer_SEAM', '--infer_list', LIST, '--out_cam', 'cam2'), '--weights')
    refused(run(data, 'infer_SEAM', *flags, '--out_cam_pred', './cam/'), '--out_cam_pred')


def test_slash_at_the_end_of_the_prefix_of_the_crfs_is_no_part_of_their_names(data, tmp_path):
    done(cams(data, '--out_crf', f'{tmp_path}/crf/', '--crf_alpha', 4))
    assert [path.name for path in tmp_path.iterdir()] == ['crf_4.0']


@pytest.mark.parametrize('shares, word', [([0., .02], 'lower'), ([1., .98], 'higher'), ([.3, .99], None), ([], None)])
def test_labels_that_are_nearly_all_background_or_hardly_any_are_warned_of(shares, word, capsys):
    outputs.warn_of_background(shares, 'rw', '--alpha')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(word)
    assert not word or lines[0].startswith('warning: ') and f'try a {word} --alpha' in lines[0]


def test_labels_that_are_not_sure_become_255(data, tmp_path):
    done(walk(data, '--out_rw', tmp_path / 'a', '--ignore_below', 0.5))
    done(walk(data, '--out_rw', tmp_path / 'b', '--ignore_crf', 'crf_4.0', 'crf_24.0'))
    for name in names_of(data):
        plain, sure, agreed = (np.asarray(Image.open(folder / f'{name}.png'))
                               for folder in (data / 'rw', tmp_path / 'a', tmp_path / 'b'))
        scores = [score_files.load_scores(str(data / f'crf_{alpha}/{name}.npy'), '', 'crf')
                  for alpha in ('4.0', '24.0')]
        low, high = map(score_files.strongest_label, scores)
        assert (agreed == np.where(low == high, plain, 255)).all()
        assert (sure[sure != 255] == plain[sure != 255]).all()


def test_scores_of_the_walk_have_its_labels_and_sum_to_one(data, tmp_path):
    done(walk(data, '--out_rw', tmp_path / 'rw', '--out_prob', tmp_path / 'prob', '--crf', '--ignore_below', 0.5))
    done(run(data, 'evaluation', '--list', LIST, '--predict_dir', tmp_path / 'prob', '--type', 'crf', '--comment', 'x',
             '--logfile', tmp_path / 'log'))
    for name in names_of(data):
        scores = score_files.load_scores(str(tmp_path / f'prob/{name}.npy'), '', 'crf')
        classes = score_files.load_scores(str(data / f'cam/{name}.npy'), '', 'cam')
        assert list(scores) == [0] + [key + 1 for key in classes]
        assert score_files.sums_to_one(scores).all() and all(value.dtype == np.float32 for value in scores.values())
        label = np.asarray(Image.open(tmp_path / f'rw/{name}.png'))
        assert (score_files.strongest_label(scores) == label)[label != 255].all()
    settings = json.loads((tmp_path / 'prob' / outputs.SETTINGS).read_text())
    assert settings['crf'] == crf.describe_crf(crf.WALK_CRF) and 'ignore_below' not in settings
    assert '7 of 7 images are finished' in done(walk(data, '--out_rw', tmp_path / 'rw', '--out_prob', tmp_path / 'prob',
                                                     '--crf', '--ignore_below', 0.5, '--resume'))


def test_scores_of_the_walk_where_nothing_is_above_zero_are_background():
    scores = np.float32([[[0, 0, .2]], [[-.1, 0, .6]]])
    assert np.allclose(infer_aff.normalize_scores(scores), [[[1, 1, .25]], [[0, 0, .75]]])


# ----- the numbers of the CRF -----

def test_the_three_uses_of_the_crf_have_the_published_numbers():
    kernels = {'sxy_gauss': 3, 'compat_gauss': 3, 'sxy_bilateral': 80, 'srgb': 13, 'compat_bilateral': 10}
    assert crf.describe_crf(crf.CAM_CRF) == {'iterations': 10, **kernels}
    assert crf.describe_crf(crf.WALK_CRF) == {'iterations': 1, **kernels}
    assert crf.describe_crf(crf.SEGMENTATION_CRF) == {'iterations': 1, **kernels, 'sxy_bilateral': 32}
