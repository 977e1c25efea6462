"""The scripts through the command line: the whole pipeline on a tiny toy set, and one test per bad input."""
import importlib.util
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import AFF, LIST, SEAM, done, names_of, refused, run, shell


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    """A folder in which every stage has run, each on the output of the one before; stdout by stage."""
    root = tmp_path_factory.mktemp('pipeline')
    out = {}
    out['toy'] = done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 12, '--size', 64, 72,
                          '--classes', 3))
    lists = LIST
    small = ['--train_list', lists, '--crop_size', 64, '--batch_size', 4, '--num_workers', 0]
    seam = [*small, '--network', SEAM, '--resize_long', 64, 80]
    out['pretrain'] = done(run(root, 'train_SEAM', *seam, '--max_epochs', 1, '--classifier_only',
                               '--train_bn', '--session_name', 'runs/pre'))
    out['seam'] = done(shell(root, 'train_SEAM', *seam, '--max_epoches', 1, '--weights', 'runs/pre.pth',
                             '--session_name', 'runs/seam', '--val_list', 'unused.txt'))
    out['infer'] = done(run(root, 'infer_SEAM', '--network', SEAM, '--weights', 'runs/seam.pth',
                            '--infer_list', lists, '--scales', 0.5, 1, '--out_cam', 'out/cam', '--out_crf', 'out/crf',
                            '--out_cam_pred', 'out/cam_pred', '--num_workers', 1))
    out['curve'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/cam', '--comment', 'seam cam',
                            '--type', 'npy', '--curve', 'True'))
    out['crf'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/crf_4.0', '--comment', 'crf',
                          '--type', 'crf'))
    out['aff'] = done(run(root, 'train_aff', *small, '--network', AFF, '--weights', 'runs/pre_backbone.pth',
                          '--la_crf_dir', 'out/crf_4.0', '--ha_crf_dir', 'out/crf_24.0', '--max_epochs', 1,
                          '--session_name', 'runs/aff'))
    out['walk'] = done(run(root, 'infer_aff', '--network', AFF, '--weights', 'runs/aff.pth', '--infer_list', lists,
                           '--cam_dir', 'out/cam', '--out_rw', 'out/rw', '--num_workers', 0))
    out['png'] = done(run(root, 'evaluation', '--list', lists, '--predict_dir', 'out/rw', '--comment', 'walk',
                          '--type', 'png', '--curve', 'False'))
    return root, out


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


# ----- other classes than VOC's -----

@pytest.mark.parametrize('count', [3, 80])
def test_every_stage_runs_with_other_classes(tmp_path, count):
    names = tmp_path / 'names.txt'
    names.write_bytes(b'\xef\xbb\xbf' + ''.join(f'traffic light {i}\r\n' for i in range(count)).encode())
    classes = '--class_names', names, '--num_workers', 0
    lists = LIST
    done(run(tmp_path, 'voc12/make_toy', '--out', 'VOC2012', '--count', 12, '--size', 64, 64, '--class_names', names))
    train = ('--train_list', lists, '--batch_size', 4, '--max_epochs', 1, *classes)
    done(run(tmp_path, 'train_SEAM', *train, '--network', SEAM, '--crop_size', 48, '--resize_long', 48, 64,
             '--session_name', 'seam'))
    assert torch.load(tmp_path / 'seam.pth', weights_only=True)['fc8.weight'].shape[0] == 1 + count
    done(run(tmp_path, 'infer_SEAM', '--network', SEAM, '--weights', 'seam.pth', '--infer_list', lists, '--scales', 1,
             '--out_cam', 'cam', '--out_crf', 'crf', *classes))
    done(run(tmp_path, 'train_aff', *train, '--network', AFF, '--crop_size', 48, '--la_crf_dir', 'crf_4.0',
             '--ha_crf_dir', 'crf_24.0', '--session_name', 'aff'))
    done(run(tmp_path, 'infer_aff', '--network', AFF, '--weights', 'aff.pth', '--infer_list', lists, '--cam_dir', 'cam',
             '--crf', *classes))
    for folder, kind in (('cam', ('npy', '--curve')), ('crf_4.0', ('crf',)), ('out_rw', ('png',))):
        out = done(run(tmp_path, 'evaluation', '--list', lists, '--predict_dir', folder, '--comment', folder,
                       '--type', *kind, *classes))
        if folder != 'cam':
            assert out.count('traffic light') == count
            rows = (tmp_path / f'{folder}_confusion.csv').read_text().splitlines()
            assert len(rows) == count + 3 and all(row.count(',') == count + 2 for row in rows)


