"""DeepLabv1 on a backbone of the package timm, named by `--backbone`."""
from network.deeplab import BN_MOMENTUM, DeepLab
from network.timm_backbone import DEFAULT, TimmBackbone
from tool.cli import BadInput


class Net(DeepLab):
    """`DeepLab` on a `TimmBackbone`, with their options."""
    takes_backbone = True

    def __init__(self, num_classes=20, freeze_bn=False, bn_momentum=BN_MOMENTUM, checkpointing=False, backbone=DEFAULT):
        if checkpointing and not freeze_bn:
            raise BadInput('--checkpointing with a network of timm would count each batch twice in batch norm: add '
                           '--freeze_bn')
        super().__init__(TimmBackbone(backbone), num_classes, freeze_bn, bn_momentum, checkpointing)
