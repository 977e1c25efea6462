"""AffinityNet at a quarter of the width, for the demo, tests and small machines."""
from network import resnet38d
from network.affinity import AffinityHead


class Net(AffinityHead, resnet38d.SlimNet):
    """See `AffinityHead`."""
