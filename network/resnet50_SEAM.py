"""SEAM on torchvision's ResNet-50: an example of another backbone. `--weights` reads torchvision's state dict, without
`fc.weight` and `fc.bias`."""
import torch.nn.functional as F
import torchvision

from network.base import Network
from network.seam import SEAMHead


class Backbone(Network):
    channels = {'conv4': 512, 'conv5': 1024, 'conv6': 2048}

    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])     # output stride 8
        for name in ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4'):
            self.add_module(name, getattr(resnet, name))
        self.not_training = [self.conv1, self.layer1]

    def forward_as_dict(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        conv4 = self.run(self.layer2, self.run(self.layer1, x))
        conv5 = self.run(self.layer3, conv4)
        return {'conv4': conv4, 'conv5': conv5, 'conv6': self.run(self.layer4, conv5)}


class Net(SEAMHead, Backbone):
    pass
