"""Images that show none of the classes, with a label of zeros, through training, inference and evaluation."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
import infer_aff
import infer_SEAM
import train_SEAM
from network import slim_aff, slim_SEAM
from tool import image_files, metrics, outputs, pyutils, report, score_files, torchutils, training, visualization
from tool.cli import BadInput
from voc12.data import VOC12AffDataset

NEGATIVE, SIZE = 'sky', (48, 64)
NAMES = ['cat1', NEGATIVE, 'cat2', 'cat3']
torch.set_num_threads(2)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data root of three images of class 0 and one of none, random networks, CAMs, CRFs and labels: cam, crf_4.0,
    crf_24.0, pred, rw, prob and, from the finished CAMs, pred_again."""
    root = tmp_path_factory.mktemp('negatives')
    rng = np.random.default_rng(0)
    for folder in ('JPEGImages', 'SegmentationClass'):
        (root / folder).mkdir()
    for name in NAMES:
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(root / f'JPEGImages/{name}.jpg')
        truth = np.zeros(SIZE, np.uint8)
        truth[:, :32] = name != NEGATIVE
        image_files.save_label_map(str(root / f'SegmentationClass/{name}.png'), truth)
    (root / 'list.txt').write_text('\n'.join(NAMES))
    (root / 'names.txt').write_text('cat\ndog\n')
    save_labels(root / 'labels.npy', [NEGATIVE])
    torch.manual_seed(0)
    for net, name in ((slim_SEAM.Net(num_classes=2), 'seam'), (slim_aff.Net(), 'aff')):
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}.pth'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        infer('--weights', 'seam.pth', '--out_cam', 'cam', '--out_crf', 'crf', '--out_cam_pred', 'pred', '--vis_dir',
              'pictures')
        infer('--cam_dir', 'cam', '--out_cam_pred', 'pred_again', '--out_crf', 'crf_again', '--crf_alpha', '4')
        call(infer_aff, '--voc12_root', '.', '--infer_list', 'list.txt', '--class_names', 'names.txt', '--num_workers',
             '0', '--network', 'network.slim_aff', '--weights', 'aff.pth', '--cam_dir', 'cam', '--out_rw', 'rw',
             '--out_prob', 'prob', '--crf', '--ignore_crf', 'crf_4.0', 'crf_24.0', '--ignore_below', '0.3')
    return root


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def save_labels(path, negatives):
    np.save(path, {name: np.float32([name not in negatives, 0]) for name in NAMES}, allow_pickle=True)


def call(script, *flags):
    """Runs a script in this process, to its end without an error."""
    try:
        script.main(script.get_args_parser().parse_args(flags))
    except SystemExit as end:
        assert not end.code


def infer(*flags):
    call(infer_SEAM, '--voc12_root', '.', '--infer_list', 'list.txt', '--cls_labels', 'labels.npy', '--class_names',
         'names.txt', '--network', 'network.slim_SEAM', '--scales', '1', '--num_workers', '0', *flags)


def train(session, *flags):
    """Trains for two steps. Returns the text of the log."""
    call(train_SEAM, '--voc12_root', '.', '--train_list', 'list.txt', '--cls_labels', 'labels.npy', '--class_names',
         'names.txt', '--network', 'network.slim_SEAM', '--weights', 'seam.pth', '--resize_long', '48', '64',
         '--crop_size', '48', '--batch_size', '2', '--max_epochs', '1', '--num_workers', '0', '--session_name', session,
         *flags)
    with open(session + '.log', encoding='utf-8') as file:
        return file.read()


# ----- the objective -----

def maps_of(n):
    """Returns the raw maps of two views of n images, in the order of the arguments of `seam_loss`, and their labels."""
    torch.manual_seed(n)
    maps = [torch.randn(n, 4, 12, 12), torch.rand(n, 4, 12, 12), torch.randn(n, 4, 3, 3), torch.rand(n, 4, 3, 3)]
    return [x.requires_grad_() for x in maps], (torch.rand(n, 3) < .5).float()


def gradients(terms, maps):
    return torch.autograd.grad(terms['loss'], maps)


