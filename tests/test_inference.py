"""Inference that stops and goes on, skips, shards, and its switches."""
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
from conftest import ROOT
from network import slim_SEAM, slim_aff
from test_scripts import AFF, SEAM, done, refused, run
from tool import crf, outputs, torchutils, training, workers
from tool.cli import BadInput
from tool.score_files import load_scores, strongest_label

LIST = 'VOC2012/ImageSets/Segmentation/train.txt'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set, random networks, and undisturbed results: cam, crf_4.0, crf_24.0, pred, rw."""
    root = tmp_path_factory.mktemp('inference')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 10, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((slim_SEAM, 'seam'), (slim_aff, 'aff')):
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


def names_of(root):
    return (root / LIST).read_text().split()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----- going on -----

def test_finished_files_are_left_alone(data):
    times = {path: path.stat().st_mtime_ns for path in data.glob('c*/*.np?')}
    result = cams(data, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred')
    assert f'{len(names_of(data))} of {len(names_of(data))} images are finished' in done(result)
    assert len(times) == 3 * len(names_of(data)) and times == {path: path.stat().st_mtime_ns for path in times}


def test_what_is_missing_or_cut_is_made_again_to_the_bit(data, tmp_path):
    names = names_of(data)
    before = {folder: contents(data / folder) for folder in ('cam', 'crf_4.0', 'pred', 'rw')}
    (data / 'cam' / f'{names[0]}.npy').unlink()
    crf = data / 'crf_4.0' / f'{names[1]}.npy'
    crf.write_bytes(crf.read_bytes()[:-1000])
    (data / 'pred' / f'{names[2]}.png').write_bytes(b'')
    (data / 'rw' / f'{names[3]}.png').write_bytes((data / 'rw' / f'{names[3]}.png').read_bytes()[:-6])
    out = done(cams(data, '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred'))
    assert f'{len(names) - 3} of {len(names)} images are finished' in out
    assert f'{len(names) - 1} of {len(names)} images are finished' in done(walk(data))
    assert before == {folder: contents(data / folder) for folder in before}


def test_folder_of_other_settings_is_refused_and_named(data):
    refused(cams(data, '--out_cam', 'cam', '--scales', 0.5), 'cam (--out_cam)', 'scales was [1.0], is [0.5]',
            '--overwrite')
    refused(walk(data, '--beta', 4), 'rw (--out_rw)', 'beta was 8, is 4')


def test_results_of_unknown_settings_are_refused(data, tmp_path):
    (tmp_path / 'cam').mkdir()
    (tmp_path / 'cam' / 'x.npy').write_bytes(b'')
    refused(cams(data, '--out_cam', tmp_path / 'cam'), 'results and no settings.json', '--overwrite')


def test_walk_notices_that_the_cams_are_others(data, tmp_path):
    shutil.copytree(data / 'cam', tmp_path / 'cam')
    done(walk(data, '--cam_dir', tmp_path / 'cam', '--out_rw', tmp_path / 'rw'))
    done(cams(data, '--out_cam', tmp_path / 'cam', '--scales', 0.5, '--overwrite'))
    refused(walk(data, '--cam_dir', tmp_path / 'cam', '--out_rw', tmp_path / 'rw'), 'rw (--out_rw)', 'cams was')


def test_overwrite_removes_what_is_there_first(data, tmp_path, monkeypatch):
    """Else a run that is stopped in the middle would leave old results under new settings."""
    shutil.copytree(data / 'cam', tmp_path / 'cam')
    (tmp_path / 'cam' / f'{names_of(data)[0]}.npy').write_bytes(b'old.')
    done(cams(data, '--out_cam', tmp_path / 'cam', '--overwrite', '--cam_format', 'npz'))
    assert not list((tmp_path / 'cam').glob('*.npy')) and len(list((tmp_path / 'cam').glob('*.npz'))) == 7
    old = [str(path) for path in (tmp_path / 'cam').glob('*.npz')]

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(outputs, 'atomic_write', killed)
    with pytest.raises(KeyboardInterrupt):
        outputs.open_folder(str(tmp_path / 'cam'), '--out_cam', {'scales': [2]}, True, old)
    assert not list((tmp_path / 'cam').iterdir())


def test_overwrite_makes_the_folder_anew(data):
    done(cams(data, '--out_cam', 'anew', '--scales', 0.5))
    done(cams(data, '--out_cam', 'anew', '--overwrite'))
    a, b = contents(data / 'anew'), contents(data / 'cam')
    assert json.loads(a.pop(outputs.SETTINGS))['scales'] == [1.0] and b.pop(outputs.SETTINGS) and a == b


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
        done(cams(data, '--out_cam', folder))
    else:
        done(walk(data, '--out_rw', folder))
    whole = {name: value for name, value in contents(folder).items() if not name.startswith('.')}
    assert whole == contents(data / {'infer_SEAM': 'cam', 'infer_aff': 'rw'}[script])


def test_full_disk_leaves_whole_files_alone(data, tmp_path, small_files):
    refused(cams(data, '--out_cam', tmp_path / 'cam'), 'cannot write', '.npy')
    finished = contents(tmp_path / 'cam')
    assert finished.items() <= contents(data / 'cam').items() and len(finished) < len(names_of(data))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    done(cams(data, '--out_cam', tmp_path / 'cam'))
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


# ----- ranks and worker processes -----

def test_ranks_share_the_list_and_end_with_the_same_files(data, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        done(cams(data, '--out_cam', tmp_path / 'cam'))
    assert contents(tmp_path / 'cam') == contents(data / 'cam')


def test_crf_workers_write_the_same_bytes(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_workers', 2))
    for alpha in ('4.0', '24.0'):
        assert contents(tmp_path / f'crf_{alpha}') == contents(data / f'crf_{alpha}')


def test_crf_in_torch_gives_the_same_scores(data, tmp_path):
    done(cams(data, '--out_crf', tmp_path / 'crf', '--crf_backend', 'torch'))
    for name in names_of(data):
        for alpha in ('4.0', '24.0'):
            ours, theirs = (load_scores(str(folder / f'crf_{alpha}/{name}.npy'), '', 'crf')
                            for folder in (tmp_path, data))
            assert list(ours) == list(theirs) and max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 1e-3


def test_without_pydensecrf_the_crf_runs_in_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pydensecrf', None)
    monkeypatch.setitem(sys.modules, 'pydensecrf.densecrf', None)
    assert crf.choose_crf_backend(None) == 'torch' and 'pydensecrf' in capsys.readouterr().out
    with pytest.raises(BadInput, match='--crf_backend torch'):
        crf.choose_crf_backend('pydensecrf')


def test_error_in_a_worker_is_raised_and_no_more_is_submitted():
    with pytest.raises(ZeroDivisionError):
        with workers.BoundedPool(1) as pool:
            for number in (1, 0, 1):
                pool.submit(divmod, 1, number)


def test_pool_does_not_run_away():
    with workers.BoundedPool(1) as pool:
        start = time.time()
        for _ in range(6):
            pool.submit(time.sleep, .1)
            assert len(pool._waiting) <= 2
    assert time.time() - start > .5


# ----- space, formats, pictures -----

def test_disk_that_will_not_do_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 2 ** 20}))
    check = outputs.SpaceCheck(1000)
    for number in range(12):
        (tmp_path / str(number)).write_bytes(bytes(2 ** 20))
        check.add([str(tmp_path / str(number))])
    assert capsys.readouterr().out.count('the other 990 images will take about 1.0 GiB, and 0.0 GiB are free') == 1


def test_half_precision_files_and_npz_hold_the_same_scores(data, tmp_path):
    done(cams(data, '--out_cam', tmp_path / 'a', '--cam_dtype', 'float16', '--cam_format', 'npz'))
    for name in names_of(data):
        full = load_scores(str(data / f'cam/{name}.npy'), '', 'cam')
        half = load_scores(str(tmp_path / f'a/{name}.npy'), '', 'cam')      # finds NAME.npz
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


def test_labels_that_are_not_sure_become_255(data, tmp_path):
    done(walk(data, '--out_rw', tmp_path / 'a', '--ignore_below', 0.5))
    done(walk(data, '--out_rw', tmp_path / 'b', '--ignore_crf', 'crf_4.0', 'crf_24.0'))
    for name in names_of(data):
        plain, sure, agreed = (np.asarray(Image.open(folder / f'{name}.png'))
                               for folder in (data / 'rw', tmp_path / 'a', tmp_path / 'b'))
        low, high = (strongest_label(load_scores(str(data / f'crf_{alpha}/{name}.npy'), '', 'crf'))
                     for alpha in ('4.0', '24.0'))
        assert (agreed == np.where(low == high, plain, 255)).all()
        assert (sure[sure != 255] == plain[sure != 255]).all()


# ----- maps -----

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    net = slim_SEAM.Net()
    torchutils.calibrate_batch_norm(net, [torch.randn(4, 3, 64, 64)])
    return net.eval()


@pytest.mark.parametrize('plus', [False, True])
def test_closed_forms_of_grad_cam_equal_autograd(net, plus):
    x = torch.randn(1, 3, 64, 80)
    maps = infer_SEAM.grad_cam(net, x, plus)
    features = net.forward_as_dict(x)['conv6'].detach().requires_grad_()
    scores = net.fc8(features).mean(dim=(2, 3))[0]
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
        cams.append(infer_SEAM.multi_scale_cam(net, [view, view.flip(-1)], [2, 5], (50, 60)))
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
        cam, cam_rv = slim_SEAM.Net(pcm=False).eval()(torch.randn(1, 3, 32, 32))
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
