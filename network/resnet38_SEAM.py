"""SEAM on ResNet38, the network of the paper."""
from network import resnet38d
from network.seam import SEAMHead


class Net(SEAMHead, resnet38d.Net):
    """See `SEAMHead`."""
