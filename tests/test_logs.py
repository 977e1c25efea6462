"""What training prints and logs, and the classifier's quality."""
import errno
import json
import os
import re
import sys
import types

import numpy as np
import pytest
import torch

import train_SEAM
from helpers import done, run
from tool import metrics, pyutils, training, visualization
from training_runs import ONE_STEP, data, flags, plain


@pytest.mark.parametrize('number', [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_log_goes_on_without_its_terminal_or_pipe_or_on_a_full_disk(tmp_path, monkeypatch, number):
    def write(*_):
        raise OSError(number, 'no output')
    log = pyutils.Logger(str(tmp_path / 'x'))
    monkeypatch.setattr(pyutils.tqdm, 'write', write)
    log('a line')
    assert (tmp_path / 'x.log').read_text() == 'a line\n'


def test_records_behind_the_checkpoint_are_taken_out_on_resume(tmp_path):
    log = pyutils.Logger(str(tmp_path / 'x'))
    for step in range(4):
        log.record({'step': step})
    with open(tmp_path / 'x.jsonl', 'a') as file:
        file.write('{"step": 4, "lo')           # the kill came here
    log = pyutils.Logger(str(tmp_path / 'x'), step=2)
    log.record({'step': 2})
    assert [json.loads(line)['step'] for line in (tmp_path / 'x.jsonl').read_text().splitlines()] == [0, 1, 2]
    pyutils.Logger(str(tmp_path / 'x'))
    assert not (tmp_path / 'x.jsonl').read_text()


def test_new_run_says_which_files_of_an_earlier_one_it_replaces(tmp_path, capsys):
    session = str(tmp_path / 'x')
    for step, ends, words in ((None, (), ()), (None, ('.pth',), ('x.pth', '--session_name')),
                              (None, ('.pth', '_last.pth'), ('x.pth', 'x_last.pth', 'x.log', '--resume')), (5, (), ())):
        for end in ends:
            (tmp_path / ('x' + end)).touch()
        training.open_log(session, step, [])
        out = capsys.readouterr().out
        assert ('warning' in out) == bool(words) and all(word in out for word in words)


def test_new_run_puts_the_checkpoint_of_an_earlier_one_aside(tmp_path):
    """A --resume of the new run, killed before its first checkpoint, ended with the weights of the old one."""
    (tmp_path / 'x_last.pth').write_text('old')
    training.open_log(str(tmp_path / 'x'), None, [])
    assert not (tmp_path / 'x_last.pth').exists() and (tmp_path / 'x_last_earlier.pth').read_text() == 'old'


def test_every_session_has_a_tensorboard_folder_and_a_resumed_one_hides_later_steps(tmp_path, monkeypatch):
    opened = []
    writer = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: opened.append((folder, purge_step)))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', writer)
    for session, step in (('a', 0), ('runs/a', 0), ('../runs//a', 7), ('/runs/a', 0)):
        visualization.open_writer('tb', session, step, print)
    assert opened == [('tb/a', 0), ('tb/runs/a', 0), ('tb/runs/a', 7), ('tb/runs/a', 0)]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_full_disk_under_the_log_is_one_line_and_the_run_goes_on(data):
    (data / 'nolog.log').symlink_to('/dev/full')
    out = done(run(data, 'train_SEAM', *flags('train_SEAM', 'nolog', *ONE_STEP)))
    assert out.count('warning: cannot write nolog.log (--session_name): No space left on device') == 1
    assert 'Iter:    0/    1' in out and (data / 'nolog.pth').is_file()


def test_record_of_every_print_step(data, plain):
    record, last = [json.loads(line) for line in (data / 'plain_train_SEAM.jsonl').read_text().splitlines()]
    assert last['step'] == 3
    assert record['step'] == 0 and record['epoch'] == 0 and record['lr'] == 0.01 and record['memory_gib'] > 0
    assert {'loss', 'loss_cls1', 'loss_er', 'loss_ecr2', 'mAP', 'images_per_second'} <= set(record)
    head = (data / 'plain_train_SEAM.log').read_text().splitlines()
    first = next(line for line in head if line.startswith('Iter:'))
    assert 'lr=0.01' in head[0] and f'torch {torch.__version__}' in head[1] and 'revision' in head[1]
    assert re.match(r'Iter: +0/ +4 loss:(\d\.\d{4} ?){4}imps:[\d.]+ Fin:.* lr: 0\.0100 mAP: [\d.]+$', first)


def test_average_precision_by_hand():
    scores = np.array([[.9, .1], [.8, .2], [.7, .3], [.6, .4]])
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(metrics.average_precision(scores, labels), [(1 + 2 / 3) / 2 * 100, 100])


def test_class_without_images_does_not_count():
    meter = metrics.ClassificationMeter()
    meter.add(torch.tensor([[.9, .5], [.1, .4]]), torch.tensor([[1., 0], [0, 0]]))
    assert meter.pop() == (100, 50)


def test_a_classifier_that_knows_nothing_is_warned_of(tmp_path):
    log = pyutils.Logger(str(tmp_path / 'x'))
    for quality in ((20., 10.), (20., 10.), (80., 10.)):
        train_SEAM.warn_of_poor_training(log, {'loss_er': 1e-5, 'loss_ecr': .4, 'mAP': quality[0]}, quality[1])
    text = (tmp_path / 'x.log').read_text()
    assert text.count('mean average precision') == 1 and text.count('ER has collapsed') == 1
    assert 'lower --lr' not in text
