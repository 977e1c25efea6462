"""tool/label_photos.py: which commands it runs, and the whole way from photographs to labels in miniature."""
import importlib
import json
import os
import sys

import pytest
import torch

from tool import label_photos
from tool.cli import BadInput
from tool.image_files import read_label_map
from tool.image_lists import load_img_name_list
from voc12 import make_custom, make_toy


@pytest.fixture(scope='module')
def drawings(tmp_path_factory):
    """Folder with photos/, truth/ and labels.csv: ten drawings of two classes."""
    folder = tmp_path_factory.mktemp('drawings')
    make_toy.main(make_toy.get_args_parser().parse_args(
        ['--out', str(folder / 'toy'), '--count', '10', '--size', '48', '64', '--classes', '2']))
    os.rename(folder / 'toy/JPEGImages', folder / 'photos')
    os.rename(folder / 'toy/SegmentationClass', folder / 'truth')
    names = sorted(os.listdir(folder / 'photos'))
    (folder / 'labels.csv').write_text(''.join(f'{name},{"cat" if i % 2 else "dog"}\n' for i, name in enumerate(names)))
    return folder


@pytest.fixture
def photos(drawings, tmp_path, monkeypatch):
    """A new folder with links to the drawings, the current one."""
    for name in ('photos', 'truth', 'labels.csv'):
        (tmp_path / name).symlink_to(drawings / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*flags):
    label_photos.main(label_photos.get_args_parser().parse_args(
        ['--images', 'photos', '--labels', 'labels.csv', '--out', 'out', '--device', 'cpu', *flags]))


@pytest.fixture
def commands(photos, monkeypatch):
    """Runs the command, but of its scripts only make_custom.py. Returns [script, flags ...] of each script."""
    log = []

    def run_child(command, *advice):
        log.append([os.path.basename(command[1]), *command[2:]])
        if command[1].endswith('make_custom.py'):
            make_custom.main(make_custom.get_args_parser().parse_args(command[2:]))

    def begin(*flags):
        log.clear()
        start(*flags)
        return log

    monkeypatch.setattr(label_photos, 'run_child', run_child)
    begin.log = log
    return begin


def of(log, script):
    """The flags of the commands of a script, in order, as its own parser reads them."""
    parser = importlib.import_module(script).get_args_parser()
    return [parser.parse_args(words) for name, *words in log if name == script.split('.')[-1] + '.py']


def test_every_step_reads_what_the_one_before_wrote(commands):
    log = commands()
    assert [name for name, *_ in log] == [
        'make_custom.py', 'check.py', 'train_SEAM.py', 'infer_SEAM.py', 'visualization.py', 'infer_SEAM.py',
        'train_aff.py', 'infer_aff.py', 'visualization.py', 'export_coco.py']
    seam, = of(log, 'train_SEAM')
    cam, crf = of(log, 'infer_SEAM')
    aff, = of(log, 'train_aff')
    walk, = of(log, 'infer_aff')
    assert cam.weights == seam.session_name + '.pth' and walk.weights == aff.session_name + '.pth'
    assert crf.cam_dir == walk.cam_dir == cam.out_cam
    assert [aff.la_crf_dir, aff.ha_crf_dir] == [f'{crf.out_crf}_{alpha}' for alpha in crf.crf_alpha]
    assert {args.class_names for args in (seam, cam, crf, aff, walk)} == {'out/data/class_names.txt'}
    assert walk.out_rw == 'out/labels' and os.path.isfile('out/report.md')


def test_sheets_leave_out_photographs_without_a_class(commands, photos):
    lines = (photos / 'labels.csv').read_text().splitlines()
    (photos / 'labels.csv').unlink()
    (photos / 'labels.csv').write_text('\n'.join([lines[0].split(",")[0] + ",", *lines[1:]]) + '\n')
    sheets = of(commands(), 'tool.visualization')
    shown, = {tuple(load_img_name_list(sheet.list)) for sheet in sheets}
    assert shown == tuple(line.split('.')[0] for line in lines[1:])


def test_resume_with_other_labels_is_refused_before_anything_is_written(commands, photos):
    commands()
    old = (photos / 'labels.csv').read_text()
    (photos / 'labels.csv').unlink()
    (photos / 'labels.csv').write_text(old.replace('cat', 'cow'))
    before = open('out/data/class_names.txt').read()
    with pytest.raises(BadInput, match='--labels.*--resume.*--out'):
        commands('--resume')
    assert open('out/data/class_names.txt').read() == before and not commands.log
    (photos / 'out/seam_last.pth').write_bytes(b'of the earlier labels')
    for path in ('out/labels/finished.txt', 'out/labels_mine/a.png', 'out/earlier/crf_0.7/b.npy'):
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        (photos / path).touch()
    commands()
    assert open('out/data/class_names.txt').read() != before and not os.path.exists('out/seam_last.pth')
    # a --resume of the new run does not take them for its own; what somebody else made, or put aside, stays
    assert os.path.exists('out/earlier/seam_last.pth') and os.path.exists('out/earlier/labels/finished.txt')
    assert os.path.exists('out/labels_mine/a.png') and os.path.exists('out/earlier/crf_0.7/b.npy')


