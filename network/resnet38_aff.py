"""AffinityNet on ResNet38."""
from network import resnet38d
from network.affinity import AffinityHead


class Net(AffinityHead, resnet38d.Net):
    """See `AffinityHead`."""