def test_weights_of_other_classes_need_reset_head(pipeline, tmp_path):
    root, _ = pipeline
    (tmp_path / 'names.txt').write_text('aeroplane\nbicycle\nbird\n')
    flags = ('--train_list', LIST, '--crop_size', 48, '--resize_long', 48, 64,
             '--batch_size', 8, '--num_workers', 0, '--max_epochs', 1, '--network', SEAM, '--weights', 'runs/seam.pth',
             '--class_names', tmp_path / 'names.txt', '--session_name', tmp_path / 'new')
    refused(run(root, 'train_SEAM', *flags), 'runs/seam.pth', '21 outputs', '3 classes (--class_names)', '--reset_head')
    assert 'randomly initialised: fc8.weight' in done(run(root, 'train_SEAM', *flags, '--reset_head'))
    old, new = (torch.load(path, weights_only=True) for path in (root / 'runs/seam.pth', tmp_path / 'new.pth'))
    assert new['fc8.weight'].shape[0] == 4 and torch.equal(new['bn7.weight'], old['bn7.weight'])


@pytest.mark.parametrize('text, words', [
    ('cat\ndog\ncat\n', ('cat twice',)), ('\n \n', ('0 classes',)), ('background\ncat', ('background',)),
    ('\n'.join(map(str, range(255))), ('255 classes', '254'))])
def test_names_file_that_cannot_be(voc, text, words):
    set_list(voc, names_of(voc))
    (voc / 'names.txt').write_text(text)
    refused(train(voc, '--class_names', 'names.txt'), 'names.txt', '--class_names', *words)


def test_class_that_no_image_has_is_named(voc):
    set_list(voc, names_of(voc))
    (voc / 'names.txt').write_text('aeroplane\nbicycle\nbird\nunicorn\n')
    out = done(train(voc, '--class_names', 'names.txt', '--lr', 0, '--batch_size', 8))
    line, = [line for line in out.splitlines() if 'unicorn' in line]
    assert 'warning' in line and '--class_names' in line and 'bird' not in line
    assert out.index('unicorn') < out.index('Iter:')


def test_names_file_that_is_no_text(voc):
    set_list(voc, names_of(voc))
    refused(train(voc, '--class_names', voc / 'VOC2012/JPEGImages' / (names_of(voc)[0] + '.jpg')), '--class_names')


def test_crf_files_of_more_classes_than_named(voc, pipeline):
    (voc / 'names.txt').write_text('aeroplane\n')
    set_list(voc, names_of(voc))
    result = run(voc, 'train_aff', '--network', AFF, '--train_list', 'list.txt', '--crop_size', 64, '--batch_size', 4,
                 '--num_workers', 0, '--la_crf_dir', pipeline[0] / 'out/crf_4.0', '--class_names', 'names.txt',
                 '--ha_crf_dir', pipeline[0] / 'out/crf_24.0', '--weights', pipeline[0] / 'runs/pre_backbone.pth')
    refused(result, '.npy', '--la_crf_dir', '1 classes of --class_names')


# ----- odd and bad input -----

@pytest.fixture
def voc(pipeline, tmp_path):
    """A copy of the toy set that a test may damage, with the flags of a short training run."""
    shutil.copytree(pipeline[0] / 'VOC2012', tmp_path / 'VOC2012')
    return tmp_path


def set_list(voc, names):
    (voc / 'list.txt').write_text('\n'.join(names))


def train(voc, *args):
    return run(voc, 'train_SEAM', '--network', SEAM, '--train_list', 'list.txt', '--crop_size', 32, '--batch_size', 1,
               '--num_workers', 0, '--resize_long', 32, 40, '--max_epochs', 1, '--classifier_only',
               '--session_name', 'run', *args)


def infer(voc, pipeline, *args):
    return run(voc, 'infer_SEAM', '--network', SEAM, '--weights', pipeline[0] / 'runs/seam.pth',
               '--infer_list', 'list.txt', '--scales', 0.5, '--out_cam', 'cam', '--num_workers', 1, *args)


def walk(voc, pipeline, *args, cam_dir=None):
    return run(voc, 'infer_aff', '--network', AFF, '--weights', pipeline[0] / 'runs/aff.pth',
               '--infer_list', 'list.txt', '--cam_dir', cam_dir or pipeline[0] / 'out/cam', '--num_workers', 0, *args)


def image(voc, name):
    return voc / f'VOC2012/JPEGImages/{name}.jpg'


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_missing_image(voc, pipeline):
    names = names_of(voc)
    set_list(voc, names)
    image(voc, names[2]).unlink()
    refused(infer(voc, pipeline), f'JPEGImages/{names[2]}.jpg', 'list.txt', '--voc12_root')
    assert not (voc / 'cam').exists()       # found before the first image


