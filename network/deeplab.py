"""DeepLabv1's head (Chen et al. 2015), as the published retraining used it, on any backbone of network/base.py."""
import torch.nn.functional as F
from torch import nn

from network.base import NORMS, Network

BN_MOMENTUM = 3e-4      # of batch norm, as published for 20,000 steps: how far a step moves the running statistics


class DeepLab(Network):
    """Segmentation network: a dilated convolution and a classifier on conv6 of `backbone`, a Network without a head.

    As published, no layer is frozen in training. Batch norm, also that of the backbone, normalises by the batch, and a
    step moves its running statistics by the share `bn_momentum`. Its gains and shifts are in no parameter group, so
    they never change. With `freeze_bn` all norms use their running statistics, which then do not change either.
    """
    kind = 'segmentation'

    def __init__(self, backbone, num_classes=20, freeze_bn=False, bn_momentum=BN_MOMENTUM, checkpointing=False):
        super().__init__()
        self.backbone, self.backbone_name, self.has_branches = backbone, backbone.backbone_name, backbone.has_branches
        backbone.set_options(train_bn=True, checkpointing=checkpointing, dropout=1.0)
        self.freeze_bn = freeze_bn
        channels = backbone.channels['conv6']
        hidden = max(channels // 8, 128)                                    # 512 of 4096 on ResNet38
        self.conv_fov = nn.Conv2d(channels, hidden, 3, padding=12, dilation=12, bias=False)
        self.bn_fov = nn.BatchNorm2d(hidden)
        self.conv_fov2 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(hidden)
        self.dropout = nn.Dropout(0.5)
        self.cls_conv = nn.Conv2d(hidden, 1 + num_classes, 1)
        self.from_scratch_layers = [self.conv_fov, self.bn_fov, self.conv_fov2, self.bn_fov2, self.cls_conv]
        self.classifier_layers = [self.cls_conv]
        for conv in (self.conv_fov, self.conv_fov2, self.cls_conv):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def frozen_norms(self):
        """List of all norms: as published, no gain or shift is trained, not even those of the new layers."""
        return [module for module in self.modules() if isinstance(module, NORMS)]

    def train(self, mode=True):
        """Sets the mode; with `freeze_bn`, the norms stay in evaluation mode. Freezes no layer. Returns self."""
        nn.Module.train(self, mode)
        for norm in self.frozen_norms() if self.freeze_bn else ():
            norm.eval()
        return self

    def forward(self, x):
        """x: normalised images (N, 3, H, W). Returns logits (N, 1+C, H, W), channel 0 the background."""
        f = self.backbone.forward_as_dict(x)['conv6']                       # (N, channels, h, w)
        f = F.relu(self.bn_fov(self.conv_fov(f)))
        f = self.dropout(F.relu(self.bn_fov2(self.conv_fov2(f))))
        logits = self.cls_conv(f).float()       # in half precision the many gradients of a cell would be summed roughly
        return F.interpolate(logits, x.shape[2:], mode='bilinear', align_corners=True)

    def load_pretrained(self):
        return self.backbone.load_pretrained()

    def rename_pretrained(self, weights):
        """Returns the state dict with the names of this network. Of a file of another network, such as SEAM or
        AffinityNet, it keeps only the backbone."""
        trained = {name.removeprefix('backbone.'): weights[name] for name in weights if name.startswith('backbone.')}
        renamed = self.backbone.rename_pretrained(trained or weights)
        renamed = {'backbone.' + name: renamed[name] for name in self.backbone.state_dict() if name in renamed}
        return {**weights, **renamed} if trained else renamed or weights
