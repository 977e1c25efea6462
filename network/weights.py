"""Loads weight files into networks."""
import torch

from network.resnet38d import convert_mxnet_to_torch
from tool.cli import BadInput, is_out_of_memory
from tool.files import describe
from tool.unpickle import load_tensors

MXNET_START = b'\x12\1\0\0\0\0\0\0'
ENTRIES = ('state_dict', 'model', 'model_state_dict')       # names under which checkpoints store the weights
WRAPPERS = ('module', '_orig_mod', 'model', 'net')          # DataParallel, torch.compile and Lightning add these
COUNTERS = ('num_batches_tracked', 'n_averaged')            # are no weights, and missing in some files
NEEDED = 'a file of torch.save(net.state_dict(), ...) is needed'


def _read(path):
    """Returns the content of a `.pth` of PyTorch, a safetensors file or MXNet's ImageNet file, told apart by the first
    bytes. Runs no code in them. Raises ValueError for other files; for a damaged file, any exception."""
    with open(path, 'rb') as file:
        start = file.read(200)
    if not start:
        raise ValueError('it is empty')
    if start[5:9] == b'\0\0\0{':
        return _read_safetensors(path)
    if min(start) >= 9:         # text: binary files of these kinds have smaller bytes
        if start.startswith(b'version https://git-lfs'):
            raise ValueError('it is a pointer of Git LFS; get the file itself with `git lfs pull`')
        what = 'a web page' if start.lstrip(b'\xef\xbb\xbf \r\n\t').startswith(b'<') else 'text'
        raise ValueError(f'it is {what} in place of weights, {start[:40].decode(errors="replace")!r}; '
                         'download it again, and look at its size')
    if start.startswith(MXNET_START) or path.endswith('.params'):
        return convert_mxnet_to_torch(path)
    return load_tensors(path)


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError('it is a safetensors file; to read it, pip install safetensors') from error
    return load_file(path)


def _is_state_dict(content):
    return isinstance(content, dict) and bool(content) and all(
        isinstance(name, str) and name.isprintable() and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items())


def _read_state_dict(path):
    """Returns the dict name -> tensor in a weight file. If the file is a checkpoint, that is the one entry of ENTRIES
    with such a dict; a line says which. Raises BadInput for damaged files, whole networks, and other checkpoints."""
    try:
        content = _read(path)
    except Exception as error:          # a damaged file can raise any exception
        if is_out_of_memory(error):
            raise
        needed = '' if path.endswith('.params') else f'; {NEEDED}'
        raise BadInput(f'cannot read the weights {path} (--weights): {describe(error)}{needed}') from error
    if _is_state_dict(content):
        return content
    if not isinstance(content, dict) or not content:
        kind = 'an empty dict' if content == {} else f'a {type(content).__name__}'
        raise BadInput(f'{path} (--weights) contains {kind}, not a state dict (name -> tensor); {NEEDED}')
    entries = [key for key in ENTRIES if _is_state_dict(content.get(key))]
    if len(entries) == 1:
        others = _short([repr(key)[:80] for key in content if key not in entries]) or 'nothing'
        print(f'weights: read from the entry {entries[0]!r} of {path}, which also contains {others}')
        return content[entries[0]]
    other = _short([repr(name)[:80] for name, value in content.items() if not _is_state_dict({name: value})])
    inside = [repr(name)[:80] for name, value in content.items() if _is_state_dict(value)]
    advice = f"save one of its entries: torch.save(torch.load('OLD.pth')[{inside[0]}], 'NEW.pth')" if inside else NEEDED
    raise BadInput(f'{path} (--weights) is no state dict (name -> tensor), since it contains {other}; {advice}')


def _strip_wrappers(weights, own, path):
    """Returns `weights` with the parts of WRAPPERS removed from names that are not among `own`, and without COUNTERS.
    Prints which parts it removed."""
    stripped, parts = {}, set()
    for name, tensor in weights.items():
        wrappers = [part for part in name.split('.') if part in WRAPPERS] if name not in own else []
        parts.update(wrappers)
        name = '.'.join(part for part in name.split('.') if part not in wrappers)
        if name in stripped:
            raise BadInput(f'{path} (--weights) has {name} twice, with and without {_short(sorted(parts))} in its name')
        if not name.endswith(COUNTERS):
            stripped[name] = tensor
    if parts:
        print(f'weights: removed {_short(sorted(parts))} from the names in {path}')
    return stripped


