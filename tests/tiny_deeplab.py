"""DeepLabv1 at a sixteenth of the width, for tests."""
from network.deeplab import BN_MOMENTUM, DeepLab
from tiny_SEAM import Backbone


class Net(DeepLab):
    """See `DeepLab`."""

    def __init__(self, num_classes=20, freeze_bn=False, bn_momentum=BN_MOMENTUM, checkpointing=False):
        super().__init__(Backbone(), num_classes, freeze_bn, bn_momentum, checkpointing)
