"""AffinityNet at a quarter of the width, for the demo, tests and small machines."""
from network import resnet38_aff


class Net(resnet38_aff.Net):
    """As `resnet38_aff.Net`, 16 channels after the first convolution."""

    def __init__(self):
        super().__init__(width=16)