def test_list_with_an_unknown_name(voc):
    set_list(voc, names_of(voc) + ['2099_000001'])
    refused(train(voc), '2099_000001.jpg', 'list.txt')


def test_empty_list(voc):
    set_list(voc, ['', ' '])
    refused(train(voc), 'list.txt', '--train_list')


def test_missing_list_of_the_repository_names_the_command_that_makes_it(voc):
    refused(run(voc, 'infer_SEAM', '--weights', __file__, '--out_cam', 'cam'), 'voc12/train.txt', 'make_lists.py')


def test_truncated_image_keeps_what_is_finished(voc, pipeline):
    names = names_of(voc)[:3]
    set_list(voc, names)
    truncate(image(voc, names[2]))
    refused(infer(voc, pipeline), image(voc, names[2]).name, '--voc12_root')
    assert (voc / f'cam/{names[0]}.npy').is_file() and not (voc / f'cam/{names[2]}.npy').exists()


def test_truncated_image_in_the_middle_of_training_keeps_what_was_learned(voc):
    names = names_of(voc)
    set_list(voc, names)
    truncate(image(voc, names[0]))
    result = train(voc, '--num_workers', 1, '--max_epochs', 50, '--weights', make_start(voc))
    refused(result, image(voc, names[0]).name)
    assert '--resume goes on' in result.stdout and torch.load(voc / 'run_last.pth', weights_only=True)['step'] > 0
    assert not (voc / 'run.pth').exists()


def test_missing_weights_file_leaves_the_last_log(voc):
    set_list(voc, names_of(voc))
    (voc / 'run.log').write_text('the last run')
    refused(train(voc, '--weights', 'start.pth'), 'start.pth', '--weights')
    assert (voc / 'run.log').read_text() == 'the last run'


def make_start(voc):
    from tiny_SEAM import Net
    torch.save(Net().state_dict(), voc / 'random.pth')
    return voc / 'random.pth'


def test_label_file_without_a_listed_name(voc):
    names = names_of(voc)
    set_list(voc, names)
    np.save(voc / 'labels.npy', {name: np.eye(20, dtype=np.float32)[0] for name in names[1:]})
    refused(train(voc, '--cls_labels', 'labels.npy'), names[0], 'labels.npy', '--cls_labels')


