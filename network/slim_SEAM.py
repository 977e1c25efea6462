"""SEAM at a quarter of the width (6.6 million parameters), for the demo, tests and small machines."""
from network import resnet38d
from network.seam import SEAMHead


class Net(SEAMHead, resnet38d.SlimNet):
    """See `SEAMHead`."""
