"""A training run: its steps and progress lines, its checkpoints, and how it is stopped and taken up again."""
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

from tool.cli import BadInput, NotFinite, check_file, check_range, is_out_of_memory
from tool.devices import check_replicas, describe_run, get_device, get_rank, peak_memory, seed_gpus
from tool.files import atomic_write, describe
from tool.pyutils import Logger
from tool.torchutils import read_batches, set_seed
from tool.unpickle import load_tensors

# for `exit_on_bad_input`
MEMORY_HELP = ('--accum 2 or more, --checkpointing, --amp bf16, a smaller --batch_size or --crop_size and fewer '
               '--num_workers; the last checkpoint stays')


def check_training_args(args):
    """Raises BadInput for flags of the training scripts that cannot be."""
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
        raise BadInput(f'--session_name {args.session_name} ends in a folder; name the files in it: '
                       f'{args.session_name}NAME')
    if args.weights:
        check_file(args.weights, '--weights')


def check_batch_size(dataset, args):
    if len(dataset) < args.batch_size:
        raise BadInput(f'{args.train_list} (--train_list) has {len(dataset)} images, fewer than --batch_size')


def set_up(args, one_gpu=False):
    """Seeds the random numbers and returns the device, see `get_device`. Writes nothing. Raises BadInput."""
    set_seed(args.seed)
    device = get_device(args.device, args.tf32, one_gpu)
    check_replicas(device, args.amp)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def open_log(args, device, description, step):
    """The Logger of a run, with its arguments, versions, device, and a description of its list written down. A new run
    says which files of an earlier one it replaces. step: the number of the first update, from 0."""
    found = [args.session_name + end for end in ('.pth', '_last.pth', '.log', '.jsonl')
             if os.path.isfile(args.session_name + end)]
    log = Logger(args.session_name, step if args.resume else None, quiet=get_rank()[0] > 0)
    for line in (*describe_run(args, device), f'{args.train_list}: {description}'):
        log(line)
    if args.resume:
        log(f'resumed after {step} steps')
    elif found:
        last = args.session_name + '_last.pth'
        advice = f'--resume would go on from {last}' if last in found else 'another --session_name would keep them'
        log(f'warning: this run replaces {", ".join(found)} of an earlier run (--session_name); {advice}')
    return log


# ----- the steps -----

def training_steps(loader, meter, log, net, optimizer, scaler, args, inputs):
    """Yields (step, names, the other parts of the batch on the network's device) from `optimizer.global_step` on, each
    with random numbers of its own. The body of the loop makes one update, and adds its losses to `meter`.

    loader: of StepBatches. After every epoch and every --save_every steps, the first rank saves a checkpoint. So too
    when the run ends early: by a signal, with exit code 128 + its number, or by BadInput for an unreadable image, which
    the user may repair or take out of the list, see `resume`.
    """
    rank, _ = get_rank()
    epoch_steps = loader.batch_sampler.epoch_steps
    device = optimizer.param_groups[0]['params'][0].device
    stopped = 0
    try:
        with StopOnSignal() as stop:
            for names, *tensors in tqdm(read_batches(loader), 'train', len(loader), dynamic_ncols=True,
                                        disable=rank > 0 or None):
                step = optimizer.global_step
                set_seed(args.seed, step, rank)
                seed_gpus(args.seed, step, rank)
                yield step, names, *_move(tensors, device)
                optimizer.global_step = step + 1        # also where fp16 overflowed and the update was skipped
                stopped = stop.exit_code(device)
                if stopped or (step + 1) % epoch_steps == 0 or (step + 1) % args.save_every == 0:
                    meter.check()       # a ruined network does not replace a good one
                    if rank == 0:
                        save_checkpoint(net, optimizer, scaler, args, inputs)
                if stopped:
                    break
    except BadInput:            # on any rank: all have the same weights
        meter.check()
        save_checkpoint(net, optimizer, scaler, args, inputs)
        log(f'stopped after {optimizer.global_step} steps; the same command with --resume goes on, also with a list from '
            'which images were taken out')
        raise
    if dist.is_initialized():       # all ranks come to their end together
        dist.destroy_process_group()
    if stopped:
        log(f'stopped by a signal after {optimizer.global_step} steps; the same command with --resume goes on')
        sys.exit(stopped)


