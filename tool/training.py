"""A training run: its steps, progress lines and checkpoints, and how it stops and resumes."""
import atexit
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from tool.cli import HANG_UP, BadInput, NotFinite, check_file, check_range, is_killed_loader, is_out_of_memory
from tool.devices import check_replicas, get_device, get_rank, peak_memory, seed_gpus
from tool.files import atomic_write, describe, set_aside
from tool.pyutils import Logger
from tool.torchutils import end_if_stuck, read_batches, set_seed
from tool.unpickle import load_tensors

# for `exit_on_bad_input`
MEMORY_HELP = ('--accum 2 or more, --checkpointing, --amp bf16, a smaller --batch_size or --crop_size and fewer '
               '--num_workers; the last checkpoint stays')


def check_training_args(args):
    """Raises BadInput for flags of the training scripts that are out of range or contradict each other."""
    check_range(args, 1, 10 ** 6, 'batch_size', 'accum', 'save_every', 'log_every')
    check_range(args, 0, 256, 'num_workers')
    check_range(args, 0, 100, 'lr', 'wt_dec')
    check_range(args, 0, 1, 'momentum')
    check_range(args, 0, 2 ** 63, 'seed')
    _, ranks = get_rank()
    if args.batch_size % (args.accum * ranks):
        raise BadInput(f'--batch_size {args.batch_size} does not divide into --accum {args.accum} parts'
                       f' on each of {ranks} ranks')
    if not os.path.basename(args.session_name):
        raise BadInput(f'--session_name {args.session_name} is a folder: add a name for the files in it, '
                       f'{args.session_name}NAME')
    if args.weights and not args.resume:
        check_file(args.weights, '--weights')


def check_batch_size(size, batch_size, train_list):
    """Raises BadInput if the list in the file `train_list`, of `size` images, does not fill one batch."""
    if size < batch_size:
        raise BadInput(f'{train_list} (--train_list) has {size} images, fewer than --batch_size {batch_size}')


def set_up(seed, device, tf32=False, amp='off', deterministic=False, one_gpu=False):
    """Seeds the random numbers and returns the torch.device of `--device`, see `get_device`. deterministic: on a GPU,
    the same seed gives the same bits. Writes nothing. Raises BadInput."""
    set_seed(seed)
    device = get_device(device, tf32, one_gpu)
    check_replicas(device, amp)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def open_log(session_name, step, lines, keep_best=False):
    """Opens the Logger of a run, which begins with `lines`. A new run (step None) warns of the files of an earlier run
    that it replaces, and renames its checkpoint, which a later --resume would take for its own; a resumed run continues
    with update number `step`."""
    last = session_name + '_last.pth'
    paths = [session_name + '.pth', last, session_name + '.log', session_name + '.jsonl']
    if keep_best:
        paths.append(session_name + '_best.pth')
    found = [path for path in paths if os.path.isfile(path)]
    log = Logger(session_name, step, quiet=get_rank()[0] > 0)
    for line in lines:
        log(line)
    if step is not None:
        log(f'resumed after {step} steps')
    elif found:
        advice = 'another --session_name would keep them'
        if last in found and get_rank()[0] == 0:
            advice = f'its checkpoint is {set_aside(last)} now, from which --resume PATH would go on'
        log(f'warning: this run replaces {", ".join(found)} of an earlier run (--session_name); {advice}')
    return log


# ----- the steps -----

