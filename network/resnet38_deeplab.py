"""DeepLabv1 on ResNet38, with the state-dict names of the released file."""
from network import resnet38d
from network.deeplab import BN_MOMENTUM, DeepLab


class Net(DeepLab):
    """`DeepLab` on a ResNet38 of this `width`, 64 in the paper."""

    def __init__(self, num_classes=20, freeze_bn=False, bn_momentum=BN_MOMENTUM, checkpointing=False, width=64):
        super().__init__(resnet38d.Net(width), num_classes, freeze_bn, bn_momentum, checkpointing)
