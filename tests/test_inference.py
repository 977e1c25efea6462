"""Inference that stops and goes on, skips, shards, and its switches."""
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infer_SEAM
import infer_aff
import tiny_aff
import tiny_SEAM
from conftest import ROOT
from helpers import AFF, LIST, SEAM, done, names_of, refused, run
from jobs import fail, write
from tool import crf, image_files, outputs, score_files, torchutils, training, visualization, workers
from tool.cli import BadInput, CannotWrite, exit_on_bad_input
from tool.on_error import Errors
from voc12.data import VOC12ClsDatasetMSF


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set, random networks, and undisturbed results: cam, crf_4.0, crf_24.0, pred, rw."""
    root = tmp_path_factory.mktemp('inference')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 10, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((tiny_SEAM, 'seam'), (tiny_aff, 'aff')):
        net = module.Net()
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}.pth'))
    done(cams(root, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred'))
    done(walk(root))
    return root


def cams(root, *more):
    return run(root, 'infer_SEAM', '--network', SEAM, '--weights', 'seam.pth', '--infer_list', LIST, '--scales', 1,
               '--num_workers', 0, *more)


def walk(root, *more):
    return run(root, 'infer_aff', '--network', AFF, '--weights', 'aff.pth', '--infer_list', LIST, '--cam_dir', 'cam',
               '--out_rw', 'rw', '--num_workers', 0, *more)


def contents(folder):
    """name -> bytes of the files in a folder, without the journal, which depends on the order of the work, and without
    what a killed process was writing."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != outputs.JOURNAL and not path.name.startswith('.')}


# ----- going on -----

def test_finished_files_are_left_alone_with_resume_and_made_anew_without(data, tmp_path):
    flags = '--out_cam', tmp_path / 'cam', '--out_crf', tmp_path / 'crf', '--out_cam_pred', tmp_path / 'pred'
    for folder in ('cam', 'crf_4.0', 'crf_24.0', 'pred'):
        shutil.copytree(data / folder, tmp_path / folder)
    names = names_of(data)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*/2*')}
    assert len(times) == 4 * len(names)
    assert f'{len(names)} of {len(names)} images are finished' in done(cams(data, *flags, '--resume'))
    assert times == {path: path.stat().st_mtime_ns for path in times}
    out = done(cams(data, *flags))
    assert 'images are finished' not in out and 'other settings' not in out
    assert all(times[path] < path.stat().st_mtime_ns for path in times)
    for folder in ('cam', 'crf_4.0', 'crf_24.0', 'pred'):
        assert contents(tmp_path / folder) == contents(data / folder)


