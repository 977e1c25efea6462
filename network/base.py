"""What a network is: a backbone, and a head on it."""
import contextlib

from torch import nn
from torch.nn.modules.batchnorm import _NormBase        # of batch and instance norms
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

NORMS = _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm


@contextlib.contextmanager
def hold_statistics(layer):
    """While a layer is computed again: its batch norms do not count the batch a second time."""
    norms = [module for module in layer.modules()
             if isinstance(module, _NormBase) and module.training and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:      # a copy counts; synchronised norms do not work without a counter
        norm.momentum, norm.num_batches_tracked = 0., norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Network(nn.Module):
    """What a network must offer. It joins a head and a backbone, the head first: `class Net(SEAMHead, Backbone)`.
    `--network` takes the name of the module that holds this class `Net`.

    A backbone is a subclass of Network with
      channels: dict, the widths of its feature maps, {'conv4': ..., 'conv5': ..., 'conv6': ...};
      width: heads project conv4, conv5 and conv6 to width, 2 width and 4 width channels; 64 without it;
      not_training: list of the layers that stay frozen; none without it;
      forward_as_dict(x): normalised images (N, 3, H, W) -> dict of the feature maps conv4, conv5 and conv6, each
        (N, its channels, h, w) after its activation, all of one h and w, whatever they are.
    Layers that it calls by `self.run(layer, x)` take less memory with `checkpointing`.

    A head (`SEAMHead` in network/seam.py, `AffinityHead` in network/affinity.py) reads `channels`, adds its layers and
    has `forward`, `new_heads` and `classifier`; the scripts also use `fc8`, `class_maps` and `PCM` of SEAM's and
    `radius` of AffinityNet's. Its constructor takes these options, which nothing changes afterwards:
      train_bn: train the norms and the `not_training` layers too. Without it they are frozen in either mode, as in
        the reference;
      checkpointing: while training, keep the inputs of `run` alone and compute the rest again in the backward pass:
        less memory, a fifth more operations;
      dropout: factor on all dropout rates.

    `DeepLab` (network/deeplab.py) has its backbone as a part, for the names of its released weights.
    """
    new_heads = ()      # state-dict names of the weights that the head adds to the backbone, in module order
    classifier = ()     # those of them whose shape follows from the number of classes
    not_training = ()
    width = 64
    train_bn = checkpointing = False
    takes_backbone = False      # whether the constructor takes `backbone`, of the `--backbone` flag

    def set_options(self, train_bn, checkpointing, dropout):
        """For constructors, once all layers are there."""
        self.train_bn, self.checkpointing = train_bn, checkpointing
        for module in self.modules():
            if isinstance(module, _DropoutNd):
                module.p *= dropout

    def load_pretrained(self):
        """Loads the ImageNet weights that come with the backbone, for a training without --weights. Returns whether
        there are any; ResNet38 has none. Raises BadInput where they cannot be had."""
        return False

    def rename_pretrained(self, weights):
        """The state dict of a weight file, with the names of this network in place of those of ImageNet files."""
        return weights

    def run(self, layer, x):
        """layer(x), whose insides are not kept with `checkpointing`. x: a tensor."""
        if self.checkpointing and x.requires_grad:
            return checkpoint(layer, x, use_reentrant=False,
                              context_fn=lambda: (contextlib.nullcontext(), hold_statistics(layer)))
        return layer(x)

    def train(self, mode=True):
        """Sets the mode, then freezes the norms and the `not_training` layers again. Returns self."""
        super().train(mode)
        if self.train_bn:
            return self
        for module in self.modules():
            if isinstance(module, NORMS):
                module.eval()
                module.requires_grad_(False)
        for layer in self.not_training:
            layer.requires_grad_(False)
        return self

    def get_parameter_groups(self):
        """Four lists for the optimizer: backbone weights, backbone biases, new-head weights, new-head biases.

        As in the reference, frozen convolutions are in the first list (without a gradient they never move) and
        norms are in none. With `train_bn`, their gains and shifts join the second list, where all parameters are
        that are not called a weight.
        """
        norms = {id(parameter) for module in self.modules() if isinstance(module, NORMS)
                 for parameter in module.parameters()}
        groups = ([], [], [], [])
        for name, parameter in self.named_parameters():
            is_norm = id(parameter) in norms
            if is_norm and not self.train_bn:
                continue
            layer, _, kind = name.rpartition('.')
            new = 2 if layer + '.weight' in self.new_heads else 0
            groups[new if kind.endswith('weight') and not is_norm else new + 1].append(parameter)
        return groups
