"""Optimizer, random numbers, devices and ranks, checkpoints."""
import atexit
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from tool.pyutils import BadInput, NotFinite, atomic_write, check_file
from tool.safe_pickle import check_weights, describe


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


# ----- random numbers: each step's and each sample's follow from whole numbers alone, so a run that was stopped goes on
# with the very same ones, on any number of loader workers -----

def set_seed(*numbers):
    """Seeds python, numpy and torch (CUDA too) from whole numbers >= 0, such as (seed, step)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededDataset(Dataset):
    """A dataset whose random augmentation depends on (seed, epoch, index) alone; it is indexed by (epoch, index)."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        set_seed(self.seed, *key)
        return self.dataset[key[1]]


class StepBatches(Sampler):
    """The batches of a training run from update number `start` to `max_step`: lists of (epoch, index).

    Every epoch is a permutation of its own; the images left over by whole batches wait for the next. Of each
    batch, rank r of `ranks` takes every ranks-th image.
    """

    def __init__(self, size, batch_size, start, max_step, seed):
        self.size, self.batch_size, self.start, self.max_step, self.seed = size, batch_size, start, max_step, seed

    def __len__(self):
        return self.max_step - self.start

    def __iter__(self):
        rank, ranks = get_rank()
        order_of = None
        for step in range(self.start, self.max_step):
            epoch, place = divmod(step, self.size // self.batch_size)
            if order_of != epoch:
                order_of, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
            batch = order[place * self.batch_size:(place + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch[rank::ranks]]


# ----- devices and ranks -----

def get_rank():
    """(rank, number of ranks) of this process: (0, 1) unless torchrun started it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def get_device(name, tf32=False):
    """torch.device of the `--device` flag; None picks CUDA where there is any. A rank of torchrun gets its own GPU.

    Switches TF32 off, which PyTorch uses for convolutions by default, for the published numbers are full float32;
    or on, for matrix products too. Raises BadInput.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda' and get_rank()[1] > 1:
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f'no such device: {name} (--device); cuda, cuda:N or cpu expected') from error
    if device.type not in ('cuda', 'cpu'):
        raise BadInput(f'--device {name}: cuda, cuda:N or cpu expected')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f'--device {name}: {torch.cuda.device_count()} GPUs are visible to PyTorch')
    if device.index is not None and device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def parallel(net, device, amp='off'):
    """net, wrapped so that batches spread over the ranks of torchrun, or for `--device cuda` over all visible GPUs."""
    if get_rank()[1] > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        for buffer in net.buffers():        # batch norm that each rank may have calibrated on images of its own
            dist.broadcast(buffer, 0)
        return torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[device] if device.type == 'cuda' else None, broadcast_buffers=False)
    if device.type == 'cuda' and device.index is None and torch.cuda.device_count() > 1:
        if amp == 'bf16':       # its threads fall back to fp16
            raise BadInput('--amp bf16 on several GPUs needs torchrun; or name one with --device cuda:0')
        return torch.nn.DataParallel(net)
    return net