def test_what_is_missing_or_cut_is_made_again_to_the_bit(data, tmp_path):
    names = names_of(data)
    before = {folder: contents(data / folder) for folder in ('cam', 'crf_4.0', 'pred', 'rw')}
    (data / 'cam' / f'{names[0]}.npy').unlink()
    crf = data / 'crf_4.0' / f'{names[1]}.npy'
    crf.write_bytes(crf.read_bytes()[:-1000])
    (data / 'pred' / f'{names[2]}.png').write_bytes(b'')
    (data / 'rw' / f'{names[3]}.png').write_bytes((data / 'rw' / f'{names[3]}.png').read_bytes()[:-6])
    out = done(cams(data, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred', '--resume'))
    assert f'{len(names) - 3} of {len(names)} images are finished' in out
    assert f'{len(names) - 1} of {len(names)} images are finished' in done(walk(data, '--resume'))
    assert before == {folder: contents(data / folder) for folder in before}


def test_resume_in_a_folder_of_other_settings_is_refused_and_named(data):
    before = contents(data / 'cam')
    refused(cams(data, '--out_cam', 'cam', '--scales', 0.5, '--resume'), 'cam (--out_cam)',
            'scales', '[1.0]', '[0.5]', '--resume')
    refused(walk(data, '--beta', 4, '--resume'), 'rw (--out_rw)', 'beta', '8', '4')
    assert contents(data / 'cam') == before


@pytest.mark.parametrize('missing', [outputs.SETTINGS, outputs.JOURNAL])
def test_resume_on_results_of_unknown_origin_is_refused(data, tmp_path, missing):
    shutil.copytree(data / 'cam', tmp_path / 'cam')
    (tmp_path / 'cam' / missing).unlink()
    before = contents(tmp_path / 'cam')
    refused(cams(data, '--out_cam', tmp_path / 'cam', '--resume'), '--out_cam', missing, '--resume')
    assert contents(tmp_path / 'cam') == before
    assert missing in done(cams(data, '--out_cam', tmp_path / 'cam'))
    assert '7 of 7 images are finished' in done(cams(data, '--out_cam', tmp_path / 'cam', '--resume'))


def test_resume_on_settings_that_cannot_be_read_is_refused(data, tmp_path):
    shutil.copytree(data / 'cam', tmp_path / 'cam')
    (tmp_path / 'cam' / outputs.SETTINGS).write_text('{')
    refused(cams(data, '--out_cam', tmp_path / 'cam', '--resume'), outputs.SETTINGS, '--resume')


def test_resume_with_another_backbone_is_refused(data, tmp_path):
    for folder in 'cam', 'rw':
        shutil.copytree(data / folder, tmp_path / folder)
        path = tmp_path / folder / outputs.SETTINGS
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, 'backbone': 'resnet18'}))
    for result in (cams(data, '--out_cam', tmp_path / 'cam', '--resume'),
                   walk(data, '--out_rw', tmp_path / 'rw', '--resume')):
        refused(result, 'backbone', 'resnet18')


def test_resume_compares_what_a_folder_holds_and_not_how_its_path_is_spelled(data, tmp_path):
    flags = '--out_rw', tmp_path / 'rw', '--ignore_crf', 'crf_4.0', 'crf_24.0'
    done(walk(data, *flags))
    everything = f'{len(names_of(data))} of {len(names_of(data))} images are finished'
    moved = tmp_path / 'moved'
    for folder in ('cam', 'crf_4.0', 'crf_24.0'):
        shutil.copytree(data / folder, moved / folder)
    shutil.copyfile(data / 'aff.pth', moved / 'aff.pth')
    for root in (f'./../{data.name}', str(moved)):
        assert everything in done(walk(data, '--resume', '--out_rw', tmp_path / 'rw' / '..' / 'rw/',
                                       '--cam_dir', f'{root}/cam/', '--weights', f'{root}/aff.pth',
                                       '--ignore_crf', f'{root}/crf_4.0/', f'{root}/crf_24.0'))
    refused(walk(data, '--resume', '--out_rw', tmp_path / 'rw', '--ignore_crf', 'crf_24.0', 'crf_4.0'),
            'ignore_crf', '4.0', '24.0')


def test_walk_notices_that_the_cams_are_others(data, tmp_path):
    flags = '--cam_dir', tmp_path / 'cam', '--out_rw', tmp_path / 'rw', '--resume'
    shutil.copytree(data / 'cam', tmp_path / 'cam')
    done(walk(data, *flags))
    done(cams(data, '--out_cam', tmp_path / 'cam', '--scales', 0.5))
    refused(walk(data, *flags), 'rw (--out_rw)', 'cam_dir scales', '[1.0]', '[0.5]')


def test_folder_of_another_program_is_told_from_others_by_a_file(tmp_path):
    for folder, content in (('a', b'one.'), ('b', b'two.'), ('empty', None)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'note.txt').write_text('no result')
        if content:
            (tmp_path / folder / 'x.npy').write_bytes(content)
    one, again, two, empty = (outputs.describe_folder(f'{tmp_path}/{folder}', 'cam_dir')
                              for folder in ('a', 'b/../a/', 'b', 'empty'))
    assert one == again != two and list(one) == ['cam_dir first file'] and empty == {}


