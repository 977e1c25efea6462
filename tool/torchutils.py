"""Optimizer, random numbers, batches of a training run, items of an inference run, and calibration of batch norm."""
import multiprocessing.queues
import os
import random
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from tool.cli import BadInput
from tool.devices import get_rank


def poly_lr(lr, step, max_step, power=0.9):
    """Returns the learning rate of update number `step` (from 0): lr * (1 - step/max_step)^power.
    From max_step on it is that of the last update, as in the reference."""
    return lr * (1 - min(step, max_step - 1) / max_step) ** power


class PolyOptimizer(torch.optim.SGD):
    """SGD with a learning rate that falls as `poly_lr` in every parameter group.

    The reference passes weight_decay where SGD expects the momentum, and the published numbers were made so;
    momentum=None repeats this. Weight decay comes only from the `weight_decay` entries of the groups; a group without
    one has 0. lr_steps: number of steps after which the learning rate reaches 0; by default max_step.
    """

    def __init__(self, params, lr, weight_decay, max_step, power=0.9, momentum=None, lr_steps=None):
        super().__init__(params, lr, momentum=weight_decay if momentum is None else momentum)
        self.global_step = 0
        self.max_step = max_step
        self.lr_steps = lr_steps or max_step
        self.power = power
        for group in self.param_groups:
            group['initial_lr'] = group['lr']

    def step(self, closure=None):
        for group in self.param_groups:
            group['lr'] = poly_lr(group['initial_lr'], self.global_step, self.lr_steps, self.power)
        loss = super().step(closure)
        self.global_step += 1
        return loss


def set_seed(*numbers):
    """Seeds python, numpy and torch (also CUDA) from whole numbers >= 0, such as (seed, step)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededDataset(Dataset):
    """A dataset whose random augmentation depends only on (seed, epoch, index); it is indexed by (epoch, index).
    Returns the BadInput of an item that cannot be read, so that `read_batches` raises it in the main process."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        set_seed(self.seed, *key)
        try:
            return self.dataset[key[1]]
        except BadInput as error:
            return error


def collate(items):
    """`collate_fn` for a SeededDataset: returns PyTorch's batch, or the first BadInput among the items."""
    bad = [item for item in items if isinstance(item, BadInput)]
    return bad[0] if bad else default_collate(items)


def read_batches(loader):
    """Yields the batches of a loader with `collate`. Raises the BadInput of an item that cannot be read."""
    for batch in loader:
        if isinstance(batch, BadInput):
            raise batch
        yield batch


class StepBatches(Sampler):
    """Yields the batches of a training run from update number `start` to `max_step`: lists of (epoch, index).

    Every epoch of `epoch_steps` batches has its own permutation; images that do not fill a batch are left out of it.
    Rank r of `ranks` gets every ranks-th image of each batch; with share=False every rank gets the whole batch.
    """

    def __init__(self, size, batch_size, start, max_step, seed, share=True):
        self.size, self.batch_size, self.start, self.max_step, self.seed = size, batch_size, start, max_step, seed
        self.share = share
        self.epoch_steps = size // batch_size

    def __len__(self):
        return max(self.max_step - self.start, 0)       # with a list that became shorter, max_step may be below start

    def __iter__(self):
        rank, ranks = get_rank() if self.share else (0, 1)
        order_of = None
        for step in range(self.start, self.max_step):
            epoch, place = divmod(step, self.epoch_steps)
            if order_of != epoch:
                order_of, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
            batch = order[place * self.batch_size:(place + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch[rank::ranks]]


def list_batches(size, batch_size):
    """Returns batches for a SeededDataset that contain every item exactly once, in the order of the list and augmented
    as in epoch 0; the last batch may be smaller. They are the same on every rank."""
    keys = [(0, index) for index in range(size)]
    return [keys[start:start + batch_size] for start in range(0, size, batch_size)]


class SkipBad:
    """The items of a dataset for some of its names. Returns the error of an item that cannot be read, since a loader
    process that raises it would end the loading; `read_items` handles it."""

    def __init__(self, dataset, names):
        place = {name: index for index, name in enumerate(dataset.img_name_list)}
        self.dataset, self.indices = dataset, [place[name] for name in names]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        try:
            return self.dataset[self.indices[number]]
        except (BadInput, MemoryError) as error:
            return error


def end_if_stuck(_):
    """`worker_init_fn` of the loaders: a worker that cannot hand its item over, because /dev/shm is full, says so and
    ends. Otherwise the script would wait for the item for ever."""
    def end(error, _):
        print(f'a loader process cannot hand an item over: {error}', file=sys.stderr, flush=True)
        os._exit(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


def read_items(dataset, names, errors, num_workers, device, desc, worker_init_fn=end_if_stuck):
    """Yields the dataset's items for these names, with a progress bar. The error of an item that cannot be read goes to
    `errors`, an `Errors` of tool/on_error.py, which raises it or keeps it."""
    loader = DataLoader(SkipBad(dataset, names), batch_size=None, num_workers=num_workers,
                        pin_memory=device.type == 'cuda', worker_init_fn=worker_init_fn)
    for item, name in zip(tqdm(loader, desc=desc, dynamic_ncols=True, disable=None), names):
        if isinstance(item, Exception):
            with errors.caught(name):
                raise item
        else:
            yield item


@torch.no_grad()
def calibrate_batch_norm(net, batches):
    """Sets the running statistics of a network with random weights to those of a few batches (N, 3, H, W).

    Batch norm is frozen in this method; with the default statistics (mean 0, variance 1) the signal of a random network
    would not get through 37 norms. The mode of net is not restored.
    """
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    net.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None            # a plain mean over the batches
        norm.train()
    for batch in batches:
        net(batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
