"""SEAM's head: classifier and pixel correlation module (PCM), on any backbone of network/base.py."""
import torch
import torch.nn.functional as F
from torch import nn

from network.base import Network

NUM_CLASSES = 20        # of VOC
PCM_BYTES = 2 ** 26     # memory for PCM's affinities at a time, where no gradient is needed


def pseudo_label(cam):
    """Keeps only the strongest foreground class of each pixel at its value (all of them where several tie), sets the
    others to 0, and channel 0 to 1 - that value; "one-hot" in the reference.
    (N, 1+C, h, w) in 0..1 -> the same shape and range, without gradient."""
    foreground = cam.detach()[:, 1:]
    strongest = foreground.amax(dim=1, keepdim=True)
    return torch.cat([1 - strongest, foreground.masked_fill(foreground != strongest, 0)], dim=1)


def normalize_cam_for_pcm(cam):
    """Returns the map that PCM refines: the `pseudo_label` of relu(relu(cam) - 1e-5) / (max over the map + 1e-5), which
    replaces the learned background. Scores (N, 1+C, h, w), any sign -> the same shape in 0..1, without gradient."""
    cam = F.relu(cam.detach())
    maximum = cam.amax(dim=(2, 3), keepdim=True) + 1e-5
    return pseudo_label(F.relu(cam - 1e-5) / maximum)


def class_scores(cam):
    """Pools raw maps (N, K, h, w) into the class scores (N, K) for the classification loss and Grad-CAM."""
    return cam.mean(dim=(2, 3))


class SEAMHead(Network):
    """Classifier and PCM for `num_classes` foreground classes; channel 0 of every output is the background. Without
    `pcm` the refined map is the raw one, and f8_3, f8_4 and f9 are not used. `Network` describes the other options."""
    kind = 'SEAM'

    def __init__(self, num_classes=NUM_CLASSES, pcm=True, train_bn=False, checkpointing=False, dropout=1.0,
                 backbone=None):
        """backbone: name of the backbone, for networks that `--backbone` selects one for."""
        super().__init__(*([backbone] if backbone else []))     # only some backbones have names
        conv4, conv5, conv6 = (self.channels[name] for name in ('conv4', 'conv5', 'conv6'))
        narrow4, narrow5 = self.width, 2 * self.width                   # 64 and 128 in the paper
        self.dropout7 = nn.Dropout2d(0.5)
        self.fc8 = nn.Conv2d(conv6, 1 + num_classes, 1, bias=False)
        self.f8_3 = nn.Conv2d(conv4, narrow4, 1, bias=False)
        self.f8_4 = nn.Conv2d(conv5, narrow5, 1, bias=False)
        self.f9 = nn.Conv2d(3 + narrow4 + narrow5, narrow4 + narrow5, 1, bias=False)
        self.from_scratch_layers = [self.fc8, self.f8_3, self.f8_4, self.f9]
        self.classifier_layers = [self.fc8]
        nn.init.xavier_uniform_(self.fc8.weight)
        nn.init.kaiming_normal_(self.f8_3.weight)
        nn.init.kaiming_normal_(self.f8_4.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)
        self.pcm = pcm
        for layer in self.from_scratch_layers:      # all but the classifier are PCM's
            layer.requires_grad_(pcm or layer is self.fc8)
        self.set_options(train_bn, checkpointing, dropout)

    def forward(self, x):
        """x: normalised images (N, 3, H, W). Returns (cam, cam_rv), both (N, 1+C, H, W).

        cam: raw class scores, any sign, channel 0 a learned background. cam_rv: the map refined by PCM, >= 0; its
        gradient reaches only f8_3, f8_4 and f9.
        """
        size = x.shape[2:]
        return tuple(F.interpolate(cam, size, mode='bilinear', align_corners=True) for cam in self.class_maps(x))

    def classify(self, conv6):
        """Computes the raw class maps (N, 1+C, h, w) from conv6 (N, its channels, h, w)."""
        with torch.autocast(conv6.device.type, enabled=False):  # in half precision more classes would tie
            return self.fc8(self.dropout7(conv6.to(self.fc8.weight.dtype)))

    def class_maps(self, x):
        """Returns (cam, cam_rv) as `forward` does, but at the size of the feature maps: two (N, 1+C, h, w)."""
        features = self.forward_as_dict(x)
        cam = self.classify(features['conv6'])
        if not self.pcm:
            return cam, cam
        f = torch.cat([F.interpolate(x, cam.shape[2:], mode='bilinear', align_corners=True),
                       F.relu(self.f8_3(features['conv4'].detach())),
                       F.relu(self.f8_4(features['conv5'].detach()))], dim=1)  # (N, 3 + 3 * 64, h, w) on ResNet38
        return cam, self.PCM(normalize_cam_for_pcm(cam), f)

    def PCM(self, cam, f):
        """Refines cam (N, 1+C, h', w'): each pixel of the result (N, 1+C, h, w) is the mean of cam over all pixels,
        weighted by the similarity of their features f (N, D, h, w).

        Paper eq. (7): the weights are the ReLU of the cosine similarity of the embedded features, and sum to 1.
        """
        n, _, h, w = f.shape
        cam = F.interpolate(cam, (h, w), mode='bilinear', align_corners=True).flatten(2)   # (N, 1+C, hw)
        f = self.f9(f).flatten(2).to(cam.dtype)                                            # (N, D', hw)
        f = f / (f.norm(dim=1, keepdim=True) + 1e-5)
        # without a gradient it works in blocks of columns, so that the hw x hw affinities never exist as a whole
        block = h * w if torch.is_grad_enabled() else max(PCM_BYTES // (n * h * w * f.element_size()), 1)
        return torch.cat([weighted_mean(cam, f, columns) for columns in f.split(block, dim=2)], dim=2).view(n, -1, h, w)


def weighted_mean(cam, f, columns):
    """Returns the refined map at some pixels, (N, 1+C, b). cam: (N, 1+C, hw) in 0..1; f: unit vectors (N, D, hw);
    columns: those of these pixels, (N, D, b)."""
    affinity = (f.transpose(1, 2) @ columns).relu_()                                       # (N, hw, b)
    total = affinity.sum(dim=1, keepdim=True, dtype=cam.dtype) + 1e-5
    # keeps the sums below the 65,504 of fp16; a power of two leaves the digits of float32 as they are
    scale = 2.0 ** min(15 - cam.shape[2].bit_length(), 0)
    # dividing after the product leaves the affinities uncopied
    return (cam * scale @ affinity) / total / scale
