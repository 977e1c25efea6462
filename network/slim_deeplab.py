"""DeepLabv1 on ResNet38 at a quarter of the width, for the demo, tests and small machines."""
from network import resnet38_deeplab
from network.deeplab import BN_MOMENTUM


class Net(resnet38_deeplab.Net):
    """See `DeepLab`."""

    def __init__(self, num_classes=20, freeze_bn=False, bn_momentum=BN_MOMENTUM, checkpointing=False):
        super().__init__(num_classes, freeze_bn, bn_momentum, checkpointing, width=16)
