"""The interface of all networks: a backbone with a head on it."""
import contextlib

from torch import nn
from torch.nn.modules.batchnorm import _NormBase        # of batch and instance norms
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

NORMS = _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm


@contextlib.contextmanager
def hold_statistics(layer):
    """Context in which the batch norms of a layer keep their running statistics, because `checkpointing` computes the
    layer a second time for the same batch."""
    norms = [module for module in layer.modules()
             if isinstance(module, _NormBase) and module.training and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:      # a copy of the counter goes up; synchronised norms need one
        norm.momentum, norm.num_batches_tracked = 0., norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Network(nn.Module):
    """Base class of backbones and heads. A network joins one of each, the head first: `class Net(SEAMHead, Backbone)`.
    `--network` names the module that contains this class `Net`.

    A backbone is a subclass of Network with
      channels: dict, the widths of its feature maps, {'conv4': ..., 'conv5': ..., 'conv6': ...};
      width: heads project conv4, conv5 and conv6 to width, 2 width and 4 width channels (default: 64);
      not_training: list of the modules and parameters that stay frozen (default: none);
      forward_as_dict(x): normalised images (N, 3, H, W) -> dict of the feature maps conv4, conv5 and conv6, each
        (N, its channels, h, w) after its activation. All three have the same h and w, which may have any size.
    Layers that it calls by `self.run(layer, x)` need less memory with `checkpointing`.

    A head (`SEAMHead` in network/seam.py, `AffinityHead` in network/affinity.py, `DeepLab` in network/deeplab.py) reads
    `channels`, adds its layers and has
      kind: 'SEAM', 'affinity' or 'segmentation'; the scripts check that they got the kind that they need;
      from_scratch_layers: list of the modules and bare parameters that it adds to the backbone. Files of pretrained
        weights lack them, the optimizer puts them into groups of their own, and none of them is frozen;
      classifier_layers: those of them whose shape depends on the number of classes;
      forward; the scripts also use `classify` and `class_maps` of SEAM's and `radius` of AffinityNet's.
    Its constructor has these options, which nothing changes afterwards:
      train_bn: also train the norms and the `not_training` layers of the backbone. Otherwise they are frozen in both
        modes, as in the reference;
      checkpointing: in training, store only the inputs of `run` and compute the rest again in the backward pass, which
        needs less memory and a fifth more operations;
      dropout: factor on all dropout rates.

    `DeepLab` contains its backbone as a submodule, because the names in its released weights say so.
    """
    kind = None
    from_scratch_layers = classifier_layers = not_training = ()
    width = 64
    train_bn = checkpointing = False
    takes_backbone = False      # whether the constructor has the argument `backbone`, the name given by --backbone
    backbone_name = None        # that name
    has_branches = False        # whether layers of the backbone do not lead to conv6, so that they may get no gradient

    @property
    def new_heads(self):
        """State-dict names of the tensors of `from_scratch_layers`, in module order."""
        return self.names_of(self.from_scratch_layers)

    @property
    def classifier(self):
        """State-dict names of the tensors of `classifier_layers`, in module order."""
        return self.names_of(self.classifier_layers)

    def names_of(self, layers):
        """State-dict names of the parameters and buffers of these modules and bare parameters, in module order."""
        tensors = {id(tensor) for layer in layers for tensor in
                   (layer.state_dict(keep_vars=True).values() if isinstance(layer, nn.Module) else [layer])}
        return tuple(name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in tensors)

    def set_options(self, train_bn, checkpointing, dropout):
        """Stores the options and scales the dropout rates. Constructors call it after they have made all layers."""
        self.train_bn, self.checkpointing = train_bn, checkpointing
        for module in self.modules():
            if isinstance(module, _DropoutNd):
                module.p *= dropout

    def load_pretrained(self):
        """Loads the backbone's own ImageNet weights, for a training without --weights. Returns whether it has any;
        ResNet38 has none. Raises BadInput if they cannot be found or downloaded."""
        return False

    def rename_pretrained(self, weights):
        """Returns the state dict of a weight file with this network's names in place of those of ImageNet files."""
        return weights

    def run(self, layer, x):
        """Returns layer(x). With `checkpointing`, the activations inside the layer are not stored. x: a tensor."""
        if self.checkpointing and x.requires_grad:
            return checkpoint(layer, x, use_reentrant=False,
                              context_fn=lambda: (contextlib.nullcontext(), hold_statistics(layer)))
        return layer(x)

    def frozen_norms(self):
        """List of the norms whose gains and shifts are not trained: those of the backbone, or none with `train_bn`."""
        new = {module for layer in self.from_scratch_layers if isinstance(layer, nn.Module)
               for module in layer.modules()}
        return [module for module in self.modules()
                if isinstance(module, NORMS) and module not in new and not self.train_bn]

    def train(self, mode=True):
        """Sets the mode, then freezes the `frozen_norms` and the `not_training` layers again. Returns self."""
        super().train(mode)
        for norm in self.frozen_norms():
            norm.eval().requires_grad_(False)
        for layer in self.not_training if not self.train_bn else ():
            layer.requires_grad_(False)
        return self

    def get_parameter_groups(self):
        """Four lists for the optimizer: backbone weights, backbone biases, new weights, new biases.

        New are the parameters of `from_scratch_layers`, whatever their names. Weights are parameters with two or more
        dimensions: kernels, matrices, position embeddings. Biases are all others, and the gains and shifts of norms.
        As in the reference, frozen convolutions are in the first list (without a gradient they never move), and
        `frozen_norms` in none.
        """
        norms, frozen = ({id(parameter) for module in modules for parameter in module.parameters()} for modules in
                         ([module for module in self.modules() if isinstance(module, NORMS)], self.frozen_norms()))
        new = set(self.new_heads)
        groups = ([], [], [], [])
        for name, parameter in self.named_parameters():
            if id(parameter) not in frozen:
                is_bias = parameter.ndim < 2 or id(parameter) in norms
                groups[2 * (name in new) + is_bias].append(parameter)
        return groups