def test_negatives_count_in_the_classification_loss_alone():
    maps, label = maps_of(5)
    label[:] = torch.tensor([[1., 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    chosen = [0, 2, 4]
    terms = train_SEAM.seam_loss(*maps, label)
    others = train_SEAM.seam_loss(*(x[chosen] for x in maps), label[chosen])
    for name in ('loss_rvmin1', 'loss_rvmin2', 'loss_er', 'loss_ecr1', 'loss_ecr2'):
        assert terms[name].item() == pytest.approx(others[name].item(), rel=1e-5), name
    assert terms['loss_cls1'] == train_SEAM.classification_loss(maps[0], label) != others['loss_cls1']


def test_batch_of_negatives_alone_gives_every_map_a_gradient():
    maps, label = maps_of(2)
    terms = train_SEAM.seam_loss(*maps, label * 0)
    assert terms['loss_er'] == terms['loss_ecr'] == terms['loss_rvmin1'] == 0
    assert terms['loss'] == (terms['loss_cls1'] + terms['loss_cls2']) / 2 > 0
    cam1, cam_rv1, cam2, cam_rv2 = gradients(terms, maps)
    assert cam1.any() and cam2.any() and not cam_rv1.any() and not cam_rv2.any()


def test_negatives_leave_no_parameter_without_a_gradient():
    """DistributedDataParallel demands the same gradients from a rank that has only negatives."""
    learned = []
    for label in (torch.ones(2, 3), torch.zeros(2, 3)):
        torch.manual_seed(0)
        net = slim_SEAM.Net(num_classes=3)
        train_SEAM.forward_losses(net, torch.randn(2, 3, 48, 48), label)[0]['loss'].backward()
        learned.append([name for name, p in net.named_parameters() if p.grad is not None])
    assert learned[0] == learned[1] != []


def test_gradient_of_a_batch_is_the_mean_over_its_parts():
    maps, label = maps_of(4)
    label[0], label[1:3], label[3] = 0, 0, 1            # one part of negatives, one that has the only positive
    whole = gradients(train_SEAM.seam_loss(*maps, label), maps)
    positives = train_SEAM.count_positives(label) / 2
    parts = [train_SEAM.seam_loss(*(x[half] for x in maps), label[half], positives=positives)
             for half in (slice(0, 2), slice(2, 4))]
    halves = gradients({'loss': (parts[0]['loss'] + parts[1]['loss']) / 2}, maps)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(whole, halves))


# ----- training -----

@pytest.mark.parametrize('flags', [(), ('--classifier_only', '--fit_classifier')])
def test_training_says_how_many_negatives_there_are(flags):
    log = train('run', *flags)
    assert '1 of 4 images are negatives' in log and 'cat 3 and 1, dog 0 and 4' in log
    assert 'every image' not in log


def test_steps_of_negatives_alone_leave_records_and_no_warning(monkeypatch):
    """Batches of one image, a log line for each, and pictures for TensorBoard where that is installed."""
    shown = []
    writer = type('Writer', (), {'add_scalar': lambda *_: 0, 'add_image': lambda _, name, *a, **k: shown.append(name)})
    monkeypatch.setattr(visualization, 'open_writer', lambda *_: writer())
    log = train('single', '--batch_size', '1', '--log_every', '1')
    records = [json.loads(line) for line in open('single.jsonl', encoding='utf-8')]
    assert sorted(str(record['mAP']) for record in records) == ['100.0'] * 3 + ['None']
    assert 'nan' not in log.lower() and 'average precision' not in log
    assert [shown.count(name) for name in ('image', 'cam', 'cam_rv')] == [4, 3, 3]


def test_class_that_every_image_has_is_warned_of():
    save_labels('positives.npy', [])
    log = train('positives', '--cls_labels', 'positives.npy')
    assert 'warning: every image of list.txt (--train_list) shows cat' in log and 'negatives' not in log


def test_list_without_any_class_is_refused_and_the_log_stays():
    save_labels('nothing.npy', NAMES)
    with open('kept.log', 'w', encoding='utf-8') as file:
        file.write('before')
    with pytest.raises(BadInput, match='list.txt .--train_list.*nothing.npy .--cls_labels'):
        train('kept', '--cls_labels', 'nothing.npy')
    assert open('kept.log', encoding='utf-8').read() == 'before'


def test_quality_without_any_class_is_none_and_warns_of_nothing(tmp_path):
    meter = metrics.ClassificationMeter()
    meter.add(torch.rand(3, 2), torch.zeros(3, 2))
    assert meter.pop() == (None, None)
    log = pyutils.Logger(str(tmp_path / 'x'))
    train_SEAM.warn_of_poor_training(log, {'mAP': None, 'loss_er': 0., 'loss_ecr': 0.}, None)
    assert not (tmp_path / 'x.log').exists() or 'warning' not in (tmp_path / 'x.log').read_text()


# ----- inference -----

def scores_of(folder, kind):
    return score_files.load_scores(os.path.join(folder, NEGATIVE + '.npy'), '', kind)


def test_cams_of_a_negative_are_an_empty_dict_without_a_pass():
    assert scores_of('cam', 'cam') == {} and list(score_files.load_scores('cam/cat1.npy', '', 'cam')) == [0]
    assert infer_SEAM.multi_scale_cam(None, [torch.zeros(3, *SIZE)], [], SIZE).shape == (0, *SIZE)


@pytest.mark.parametrize('folder', ['crf_4.0', 'crf_24.0', 'crf_again_4.0', 'prob'])
def test_scores_of_a_negative_are_background_alone(folder):
    (key, scores), = scores_of(folder, 'crf').items()
    assert key == 0
    np.testing.assert_array_equal(scores, np.ones(SIZE, np.float32), strict=True)


@pytest.mark.parametrize('folder', ['pred', 'pred_again', 'rw'])
def test_label_map_of_a_negative_is_0(folder):
    labels = image_files.read_label_map(f'{folder}/{NEGATIVE}.png', '')
    np.testing.assert_array_equal(labels, np.zeros(SIZE, np.uint8), strict=True)


def test_picture_of_a_negative_has_no_map():
    images = 1 + 3         # the image, and its labels at three background scores
    cell = max(SIZE) + 6
    assert Image.open(f'pictures/{NEGATIVE}.jpg').width == images * cell
    assert Image.open('pictures/cat1.jpg').width == (images + 1) * cell


def test_the_walk_of_a_negative_needs_no_network():
    np.testing.assert_array_equal(infer_aff.walk_image(None, torch.zeros(3, 16, 24), {}, 6., 8, 6), np.ones((1, 16, 24)))


def test_negatives_do_not_count_where_background_is_warned_of(capsys):
    outputs.warn_of_background([.5, None, None, None], 'rw', '--alpha')
    outputs.warn_of_background([None], 'rw', '--alpha')
    assert capsys.readouterr().out == ''
    outputs.warn_of_background([.01, None], 'rw', '--alpha')
    assert '1.0%' in capsys.readouterr().out


def test_crf_file_without_scores_is_refused(tmp_path):
    np.save(tmp_path / 'a.npy', {})
    with pytest.raises(BadInput, match='a.npy .--la_crf_dir'):
        score_files.load_fitting(str(tmp_path), 'a', '--la_crf_dir', 'crf', SIZE, 2)


def test_affinity_labels_of_a_negative_are_background_pairs_alone():
    dataset = VOC12AffDataset('list.txt', 'crf_4.0', 'crf_24.0', 40, '.', num_classes=2, transforms=[
        lambda img, scores: (np.zeros((40, 40, 3), np.float32), scores[:40:8, :40:8])])
    _, _, (background, foreground, different) = dataset[NAMES.index(NEGATIVE)]
    assert background.all() and not foreground.any() and not different.any()


# ----- evaluation and pictures -----

def evaluate(folder, kind, *flags):
    call(evaluation, '--list', 'list.txt', '--gt_dir', 'SegmentationClass', '--class_names', 'names.txt',
         '--num_workers', '0', '--comment', 'x', '--predict_dir', folder, '--type', kind, '--out_prefix', 'out', *flags)
    with open('out_confusion.csv', encoding='utf-8') as file:
        return [[int(cell) for cell in line.split(',')[1:]] for line in file.read().splitlines()[1:]]


@pytest.mark.parametrize('folder, kind, flags', [
    ('cam', 'npy', ('--t', '0.3')), ('crf_4.0', 'crf', ()), ('rw', 'png', ())])
def test_evaluation_reads_negatives_as_background(folder, kind, flags):
    assert sum(map(sum, evaluate(folder, kind, *flags))) == len(NAMES) * SIZE[0] * SIZE[1]
    with open('negative.txt', 'w', encoding='utf-8') as file:
        file.write(NEGATIVE)
    assert evaluate(folder, kind, *flags, '--list', 'negative.txt')[0] == [SIZE[0] * SIZE[1], 0, 0, 0]


def test_what_is_found_on_a_negative_is_a_false_positive(tmp_path):
    for name in NAMES:
        labels = image_files.read_label_map(f'SegmentationClass/{name}.png', '')
        labels[:, 32:40] = name == NEGATIVE
        image_files.save_label_map(str(tmp_path / f'{name}.png'), labels)
    matrix = evaluate(str(tmp_path), 'png')
    assert matrix[0][1] == 8 * SIZE[0] and matrix[1][0] == 0


def test_sheet_shows_a_negative(capsys):
    call(visualization, '--voc12_root', '.', '--list', 'list.txt', '--cam_dir', 'cam', '--crf_dir', 'crf_4.0',
         '--label_dir', 'rw', '--out', 'sheet.png')
    assert 'left out' not in capsys.readouterr().out


def test_trivial_answer_of_a_negative_is_background(capsys):
    args = report.get_args_parser().parse_args(['trivial', '--cam_dir', 'cam', '--voc12_root', '.', '--out_dir', 'out'])
    report.write_trivial(args)
    for kind, positive in (('background', 0), ('labels', 1)):
        for name in NAMES:
            labels = image_files.read_label_map(f'out/{kind}/{name}.png', '')
            np.testing.assert_array_equal(labels, np.full(SIZE, positive * (name != NEGATIVE)))
    assert 'left out' not in capsys.readouterr().out
