"""A training run: its progress lines, checkpoints, and how it is stopped and taken up again."""
import atexit
import errno
import multiprocessing
import signal

import torch
import torch.distributed as dist

from tool.cli import BadInput, NotFinite, check_file
from tool.devices import peak_memory
from tool.files import atomic_write, describe
from tool.unpickle import load_tensors


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
        checkpoint = load_tensors(path)
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
