"""Devices, ranks of torchrun, precision, memory."""
import inspect
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist

from tool.cli import BadInput


def get_rank():
    """(rank, number of ranks) of this process: (0, 1) unless torchrun started it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def _gpu_problem(index):
    """Why PyTorch cannot use GPU number `index`, in a line; '' where it can."""
    with warnings.catch_warnings(record=True) as told:      # PyTorch warns of an old driver, or of an old card
        warnings.simplefilter('always')
        if not torch.cuda.is_available():
            reasons = [' '.join(str(warning.message).split()) for warning in told if 'CUDA' in str(warning.message)]
            return reasons[0].split(' (Triggered')[0] if reasons else 'no GPU is visible to PyTorch'
        if index >= torch.cuda.device_count():
            return f'{torch.cuda.device_count()} GPUs are visible to PyTorch'
        try:
            major, minor = torch.cuda.get_device_capability(index)
        except RuntimeError as error:
            return str(error).split('\n')[0]
    lowest = min(map(int, re.findall(r'sm_(\d+)', ' '.join(torch.cuda.get_arch_list()))), default=0)
    if 10 * major + minor >= lowest:
        return ''
    return (f'{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and this build of PyTorch '
            f'needs {lowest // 10}.{lowest % 10}; an older build may have it')


def get_device(name, tf32=False, one_gpu=False):
    """torch.device of the `--device` flag; None picks CUDA where it can be used. A rank of torchrun gets its own GPU.

    one_gpu: take the first where `cuda` means several. Switches TF32 off, which PyTorch uses for convolutions by
    default, for the published numbers are full float32; or on, for matrix products too. Raises BadInput.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    rank, ranks = get_rank()
    if not re.fullmatch(r'cpu|cuda(:(0|[1-9]\d?))?', name or 'cuda'):
        raise BadInput(f'--device {name}: cuda, cuda:N or cpu expected')
    device = torch.device(name or 'cuda')
    if device.type == 'cpu':
        return device
    if ranks > 1:
        if device.index is not None:
            raise BadInput(f'--device {name} would put all ranks of torchrun on one GPU; say cuda, or leave it out')
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    problem = _gpu_problem(device.index or 0)
    if problem and name is None and (ranks == 1 or not torch.cuda.is_available()):
        if rank == 0 and torch.version.cuda:
            print(f'{problem}: the CPU is used')
        return torch.device('cpu')
    if problem:
        raise BadInput(f'--device {name or device}: {problem}')
    if one_gpu and count_replicas(device) > 1:
        print(f'one of {count_replicas(device)} GPUs is used: --train_bn needs whole batches')
        device = torch.device('cuda', 0)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def count_replicas(device):
    """How many GPUs DataParallel spreads over: for `--device cuda` without torchrun all that are visible."""
    whole_machine = device.type == 'cuda' and device.index is None
    return torch.cuda.device_count() if whole_machine else 1


def check_replicas(device, amp):
    """Raises BadInput for what DataParallel cannot do, before anything is written."""
    if count_replicas(device) > 1 and amp == 'bf16':        # its threads fall back to fp16
        raise BadInput('--amp bf16 on several GPUs needs torchrun; or name one with --device cuda:0')


def parallel(net, device):
    """net, wrapped so that batches spread over the ranks of torchrun, or for `--device cuda` over all visible GPUs."""
    if get_rank()[1] > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        copy_buffers_of_first_rank(net)     # calibrated batch norm, whose last digits may differ between machines
        wrapper = torch.nn.parallel.DistributedDataParallel
        # buffers written between the two passes of a step would spoil the first one's gradient
        no_sync = next(name for name in ('forward_sync_buffers', 'broadcast_buffers')       # new and old name
                       if name in inspect.signature(wrapper).parameters)
        return wrapper(net, device_ids=[device] if device.type == 'cuda' else None, **{no_sync: False})
    return torch.nn.DataParallel(net) if count_replicas(device) > 1 else net


def copy_buffers_of_first_rank(net):
    """Gives the buffers of a network, such as running statistics, the values that they have on the first rank."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def seed_gpus(*numbers):
    """After `set_seed`, which gives all GPUs the seed of the first: the others get their own, so that the parts of a
    batch under DataParallel draw different dropout masks."""
    for index, generator in enumerate(torch.cuda.default_generators[1:], 1):
        generator.manual_seed(int(np.random.SeedSequence((*numbers, index)).generate_state(1)[0]))


def sum_over_ranks(tensor):
    """The sum of a tensor over the ranks of torchrun, in place; the tensor itself without ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(values):
    """The mean over the ranks of torchrun of each number of a dict with the same names everywhere."""
    if not dist.is_initialized():
        return values
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    means = sum_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64, device=device)) / get_rank()[1]
    return dict(zip(values, means.tolist()))


def autocast(device, amp):
    """The context in which the network runs for the `--amp` flag: off, bf16 or fp16."""
    return torch.autocast(device.type, torch.float16 if amp == 'fp16' else torch.bfloat16, enabled=amp != 'off')


def describe_revision():
    """`git describe` of this code, -dirty where it was changed or has Python files that are not in git; 'unknown'
    without git."""
    def git(*arguments):
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return subprocess.run(['git', '-C', here, *arguments], capture_output=True, text=True).stdout.strip()

    try:
        revision = git('describe', '--always', '--dirty')
        if revision and not revision.endswith('-dirty') and git('ls-files', '--others', '--exclude-standard', '*.py'):
            revision += '-dirty'
    except OSError:             # no git here
        return 'unknown'
    return revision or 'unknown'


def describe_run(flags, device):
    """Lines for the head of a log: arguments (a dict), versions, device, revision of the code."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    return [' '.join(f'{key}={value}' for key, value in flags.items()),
            f'python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}; {name}, '
            f'{get_rank()[1]} ranks; revision {describe_revision()}']


def peak_memory():
    """Bytes: the most that this process has had on the GPU, or without one in main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                 # not on Windows
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