def sum_over_ranks(tensor):
    """The sum of a tensor over the ranks of torchrun, in place; the tensor itself without ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast(device, amp):
    """The context in which the network runs for the `--amp` flag: off, bf16 or fp16."""
    return torch.autocast(device.type, torch.float16 if amp == 'fp16' else torch.bfloat16, enabled=amp != 'off')


def use_deterministic():
    """Makes CUDA compute the same bits from the same numbers, for `--deterministic`."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def describe_run(args, device):
    """Lines for the head of a log: arguments, versions, device, revision of the code."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        revision = subprocess.run(['git', '-C', here, 'describe', '--always', '--dirty'], capture_output=True,
                                  text=True).stdout.strip()
    except OSError:             # no git here
        revision = ''
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    return [' '.join(f'{key}={value}' for key, value in vars(args).items()),
            f'python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}; {name}, '
            f'{get_rank()[1]} ranks; revision {revision or "unknown"}']


def peak_memory():
    """Bytes: the most that this process has had on the GPU, or without one in main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                 # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_progress(log, timer, optimizer, args, epoch_steps, means, counts=()):
    """Logs the `Iter:` line of the reference, and a record of everything: step, epoch, means, lr, images/s, memory.

    means: dict of floats; of these the losses are shown, and mAP where there is one. counts: of AffinityNet's pairs.
    """
    step, max_step, lr = optimizer.global_step, optimizer.max_step, optimizer.param_groups[0]['lr']
    speed, finish = timer.report(step, max_step, args.batch_size)
    shown = [means[name] for name in ('loss', 'loss_cls', 'loss_er', 'loss_ecr', 'bg_loss', 'fg_loss', 'neg_loss')
             if name in means]
    parts = [f'Iter:{step - 1:5d}/{max_step:5d}', 'loss:' + ' '.join(f'{loss:.4f}' for loss in shown),
             f'imps:{speed:.1f}']
    if counts:
        parts.append('cnt:' + ' '.join(f'{count:.0f}' for count in counts))
    parts += [f'Fin:{finish}', f'lr: {lr:.4f}']
    if 'mAP' in means:
        parts.append(f'mAP: {means["mAP"]:.1f}')
    log(' '.join(parts))
    log.record({'step': step - 1, 'epoch': (step - 1) // epoch_steps, **means, 'lr': lr, 'images_per_second': speed,
                'memory_gib': peak_memory() / 2 ** 30})


# ----- checkpoints -----

# what a resumed run may change without ending elsewhere, except for rounding
FREE_ON_RESUME = {'resume', 'session_name', 'save_every', 'tblog_dir', 'weights', 'reset_head', 'val_list',
                  'voc12_root', 'num_workers', 'device', 'deterministic', 'accum', 'checkpointing'}


def _save(what, path):
    """torch.save of all or nothing. Raises BadInput where the disk is full."""
    with atomic_write(path) as file:
        try:
            torch.save(what, file)
        except RuntimeError as error:       # of PyTorch's zip writer, whose write failed
            raise OSError(errno.EIO, 'is the disk full?') from error


def save_weights(net, path, leave_out=()):
    """Writes the bare state dict, which the original code loads too, without the names in `leave_out`."""
    weights = {name: tensor for name, tensor in net.state_dict().items() if name not in leave_out}
    _save(weights, path)


def save_checkpoint(path, net, optimizer, scaler, args):
    """Writes all that `resume` needs: weights, optimizer, number of updates, and the arguments that it compares.
    Raises NotFinite rather than put ruined weights in place of good ones."""
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise NotFinite(f'the weights are not finite after step {optimizer.global_step}; {path} is as before')
    checkpoint = {'model': net.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                  'step': optimizer.global_step, 'args': vars(args), 'torch': str(torch.__version__)}
    _save(checkpoint, path)


def resume(path, net, optimizer, scaler, args):
    """Restores what `save_checkpoint` wrote. Raises BadInput for another file, and for flags that contradict it."""
    check_file(path, '--resume')
    try:
        check_weights(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        before = checkpoint['args']
        differ = [f'--{key} was {before[key]}' for key in vars(args)
                  if key in before and key not in FREE_ON_RESUME and before[key] != getattr(args, key)]
        if not differ:
            net.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])
            optimizer.global_step = checkpoint['step']
            scaler.load_state_dict(checkpoint['scaler'])
    except Exception as error:          # a damaged pickle raises whatever it likes
        raise BadInput(f'{path} (--resume) is no checkpoint of this training: {describe(error)}') from error
    if differ:
        raise BadInput(f'{path} (--resume) was made with other flags: {", ".join(differ)}')


def outlive_sigterm(_):
    """`worker_init_fn` of the loaders: where a whole process group is signalled, the workers outlive the last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _kill_workers():
    """Python ends the workers that a failed run left with SIGTERM and waits for them: for ever, if they outlive it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # the loader's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


class StopOnSignal:
    """Inside the block, SIGTERM and the first Ctrl-C only make a note, so that the step can end; a second Ctrl-C
    interrupts at once."""

    def __enter__(self):
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_code(self, device):
        """0, or 128 + the number of a signal that came, to this rank or to another."""
        if not dist.is_initialized():
            return 128 + self.number if self.number else 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return 128 + number.item() if number else 0


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
