"""Validation during a training: its numbers, its files, and that the training does not depend on it."""
import json
import sys
import types

import numpy as np
import pytest
import torch

import tiny_deeplab
import tiny_SEAM
import train_SEAM
from helpers import done, refused, run
from tool import cli, torchutils, training, validation
from tool.image_files import save_label_map
from tool.text_files import read_csv

LISTS = 'VOC2012/ImageSets/Segmentation/'
TRUTH = 'VOC2012/SegmentationClass'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set of 12 training images and 4 held-out ones, and weights to start from."""
    root = tmp_path_factory.mktemp('validation')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 16, '--size', 64, 64, '--classes', 3))
    torch.manual_seed(0)
    net = tiny_SEAM.Net()
    torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
    training.save_weights(net, str(root / 'seam.pth'))
    training.save_weights(tiny_deeplab.Net(), str(root / 'seg.pth'))
    return root


VALIDATE = '--val_every', 1, '--keep_best', '--val_list', LISTS + 'val.txt'


def train_seam(root, session, *more):
    return run(root, 'train_SEAM', '--train_list', LISTS + 'train.txt', '--crop_size', 48, '--resize_long', 48, 64,
               '--batch_size', 4, '--max_epochs', 2, '--num_workers', 0, '--network', 'tiny_SEAM', '--weights',
               'seam.pth', '--session_name', session, *more)


def train_seg(root, session, *more):
    return run(root, 'train_seg', '--train_list', LISTS + 'train.txt', '--label_dir', TRUTH, '--crop_size', 48,
               '--batch_size', 4, '--max_iters', 4, '--num_workers', 0, '--network', 'tiny_deeplab',
               '--weights', 'seg.pth', '--session_name', session, '--bn_momentum', .3, *more)


@pytest.fixture(scope='module')
def seam(data):
    """What a validated training of SEAM prints, and what it sends to TensorBoard: (step, name) -> value."""
    sent = {}

    class Writer:
        def __init__(self, folder, purge_step):
            pass

        def add_scalar(self, name, value, step):
            sent[step, name] = value

        def add_image(self, *_, **__):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
        return done(train_seam(data, 'validated', *VALIDATE)), sent


@pytest.fixture(scope='module')
def seg(data):
    return done(train_seg(data, 'seg_validated', *VALIDATE))


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def records(root, session):
    """The records of the validations in the .jsonl file."""
    lines = map(json.loads, (root / f'{session}.jsonl').read_text().splitlines())
    return [line for line in lines if any(name.startswith('val_') for name in line)]


# ----- the training does not depend on it -----

def test_weights_of_seam_are_the_same_bits_with_and_without_validation(data, seam):
    done(train_seam(data, 'plain'))
    assert same(weights(data / 'plain.pth'), weights(data / 'validated.pth'))


def test_weights_of_a_network_whose_batch_norm_trains_are_the_same_bits_too(data, seg):
    done(train_seg(data, 'seg_plain'))
    assert same(weights(data / 'seg_plain.pth'), weights(data / 'seg_validated.pth'))


def test_run_stopped_after_every_step_validates_as_an_undisturbed_one(data, seam, monkeypatch):
    monkeypatch.setattr(training.StopOnSignal, '__enter__', lambda self: setattr(self, 'number', 15) or self)
    monkeypatch.setattr(training.StopOnSignal, '__exit__', lambda *_: None)
    for step in range(6):
        stopped = train_seam(data, 'stopped', *VALIDATE, *(['--resume'] if step else []))
        assert stopped.returncode == 143, stopped.stderr
    done(train_seam(data, 'stopped', *VALIDATE, '--resume'))
    assert same(weights(data / 'stopped.pth'), weights(data / 'validated.pth'))
    assert same(weights(data / 'stopped_best.pth'), weights(data / 'validated_best.pth'))
    assert records(data, 'stopped') == records(data, 'validated')


def test_run_killed_in_its_validation_is_validated_when_it_is_resumed(data, seam, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(validation, 'measure_cams', interrupt)
    assert train_seam(data, 'killed', *VALIDATE).returncode == 130
    monkeypatch.undo()
    assert weights(data / 'killed_last.pth')['step'] == 3
    done(train_seam(data, 'killed', *VALIDATE, '--resume'))
    assert records(data, 'killed') == records(data, 'validated')
    assert same(weights(data / 'killed.pth'), weights(data / 'validated.pth'))


# ----- the numbers -----

def test_numbers_of_seam_are_those_of_inference_and_evaluation(data, seam):
    common = '--network', 'tiny_SEAM', '--infer_list', LISTS + 'val.txt', '--num_workers', 0
    last = records(data, 'validated')[-1]
    for kind in ('cam', 'cam_rv'):
        done(run(data, 'infer_SEAM', *common, '--weights', 'validated.pth', '--scales', 1, '--flip', 0, '--map', kind,
                 '--out_cam', kind))
        done(run(data, 'evaluation', '--list', LISTS + 'val.txt', '--predict_dir', kind, '--gt_dir', TRUTH, '--type',
                 'npy', '--curve', '--t_list', *(t / 100 for t in range(100)), '--comment', 'x', '--num_workers', 0))
        result = read_csv(data / f'{kind}_result.csv')[0]
        assert float(result['mIoU_present']) == pytest.approx(last[f'val_mIoU_{kind}'], abs=1e-4)
        assert float(result['background_score']) == last[f'val_background_score_{kind}']
    names = (data / LISTS / 'val.txt').read_text().split()
    assert last['val_mAP'] == np.mean([value for name, value in last.items() if name.startswith('val_AP_')])
    assert len(names) == 4 and 'images 4, masks 4' in seam[0]


def test_numbers_of_a_segmentation_network_are_those_of_inference_and_evaluation(data, seg):
    done(run(data, 'infer_seg', '--network', 'tiny_deeplab', '--weights', 'seg_validated.pth', '--infer_list',
             LISTS + 'val.txt', '--scales', 1, '--flip', 0, '--crf', 'off', '--out_seg', 'seg', '--num_workers', 0))
    done(run(data, 'evaluation', '--list', LISTS + 'val.txt', '--predict_dir', 'seg', '--gt_dir', TRUTH, '--comment',
             'x', '--num_workers', 0))
    first, last = records(data, 'seg_validated')
    assert float(read_csv(data / 'seg_result.csv')[0]['mIoU_present']) == pytest.approx(last['val_mIoU'], abs=1e-4)
    assert [first['step'], last['step']] == [3, 4]          # after the epoch, and at the end within the second
    assert 'val_IoU_background' in last


def test_log_records_and_tensorboard_have_the_same_numbers(data, seam):
    out, sent = seam
    kept = records(data, 'validated')
    assert [(record['step'], record['epoch']) for record in kept] == [(3, 1), (6, 2)]
    for record in kept:
        assert f'mAP {record["val_mAP"]:.4g}' in out
        for name in set(record) - {'step', 'epoch'}:
            assert sent[record['step'], name.replace('val_', 'val/', 1)] == record[name]


class Images:
    """Held-out images: 'a' and 'b' show class 0, 'c' class 1; half of each is object. The image holds its CAMs."""
    img_name_list = ['a', 'b', 'c']
    labels = {'a': np.float32([1, 0, 0]), 'b': np.float32([1, 0, 0]), 'c': np.float32([0, 1, 0])}

    def __getitem__(self, number):
        img = torch.zeros(3, 4, 4)
        img[0, :, :2] = [.9, .2, .7][number]
        img[1, :, :2] = [.1, .6, .8][number]
        return 'abc'[number], img

    def predict(self, net, img):
        return img.amax(dim=(2, 3)), [img]


def held_out(truth_dir):
    return validation.HeldOut(Images(), str(truth_dir), ['cat', 'dog', 'cow'], 0, torch.device('cpu'), 'off')


def write_truth(folder):
    for name, label in (('a', 1), ('c', 2)):
        truth = np.zeros((4, 4), np.uint8)
        truth[:, :2] = label
        save_label_map(str(folder / f'{name}.png'), truth)


def test_measures_by_hand(tmp_path):
    write_truth(tmp_path)
    means, per_class, best = validation.measure_cams(Images().predict, None, held_out(tmp_path))
    # class 0 is ranked a, c, b; class 1 is ranked c, b, a; class 2 has no image
    assert per_class == {'AP_cat': pytest.approx((1 + 2 / 3) / 2 * 100), 'AP_dog': 100}
    assert means['mAP'] == pytest.approx((per_class['AP_cat'] + 100) / 2) and best == 'mIoU_cam'
    # only classes that an image shows count: from 0 on, both CAMs are right until 0.8
    assert means['mIoU_cam'] == pytest.approx(100) and means['background_score_cam'] == 0
    assert 'mIoU_cam_rv' not in means


def test_masks_without_an_object_are_refused_before_training(tmp_path):
    """Background everywhere would be the best network."""
    save_label_map(str(tmp_path / 'a.png'), np.uint8([[0, 255], [128, 0]]))
    with pytest.raises(cli.BadInput, match=r'val\.txt .*1 to 3'):
        held_out(tmp_path).check_truth('val.txt', needed=False)
    save_label_map(str(tmp_path / 'b.png'), np.uint8([[0, 3]]))
    held_out(tmp_path).check_truth('val.txt', needed=True)


def test_without_ground_truth_the_map_alone(tmp_path):
    means, _, best = validation.measure_cams(Images().predict, None, held_out(tmp_path))
    assert list(means) == ['images', 'masks', 'mAP'] and best == 'mAP' and means['masks'] == 0


def test_ranks_share_the_images(tmp_path, monkeypatch):
    write_truth(tmp_path)
    whole = validation.measure_cams(Images().predict, None, held_out(tmp_path))
    parts = []
    monkeypatch.setattr(validation.HeldOut, 'sum', lambda self, array: parts.append(array) or array)
    for rank in range(2):
        monkeypatch.setattr(validation, 'get_rank', lambda: (rank, 2))
        validation.measure_cams(Images().predict, None, held_out(tmp_path))
    sums = [parts[0] + parts[2], parts[1] + parts[3]]
    monkeypatch.setattr(validation.HeldOut, 'sum', lambda self, array: sums.pop(0))
    assert validation.measure_cams(Images().predict, None, held_out(tmp_path)) == whole


# ----- the best weights -----

@pytest.fixture
def validate(tmp_path, monkeypatch):
    """Returns a function that validates a network (its weight is the step) with these values of a measure, in turn."""
    def validate(values, name='mAP', names=('a',), best=None, keep_best=True):
        net = torch.nn.Linear(1, 1)
        images = types.SimpleNamespace(names=list(names), errors=types.SimpleNamespace(pop=lambda: []))
        checkpoint = types.SimpleNamespace(net=net, session_name=str(tmp_path / 'x'), best=best)
        values = iter(values)
        run = validation.Validation(1, lambda *_: ({name: next(values)}, {}, name), images, keep_best)
        batches = types.SimpleNamespace(epoch_steps=1, max_step=9)
        log = type('Log', (), {'__call__': lambda *_: None, 'record': lambda *_: None})()
        for step in range(1, 10):
            torch.nn.init.constant_(net.weight, step)
            try:
                run.run(step, batches, checkpoint, log, None)
            except StopIteration:
                break
        return checkpoint.best

    def saved():
        return int(weights(tmp_path / 'x_best.pth')['weight'].item())
    return validate, saved


def test_best_weights_are_kept_also_over_a_resume(validate):
    validate, saved = validate
    best = validate([50., 70., 60.])
    assert best['step'] == saved() == 2 and best['value'] == 70
    assert validate([65., 69.], best=best) == best and saved() == 2
    assert validate([65., 71., 71.], best=best)['value'] == 71 and saved() == 2


def test_values_of_other_images_or_of_another_measure_are_no_rivals(validate):
    validate, saved = validate
    best = validate([50., 70.])
    assert validate([30.], best=best, names=['b'])['value'] == 30 and saved() == 1
    best = validate([70.])
    assert validate([30.], best=best, name='mIoU_cam')['value'] == 30


def test_lost_file_of_the_best_weights_is_written_anew(validate, tmp_path):
    validate, saved = validate
    best = validate([70.])
    (tmp_path / 'x_best.pth').unlink()
    assert validate([60.], best=best)['value'] == 60 and saved() == 1


def test_no_file_without_keep_best(validate, tmp_path):
    validate, _ = validate
    assert validate([70., 60.], keep_best=False)['value'] == 70 and not list(tmp_path.iterdir())


def test_best_of_an_earlier_run_is_named_before_it_is_replaced(tmp_path, capsys):
    (tmp_path / 'x_best.pth').touch()
    training.open_log(str(tmp_path / 'x'), None, [], keep_best=True)
    assert 'x_best.pth' in capsys.readouterr().out


# ----- bad input -----

def test_held_out_image_that_cannot_be_read_does_not_end_the_training(data):
    names = (data / LISTS / 'val.txt').read_text().split()
    (data / 'VOC2012/JPEGImages/2009_000001.jpg').write_bytes(b'nothing')
    (data / 'bad.txt').write_text('\n'.join([*names, '2009_000001']))
    np.save(data / 'labels.npy', {name: np.eye(20, dtype=np.float32)[0] for name in
                                  [*names, '2009_000001', *(data / LISTS / 'train.txt').read_text().split()]})
    out = done(train_seam(data, 'bad', *VALIDATE[:-1], 'bad.txt', '--cls_labels', 'labels.npy', '--max_epochs', 2))
    warning, = [line for line in out.splitlines() if '2009_000001' in line]
    assert '--val_list' in warning and out.count('images 4, masks 4') == 2


def test_nothing_that_can_be_measured_is_refused_and_the_checkpoint_stays(data):
    names = (data / LISTS / 'val.txt').read_text().split()
    (data / 'alone.txt').write_text('2009_000001')
    (data / 'VOC2012/JPEGImages/2009_000001.jpg').write_bytes(b'nothing')
    np.save(data / 'labels2.npy', {name: np.eye(20, dtype=np.float32)[0] for name in
                                   [*names, '2009_000001', *(data / LISTS / 'train.txt').read_text().split()]})
    result = train_seam(data, 'alone', *VALIDATE[:-1], 'alone.txt', '--cls_labels', 'labels2.npy')
    refused(result, '2009_000001', '--val_list')
    assert weights(data / 'alone_last.pth')['step'] == 3


@pytest.mark.parametrize('train, flags, words', [
    (train_seam, ('--val_every', 1, '--val_list', 'none.txt'), ('none.txt', '--val_list')),
    (train_seg, ('--val_every', 1, '--val_list', 'none.txt'), ('none.txt', '--val_list')),
    (train_seam, ('--keep_best',), ('--keep_best', '--val_every')),
    (train_seg, ('--keep_best',), ('--keep_best', '--val_every')),
    (train_seam, ('--val_every', -1), ('--val_every',))])
def test_flags_that_cannot_be(data, tmp_path, train, flags, words):
    refused(train(data, tmp_path / 'x', *flags), *words)
    assert not list(tmp_path.iterdir())


def test_segmentation_needs_ground_truth(data, tmp_path):
    (data / 'one.txt').write_text('2009_000002')
    (data / 'VOC2012/JPEGImages/2009_000002.jpg').touch()
    refused(train_seg(data, tmp_path / 'x', '--val_every', 1, '--val_list', 'one.txt'), '--val_list', 'one.txt',
            'SegmentationClass')
    assert not list(tmp_path.iterdir())


def test_list_is_not_read_without_val_every(data):
    args = train_SEAM.get_args_parser().parse_args(['--val_list', 'none.txt'])
    assert args.val_every == 0
    validation.check_validation_args(args)
    args.val_every = 1
    with pytest.raises(cli.BadInput, match='none.txt'):
        validation.check_validation_args(args)
