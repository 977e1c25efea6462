"""Inference on images that cannot be read, and where memory runs out."""
import contextlib
import os
import shutil

import numpy as np
import pytest
import torch

import infer_aff
import tiny_aff
from helpers import AFF, LIST, names_of, refused, run
from inference_runs import cams, data, walk
from tool import score_files, workers
from tool.cli import BadInput, CannotWrite
from tool.on_error import Errors
from tool.outputs import ResultFolder


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_image_is_skipped_listed_and_told_by_the_exit_code(data, tmp_path, workers):
    os.symlink(data / 'VOC2012' / 'Annotations', tmp_path / 'Annotations')
    (tmp_path / 'JPEGImages').mkdir()
    names = names_of(data)
    for name in names:
        (tmp_path / f'JPEGImages/{name}.jpg').write_bytes((data / f'VOC2012/JPEGImages/{name}.jpg').read_bytes())
    (tmp_path / f'JPEGImages/{names[2]}.jpg').write_bytes(b'no image')
    flags = '--voc12_root', tmp_path, '--out_cam', tmp_path / 'cam', '--num_workers', workers
    refused(cams(data, *flags), f'{names[2]}.jpg')
    result = cams(data, *flags, '--on_error', 'skip')
    assert result.returncode == 3 and f'skipped: cannot read the image {tmp_path}' in result.stdout
    assert sorted(path.stem for path in (tmp_path / 'cam').glob('*.npy')) == sorted(set(names) - {names[2]})
    result = walk(data, '--cam_dir', tmp_path / 'cam', '--out_rw', tmp_path / 'rw', '--voc12_root', tmp_path)
    refused(result, f'{names[2]}.npy', '--cam_dir')
    result = walk(data, '--cam_dir', tmp_path / 'cam', '--out_rw', tmp_path / 'rw', '--voc12_root', tmp_path,
                  '--on_error', 'skip')
    assert result.returncode == 3 and len(list((tmp_path / 'rw').glob('*.png'))) == len(names) - 1


@pytest.mark.parametrize('flags', [['--alpha', 'inf'], ['--alpha', -1], ['--crf', '--crf_workers', -1]])
def test_flags_of_the_walk_out_of_range(data, tmp_path, flags):
    refused(walk(data, '--out_rw', tmp_path / 'rw', *flags), flags[-2])


def test_walk_of_nan_is_no_background(data, tmp_path, monkeypatch):
    weights = torch.load(data / 'aff.pth', weights_only=True)
    weights['f9.weight'][0] = float('nan')
    net = tiny_aff.Net().eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        scores = infer_aff.walk_image(net, torch.zeros(3, 64, 64), {0: np.ones((60, 62), np.float32)}, 6, 8, 2)
    assert np.isnan(scores).any()
    monkeypatch.setattr(infer_aff, 'walk_image', lambda *_: scores)
    monkeypatch.chdir(data)
    with pytest.raises(BadInput, match=f'walk of {names_of(data)[0]} .* NaN .*--weights aff.pth'):
        infer_aff.main(infer_aff.get_args_parser().parse_args(
            ['--network', AFF, '--weights', 'aff.pth', '--infer_list', LIST, '--cam_dir', 'cam', '--num_workers', '0',
             '--out_rw', str(tmp_path / 'rw')]))
    assert not list(tmp_path.glob('rw/*.png'))


@pytest.mark.parametrize('error', [
    MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_image_and_the_flags_that_help(error):
    words = 'out of memory at the image n1; what helps: smaller --scales'
    with pytest.raises(BadInput, match=words), Errors('stop', 'smaller --scales').caught('n1'):
        raise error
    errors = Errors('skip', 'smaller --scales')
    with errors.caught('n1'):
        raise error
    assert errors.lines == [words]


@pytest.mark.parametrize('at', ['Module.to', 'load'])
def test_out_of_memory_before_the_first_image_is_one_line(data, tmp_path, monkeypatch, at):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')
    if at == 'load':
        monkeypatch.setattr(torch, 'load', run_out)
    else:
        monkeypatch.setattr(torch.nn.Module, 'to', run_out)
    refused(cams(data, '--out_cam', tmp_path / 'cam'), 'out of memory', '--device cpu', '--scales', '--resume')
    refused(walk(data, '--out_rw', tmp_path / 'rw'), 'out of memory', '--device cpu', '--amp bf16', '--resume')


def test_missing_scores_are_found_before_the_work_starts(data, tmp_path):
    for folder in ('cam', 'crf_4.0'):
        shutil.copytree(data / folder, tmp_path / folder)
        (tmp_path / folder / f'{names_of(data)[-1]}.npy').unlink()
    flags = '--infer_list', LIST, '--num_workers', 0, '--cam_dir', tmp_path / 'cam', '--out_crf', tmp_path / 'new'
    refused(run(data, 'infer_SEAM', *flags), f'{names_of(data)[-1]}.npy', '--cam_dir')
    refused(walk(data, '--out_rw', tmp_path / 'new_rw', '--ignore_crf', tmp_path / 'crf_4.0', 'crf_24.0'),
            f'{names_of(data)[-1]}.npy', '--ignore_crf')
    assert not list(tmp_path.glob('new*'))
    assert run(data, 'infer_SEAM', *flags, '--on_error', 'skip').returncode == 3


@pytest.mark.parametrize('resume', [False, True])
def test_result_of_an_earlier_run_does_not_stay_for_a_skipped_image(tmp_path, resume):
    folder = ResultFolder(str(tmp_path), '--out_cam', '.npy', {})
    folder.open(['n1', 'n2'], resume=False)
    for name in ('n1', 'n2'):
        with folder.writing(name) as path:
            np.save(path, 1)
    folder.open(['n1', 'n2'], resume)
    errors = Errors('skip', '', [folder])
    with errors.caught('n1'):
        raise BadInput('n1 is damaged')
    removed = set() if resume else {'n1'}           # with --resume it was finished, with these settings
    assert {path.stem for path in tmp_path.glob('*.npy')} == {'n1', 'n2'} - removed
    assert (folder.file('n1') in errors.lines[0]) == (not resume)


def test_run_goes_on_past_the_image_for_which_memory_runs_out(data, tmp_path, monkeypatch):
    name, save_scores = names_of(data)[1], score_files.save_scores

    def run_out(path, *more):
        if name in path:
            raise torch.OutOfMemoryError('CUDA out of memory')
        save_scores(path, *more)
    monkeypatch.setattr(score_files, 'save_scores', run_out)
    result = cams(data, '--out_cam', tmp_path / 'cam', '--on_error', 'skip')
    assert result.returncode == 3 and f'out of memory at the image {name}' in result.stdout
    assert len(list((tmp_path / 'cam').glob('*.npy'))) == len(names_of(data)) - 1


@pytest.mark.parametrize('error, kept', [(BadInput('bad'), True), (CannotWrite('full'), False),
                                         (KeyError('bug'), False)])
def test_skip_keeps_bad_images_and_stops_for_a_full_disk_and_for_bugs(error, kept):
    errors = Errors('skip', '')
    with contextlib.nullcontext() if kept else pytest.raises(type(error)):
        with errors.caught('x'):
            raise error
    assert errors.lines == (['bad'] if kept else [])