def test_seam_weights_in_the_affinity_network(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    refused(walk(voc, pipeline, '--weights', pipeline[0] / 'runs/seam.pth'),
            'seam.pth', '--weights', 'missing: f8_5.weight')


def test_affinity_weights_in_seam(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    refused(infer(voc, pipeline, '--weights', pipeline[0] / 'runs/aff.pth'),
            'aff.pth', '--weights', 'missing: fc8.weight')


def test_grey_rgba_and_cmyk_files_are_converted(voc, pipeline):
    names = names_of(voc)[:3]
    set_list(voc, names)
    for name, mode, kind in zip(names, ('L', 'RGBA', 'CMYK'), ('JPEG', 'PNG', 'JPEG')):
        img = Image.open(image(voc, name)).convert(mode)
        img.save(image(voc, name), format=kind)
    done(infer(voc, pipeline, '--out_crf', 'crf'))
    done(train(voc, '--lr', 1e-4))        # random weights
    done(walk(voc, pipeline, '--crf'))
    assert all((voc / f'{folder}/{name}{end}').is_file() for name in names
               for folder, end in (('cam', '.npy'), ('crf_4.0', '.npy'), ('out_rw', '.png')))


def test_image_of_32_px_goes_through_the_affinity_network(voc, pipeline):
    name = names_of(voc)[0]
    set_list(voc, [name])
    Image.open(image(voc, name)).resize((70, 20)).save(image(voc, name))
    done(infer(voc, pipeline, '--scales', 1))
    done(walk(voc, pipeline, cam_dir='cam'))
    assert Image.open(voc / f'out_rw/{name}.png').size == (70, 20)


def test_cams_of_another_size_than_the_image(voc, pipeline):
    name = names_of(voc)[0]
    set_list(voc, [name])
    Image.open(image(voc, name)).resize((80, 90)).save(image(voc, name))
    refused(walk(voc, pipeline), f'{name}.npy', '--cam_dir', '90x80')


def test_missing_cam(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    (voc / 'cam').mkdir()
    refused(walk(voc, pipeline, cam_dir='cam'), names_of(voc)[0] + '.npy', '--cam_dir')


def test_crf_files_of_different_labels(voc, pipeline):
    names = names_of(voc)[:1]
    set_list(voc, names)
    half = np.full(Image.open(image(voc, names[0])).size[::-1], .5, np.float32)
    for folder, keys in (('la', (0, 1)), ('ha', (0, 2))):
        (voc / folder).mkdir()
        np.save(voc / folder / f'{names[0]}.npy', dict.fromkeys(keys, half))
    result = run(voc, 'train_aff', '--network', AFF, '--train_list', 'list.txt', '--crop_size', 64, '--batch_size', 1,
                 '--num_workers', 0, '--la_crf_dir', 'la', '--ha_crf_dir', 'ha',
                 '--weights', pipeline[0] / 'runs/pre_backbone.pth')
    refused(result, names[0], '--la_crf_dir', '--ha_crf_dir')


def evaluate(voc, pipeline, *args):
    return run(voc, 'evaluation', '--list', 'list.txt', '--predict_dir', pipeline[0] / 'out/rw', '--comment', 'x',
               *args)


def test_prediction_and_ground_truth_of_different_size(voc, pipeline):
    name = names_of(voc)[0]
    set_list(voc, [name])
    path = voc / f'VOC2012/SegmentationClass/{name}.png'
    Image.open(path).resize((30, 40)).save(path)
    refused(evaluate(voc, pipeline), f'{name}.png', '--predict_dir', '--gt_dir', '40x30')


@pytest.mark.parametrize('missing, flag', [('VOC2012/SegmentationClass', '--gt_dir'), ('rw', '--predict_dir')])
def test_missing_prediction_or_ground_truth(voc, pipeline, missing, flag):
    names = names_of(voc)
    set_list(voc, names)
    shutil.copytree(pipeline[0] / 'out/rw', voc / 'rw')
    (voc / missing / f'{names[3]}.png').unlink()
    refused(evaluate(voc, pipeline, '--predict_dir', 'rw'), f'{names[3]}.png', flag)
    assert not (voc / 'evallog.txt').exists()


def test_ground_truth_without_255_or_objects_is_warned_of(voc, pipeline):
    names = names_of(voc)
    set_list(voc, names)
    for name in names:
        path = voc / f'VOC2012/SegmentationClass/{name}.png'
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    out = done(evaluate(voc, pipeline))
    assert 'warning' in out and '255' in out and 'no file' in out and 'an object' in out


def test_good_ground_truth_gets_no_warning(pipeline):
    assert 'warning' not in pipeline[1]['png']


@pytest.mark.parametrize('kind', [['--type', 'npy', '--t', '0.2'], ['--type', 'crf']])
def test_dict_without_classes_is_background_in_evaluation(voc, pipeline, kind):
    name = names_of(voc)[0]
    set_list(voc, [name])
    (voc / 'cam').mkdir()
    np.save(voc / f'cam/{name}.npy', {})
    gt = np.asarray(Image.open(voc / f'VOC2012/SegmentationClass/{name}.png'))
    iou = (gt == 0).sum() / (gt != 255).sum() * 100
    assert f' background:{iou:7.3f}%' in done(evaluate(voc, pipeline, '--predict_dir', 'cam', *kind))


def test_crf_folder_in_place_of_cams(voc, pipeline):
    set_list(voc, names_of(voc))
    refused(walk(voc, pipeline, cam_dir=pipeline[0] / 'out/crf_4.0'),
            '--cam_dir', 'CRF', 'CAM')


def test_network_of_the_other_stage(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    refused(infer(voc, pipeline, '--network', AFF), AFF, '--network', 'SEAM')


@pytest.mark.parametrize('flags', [['--batch_size', '0'], ['--resize_long', '40', '32'], ['--crop_size', '4'],
                                   ['--num_workers', '-1'], ['--device', 'tpu'],
                                   ['--device', 'cuda:01'], ['--momentum', '-1'],
                                   ['--momentum', 'nan'], ['--session_name', 'runs/']])
def test_flags_out_of_range(voc, flags):
    set_list(voc, names_of(voc))
    refused(train(voc, *flags), flags[0])


@pytest.mark.parametrize('flags', [['--crf_workers', '-1'], ['--out_cam_pred_alpha', 'nan']])
def test_flags_of_inference_out_of_range(voc, pipeline, flags):
    refused(infer(voc, pipeline, *flags), flags[0])


@pytest.mark.parametrize('args, word', [(['--type', 'npy'], '--t'), (['--curve', 'True'], '--type npy')])
def test_contradictory_flags_of_evaluation(voc, pipeline, args, word):
    set_list(voc, names_of(voc))
    refused(evaluate(voc, pipeline, *args), word)


def test_unknown_network(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    refused(infer(voc, pipeline, '--network', 'network.resnet99'), 'network.resnet99', '--network')
