"""Optimizer, seeds, devices and checkpoints."""
import random

import numpy as np
import torch

from tool.pyutils import BadInput, atomic_write


def poly_lr(lr, step, max_step, power=0.9):
    """Learning rate of update number `step` (from 0): lr * (1 - step/max_step)^power.
    From max_step on, that of the last update, as in the reference."""
    return lr * (1 - min(step, max_step - 1) / max_step) ** power


class PolyOptimizer(torch.optim.SGD):
    """SGD whose learning rate falls as `poly_lr` in every parameter group.

    The reference passed weight_decay into SGD's momentum slot, and its numbers were made so: momentum=None
    repeats that. Weight decay comes only from the groups' own `weight_decay` entries; a group without one has 0.
    """

    def __init__(self, params, lr, weight_decay, max_step, power=0.9, momentum=None):
        super().__init__(params, lr, momentum=weight_decay if momentum is None else momentum)
        self.global_step = 0
        self.max_step = max_step
        self.power = power
        for group in self.param_groups:
            group['initial_lr'] = group['lr']

    def step(self, closure=None):
        for group in self.param_groups:
            group['lr'] = poly_lr(group['initial_lr'], self.global_step, self.max_step, self.power)
        loss = super().step(closure)
        self.global_step += 1
        return loss


def set_seed(seed):
    """Seeds python, numpy and torch; loader workers draw theirs from torch's."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def get_device(name):
    """torch.device of the `--device` flag; None picks CUDA where there is any. Raises BadInput.

    Switches off TF32, which PyTorch uses for convolutions by default: the published numbers are full float32.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f'no such device: {name} (--device); cuda, cuda:N or cpu expected') from error
    if device.type not in ('cuda', 'cpu'):
        raise BadInput(f'--device {name}: cuda, cuda:N or cpu expected')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f'--device {name}: {torch.cuda.device_count()} GPUs are visible to PyTorch')
    return device


def parallel(net, device):
    """For `--device cuda`, net wrapped so that batches spread over all visible GPUs; else net."""
    if device.type == 'cuda' and device.index is None and torch.cuda.device_count() > 1:
        return torch.nn.DataParallel(net)
    return net


def save_weights(net, path, leave_out=()):
    """Writes the bare state dict, which the original code loads too, without the names in `leave_out`."""
    weights = {name: tensor for name, tensor in net.state_dict().items() if name not in leave_out}
    with atomic_write(path) as file:
        torch.save(weights, file)


@torch.no_grad()
def calibrate_batch_norm(net, batches):
    """Sets the running statistics of a network with random weights to those of a few batches (N, 3, H, W).

    Batch norm is frozen in this method; with the default statistics (mean 0, variance 1) the signal of a
    random network would not get through 37 of them. The mode of net is not restored.
    """
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    net.eval()
    momentum = norms[0].momentum
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None            # a plain mean over the batches
        norm.train()
    for batch in batches:
        net(batch)
    for norm in norms:
        norm.momentum = momentum
