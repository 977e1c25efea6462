"""ResNet38 with SEAM's classifier and pixel correlation module (PCM)."""
import torch
import torch.nn.functional as F
from torch import nn

from network import resnet38d

NUM_CLASSES = 20        # of VOC
PCM_BYTES = 2 ** 26     # what PCM's affinities may take at a time where no gradient is wanted


def suppress_weaker_classes(cam):
    """cam: (N, 1+C, h, w), channel 0 background. Sets every foreground value below the pixel's foreground
    maximum to 0; ties all survive, the background is untouched. Returns a new tensor."""
    foreground = cam[:, 1:]
    strongest = foreground.amax(dim=1, keepdim=True)
    return torch.cat([cam[:, :1], foreground.masked_fill(foreground != strongest, 0)], dim=1)


def normalize_cam_for_pcm(cam):
    """The map that PCM refines: scores (N, 1+C, h, w), any sign -> values in [0, 1], no gradient.

    Foreground: relu(relu(cam) - 1e-5) / (max over the map + 1e-5); background := 1 - the largest
    foreground value (the learned background is discarded); then only each pixel's strongest classes stay.
    """
    cam = F.relu(cam.detach())
    maximum = cam.amax(dim=(2, 3), keepdim=True) + 1e-5
    cam = F.relu(cam - 1e-5) / maximum
    background = 1 - cam[:, 1:].amax(dim=1, keepdim=True)
    return suppress_weaker_classes(torch.cat([background, cam[:, 1:]], dim=1))


class Net(resnet38d.Net):
    """SEAM: `num_classes` foreground classes; channel 0 of every output is the background. Without `pcm` the
    refined map is the raw one, and f8_3, f8_4 and f9 are idle."""
    classifier = ('fc8.weight',)
    new_heads = (*classifier, 'f8_3.weight', 'f8_4.weight', 'f9.weight')

    def __init__(self, num_classes=NUM_CLASSES, width=64, pcm=True):
        super().__init__(width)
        self.dropout7 = nn.Dropout2d(0.5)
        self.fc8 = nn.Conv2d(64 * width, 1 + num_classes, 1, bias=False)
        self.f8_3 = nn.Conv2d(8 * width, width, 1, bias=False)
        self.f8_4 = nn.Conv2d(16 * width, 2 * width, 1, bias=False)
        self.f9 = nn.Conv2d(3 + 3 * width, 3 * width, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        nn.init.kaiming_normal_(self.f8_3.weight)
        nn.init.kaiming_normal_(self.f8_4.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)
        self.not_training = [self.conv1a, self.b2, self.b2_1, self.b2_2]
        self.pcm = pcm

    def train(self, mode=True):
        """As `resnet38d.Net.train`; without PCM its layers are frozen too. Returns self."""
        super().train(mode)
        if not self.pcm:
            for layer in (self.f8_3, self.f8_4, self.f9):
                layer.requires_grad_(False)
        return self

    def forward(self, x):
        """x: normalised images (N, 3, H, W). Returns (cam, cam_rv), both (N, 1+C, H, W).

        cam: raw class scores, any sign, channel 0 a learned background. cam_rv: the map refined by PCM, >= 0;
        it gives gradient to f8_3, f8_4 and f9 alone.
        """
        size = x.shape[2:]
        return tuple(F.interpolate(cam, size, mode='bilinear', align_corners=True) for cam in self.class_maps(x))

    def class_maps(self, x):
        """As `forward`, at the size of the feature maps: two (N, 1+C, h, w)."""
        features = self.forward_as_dict(x)
        cam = self.fc8(self.dropout7(features['conv6']))                       # (N, 1+C, h, w)
        if not self.pcm:
            return cam, cam
        f = torch.cat([F.interpolate(x, cam.shape[2:], mode='bilinear', align_corners=True),
                       F.relu(self.f8_3(features['conv4'].detach())),
                       F.relu(self.f8_4(features['conv5'].detach()))], dim=1)  # (N, 3 + 3 width, h, w)
        return cam, self.PCM(normalize_cam_for_pcm(cam), f)

    def PCM(self, cam, f):
        """Refines cam (N, K, h', w') by the pixels that look alike in f (N, 3 + 3 width, h, w) -> (N, K, h, w).

        Paper eq. (7): weights are the ReLU of the cosine similarity of the embedded features, and sum to 1.
        """
        n, _, h, w = f.shape
        cam = F.interpolate(cam, (h, w), mode='bilinear', align_corners=True).flatten(2)   # (N, K, hw)
        f = self.f9(f).flatten(2)                                                          # (N, 3 width, hw)
        f = f / (f.norm(dim=1, keepdim=True) + 1e-5)
        # in blocks of columns: without a gradient the hw x hw affinities are never all there
        block = h * w if torch.is_grad_enabled() else max(PCM_BYTES // (n * h * w * f.element_size()), 1)
        return torch.cat([weighted_mean(cam, f, columns) for columns in f.split(block, dim=2)], dim=2).view(n, -1, h, w)


def weighted_mean(cam, f, columns):
    """cam: (N, K, hw), f: unit vectors (N, D, hw), columns: some of them, (N, D, b). Returns (N, K, b)."""
    affinity = (f.transpose(1, 2) @ columns).relu_()                                       # (N, hw, b)
    # dividing after the product leaves the affinities uncopied
    return (cam @ affinity) / (affinity.sum(dim=1, keepdim=True) + 1e-5)