def test_starting_anew_says_so_and_replaces_file_by_file(data, tmp_path):
    cam = tmp_path / 'cam'
    done(cams(data, '--out_cam', cam, '--scales', 0.5))
    (cam / 'other.npy').write_bytes(b'of another list.')
    out = done(cams(data, '--out_cam', cam))
    assert out.count('warning: ') == 1 and 'scales was [0.5], is [1.0]' in out
    ours = contents(cam)
    assert ours.pop('other.npy') and ours == contents(data / 'cam')
    done(cams(data, '--out_cam', cam, '--cam_format', 'npz'))
    assert [path.name for path in cam.glob('*.npy')] == ['other.npy'] and len(list(cam.glob('*.npz'))) == 7


def open_folder(path, scales=1, names='abc', resume=False):
    """A ResultFolder of these settings, opened for a run over `names`, and the names that are to do."""
    folder = outputs.ResultFolder(str(path), '--out_cam', '.npy', {'scales': scales})
    return folder, outputs.open_folders([folder], list(names), resume)


def todo(path, scales=1, names='abc'):
    return ''.join(open_folder(path, scales, names, resume=True)[1])


@pytest.mark.parametrize('kill_at', ['first file', 'settings', 'second rank'])
def test_killed_while_starting_anew_leaves_no_old_file_that_passes_for_a_new_one(tmp_path, monkeypatch, kill_at):
    write(open_folder(tmp_path, 1)[0], 'abc')
    assert todo(tmp_path, 1) == ''

    if kill_at == 'settings':       # the journal is empty, the settings are still the old ones
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(outputs, 'atomic_write', lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            open_folder(tmp_path, 2)
        assert todo(tmp_path, 1) == 'abc'
    elif kill_at == 'first file':
        folder, names = open_folder(tmp_path, 2)
        assert names == list('abc') and len(list(tmp_path.glob('*.npy'))) == 3      # the old ones can still be read
        write(folder, 'b')
        assert todo(tmp_path, 2) == 'ac'
    else:                           # has not begun when the first one is killed
        folder, _ = open_folder(tmp_path, 2, names='ac')
        write(folder, 'a')
        assert todo(tmp_path, 2) == 'bc'
        write(open_folder(tmp_path, 2, names='b')[0], 'b')      # it begins later, anew: what the first one made stays
        assert todo(tmp_path, 2) == 'c'


def test_a_run_anew_with_the_same_settings_forgets_its_images_and_no_others(tmp_path):
    """The settings are the same after an edit of the code, the results are not."""
    write(open_folder(tmp_path)[0], 'abc')
    folder, names = open_folder(tmp_path, names='ab')
    assert names == ['a', 'b']
    write(folder, 'a')
    assert todo(tmp_path) == 'b'


def test_file_without_its_line_in_the_journal_is_made_again(tmp_path):
    """Killed between the two. The other way round, the file is missing or of another size: a copy that was cut."""
    write(open_folder(tmp_path)[0], 'ab')
    (tmp_path / 'c.npy').write_bytes(b'whole.')
    (tmp_path / 'b.npy').write_bytes(b'who')
    assert todo(tmp_path) == 'bc'
    (tmp_path / 'a.npy').unlink()
    assert todo(tmp_path) == 'abc'


@pytest.mark.parametrize('cut', range(1, 10))
def test_torn_last_line_of_the_journal_counts_for_nothing(tmp_path, cut):
    write(open_folder(tmp_path, names=['n', 'n1', 'n12'])[0], ['n', 'n12'])
    (tmp_path / 'n1.npy').write_bytes(b'whole.')                 # of an earlier run
    journal = tmp_path / outputs.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    folder, names = open_folder(tmp_path, names=['n', 'n1', 'n12'], resume=True)
    assert names == (['n1'] if cut == 1 else ['n', 'n1', 'n12'] if cut > 7 else ['n1', 'n12'])
    write(folder, names)
    assert open_folder(tmp_path, names=['n', 'n1', 'n12'], resume=True)[1] == []


def test_journal_survives_a_copy_without_dates(tmp_path):
    write(open_folder(tmp_path / 'a')[0], 'ab')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b', copy_function=shutil.copyfile)
    for path in (tmp_path / 'b').iterdir():
        os.utime(path, (0, 0))
    assert todo(tmp_path / 'b') == 'c'


def test_processes_that_share_a_journal_lose_no_line(tmp_path):
    folder, _ = open_folder(tmp_path, names=())
    names = [f'n{number}' for number in range(100)]
    with workers.BoundedPool(2) as pool:
        for part in range(4):
            pool.submit(write, folder, names[part::4])
    assert folder.finished() == set(names)


def test_nothing_is_finished_where_the_file_could_not_be_written(tmp_path):
    folder, _ = open_folder(tmp_path)
    with pytest.raises(CannotWrite), folder.writing('a'):
        raise CannotWrite('full')
    assert not folder.finished()


def test_one_folder_for_two_outputs_is_refused(data, tmp_path):
    refused(cams(data, '--out_cam', tmp_path / 'x', '--out_cam_pred', f'{tmp_path}/./x/'), '--out_cam')
    refused(walk(data, '--out_rw', f'{data}/cam'), '--out_rw')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('script', ['infer_SEAM', 'infer_aff'])
def test_killed_run_goes_on_to_the_same_result(data, script, tmp_path):
    command = {'infer_SEAM': ['--network', SEAM, '--weights', 'seam.pth', '--scales', '1', '--out_cam'],
               'infer_aff': ['--network', AFF, '--weights', 'aff.pth', '--cam_dir', 'cam', '--out_rw']}[script]
    folder = tmp_path / 'out'
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, script + '.py'), '--infer_list', LIST,
                                '--num_workers', '1', *command, str(folder)], cwd=data,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob('*.*[gy]')):
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if script == 'infer_SEAM':
        done(cams(data, '--out_cam', folder, '--resume'))
    else:
        done(walk(data, '--out_rw', folder, '--resume'))
    assert contents(folder) == contents(data / {'infer_SEAM': 'cam', 'infer_aff': 'rw'}[script])