def training_steps(loader, meter, log, checkpoint, validation=None, writer=None):
    """Yields (step, names, the other parts of the batch on the network's device), from the checkpoint's step on. Each
    step has its own random numbers. The body of the loop makes one update and adds its losses to `meter`.

    loader: of StepBatches. The first rank saves the checkpoint after every epoch, after every `save_every` steps, and
    when the run ends early: by a signal, with exit code 128 + its number, or by the BadInput of an unreadable image,
    which the user may repair or take out of the list, see `Checkpoint.resume`. validation: a Validation of
    tool/validation.py, which runs after the checkpoint of an epoch, or None. writer: TensorBoard's, or None.
    """
    rank, _ = get_rank()
    batches, optimizer = loader.batch_sampler, checkpoint.optimizer
    device = optimizer.param_groups[0]['params'][0].device
    stopped = 0
    try:
        with StopOnSignal() as stop:
            for names, *tensors in tqdm(read_batches(loader), 'train', len(loader), dynamic_ncols=True,
                                        disable=rank > 0 or None):
                step = optimizer.global_step
                if validation:
                    validation.run(step, batches, checkpoint, log, writer)     # before the step's random numbers begin
                set_seed(batches.seed, step, rank)
                seed_gpus(batches.seed, step, rank)
                yield step, names, *_move(tensors, device)
                optimizer.global_step = step + 1        # also where fp16 overflowed and the update was skipped
                stopped = stop.exit_code(device)
                done = step + 1 == batches.max_step
                if stopped or done or (step + 1) % batches.epoch_steps == 0 or (step + 1) % checkpoint.save_every == 0:
                    meter.check()       # a ruined network does not replace a good one
                    if rank == 0:
                        checkpoint.save()
                if stopped:
                    break
            if validation and not stopped:
                validation.run(optimizer.global_step, batches, checkpoint, log, writer)
    except BadInput:            # on any rank: all have the same weights
        meter.check()
        checkpoint.save()
        log(f'stopped after {optimizer.global_step} steps; the same command with --resume continues, also if you take '
            'the image out of the list')
        raise
    if dist.is_initialized():       # all ranks come to their end together
        dist.destroy_process_group()
    if stopped:
        log(f'stopped by a signal after {optimizer.global_step} steps; the same command with --resume continues')
        sys.exit(stopped)


