"""SEAM at a quarter of the width (6.6 million parameters), for the demo, tests and small machines."""
from network import resnet38_SEAM


class Net(resnet38_SEAM.Net):
    """As `resnet38_SEAM.Net`, 16 channels after the first convolution."""

    def __init__(self, num_classes=resnet38_SEAM.NUM_CLASSES, pcm=True):
        super().__init__(num_classes, width=16, pcm=pcm)