def test_full_disk_leaves_whole_files_alone(data, tmp_path, small_files):
    refused(cams(data, '--out_cam', tmp_path / 'cam'), '.npy')
    finished = contents(tmp_path / 'cam')
    assert finished.items() <= contents(data / 'cam').items() and len(finished) < len(names_of(data))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    done(cams(data, '--out_cam', tmp_path / 'cam', '--resume'))
    assert contents(tmp_path / 'cam') == contents(data / 'cam')


def test_folder_that_cannot_be_written(data):
    refused(cams(data, '--out_cam', '/sys/cam'), '/sys/cam', '--out_cam')
    refused(walk(data, '--out_rw', '/sys/rw'), '/sys/rw', '--out_rw')


# ----- bad images -----

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


# ----- ranks and worker processes -----

def test_ranks_share_the_list_and_end_with_the_same_files(data, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        done(cams(data, '--out_cam', tmp_path / 'cam'))
    assert contents(tmp_path / 'cam') == contents(data / 'cam')
    monkeypatch.delenv('WORLD_SIZE')
    assert '7 of 7 images are finished' in done(cams(data, '--out_cam', tmp_path / 'cam', '--resume'))


def test_crf_workers_write_the_same_bytes(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_workers', 1))
    for alpha in ('4.0', '24.0'):
        assert contents(tmp_path / f'crf_{alpha}') == contents(data / f'crf_{alpha}')


def test_crf_in_torch_gives_the_same_scores(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_backend', 'torch'))
    for name in names_of(data):
        for alpha in ('4.0', '24.0'):
            ours, theirs = (score_files.load_scores(str(folder / f'crf_{alpha}/{name}.npy'), '', 'crf')
                            for folder in (tmp_path, data))
            assert list(ours) == list(theirs) and max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 1e-3


def test_error_in_a_worker_is_raised_and_no_more_is_submitted():
    with pytest.raises(ZeroDivisionError):
        with workers.BoundedPool(1) as pool:
            for number in (1, 0, 1):
                pool.submit(divmod, 1, number)


def test_errors_of_jobs_are_kept_under_the_names_of_their_images():
    for count in 0, 1:
        errors = Errors('skip', 'less')
        with workers.BoundedPool(count, errors) as pool:
            pool.submit(fail, MemoryError(), name='a')
            pool.submit(fail, BadInput('b is bad'), name='b')
            pool.submit(abs, -1, name='c')
        assert errors.lines == ['out of memory at the image a; what helps: less', 'b is bad'] and pool.results == [1]


def test_killed_worker_is_one_line_even_with_skip():
    errors = Errors('skip', '')
    with pytest.raises(BadInput, match='--crf_workers'):
        with workers.BoundedPool(1, errors) as pool:
            for name in 'abcdef':
                with errors.caught(name):
                    pool.submit(os._exit, 1, name=name)
    assert not errors.lines


def test_pool_does_not_run_away():
    with workers.BoundedPool(1) as pool:
        start = time.time()
        for _ in range(6):
            pool.submit(time.sleep, .1)
            assert len(pool._waiting) <= 2
    assert time.time() - start > .5


# ----- other systems -----

OTHER_SYSTEM = """
import multiprocessing, os, resource, sys
multiprocessing.set_start_method('spawn')
for name in 'sched_getaffinity', 'fork', 'forkpty':
    delattr(os, name)
sys.modules['resource'] = None
"""


@pytest.mark.parametrize('script', ['infer_SEAM', 'infer_aff'])
def test_without_fork_affinity_and_utf_8(data, tmp_path, script):
    (tmp_path / 'sitecustomize.py').write_text(OTHER_SYSTEM)
    (tmp_path / 'list.txt').write_text(names_of(data)[0])
    flags = {'infer_SEAM': ['--network', SEAM, '--weights', 'seam.pth', '--scales', '1', '--out_crf', tmp_path / 'out'],
             'infer_aff': ['--network', AFF, '--weights', 'aff.pth', '--cam_dir', 'cam', '--out_rw', tmp_path / 'out',
                           '--crf']}[script]
    done(subprocess.run([sys.executable, os.path.join(ROOT, script + '.py'), '--infer_list', tmp_path / 'list.txt',
                         *flags, '--num_workers', '1' if script == 'infer_SEAM' else '0', '--crf_workers', '1'],
                        cwd=data, capture_output=True, text=True,
                        env=dict(os.environ, PYTHONIOENCODING='cp1252',
                                 PYTHONPATH=f'{tmp_path}{os.pathsep}{os.environ["PYTHONPATH"]}')))
    assert len(list(tmp_path.glob('out*/2*'))) == (2 if script == 'infer_SEAM' else 1)


def test_loader_processes_of_the_walk_can_be_spawned(data, tmp_path, pickled):
    done(walk(data, '--out_rw', tmp_path / 'rw'))
    assert pickled


WRAPPED = "from tool.cli import exit_on_bad_input\nwith exit_on_bad_input():\n    "


@pytest.mark.parametrize('code', ['print("x" * 10 ** 6)', 'print("x")', 'print("x"); raise SystemExit(3)'])
def test_output_that_nobody_reads_ends_quietly(code):
    process = subprocess.Popen([sys.executable, '-c', WRAPPED + 'import time; time.sleep(.5); ' + code], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 141


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
@pytest.mark.parametrize('code', ['print("x" * 10 ** 6)', 'print("x")', 'print("x"); raise SystemExit(3)'])
def test_output_on_a_full_disk_is_one_line(code):
    with open('/dev/full', 'w') as full:
        result = subprocess.run([sys.executable, '-c', WRAPPED + code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                                text=True)
    assert 'cannot write the output: No space left' in refused(result)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize('code, expected', [
    ('print("x", flush=True)', 129), ('print("x", end="")', 0), ('print("x", end=""); raise SystemExit(143)', 143)])
def test_output_to_a_closed_terminal_ends_quietly_with_the_exit_code_of_the_run(code, expected):
    ours, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, '-c', WRAPPED + 'input(); ' + code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=terminal, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONUNBUFFERED=''))
    os.close(terminal)
    os.close(ours)
    assert process.communicate(b'\n')[1] == b'' and process.returncode == expected


def test_damaged_disk_is_no_closed_terminal():
    result = subprocess.run([sys.executable, '-c', f'{WRAPPED}raise OSError(5, "Input/output error")'], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1 and 'Input/output error' in result.stderr


@pytest.mark.parametrize('error, words', [
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), '--num_workers'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'out of memory'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'), 'out of memory')])
def test_errors_of_the_machine_are_one_line(error, words, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_bad_input():
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == 2 and words in line and line.count('\n') == 1


def test_bug_in_a_loader_process_is_no_killed_process():
    error = 'RuntimeError("Caught RuntimeError in DataLoader worker process 0.")'
    result = subprocess.run([sys.executable, '-c', f'{WRAPPED}raise {error}'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and 'Traceback' in result.stderr


def test_console_that_lacks_a_character():
    result = subprocess.run([sys.executable, '-c', WRAPPED + 'print("gr\\u00fcn \\u65e5")'], cwd=ROOT,
                            env=dict(os.environ, PYTHONIOENCODING='ascii'), capture_output=True, text=True)
    assert done(result) == 'gr\\xfcn \\u65e5\n'


# ----- space, formats, pictures -----

def test_disk_that_will_not_do_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 2 ** 20}))
    folder = outputs.ResultFolder(str(tmp_path), '--out_cam', '.npy', {})
    check = outputs.SpaceCheck([folder], [str(number) for number in range(1000)])
    for number in range(12):
        (tmp_path / f'{number}.npy').write_bytes(bytes(2 ** 20))
        check.count_image()
    assert capsys.readouterr().out.count('the other 990 images will take about 1.0 GiB, and 0.0 GiB are free') == 1


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


# ----- maps -----

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    net = tiny_SEAM.Net()
    torchutils.calibrate_batch_norm(net, [torch.randn(4, 3, 64, 64)])
    return net.eval()


@pytest.mark.parametrize('plus', [False, True])
def test_closed_forms_of_grad_cam_equal_autograd(net, plus):
    x = torch.randn(1, 3, 64, 80)
    maps, our_scores = infer_SEAM.grad_cam(net, x, plus)
    features = net.forward_as_dict(x)['conv6'].detach().requires_grad_()
    scores = net.fc8(features).mean(dim=(2, 3))[0]
    assert torch.allclose(our_scores, scores)
    for k in range(3):
        g, = torch.autograd.grad(scores[k], features, retain_graph=True)            # (1, D, h, w)
        if plus:
            alpha = g ** 2 / (2 * g ** 2 + features.sum(dim=(2, 3), keepdim=True) * g ** 3)
            weight = (alpha * F.relu(g)).nan_to_num().sum(dim=(2, 3), keepdim=True)
        else:
            weight = g.sum(dim=(2, 3), keepdim=True)
        expected = F.relu((weight * features).sum(dim=1))
        assert torch.allclose(maps[:, k], expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_large_views_go_one_by_one_to_the_same_maps(net, monkeypatch):
    view = torch.randn(3, 64, 80)
    batches, cams = [], []
    hook = net.conv1a.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    for limit in view.numel(), view.numel() - 1:
        monkeypatch.setattr(infer_SEAM, 'LARGE_VIEW', limit)
        maps, _ = infer_SEAM.run_views(net, [view])
        cams.append(infer_SEAM.multi_scale_cam(maps, [view], [2, 5], (50, 60)))
    hook.remove()
    assert batches == [2, 1, 1] and np.abs(cams[0] - cams[1]).max() < 1e-5 * cams[0].max()


def test_pcm_in_blocks_equals_pcm_at_once(net, monkeypatch):
    x = torch.randn(2, 3, 64, 80)
    whole = net(x)[1].detach()
    from network import seam
    monkeypatch.setattr(seam, 'PCM_BYTES', 4 * 2 * 80 * 7)     # seven columns at a time
    with torch.no_grad():
        assert torch.allclose(net(x)[1], whole, rtol=1e-5, atol=1e-6)


def test_no_pcm_gives_the_plain_map_twice():
    with torch.no_grad():
        cam, cam_rv = tiny_SEAM.Net(pcm=False).eval()(torch.randn(1, 3, 32, 32))
    assert torch.equal(cam, cam_rv)


def test_flip_0_and_pcm_off_are_the_single_view_and_the_plain_cam(data, tmp_path):
    done(cams(data, '--out_cam', tmp_path / 'single', '--flip', 0))
    done(cams(data, '--out_cam', tmp_path / 'plain', '--map', 'cam'))
    done(cams(data, '--out_cam', tmp_path / 'off', '--pcm', 'off'))
    name = names_of(data)[0] + '.npy'
    assert (tmp_path / 'plain' / name).read_bytes() == (tmp_path / 'off' / name).read_bytes()
    single, plain, full = (np.load(folder / name, allow_pickle=True).item()
                           for folder in (tmp_path / 'single', tmp_path / 'plain', data / 'cam'))
    assert all(np.abs(single[key] - full[key]).max() > 1e-3 and np.abs(plain[key] - full[key]).max() > 1e-3
               for key in full)


# ----- images -----

def test_an_image_is_read_once_and_its_mirror_is_made_on_the_device(data, monkeypatch):
    """The views are not doubled in the loader, and the image for CRF and pictures is not decoded a second time."""
    monkeypatch.chdir(data)
    reads, read_image = [], image_files.read_image
    monkeypatch.setattr(image_files, 'read_image', lambda path, flag: reads.append(path) or read_image(path))
    dataset = VOC12ClsDatasetMSF(LIST, 'VOC2012', [0.5, 1], lambda img: np.asarray(img).transpose(2, 0, 1))
    name, img, views, label = dataset[0]
    assert name == names_of(data)[0] and len(reads) == 1
    w, h = Image.open(f'VOC2012/JPEGImages/{name}.jpg').size
    assert img.dtype == np.uint8 and img.shape == (h, w, 3) and img.flags.writeable
    assert [view.shape for view in views] == [(3, round(h / 2), round(w / 2)), (3, h, w)] and label.shape == (20,)
    assert (views[1].transpose(1, 2, 0) == img).all()


def test_mirrored_view_adds_the_mirrored_maps(net):
    view = torch.randn(3, 64, 80)
    both, one, other = (infer_SEAM.multi_scale_cam(infer_SEAM.run_views(net, [x], flip=flip)[0], [x], [2, 5], (64, 80))
                        for x, flip in ((view, True), (view, False), (view.flip(-1), False)))
    assert np.abs(both - (one + other[..., ::-1])).max() < 1e-5 * both.max()


# ----- the numbers of the CRF -----

def test_the_three_uses_of_the_crf_have_the_published_numbers():
    kernels = {'sxy_gauss': 3, 'compat_gauss': 3, 'sxy_bilateral': 80, 'srgb': 13, 'compat_bilateral': 10}
    assert crf.describe_crf(crf.CAM_CRF) == {'iterations': 10, **kernels}
    assert crf.describe_crf(crf.WALK_CRF) == {'iterations': 1, **kernels}
    assert crf.describe_crf(crf.SEGMENTATION_CRF) == {'iterations': 1, **kernels, 'sxy_bilateral': 32}
