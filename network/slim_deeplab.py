"""DeepLabv1 on ResNet38 at a quarter of the width, for the demo, tests and small machines."""
from network import resnet38_deeplab


class Net(resnet38_deeplab.Net):
    """See `DeepLab`."""

    def __init__(self, num_classes=20, **options):
        super().__init__(num_classes, width=16, **options)
