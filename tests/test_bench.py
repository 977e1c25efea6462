"""tests/by_hand/bench.py voc: its commands, and what it makes of the times. The scripts do not run here."""
import argparse
import importlib
import os

import pytest
import torch

import pipeline
from conftest import ROOT


@pytest.mark.parametrize('width', pipeline.NETS)
@pytest.mark.parametrize('size', [None, (48, 64)])
def test_commands_of_all_nine_steps_have_flags_that_exist(width, size):
    args = argparse.Namespace(width=width, size=size, count=24, num_workers=2, amp='bf16', device=torch.device('cuda'))
    steps = pipeline.list_steps(args)
    assert [name[0] for name, *_ in steps] == list('123456789')
    for _, per_batch, _, script, flags in steps:
        flags = importlib.import_module(script[:-3]).get_args_parser().parse_args(flags.split())
        assert per_batch == getattr(flags, 'batch_size', per_batch)
        if script != 'evaluation.py':
            assert os.path.isfile(os.path.join(ROOT, flags.network.replace('.', '/') + '.py'))
        if script == 'train_aff.py':
            assert flags.crop_size % 8 == 0 and flags.crop_size >= 40


def test_rate_and_waiting_leave_the_first_fifth_out():
    # ten batches of 8: the first two are slow, each of the others takes a second, a quarter of which is waiting
    batches = [[100., 100.], [150., 50.]] + [[151. + number, .25] for number in range(8)]
    rate, waits, busy = pipeline.steady_state(batches, 8, [(120, 0.), (152, .5), (157, 1.), (200, 0.)])
    assert (rate, waits, busy) == (8, .25, .75)


def test_rate_leaves_prepared_batches_out_but_no_more_than_half():
    # the first four of ten batches come at once
    batches = [[100., 0.]] * 4 + [[100. + number, 1.] for number in range(1, 7)]
    assert pipeline.steady_state(batches, 8, [], prepared=4)[0] == 8
    assert pipeline.steady_state(batches, 8, [], prepared=100)[0] == 8


def test_load_of_a_gpu_that_tells_none_and_of_a_line_that_was_cut_off(tmp_path):
    (tmp_path / 'load.txt').write_text('2026/01/02 03:04:05.500, 40\n2026/01/02 03:04:06.000, [N/A]\n2026/01')
    (moment, share), = pipeline.read_loads(tmp_path / 'load.txt')
    assert share == .4 and moment % 60 == 5.5


def test_failed_step_does_not_end_the_benchmark(monkeypatch, capsys):
    def run_script(script, flags, folder, on_gpu, timed):
        if script == 'train_aff.py':
            raise pipeline.BadInput('train_aff.py ended with exit code 2')
        batches = [[float(number), 0.] for number in range(10)]
        return 10., {'batches': batches, 'peak': 2 ** 30} if timed else None, []
    monkeypatch.setattr(pipeline, 'run_script', run_script)
    monkeypatch.setattr(pipeline, 'draw_data', lambda *_: None)
    args = argparse.Namespace(width=16, size=(48, 64), count=24, num_workers=1, amp='off', on_gpu=False,
                              device=torch.device('cpu'))
    rows = pipeline.bench_voc(args)
    assert [row[1] == 'failed' for row in rows] == [row[0].startswith('4') for row in rows]
    assert 'exit code 2' in capsys.readouterr().out
