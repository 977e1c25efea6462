"""AffinityNet on a backbone of the package timm, named by `--backbone`."""
from network.affinity import AffinityHead
from network.timm_backbone import TimmBackbone


class Net(AffinityHead, TimmBackbone):
    """See `AffinityHead`, `TimmBackbone`."""
