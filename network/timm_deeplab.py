"""DeepLabv1 on a backbone of the package timm, named by `--backbone`."""
from network.deeplab import DeepLab
from network.timm_backbone import DEFAULT, TimmBackbone


class Net(DeepLab):
    """See `DeepLab`, `TimmBackbone`."""

    def __init__(self, num_classes=20, freeze_bn=False, checkpointing=False, backbone=DEFAULT):
        super().__init__(TimmBackbone(backbone), num_classes, freeze_bn, checkpointing)
