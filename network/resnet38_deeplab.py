"""DeepLabv1 on ResNet38, with the state-dict names of the released file."""
from network import resnet38d
from network.deeplab import DeepLab


class Net(DeepLab):
    """See `DeepLab`. `width`: of ResNet38, 64 in the paper's network."""

    def __init__(self, num_classes=20, width=64, **options):
        super().__init__(resnet38d.Net(width), num_classes, **options)
