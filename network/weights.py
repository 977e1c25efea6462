"""Loads weight files into networks."""
import torch

from network.resnet38d import convert_mxnet_to_torch
from tool.cli import BadInput, is_out_of_memory
from tool.files import describe
from tool.unpickle import load_tensors

MXNET_START = b'\x12\1\0\0\0\0\0\0'
ENTRIES = ('state_dict', 'model', 'model_state_dict')       # of checkpoints, where the weights are
WRAPPERS = ('module', '_orig_mod', 'model', 'net')          # DataParallel, torch.compile and Lightning add these
COUNTERS = ('num_batches_tracked', 'n_averaged')            # no weights, and not in every file
NEEDED = 'a file of torch.save(net.state_dict(), ...) is needed'


def _read(path):
    """What is in a `.pth` of PyTorch, a safetensors file or MXNet's ImageNet file, told apart by the content. Nothing
    in it is run. Raises ValueError for other files; a damaged one raises whatever it leads to."""
    with open(path, 'rb') as file:
        start = file.read(200)
    if not start:
        raise ValueError('it is empty')
    if start[5:9] == b'\0\0\0{':
        return _read_safetensors(path)
    if min(start) >= 9:         # no binary file of these kinds
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
    """dict name -> tensor of a weight file, or of the one entry of ENTRIES in it that is such a dict, which is printed.
    Raises BadInput for damaged files, whole networks, and checkpoints without such an entry."""
    try:
        content = _read(path)
    except Exception as error:          # a damaged file raises whatever it likes
        if is_out_of_memory(error):
            raise
        needed = '' if path.endswith('.params') else f'; {NEEDED}'
        raise BadInput(f'cannot read the weights {path} (--weights): {describe(error)}{needed}') from error
    if _is_state_dict(content):
        return content
    if not isinstance(content, dict) or not content:
        kind = 'an empty dict' if content == {} else f'a {type(content).__name__}'
        raise BadInput(f'{path} (--weights) holds {kind}, no state dict (name -> tensor); {NEEDED}')
    entries = [key for key in ENTRIES if _is_state_dict(content.get(key))]
    if len(entries) == 1:
        others = _short([repr(key)[:80] for key in content if key not in entries]) or 'nothing'
        print(f'weights: taken from the entry {entries[0]!r} of {path}; beside it is {others}')
        return content[entries[0]]
    other = _short([repr(name)[:80] for name, value in content.items() if not _is_state_dict({name: value})])
    inside = [repr(name)[:80] for name, value in content.items() if _is_state_dict(value)]
    advice = f"save one of its entries: torch.save(torch.load('OLD.pth')[{inside[0]}], 'NEW.pth')" if inside else NEEDED
    raise BadInput(f'{path} (--weights) holds no state dict (name -> tensor), but also: {other}; {advice}')


def _strip_wrappers(weights, own, path):
    """`weights` without the parts of WRAPPERS in names that are not among `own`, and without COUNTERS. Prints them."""
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
        print(f'weights: read without {_short(sorted(parts))} in the names of {path}')
    return stripped


def _check_values(weights, own, path):
    """Raises BadInput for tensors of another kind than the network's, and for NaN and infinite values. Smaller and
    larger floats are taken over, so the values are looked at in the network's type."""
    other = [f'{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})' for name, tensor in weights.items()
             if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex()
             or tensor.layout != torch.strided or tensor.device.type != 'cpu']
    if other:
        raise BadInput(f'{path} (--weights) has tensors that are not of dense floats: {_short(other)}')
    broken = []
    for name, tensor in weights.items():
        tensor = tensor.to(own[name].dtype)
        # the sum is quick and never finite where a value is not; it may overflow where all are
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            broken.append(name)
    if broken:
        raise BadInput(f'{path} (--weights) has NaN or infinite values in {_short(broken)}; did its training '
                       'diverge?')


def _describe_shape(name, theirs, ours, is_classifier):
    """Words for the shape of a tensor in the file, and for that in the network; other outputs of a classifier layer
    than the network's come of other classes, or of a classifier without background."""
    if not is_classifier or not theirs or theirs[1:] != ours[1:]:
        return f'{name} {tuple(theirs)} for {tuple(ours)}'
    without = ' (one for each class and none for the background, as in AffinityNet)' if theirs[0] == ours[0] - 1 else ''
    advice = '; train_SEAM.py --reset_head starts with a new one' if name == 'fc8.weight' else ''
    return (f'{name} with {theirs[0]} outputs{without} for {ours[0]}, the background and {ours[0] - 1} classes '
            f'(--class_names){advice}')


def load_weights(net, path, new_heads=(), reset=()):
    """Loads a released `.pth` (bare state dict), a checkpoint that has one as an entry, safetensors, or the ImageNet
    `.params`.

    Nothing may be missing, or exactly `new_heads` (what a training script adds to a backbone); nothing may be
    unexpected, have another shape, or values that are not finite. Tensors named in `reset` are not taken from the
    file, but keep their random values. `num_batches_tracked` does not count. Prints what was loaded.
    Raises BadInput (a ValueError), naming the file and the tensors, and leaves net as it was.
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


def load_trained(net, path, device):
    """A trained network for inference: `load_weights`, evaluation mode, on its device. Returns net."""
    load_weights(net, path)
    # channels_last: on a CPU faster by a fifth, but slower where convolutions have groups; on a GPU in float32 several
    # times slower
    grouped = any(module.groups > 1 for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    layout = torch.channels_last if device.type == 'cpu' and not grouped else torch.contiguous_format
    return net.eval().to(device, memory_format=layout)


def _short(names, most=4):
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
