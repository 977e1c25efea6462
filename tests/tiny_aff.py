"""AffinityNet at a sixteenth of the width, for tests."""
from network.affinity import AffinityHead
from tiny_SEAM import Backbone


class Net(AffinityHead, Backbone):
    """See `AffinityHead`."""
