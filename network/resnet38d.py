"""ResNet38, the 38-layer wide residual network of SEAM and AffinityNet (Wu et al. 2016), with output stride 8.

Attribute names are a file format: the released weights depend on them.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from network.base import Network
from tool import mxnet_params


class ResBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions."""

    def __init__(self, in_channels, mid_channels, out_channels, stride=1, first_dilation=None, dilation=1):
        super().__init__()
        first_dilation = first_dilation or dilation
        self.same_shape = in_channels == out_channels and stride == 1
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, mid_channels, 3, stride,
                                       padding=first_dilation, dilation=first_dilation, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = nn.Conv2d(mid_channels, out_channels, 3,
                                        padding=dilation, dilation=dilation, bias=False)
        if not self.same_shape:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        """x: (N, in, H, W). Returns (output (N, out, H/stride, W/stride), activated input (N, in, H, W))."""
        activated = F.relu_(self.bn_branch2a(x))
        # the projection's input is the activated tensor, the identity is the raw one
        shortcut = x if self.same_shape else self.conv_branch1(activated)
        x = self.conv_branch2a(activated)
        x = self.conv_branch2b1(F.relu_(self.bn_branch2b1(x)))
        return x.add_(shortcut), activated


class ResBlock_bot(nn.Module):
    """Pre-activation bottleneck of 1x1, 3x3 and 1x1 convolutions with channel dropout; always projects its shortcut."""

    def __init__(self, in_channels, out_channels, stride=1, dilation=1, dropout=0.):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, out_channels // 4, 1, stride, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out_channels // 4)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(out_channels // 4, out_channels // 2, 3,
                                        padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(out_channels // 2)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(out_channels // 2, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        """x: (N, in, H, W). Returns (output (N, out, H/stride, W/stride), activated input (N, in, H, W))."""
        activated = F.relu_(self.bn_branch2a(x))
        x = self.conv_branch2a(activated)
        x = self.conv_branch2b1(self.dropout_2b1(F.relu_(self.bn_branch2b1(x))))
        x = self.conv_branch2b2(self.dropout_2b2(F.relu_(self.bn_branch2b2(x))))
        return x.add_(self.conv_branch1(activated)), activated


class Net(Network):
    """The backbone. `width` is the number of channels after the first convolution: 64 in the paper's network."""

    def __init__(self, width=64):
        super().__init__()
        self.width = w = width
        self.conv1a = nn.Conv2d(3, w, 3, padding=1, bias=False)
        self.b2 = ResBlock(w, 2 * w, 2 * w, stride=2)
        self.b2_1 = ResBlock(2 * w, 2 * w, 2 * w)
        self.b2_2 = ResBlock(2 * w, 2 * w, 2 * w)
        self.b3 = ResBlock(2 * w, 4 * w, 4 * w, stride=2)
        self.b3_1 = ResBlock(4 * w, 4 * w, 4 * w)
        self.b3_2 = ResBlock(4 * w, 4 * w, 4 * w)
        self.b4 = ResBlock(4 * w, 8 * w, 8 * w, stride=2)
        self.b4_1 = ResBlock(8 * w, 8 * w, 8 * w)
        self.b4_2 = ResBlock(8 * w, 8 * w, 8 * w)
        self.b4_3 = ResBlock(8 * w, 8 * w, 8 * w)
        self.b4_4 = ResBlock(8 * w, 8 * w, 8 * w)
        self.b4_5 = ResBlock(8 * w, 8 * w, 8 * w)
        self.b5 = ResBlock(8 * w, 8 * w, 16 * w, first_dilation=1, dilation=2)
        self.b5_1 = ResBlock(16 * w, 8 * w, 16 * w, dilation=2)
        self.b5_2 = ResBlock(16 * w, 8 * w, 16 * w, dilation=2)
        self.b6 = ResBlock_bot(16 * w, 32 * w, dilation=4, dropout=0.3)
        self.b7 = ResBlock_bot(32 * w, 64 * w, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(64 * w)
        self.channels = {'conv3': 4 * w, 'conv4': 8 * w, 'conv5': 16 * w, 'conv6': 64 * w}
        self.not_training = [self.conv1a, self.b2, self.b2_1, self.b2_2]

    def forward(self, x):
        """x: normalised images (N, 3, H, W). Returns conv6 (N, 64 width, ceil(H/8), ceil(W/8)), >= 0."""
        return self.forward_as_dict(x)['conv6']

    def forward_as_dict(self, x):
        """x: normalised images (N, 3, H, W). Returns the activated feature maps, all >= 0:

        conv3 (N, 4 width, ceil(H/4), ceil(W/4)); conv4 (N, 8 width, h, w), conv5 (N, 16 width, h, w) and
        conv6 (N, 64 width, h, w) with h = ceil(H/8), w = ceil(W/8).
        """
        x = self.conv1a(x)
        for block in (self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = self.run(block, x)
        x, conv3 = self.run(self.b4, x)
        for block in (self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, _ = self.run(block, x)
        x, conv4 = self.run(self.b5, x)
        for block in (self.b5_1, self.b5_2):
            x, _ = self.run(block, x)
        x, conv5 = self.run(self.b6, x)
        x, _ = self.run(self.b7, x)
        return {'conv3': conv3, 'conv4': conv4, 'conv5': conv5, 'conv6': F.relu_(self.bn7(x))}


class SlimNet(Net):
    """The backbone at a quarter of the width."""

    def __init__(self):
        super().__init__(width=16)


# ----- names of the MXNet ImageNet file -----

_UNIT = re.compile(r'(res|bn)(\d)(?:a|b(\d))_(branch\w+?)_(?:moving_)?(weight|gamma|beta|mean|var)')
_KIND = {'weight': 'weight', 'gamma': 'weight', 'beta': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def _torch_name(mxnet_name):
    """State-dict name of a parameter in the MXNet ImageNet file; None for its classifier, which is left out."""
    name = mxnet_name.split(':')[-1]                    # without 'arg:' or 'aux:'
    if name == 'conv1a_weight':
        return 'conv1a.weight'
    if name.startswith('linear1000_'):
        return None
    final = re.fullmatch(r'bn7_(?:moving_)?(gamma|beta|mean|var)', name)
    if final:
        return f'bn7.{_KIND[final[1]]}'
    unit = _UNIT.fullmatch(name)                        # 'res2a' is block b2, 'res2b1' is b2_1
    if unit is None or (unit[1] == 'res') != (unit[5] == 'weight'):
        raise ValueError(f'unknown parameter name {mxnet_name!r}, not of ResNet38')
    block = f'b{unit[2]}_{unit[3]}' if unit[3] else f'b{unit[2]}'
    layer = 'conv' if unit[1] == 'res' else 'bn'
    return f'{block}.{layer}_{unit[4]}.{_KIND[unit[5]]}'


def convert_mxnet_to_torch(path):
    """Reads the ImageNet `.params` file. Returns a dict state-dict name -> tensor, without the 1000-class layer.

    Raises ValueError for a damaged file or a name that ResNet38 does not have.
    """
    tensors = {_torch_name(name): torch.from_numpy(array) for name, array in mxnet_params.load(path).items()}
    tensors.pop(None, None)
    return tensors
