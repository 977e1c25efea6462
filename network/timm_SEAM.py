"""SEAM on a backbone of the package timm, named by `--backbone`."""
from network.seam import SEAMHead
from network.timm_backbone import TimmBackbone


class Net(SEAMHead, TimmBackbone):
    """See `SEAMHead`, `TimmBackbone`."""
