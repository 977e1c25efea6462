"""Result folders of inference: stopping, going on, what counts as finished."""
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
from PIL import Image

import tiny_deeplab
from conftest import ROOT
from helpers import AFF, LIST, SEAM, done, names_of, refused, run
from inference_runs import cams, contents, data, walk
from jobs import write
from tool import outputs, workers
from tool.cli import CannotWrite


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


def test_what_is_missing_or_empty_is_made_again_to_the_bit(data, tmp_path):
    names = names_of(data)
    before = {folder: contents(data / folder) for folder in ('cam', 'crf_4.0', 'pred', 'rw')}
    (data / 'cam' / f'{names[0]}.npy').unlink()
    (data / 'crf_4.0' / f'{names[1]}.npy').unlink()
    (data / 'pred' / f'{names[2]}.png').write_bytes(b'')
    (data / 'rw' / f'{names[3]}.png').write_bytes(b'')
    out = done(cams(data, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred', '--resume'))
    assert f'{len(names) - 3} of {len(names)} images are finished' in out
    assert f'{len(names) - 1} of {len(names)} images are finished' in done(walk(data, '--resume'))
    assert before == {folder: contents(data / folder) for folder in before}


def test_resume_keeps_a_label_map_that_was_corrected_by_hand(data, tmp_path):
    shutil.copytree(data / 'rw', tmp_path / 'rw')
    corrected, missing = (tmp_path / 'rw' / f'{name}.png' for name in names_of(data)[:2])
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 21).save(corrected)
    missing.unlink()
    before = contents(tmp_path / 'rw')
    refused(walk(data, '--out_rw', tmp_path / 'rw', '--resume'), corrected, '--out_rw', '--resume')
    assert contents(tmp_path / 'rw') == before
    corrected.rename(tmp_path / 'mine.png')
    done(walk(data, '--out_rw', tmp_path / 'rw', '--resume'))
    assert contents(tmp_path / 'rw') == contents(data / 'rw')


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


def test_folder_that_a_second_run_has_replaced_in_part_is_warned_of(data, tmp_path):
    names, cam = names_of(data), tmp_path / 'cam'
    shutil.copytree(data / 'cam', cam)
    (tmp_path / 'half.txt').write_text('\n'.join(names[:3]))
    done(cams(data, '--out_cam', cam, '--scales', 0.5, '--infer_list', tmp_path / 'half.txt'))
    scores = ('evaluation', '--list', LIST, '--gt_dir', 'VOC2012/SegmentationClass', '--type', 'npy', '--t', 0.2,
              '--comment', 'x', '--logfile', tmp_path / 'log', '--num_workers', 0, '--predict_dir')
    for out in (done(walk(data, '--cam_dir', cam, '--out_rw', tmp_path / 'rw')), done(run(data, *scores, cam))):
        assert out.count(f'{len(names) - 3} of {len(names)} files in {cam}') == 1 and names[3] in out
    for name in names[3:]:                                          # by hand; half of the list was always whole
        (cam / f'{name}.npy').unlink()
    done(cams(data, '--out_cam', cam, '--scales', 0.5, '--resume'))
    np.save(cam / f'{names[0]}.npy', {})
    assert outputs.JOURNAL not in done(run(data, *scores, cam))
    (cam / outputs.JOURNAL).unlink()
    assert outputs.JOURNAL not in done(run(data, *scores, cam))


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
    """Opens a ResultFolder with these settings for a run over `names`. Returns it and the unfinished names."""
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
    """The run was killed between writing the file and its line; or the file is missing, or empty after a crash."""
    write(open_folder(tmp_path)[0], 'ab')
    (tmp_path / 'c.npy').write_bytes(b'whole.')
    (tmp_path / 'b.npy').write_bytes(b'')
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
    assert names == (['n1', 'n12'] if cut < 7 else ['n', 'n1', 'n12'])
    write(folder, names)
    assert open_folder(tmp_path, names=['n', 'n1', 'n12'], resume=True)[1] == []


def test_incomplete_size_in_the_journal_is_no_sign_of_a_changed_file(tmp_path):
    folder, _ = open_folder(tmp_path)
    with folder.writing('a') as path, open(path, 'wb') as file:
        file.write(b'whole.' * 2)
    journal = tmp_path / outputs.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-2])              # 1 in place of 12 bytes
    assert todo(tmp_path) == todo(tmp_path) == 'abc'            # the second time, later lines follow it


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


def segments(root, *more):
    torch.save(tiny_deeplab.Net().state_dict(), root / 'seg.pth')
    return run(root, 'infer_seg', '--network', 'tiny_deeplab', '--weights', 'seg.pth', '--num_workers', 0, *more)


def test_results_in_the_folder_of_the_inputs_are_refused(data, tmp_path):
    """Label maps, pictures and tables could replace photographs, ground truth and a list of tags of the same names."""
    photos, truth, linked = tmp_path / 'photos', 'VOC2012/SegmentationClass', tmp_path / 'linked'
    photos.mkdir()
    linked.mkdir()
    Image.new('RGB', (48, 48)).save(photos / 'a.png')
    (linked / 'a.png').symlink_to(photos / 'a.png')
    before, before_truth = contents(photos), contents(data / truth)
    for flags in (('--images', photos), ('--images', photos / 'a.png'), ('--images', linked)):
        refused(segments(data, *flags, '--out_seg', photos), '--out_seg', photos)
    refused(segments(data, '--images', photos, '--out_seg', tmp_path / 'seg', '--vis_dir', photos), '--vis_dir', photos)
    refused(segments(data, '--infer_list', LIST, '--out_seg', truth), '--out_seg', truth)
    refused(walk(data, '--out_rw', truth), '--out_rw', truth)
    refused(walk(data, '--out_rw', tmp_path / 'rw', '--vis_dir', 'VOC2012/JPEGImages/'), '--vis_dir')
    predicted = '--images', photos, '--tag_threshold', .5, '--out_tags'
    tags = 'infer_SEAM', '--network', SEAM, '--weights', 'seam.pth', '--num_workers', 0, *predicted
    refused(run(data, *tags, photos), '--out_tags', photos)
    refused(run(data, *tags, tmp_path / 'tags', '--vis_dir', photos), '--vis_dir', photos)
    assert contents(photos) == before and contents(data / truth) == before_truth
    assert sorted(path.name for path in tmp_path.iterdir()) == ['linked', 'photos']


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
