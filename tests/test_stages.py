"""Every stage through the command line, each on the output of the one before: what it writes and prints."""
import importlib.util

import numpy as np
import torch
from PIL import Image

from helpers import LIST, SEAM, done, names_of, run
from script_runs import pipeline


def test_training_writes_a_bare_state_dict_and_its_log(pipeline):
    root, out = pipeline
    weights = torch.load(root / 'runs/seam.pth', weights_only=True)
    assert weights['fc8.weight'].shape == (21, 256, 1, 1) and not any(name.startswith('module.') for name in weights)
    assert out['seam'].count('Iter:    0/    2 loss:') == 1
    assert 'Iter:    0/    2 loss:' in (root / 'runs/seam.log').read_text()
    assert not list(root.glob('runs/.*'))


def test_backbone_file_has_no_heads(pipeline):
    weights = torch.load(pipeline[0] / 'runs/pre_backbone.pth', weights_only=True)
    assert 'bn7.weight' in weights and not any(name.startswith('f') for name in weights)


def test_missing_tensorboard_gets_one_notice(pipeline):
    expected = 0 if importlib.util.find_spec('tensorboard') else 1
    assert pipeline[1]['seam'].count('pip install tensorboard') == expected


def test_cam_files_have_the_reference_s_format(pipeline):
    root, _ = pipeline
    for name in names_of(root):
        cams = np.load(root / f'out/cam/{name}.npy', allow_pickle=True).item()
        size = Image.open(root / f'VOC2012/JPEGImages/{name}.jpg').size[::-1]
        assert list(cams) == sorted(cams) and set(cams) <= {0, 1, 2}
        assert all(type(key) is int and cam.dtype == np.float32 and cam.shape == size for key, cam in cams.items())
        for alpha in ('4.0', '24.0'):
            crf = np.load(root / f'out/crf_{alpha}/{name}.npy', allow_pickle=True).item()
            assert list(crf) == [0] + [key + 1 for key in cams]
            assert np.allclose(sum(crf.values()), 1, atol=1e-4)


def test_label_maps_are_palette_pngs_of_class_indices(pipeline):
    root, _ = pipeline
    for folder in ('out/cam_pred', 'out/rw'):
        for name in names_of(root):
            img = Image.open(root / folder / f'{name}.png')
            assert img.mode == 'P' and set(np.unique(np.asarray(img))) <= {0, 1, 2, 3}


def test_curve_has_60_lines_and_the_log_grows(pipeline):
    root, out = pipeline
    assert out['curve'].count('/60 background score: 0.') == 60
    assert '59/60 background score: 0.590\tmIoU:' in out['curve']
    log = (root / 'evallog.txt').read_text()
    assert log.count('=' * 37 + '\n') == 3 and all(f'\t{c}\n' in log for c in ('seam cam', 'crf', 'walk'))
    assert 'aeroplane:' in out['png'] and '       mIoU:' in out['png']


def test_pair_counts_are_in_the_affinity_log(pipeline):
    assert 'cnt:' in pipeline[1]['aff']


def test_same_seed_gives_the_same_weights(pipeline, tmp_path):
    root, _ = pipeline
    done(run(root, 'train_SEAM', '--train_list', LIST, '--crop_size', 64,
             '--batch_size', 4, '--num_workers', 0, '--network', SEAM, '--resize_long', 64, 80, '--max_epoches', 1,
             '--weights', 'runs/pre.pth', '--session_name', tmp_path / 'again'))
    first, again = (torch.load(path, weights_only=True) for path in (root / 'runs/seam.pth', tmp_path / 'again.pth'))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_plain_cam_differs_from_the_refined_one(pipeline, tmp_path):
    root, _ = pipeline
    name = names_of(root)[0]
    (tmp_path / 'one.txt').write_text(name)
    done(run(root, 'infer_SEAM', '--network', SEAM, '--weights', 'runs/seam.pth', '--infer_list', tmp_path / 'one.txt',
             '--scales', 0.5, 1, '--map', 'cam', '--out_cam', tmp_path / 'cam', '--num_workers', 0))
    plain, refined = (np.load(folder / f'{name}.npy', allow_pickle=True).item()
                      for folder in (tmp_path / 'cam', root / 'out/cam'))
    assert list(plain) == list(refined)
    assert all(np.abs(plain[key] - refined[key]).max() > 1e-3 for key in plain)
