"""Odd and bad input of every script: one test each."""
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import infer_aff
import infer_seg
import train_aff
from helpers import AFF, SEAM, done, names_of, refused, run
from script_runs import pipeline, set_list, train, voc
from tool.cli import BadInput


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
    assert '--resume' in result.stdout and torch.load(voc / 'run_last.pth', weights_only=True)['step'] > 0
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


def test_exchanged_crf_folders(tmp_path):
    la, ha = (str(tmp_path / name) for name in ('la', 'ha'))
    args = train_aff.get_args_parser().parse_args(['--la_crf_dir', la, '--ha_crf_dir', ha])
    for folder in la, ha:
        os.mkdir(folder)
    (tmp_path / 'la/settings.json').write_text('{"alpha": 24}')
    train_aff.check_args(args)              # the other folder is of the original code
    (tmp_path / 'ha/settings.json').write_text('{"alpha": 4}')
    with pytest.raises(BadInput, match='--la_crf_dir.*24.*--ha_crf_dir.*4'):
        train_aff.check_args(args)


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


@pytest.mark.parametrize('flags', [['--crf_workers', '-1'], ['--out_cam_pred_alpha', 'nan'], ['--vis_count', '-1']])
def test_flags_of_inference_out_of_range(voc, pipeline, flags):
    refused(infer(voc, pipeline, *flags), flags[0])


def test_negative_count_of_pictures_is_refused():
    for script, flags in ((infer_aff, ['--cam_dir', '.']), (infer_seg, ['--out_seg', 'x'])):
        args = script.get_args_parser().parse_args(['--weights', __file__, '--vis_count', '-1', *flags])
        with pytest.raises(BadInput, match='--vis_count'):
            script.check_args(args)


@pytest.mark.parametrize('args, word', [(['--type', 'npy'], '--t'), (['--curve', 'True'], '--type npy')])
def test_contradictory_flags_of_evaluation(voc, pipeline, args, word):
    set_list(voc, names_of(voc))
    refused(evaluate(voc, pipeline, *args), word)


def test_unknown_network(voc, pipeline):
    set_list(voc, names_of(voc)[:1])
    refused(infer(voc, pipeline, '--network', 'network.resnet99'), 'network.resnet99', '--network')