def test_one_class_has_the_exponents_of_its_own_threshold(commands, photos):
    (photos / 'labels.csv').unlink()
    (photos / 'labels.csv').write_text(''.join(f'{name},dog\n' for name in os.listdir('photos')))
    exponents = []
    for flags in ((), ('--t', '0.6')):
        log = commands(*flags)
        exponents.append([of(log, 'infer_SEAM')[1].crf_alpha, of(log, 'infer_aff')[0].alpha])
    assert exponents[0] == exponents[1] == [[.5, 3.], .8]


def test_report_advises_to_resume_but_its_commands_can_be_changed(commands):
    commands('--resume')
    advice, steps = open('out/report.md').read().split('## The commands')
    again, = [line for line in advice.splitlines() if line.startswith('python tool/label_photos.py')]
    assert again.endswith('--out out --device cpu --t T --resume') and '--resume' not in steps


def test_report_warns_of_a_class_that_every_photograph_shows(commands, photos, capsys):
    (photos / 'labels.csv').unlink()
    (photos / 'labels.csv').write_text(''.join(f'{name},dog\n' for name in os.listdir('photos')))
    commands()
    assert 'Every photograph shows dog' in capsys.readouterr().out.split('# Labels of')[1]


@pytest.mark.parametrize('images, batch_size, epochs', [(3, 3, 130), (200, 8, 5), (1040, 8, 1), (5000, 8, 1)])
def test_length_of_the_training_follows_from_the_number_of_images(images, batch_size, epochs):
    length, steps = label_photos.training_length(130, images, min(8, images))
    assert length == ['--batch_size', min(8, images), '--max_epochs', epochs]
    assert steps == images // batch_size * epochs


@pytest.mark.parametrize('classes, rate', [(1, '5e-05'), (6, '0.0003'), (20, '0.001'), (80, '0.001')])
def test_learning_rate_keeps_the_step_of_a_class(classes, rate):
    assert label_photos.learning_rate(classes) == rate


def test_learning_rate_is_that_of_the_classes_and_printed(commands, capsys):
    seam, = of(commands(), 'train_SEAM')
    assert seam.lr == 0.0001 and 'learning rate 0.0001 for 2 classes' in capsys.readouterr().out


def test_settings_on_a_cpu_are_those_of_the_recipe(commands):
    log = commands()
    seam, = of(log, 'train_SEAM')
    assert (seam.crop_size, seam.resize_long, seam.fit_classifier, seam.max_epoches) == (128, [128, 224], True, 130)
    cam, crf = of(log, 'infer_SEAM')
    assert (cam.scales, cam.flip, crf.crf_alpha) == ([.75, 1], 0, [.7, 4])
    walk, = of(log, 'infer_aff')
    assert (walk.alpha, walk.logt) == (1.1, 4)


def test_a_gpu_takes_the_sizes_and_scales_of_the_scripts(commands, monkeypatch):
    monkeypatch.setattr(label_photos, 'get_device', torch.device)
    log = commands('--device', 'cuda')
    seam, = of(log, 'train_SEAM')
    assert (seam.crop_size, seam.resize_long, seam.fit_classifier) == (448, [448, 768], True)
    cam, _ = of(log, 'infer_SEAM')
    assert (cam.scales, cam.flip, cam.amp) == ([.5, 1, 1.5, 2], 1, 'off')
    assert all(args.device == 'cuda' for args in (seam, cam, *of(log, 'train_aff'), *of(log, 'infer_aff')))


def test_another_threshold_keeps_the_labels_of_the_first(commands):
    log = commands('--t', '0.4', '--resume')
    _, crf = of(log, 'infer_SEAM')
    aff, = of(log, 'train_aff')
    walk, = of(log, 'infer_aff')
    # as tool/visualization.py --t prints them for 0.4
    assert (crf.crf_alpha, walk.alpha) == ([1.6, 9.7], 2.4)
    assert (aff.session_name, walk.out_rw) == ('out/aff_0.4', 'out/labels_0.4')
    assert os.path.isfile('out/report_0.4.md')


def test_resume_reaches_what_can_be_resumed(commands, photos):
    commands()
    assert not any('--resume' in command for command in commands.log)
    (photos / 'out/seam_last.pth').write_text('')
    log = commands('--resume')
    assert [name for name, *words in log if '--resume' in words] == [
        'train_SEAM.py', 'infer_SEAM.py', 'infer_SEAM.py', 'infer_aff.py']      # AffinityNet has not begun