def _check_values(weights, own, path):
    """Raises BadInput for tensors that do not have the network's kind of type, and for NaN and infinite values. Floats
    of another size are allowed, so values are checked in the network's own type."""
    other = [f'{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})' for name, tensor in weights.items()
             if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex()
             or tensor.layout != torch.strided or tensor.device.type != 'cpu']
    if other:
        raise BadInput(f'{path} (--weights) has tensors that are not of dense floats: {_short(other)}')
    broken = []
    for name, tensor in weights.items():
        tensor = tensor.to(own[name].dtype)
        # the quick sum is not finite if any value is not; it may also overflow, then each value is checked
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            broken.append(name)
    if broken:
        raise BadInput(f'{path} (--weights) has NaN or infinite values in {_short(broken)}; did its training '
                       'diverge?')


def _describe_shape(name, theirs, ours, is_classifier):
    """Text on a tensor whose shape in the file differs from that in the network. A classifier layer with another number
    of outputs was trained on other classes, or without a background."""
    if not is_classifier or not theirs or theirs[1:] != ours[1:]:
        return f'{name} {tuple(theirs)} for {tuple(ours)}'
    without = ' (one for each class and none for the background, as in AffinityNet)' if theirs[0] == ours[0] - 1 else ''
    advice = '; train_SEAM.py --reset_head starts with a new one' if name == 'fc8.weight' else ''
    return (f'{name} with {theirs[0]} outputs{without} for {ours[0]}, the background and {ours[0] - 1} classes '
            f'(--class_names){advice}')


def load_weights(net, path, new_heads=(), reset=()):
    """Loads weights into net from a released `.pth` (bare state dict), a checkpoint that contains one, a safetensors
    file, or the ImageNet `.params`. Prints what was loaded.

    Either no tensor is missing, or exactly `new_heads` (the layers that a training script adds to a backbone). Tensors
    named in `reset` keep their random values instead of those in the file. `num_batches_tracked` does not count.
    Raises BadInput (a ValueError), naming the file and the tensors, and leaves net unchanged if tensors are missing or
    unexpected, have another shape, or values that are not finite.
    """
    own = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith(COUNTERS)}
    weights = net.rename_pretrained(_strip_wrappers(_read_state_dict(path), own, path))
    weights = {name: tensor for name, tensor in weights.items() if name not in reset}
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [_describe_shape(name, weights[name].shape, own[name].shape, name in net.classifier)
              for name in own if name in weights and weights[name].shape != own[name].shape]
    lacking = [] if set(missing) in (own.keys() & set(new_heads), own.keys() & set(reset)) else missing
    problems = [f'{label}: {_short(names)}' for label, names in
                (('missing', lacking), ('unexpected', unexpected), ('other shape', shapes)) if names]
    if problems:
        backbone = f' with --backbone {net.backbone_name}' if net.backbone_name else ''
        raise BadInput(f'{path} (--weights) does not fit {type(net).__module__} (--network){backbone}: '
                       + '; '.join(problems))
    _check_values(weights, own, path)
    net.load_state_dict(weights, strict=False)
    fresh = f'; new, randomly initialised: {_short(missing)}' if missing else ''
    print(f'weights: {len(weights)} tensors from {path}{fresh}')


def choose_memory_format(net, device, amp='off', training=False):
    """torch.channels_last where convolutions are faster with it: inference on a CPU (by a fifth), and a GPU with
    `--amp` (tests/results/gpu.csv). It is slower in training on a CPU and where convolutions have groups, and several
    times slower on a GPU in float32."""
    grouped = any(module.groups > 1 for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    faster = amp != 'off' if device.type == 'cuda' else not training
    return torch.channels_last if faster and not grouped else torch.contiguous_format


def load_trained(net, path, device, amp='off'):
    """Prepares a trained network for inference: loads its weights, and puts it on its device in evaluation mode.
    amp: the --amp flag. Returns net."""
    load_weights(net, path)
    return net.eval().to(device, memory_format=choose_memory_format(net, device, amp))


def _short(names, most=4):
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
