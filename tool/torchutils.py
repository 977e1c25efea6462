"""Optimizer, random numbers, the batches of a training run, the items of an inference run, batch-norm calibration."""
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from tool.cli import BadInput
from tool.devices import get_rank


def poly_lr(lr, step, max_step, power=0.9):
    """Learning rate of update number `step` (from 0): lr * (1 - step/max_step)^power.
    From max_step on, that of the last update, as in the reference."""
    return lr * (1 - min(step, max_step - 1) / max_step) ** power


class PolyOptimizer(torch.optim.SGD):
    """SGD whose learning rate falls as `poly_lr` in every parameter group.

    The reference passed weight_decay into SGD's momentum slot, and its numbers were made so: momentum=None
    repeats that. Weight decay comes only from the groups' own `weight_decay` entries; a group without one has 0.
    lr_steps: the steps in which the learning rate would reach 0; max_step without it.
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
    """Seeds python, numpy and torch (CUDA too) from whole numbers >= 0, such as (seed, step)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededDataset(Dataset):
    """A dataset whose random augmentation depends on (seed, epoch, index) alone; it is indexed by (epoch, index).
    In place of an item that cannot be read comes its BadInput, for `read_batches` to raise in the main process."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        set_seed(self.seed, *key)
        try:
            return self.dataset[key[1]]
        except BadInput as error:
            return error


def collate(items):
    """`collate_fn` for a SeededDataset: a batch as PyTorch makes it, or the first BadInput among the items."""
    bad = [item for item in items if isinstance(item, BadInput)]
    return bad[0] if bad else default_collate(items)


def read_batches(loader):
    """The batches of a loader with `collate`. Raises the BadInput of an item that cannot be read."""
    for batch in loader:
        if isinstance(batch, BadInput):
            raise batch
        yield batch


class StepBatches(Sampler):
    """The batches of a training run from update number `start` to `max_step`: lists of (epoch, index).

    Every epoch of `epoch_steps` batches is a permutation of its own; the images left over by whole batches wait for the
    next. Of each batch, rank r of `ranks` takes every ranks-th image; with share=False every rank takes all of it.
    """

    def __init__(self, size, batch_size, start, max_step, seed, share=True):
        self.size, self.batch_size, self.start, self.max_step, self.seed = size, batch_size, start, max_step, seed
        self.share = share
        self.epoch_steps = size // batch_size

    def __len__(self):
        return max(self.max_step - self.start, 0)       # a shorter list may end before `start`

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
    """Batches for a SeededDataset in which every item comes exactly once, in the order of the list and as augmented in
    epoch 0; the last batch may be smaller. The same on every rank."""
    keys = [(0, index) for index in range(size)]
    return [keys[start:start + batch_size] for start in range(0, size, batch_size)]


class SkipBad:
    """The items of a dataset for some of its names. In place of an item that cannot be had stands its error, for
    `read_items`: a loader process that raised it would end the loading."""

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


def read_items(dataset, names, errors, num_workers, device, desc, worker_init_fn=None):
    """Yields the dataset's items for these names, with a progress bar. One that cannot be had goes to `errors`, an
    `Errors` of tool/on_error.py, which raises it or keeps it."""
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

    Batch norm is frozen in this method; with the default statistics (mean 0, variance 1) the signal of a
    random network would not get through 37 of them. The mode of net is not restored.
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
