"""Loads weight files into networks."""
import torch

from network.resnet38d import convert_mxnet_to_torch
from tool.cli import BadInput
from tool.safe_pickle import check_weights, describe


def _read_state_dict(path):
    """dict name -> tensor of a `.pth` or `.params` file. Nothing in the file is run, see tool/safe_pickle.py.

    Refused with BadInput: damaged files, whole networks, checkpoints that hold other things than tensors.
    """
    needed = '' if path.endswith('.params') else '; a file of torch.save(net.state_dict(), ...) is needed'
    try:
        if path.endswith('.params'):
            return convert_mxnet_to_torch(path)
        check_weights(path)
        weights = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:          # a damaged file raises whatever it likes
        raise BadInput(f'cannot read the weights {path} (--weights): {describe(error)}{needed}') from error
    if not isinstance(weights, dict):
        raise BadInput(f'{path} (--weights) holds a {type(weights).__name__}, no state dict (name -> tensor){needed}')
    other = [repr(name)[:80] for name, value in weights.items()
             if not isinstance(name, str) or not name.isprintable() or not isinstance(value, torch.Tensor)]
    if other:
        raise BadInput(f'{path} (--weights) holds no state dict (name -> tensor), but also: {_short(other)}{needed}')
    return {name.removeprefix('module.'): tensor for name, tensor in weights.items()}


def load_weights(net, path, new_heads=(), reset=()):
    """Loads a released `.pth` (bare state dict, with or without `module.`) or the ImageNet `.params` into net.

    Nothing may be missing, or exactly `new_heads` (what a training script adds to a backbone); nothing may be
    unexpected or have another shape. Tensors named in `reset` are not taken from the file, but keep their random
    values. `num_batches_tracked` does not count. Prints what was loaded.
    Raises BadInput (a ValueError), naming the file and the tensors, and leaves net as it was.
    """
    weights = _read_state_dict(path)
    own = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith('num_batches_tracked')}
    weights = {name: tensor for name, tensor in weights.items()
               if not name.endswith('num_batches_tracked') and name not in reset}
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshapen = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if misshapen and set(misshapen) <= set(net.classifier):
        theirs, ours = (len(tensors[misshapen[0]]) - 1 for tensors in (weights, own))
        raise BadInput(f'{path} (--weights) was trained on {theirs} classes, this run has {ours} (--class_names); '
                       'train_SEAM.py --reset_head starts with a new classifier layer')
    shapes = [f'{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}' for name in misshapen]
    problems = [f'{label}: {_short(names)}' for label, names in
                (('unexpected', unexpected), ('other shape', shapes)) if names]
    if missing and set(missing) not in (set(new_heads), set(reset)):
        problems.insert(0, f'missing: {_short(missing)}')
    if problems:
        raise BadInput(f'{path} (--weights) does not fit {type(net).__module__} (--network): ' + '; '.join(problems))
    net.load_state_dict(weights, strict=False)
    fresh = f'; new, randomly initialised: {_short(missing)}' if missing else ''
    print(f'weights: {len(weights)} tensors from {path}{fresh}')


def _short(names, most=4):
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