def _move(value, device):
    """A tensor, or those in lists of lists, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return [_move(part, device) for part in value]


def report_progress(log, timer, batches, optimizer, step, means):
    """Logs the `Iter:` line of the reference, and a record of everything: step, epoch, means, lr, images/s, memory.

    batches: the StepBatches. step: the number of the last update, from 0. means: dict of floats; the line shows the
    losses, AffinityNet's numbers of pairs (cnt) and the mAP, where they are there.
    """
    lr = optimizer.param_groups[0]['lr']
    speed, finish = timer.report(step + 1, batches.max_step, batches.batch_size)
    losses = [f'{means[name]:.4f}' for name in ('loss', 'loss_cls', 'loss_er', 'loss_ecr', 'bg_loss', 'fg_loss',
                                                'neg_loss') if name in means]
    counts = [f'{means[name]:.0f}' for name in ('bg_cnt', 'fg_cnt', 'neg_cnt') if name in means]
    line = f'Iter:{step:5d}/{batches.max_step:5d} loss:{" ".join(losses)} imps:{speed:.1f}'
    if counts:
        line += f' cnt:{" ".join(counts)}'
    line += f' Fin:{finish} lr: {lr:.4f}'
    if 'mAP' in means:
        line += f' mAP: {means["mAP"]:.1f}'
    log(line)
    log.record({'step': step, 'epoch': step // batches.epoch_steps, **means, 'lr': lr, 'images_per_second': speed,
                'memory_gib': peak_memory() / 2 ** 30})


# ----- checkpoints -----

# what a resumed run may change without ending elsewhere, except for rounding; with another `accum`, dropout draws other
# masks, and a batch norm that trains sees other batches
FREE_ON_RESUME = {'resume', 'session_name', 'save_every', 'log_every', 'tblog_dir', 'weights', 'reset_head', 'val_list',
                  'voc12_root', 'num_workers', 'device', 'deterministic', 'accum', 'checkpointing'}


def _save(what, path):
    """torch.save of all or nothing. Raises BadInput where the disk is full."""
    with atomic_write(path) as file:
        try:
            torch.save(what, file)
        except RuntimeError as error:       # of PyTorch's zip writer, whose write failed
            raise OSError(errno.EIO, 'is the disk full?') from error


def save_weights(net, path, leave_out=()):
    """Writes the bare state dict, which the original code loads too, without the names in `leave_out`; on rank 0."""
    if get_rank()[0] == 0:
        _save({name: tensor for name, tensor in net.state_dict().items() if name not in leave_out}, path)


def digest(value):
    """Eight bytes (hex) that follow from a value of lists, dicts, arrays, text and numbers."""
    text = json.dumps(value, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_inputs(train_list, **others):
    """What tells the inputs of a training from others, wherever they lie: for each flag the `digest` of what was read,
    and as `images` that of the name and label of each image, by which `resume` knows images taken out of the list.
    train_list: the names; cls_labels, where labels are read: dict name -> label."""
    labels = others.get('cls_labels', {})
    images = [digest([name, labels.get(name)]) for name in train_list]
    return {'images': images, **{flag: digest(value) for flag, value in {'train_list': train_list, **others}.items()}}


def save_checkpoint(net, optimizer, scaler, args, inputs):
    """Writes <session_name>_last.pth with all that `resume` needs: weights, optimizer, number of updates, and the
    arguments that it compares. inputs: as `digest_inputs` returns. Raises NotFinite rather than put ruined weights in
    place of good ones."""
    path = args.session_name + '_last.pth'
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise NotFinite(f'the weights are not finite after step {optimizer.global_step}; {path} is as before')
    checkpoint = {'model': net.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                  'step': optimizer.global_step, 'args': vars(args), 'inputs': inputs, 'torch': str(torch.__version__)}
    _save(checkpoint, path)


def resume(net, optimizer, scaler, args, inputs):
    """Restores what `save_checkpoint` wrote. Raises BadInput for another file, and for flags that contradict it: other
    values, and of files other contents, wherever they lie. Images may have been taken out of the list, as a user does
    with one that cannot be read."""
    path = args.session_name + '_last.pth' if args.resume is True else args.resume
    check_file(path, '--resume')
    try:
        checkpoint = load_tensors(path)
        if 'optimizer' not in checkpoint:
            raise ValueError('it has no state of the optimizer; weights alone go to --weights')
        before, read_before = checkpoint['args'], checkpoint.get('inputs', {})      # without these, paths are compared
        images, images_before = inputs['images'], read_before.get('images', [])
        rest = iter(images_before)
        fewer = images_before and all(image in rest for image in images)        # all of them, in the same order
        free = ('images', 'train_list', 'cls_labels') if fewer else ('images',)
        differ = [f'--{key} was {before[key]}' for key in vars(args) if key in before and key not in FREE_ON_RESUME
                  and key not in read_before and before[key] != getattr(args, key)]
        differ += [f'--{key} {getattr(args, key)} has other contents than {before[key]} had' for key in inputs
                   if key in read_before and read_before[key] != inputs[key] and key not in free]
        if not differ:
            net.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])
            optimizer.global_step = checkpoint['step']
            scaler.load_state_dict(checkpoint['scaler'])
    except Exception as error:          # a damaged file raises whatever it likes
        if is_out_of_memory(error):
            raise
        raise BadInput(f'{path} (--resume) is no checkpoint of this training: {describe(error)}') from error
    if differ:
        raise BadInput(f'{path} (--resume) was made with other flags: {"; ".join(differ)}')
    if fewer and len(images) < len(images_before) and get_rank()[0] == 0:
        print(f'{args.train_list} (--train_list) has {len(images)} of the {len(images_before)} images that {path} '
              '(--resume) was made with; the training goes on with these')


# ----- signals -----

HANG_UP = [signal.SIGHUP] if hasattr(signal, 'SIGHUP') else []      # of a terminal that is closed; not on Windows


def outlive_sigterm(_):
    """`worker_init_fn` of the loaders: where a whole process group is signalled, the workers outlive the last step."""
    for number in (signal.SIGTERM, *HANG_UP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers():
    """Python ends the workers that a failed run left with SIGTERM and waits for them: for ever, if they outlive it."""
    if hasattr(signal, 'SIGCHLD'):                          # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # the loader's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


class StopOnSignal:
    """Inside the block, SIGTERM, SIGHUP and the first Ctrl-C only make a note, so that the step can end; a second Ctrl-C
    interrupts at once. A SIGHUP that is ignored stays so: `nohup` means that the training goes on."""

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
        """0, or 128 + the number of a signal that came, to this rank or to another."""
        if not dist.is_initialized():
            return 128 + self.number if self.number else 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return 128 + number.item() if number else 0