def _move(value, device):
    """Moves a tensor, or nested lists of tensors, to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return [_move(part, device) for part in value]


def report_progress(log, timer, batches, optimizer, step, means, losses, counts=()):
    """Logs the `Iter:` line of the reference, and a record of everything: step, epoch, means, lr, images/s, memory.

    batches: the StepBatches. step: the number of the last update, from 0. means: dict of floats; the record has all of
    them, the line its mAP and those that are named in `losses`, as far as they exist, and in `counts`.
    """
    lr = optimizer.param_groups[0]['lr']
    speed, finish = timer.report(step + 1, batches.max_step, batches.batch_size)
    shown = ' '.join(f'{means[name]:.4f}' for name in losses if name in means)
    line = f'Iter:{step:5d}/{batches.max_step:5d} loss:{shown} imps:{speed:.1f}'
    if counts:
        line += f' cnt:{" ".join(f"{means[name]:.0f}" for name in counts)}'
    line += f' Fin:{finish} lr: {lr:.4f}'
    if means.get('mAP') is not None:
        line += f' mAP: {means["mAP"]:.1f}'
    log(line)
    log.record({'step': step, 'epoch': step // batches.epoch_steps, **means, 'lr': lr, 'images_per_second': speed,
                'memory_gib': peak_memory() / 2 ** 30})


# ----- checkpoints -----

# flags that a resumed run may change: the result stays the same, except for rounding. (With another `accum`, dropout
# draws other masks, and a batch norm that trains sees other batches)
FREE_ON_RESUME = {'resume', 'session_name', 'save_every', 'log_every', 'tblog_dir', 'weights', 'reset_head',
                  'fit_classifier', 'val_list', 'val_every', 'keep_best', 'voc12_root', 'num_workers', 'device',
                  'deterministic', 'accum', 'checkpointing'}


def _save(what, path):
    """Runs torch.save; the file is written whole or not at all. Raises BadInput if the disk is full."""
    with atomic_write(path) as file:
        try:
            torch.save(what, file)
        except RuntimeError as error:       # of PyTorch's zip writer, whose write failed
            if is_killed_loader(error):
                raise
            raise OSError(errno.EIO, 'is the disk full?') from error


def save_weights(net, path, leave_out=()):
    """Writes the bare state dict, which the original code loads too, without the names in `leave_out`; on rank 0."""
    if get_rank()[0] == 0:
        _save({name: tensor for name, tensor in net.state_dict().items() if name not in leave_out}, path)


def digest(value):
    """Returns eight bytes (hex) computed from a value of lists, dicts, arrays, text and numbers."""
    text = json.dumps(value, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_inputs(train_list, **others):
    """Returns what identifies the inputs of a training, whatever their paths: for each flag the `digest` of what was
    read, and as `images` the digest of the name and label of each image, by which `Checkpoint.resume` recognises images
    that were taken out of the list. train_list: the names; cls_labels: dict name -> label, if labels are read."""
    labels = others.get('cls_labels', {})
    images = [digest([name, labels.get(name)]) for name in train_list]
    return {'images': images, **{flag: digest(value) for flag, value in {'train_list': train_list, **others}.items()}}


class Checkpoint:
    """All that a training needs to continue, in the file <session_name>_last.pth. flags: dict of the arguments. inputs:
    see `digest_inputs`. save_every: number of steps between two saves, for `training_steps`."""

    def __init__(self, session_name, net, optimizer, scaler, flags, inputs, save_every):
        self.session_name, self.path = session_name, session_name + '_last.pth'
        self.net, self.optimizer, self.scaler = net, optimizer, scaler
        self.flags, self.inputs, self.save_every = flags, inputs, save_every
        self.best = None        # of the validations, see tool/validation.py

    def save(self):
        """Writes weights, optimizer, number of updates, and the flags and inputs that `resume` compares.
        Raises NotFinite, and keeps the file of before, if the weights are not finite."""
        step = self.optimizer.global_step
        if not all(tensor.isfinite().all() for tensor in self.net.state_dict().values()):
            raise NotFinite(f'the weights are not finite after step {step}; {self.path} keeps the last good ones')
        _save({'model': self.net.state_dict(), 'optimizer': self.optimizer.state_dict(),
               'scaler': self.scaler.state_dict(), 'step': step, 'args': self.flags, 'inputs': self.inputs,
               'best': self.best, 'torch': str(torch.__version__)}, self.path)

    def resume(self, path=True):
        """Restores what `save` wrote to `path`; True means its own file. Raises BadInput for other files, and for flags
        with other values or, whatever the paths, files with other contents. Images may have been taken out of the list,
        as a user does with one that cannot be read."""
        path = self.path if path is True else path
        check_file(path, '--resume')
        try:
            saved = load_tensors(path)
            if 'optimizer' not in saved:
                raise ValueError('it has no state of the optimizer; weights alone go to --weights')
            missing = self._count_missing(saved)
            differ = self._compare(saved, images_missing=missing > 0)
            if not differ:
                self.net.load_state_dict(saved['model'])
                self.optimizer.load_state_dict(saved['optimizer'])
                self.optimizer.global_step = saved['step']
                self.scaler.load_state_dict(saved['scaler'])
                self.best = saved.get('best')
        except Exception as error:          # a damaged file raises whatever it likes
            if is_out_of_memory(error):
                raise
            raise BadInput(f'{path} (--resume) is no checkpoint of this training: {describe(error)}') from error
        if differ:
            raise BadInput(f'{path} (--resume) was made with other flags: {"; ".join(differ)}')
        if missing and get_rank()[0] == 0:
            print(f'{self.flags["train_list"]} (--train_list) has {missing} images fewer than when {path} (--resume) '
                  'was written; the training continues without them')

    def _count_missing(self, saved):
        """Returns how many images were taken out of the saved list; 0 if the list is not a part of it in its order."""
        before = saved.get('inputs', {}).get('images', [])
        rest = iter(before)
        is_part = all(image in rest for image in self.inputs['images'])
        return len(before) - len(self.inputs['images']) if is_part else 0

    def _compare(self, saved, images_missing):
        """Returns texts on the flags that differ, and on the files whose contents differ."""
        before, read_before = saved['args'], saved.get('inputs', {})        # without inputs, paths are compared
        free = {'images', 'train_list', 'cls_labels'} if images_missing else {'images'}
        differ = [f'--{key} was {before[key]}' for key in self.flags if key in before and key not in FREE_ON_RESUME
                  and key not in read_before and before[key] != self.flags[key]]
        return differ + [f'--{key} {self.flags[key]} has other contents than {before[key]} had' for key in self.inputs
                         if key in read_before and key not in free and read_before[key] != self.inputs[key]]


# ----- signals -----

def outlive_sigterm(worker):
    """`worker_init_fn` of the loaders: if a whole process group gets the signal, the workers outlive the last step."""
    end_if_stuck(worker)
    for number in (signal.SIGTERM, signal.SIGINT, *HANG_UP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers():
    """Python ends the workers of a failed run with SIGTERM, which they ignore, and would wait for them for ever."""
    if hasattr(signal, 'SIGCHLD'):                          # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # the loader's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


class StopOnSignal:
    """Inside the block, SIGTERM, SIGHUP and the first Ctrl-C are only noted, so that the step can end; a second Ctrl-C
    interrupts at once. If SIGHUP is ignored it stays so: with `nohup` the training continues."""

    def __enter__(self):
        self.number = 0
        hang_up = [number for number in HANG_UP if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note)
                        for number in (signal.SIGTERM, signal.SIGINT, *hang_up)}
        return self

    def _note(self, number, frame):
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_code(self, device):
        """Returns 0, or 128 + the number of a signal that this rank or another one got."""
        if not dist.is_initialized():
            return 128 + self.number if self.number else 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return 128 + number.item() if number else 0