def test_a_line_in_place_of_the_coco_file_where_pycocotools_is_missing(commands, monkeypatch):
    monkeypatch.setattr(label_photos.importlib.util, 'find_spec', lambda name: None)
    assert 'export_coco.py' not in [name for name, *_ in commands()]
    report = open('out/report.md').read()
    assert 'pip install pycocotools' in report and 'python voc12/export_coco.py --label_dir out/labels' in report


def test_the_coco_file_has_the_photographs_of_the_labels_alone(commands):
    pytest.importorskip('pycocotools')
    log = commands()
    assert of(log, 'voc12.export_coco')[0].list == of(log, 'train_SEAM')[0].train_list


@pytest.mark.parametrize('script', ['export_coco.py', 'evaluation.py'])
def test_report_is_written_although_a_last_command_fails(commands, monkeypatch, script):
    pytest.importorskip('pycocotools')
    run_child = label_photos.run_child

    def fail(command, *advice):
        if command[1].endswith(script):
            raise SystemExit(2)
        run_child(command, *advice)
    monkeypatch.setattr(label_photos, 'run_child', fail)
    with pytest.raises(SystemExit):
        commands('--masks', 'truth')
    report = open('out/report.md').read()
    assert 'export_coco.py' in report and report.count('python evaluation.py') == 2


def test_a_folder_of_something_else_is_left_alone(commands, photos):
    (photos / 'out').mkdir()
    (photos / 'out/mine.txt').write_text('')
    with pytest.raises(BadInput, match='out .--out'):
        commands()
    assert not commands.log and os.listdir('out') == ['mine.txt']


@pytest.mark.parametrize('flags, words', [(['--t', '0.95'], ['--t']), (['--images', 'none'], ['none', '--images']),
                                          (['--labels', 'none.csv'], ['none.csv', '--labels'])])
def test_bad_flags_are_refused_before_anything_is_written(commands, flags, words):
    with pytest.raises(BadInput) as refusal:
        commands(*flags)
    assert all(word in str(refusal.value) for word in words) and not os.path.exists('out')


def test_time_left_follows_the_speed_of_what_is_done():
    assert label_photos.describe_time(0, 0, 600) == '10 min left on two free cores'
    assert label_photos.describe_time(200, 100, 600) == '20 min left'


def test_photographs_become_labels_scores_and_a_coco_file(photos, monkeypatch, capsys):
    pytest.importorskip('pycocotools')
    small = {'network': 'network.slim_SEAM', 'network_aff': 'network.slim_aff', 'scales': [1.], 'alphas': [.7, 1.1, 4],
             'train': ['--lr', '0.1', '--crop_size', '32', '--resize_long', '32', '48', '--max_epochs', '9'],
             'train_aff': ['--crop_size', '40', '--max_epochs', '9'], 'infer': ['--flip', '0'],
             'walk': ['--alpha', '1.1', '--logt', '2']}
    torch.set_num_threads(1)        # the images are too small for two
    for name, value in (('LITE0', small), ('STEPS', 1), ('AFF_STEPS', 1), ('available_cores', lambda: 0)):
        monkeypatch.setattr(label_photos, name, value)

    def run_child(command, *advice):        # in this process, for starting Python takes longer than all else
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', command[1:])
            script = os.path.relpath(command[1], label_photos.ROOT)[:-3].replace(os.sep, '.')
            module = importlib.import_module(script)
            try:
                module.main(module.get_args_parser().parse_args(command[2:]))
            except SystemExit as end:
                assert not end.code

    monkeypatch.setattr(label_photos, 'run_child', run_child)
    start('--masks', 'truth')
    names = {name[:-4] for name in os.listdir('photos')}
    assert {name[:-4] for name in os.listdir('out/labels') if name.endswith('.png')} == names
    assert len(json.load(open('out/labels.json'))['images']) == 10
    assert all(os.path.getsize(f'out/{name}.png') for name in ('thresholds', 'labels'))
    report = open('out/report.md').read()
    text, commands = report.split('## The commands')
    assert text in capsys.readouterr().out
    assert [line.split()[1] for line in commands.splitlines() if line.startswith('python')] == [
        'voc12/make_custom.py', 'voc12/check.py', 'train_SEAM.py', 'infer_SEAM.py', 'tool/visualization.py',
        'infer_SEAM.py', 'train_aff.py', 'infer_aff.py', 'tool/visualization.py', 'voc12/export_coco.py',
        'evaluation.py', 'evaluation.py']
    assert '`cam` has' in report and '`labels` has' in report and 'on 10 images' in report

    # the advice of the report, followed: the CAMs stay, and so do the labels
    results = [path for ending in ('cam/*.npy', 'labels/*.png') for path in (photos / 'out').glob(ending)]
    assert len(results) == 20
    before = {path: path.stat().st_mtime_ns for path in results}
    start('--masks', 'truth', '--t', '0.3', '--resume')
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert read_label_map('out/labels_0.3/' + min(names) + '.png', '--x').shape
