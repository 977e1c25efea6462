"""Devices, ranks of torchrun, precision."""
import os
import subprocess
import sys

import numpy as np
import torch
import torch.distributed as dist

from tool.cli import BadInput


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


def is_out_of_memory(error):
    """Whether an exception says that memory ran out: Python's and NumPy's, PyTorch's on a CPU, on a GPU."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and 'DefaultCPUAllocator' in str(error))


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
