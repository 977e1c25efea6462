"""GPUs and ranks of torchrun, precision, memory, and what a log says about the machine."""
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
    """One line on why PyTorch cannot use GPU number `index`; '' if it can."""
    with warnings.catch_warnings(record=True) as told:      # PyTorch warns of an old driver or an old GPU
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
            f'needs {lowest // 10}.{lowest % 10}; install an older build of PyTorch')


def get_device(name, tf32=False, one_gpu=False):
    """Returns the torch.device for the `--device` flag; None chooses a GPU if PyTorch can use one. Each rank of
    torchrun gets its own GPU. Raises BadInput if the device does not work.

    one_gpu: use only the first GPU if there are several. tf32: allow TF32 for convolutions and matrix products. Without
    it TF32 is switched off, which PyTorch uses for convolutions by default, since the published numbers are float32.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    rank, ranks = get_rank()
    if not re.fullmatch(r'cpu|cuda(:(0|[1-9]\d?))?', name or 'cuda'):
        raise BadInput(f'--device {name}: use cuda, cuda:N or cpu')
    device = torch.device(name or 'cuda')
    if device.type == 'cpu':
        return device
    if ranks > 1:
        if device.index is not None:
            raise BadInput(f'--device {name} would put all ranks of torchrun on one GPU; use cuda, or leave it out')
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    problem = _gpu_problem(device.index or 0)
    if problem and name is None and (ranks == 1 or not torch.cuda.is_available()):
        if rank == 0 and torch.version.cuda:
            print(f'{problem}; running on the CPU')
        return torch.device('cpu')
    if problem:
        raise BadInput(f'--device {name or device}: {problem}')
    if one_gpu and count_replicas(device) > 1:
        print(f'using one of {count_replicas(device)} GPUs, because --train_bn needs whole batches')
        device = torch.device('cuda', 0)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def count_replicas(device):
    """Number of GPUs that DataParallel uses: all visible ones for `--device cuda` without torchrun, else 1."""
    whole_machine = device.type == 'cuda' and device.index is None
    return torch.cuda.device_count() if whole_machine else 1


def check_replicas(device, amp):
    """Raises BadInput for flags that DataParallel does not support, before anything is written."""
    if count_replicas(device) > 1 and amp == 'bf16':        # its threads fall back to fp16
        raise BadInput('--amp bf16 on several GPUs needs torchrun; or use one GPU, with --device cuda:0')


def parallel(net, device):
    """Returns net, wrapped to use all ranks of torchrun or, for `--device cuda`, all visible GPUs."""
    if get_rank()[1] > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        copy_buffers_of_first_rank(net)     # the last digits of calibrated batch norm may differ between machines
        wrapper = torch.nn.parallel.DistributedDataParallel
        # buffers written between the two passes of a step would spoil the first one's gradient
        no_sync = next(name for name in ('forward_sync_buffers', 'broadcast_buffers')       # new and old name
                       if name in inspect.signature(wrapper).parameters)
        return wrapper(net, device_ids=[device] if device.type == 'cuda' else None, **{no_sync: False},
                       find_unused_parameters=net.has_branches)
    return torch.nn.DataParallel(net) if count_replicas(device) > 1 else net


def copy_buffers_of_first_rank(net):
    """Copies the buffers of a network, such as running statistics, from the first rank to all others."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def seed_gpus(*numbers):
    """Seeds each further GPU differently, so that the parts of a batch under DataParallel draw different dropout masks.
    Call it after `set_seed`, which seeds all GPUs alike. numbers: as for `set_seed`."""
    for index, generator in enumerate(torch.cuda.default_generators[1:], 1):
        generator.manual_seed(int(np.random.SeedSequence((*numbers, index)).generate_state(1)[0]))


def sum_over_ranks(tensor):
    """Sums a tensor over the ranks of torchrun, in place, and returns it; without ranks it is unchanged."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(values):
    """Returns the dict of the means of `values` over the ranks of torchrun; all ranks have the same names."""
    if not dist.is_initialized():
        return values
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    means = sum_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64, device=device)) / get_rank()[1]
    return dict(zip(values, means.tolist()))


def autocast(device, amp):
    """Context that runs the network in the precision of the `--amp` flag: off, bf16 or fp16."""
    return torch.autocast(device.type, torch.float16 if amp == 'fp16' else torch.bfloat16, enabled=amp != 'off')


def describe_revision():
    """Returns `git describe` of this code, with -dirty if it was changed or has Python files that are not in git;
    'unknown' without git."""
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
    """Returns the first lines of a log: flags (a dict), versions, device, revision of the code."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    return [' '.join(f'{key}={value}' for key, value in flags.items()),
            f'python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}; {name}, '
            f'{get_rank()[1]} ranks; revision {describe_revision()}']


def peak_memory():
    """Peak memory of this process in bytes, on the GPU or, without one, in main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                 # not on Windows
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
