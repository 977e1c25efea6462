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
