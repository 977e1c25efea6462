"""Image transforms. Images are (H, W, C) unless a name says CHW."""
import random

import cv2
import numpy as np
from PIL import Image

# people look for these here
from tool.crf import crf_inference      # noqa: F401
from tool.image_files import IGNORE, read_image, read_label_map, save_label_map      # noqa: F401
from tool.score_files import load_scores, save_scores      # noqa: F401

MEAN = (0.485, 0.456, 0.406)       # of ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)


def normalize(img):
    """RGB image with values 0..255 -> float32 (H, W, 3), zero mean and unit deviation over ImageNet.
    uint8 is computed in double and rounded once, float32 stays float32, as in the reference."""
    x = np.asarray(img) / 255.
    return ((x - np.asarray(MEAN, x.dtype)) / np.asarray(STD, x.dtype)).astype(np.float32)


def denormalize(img):
    """float32 CHW normalised image -> uint8 (H, W, 3). float32 arithmetic in this order, truncated: the
    random walk's CRF was published with these very values, of which two fifths end one below the file's."""
    x = np.stack([(img[i] * np.float32(STD[i]) + np.float32(MEAN[i])) * np.float32(255) for i in range(3)], axis=-1)
    return np.clip(x, 0, 255).astype(np.uint8)


def HWC_to_CHW(img):
    """(H, W, C) array -> (C, H, W) view."""
    return np.transpose(img, (2, 0, 1))


def resize(img, scale):
    """PIL image scaled by a factor, each side rounded half to even, bicubic."""
    w, h = img.size
    return img.resize((max(round(w * scale), 1), max(round(h * scale), 1)), Image.Resampling.BICUBIC)


class RandomResizeLong:
    """Resizes a PIL image so that its long side is a random integer in [min_long, max_long]; bicubic."""

    def __init__(self, min_long, max_long):
        self.min_long, self.max_long = min_long, max_long

    def __call__(self, img):
        long_side = random.randint(self.min_long, self.max_long)
        size = tuple(max(round(side * long_side / max(img.size)), 1) for side in img.size)
        return img.resize(size, Image.Resampling.BICUBIC)


def get_random_crop_box(imgsize, cropsize):
    """Where a random crop goes. imgsize: (h, w). Returns eight ints: top, bottom, left, right in the
    cropsize x cropsize container, then in the image. A smaller image lands at a random place of the container.
    One draw of `random` per axis, horizontal first."""
    h, w = imgsize
    (img_left, cont_left), (img_top, cont_top) = (
        (offset, 0) if side > cropsize else (0, offset)
        for side, offset in ((side, random.randint(0, abs(side - cropsize))) for side in (w, h)))
    ch, cw = min(cropsize, h), min(cropsize, w)
    return cont_top, cont_top + ch, cont_left, cont_left + cw, img_top, img_top + ch, img_left, img_left + cw


class RandomCrop:
    """Crops (H, W, C) to float32 (cropsize, cropsize, C); what lies outside the image is 0."""

    def __init__(self, cropsize):
        self.cropsize = cropsize

    def __call__(self, img):
        ct, cb, cl, cr, it, ib, il, ir = get_random_crop_box(img.shape[:2], self.cropsize)
        container = np.zeros((self.cropsize, self.cropsize, img.shape[2]), np.float32)
        container[ct:cb, cl:cr] = img[it:ib, il:ir]
        return container


class RandomHorizontalFlip:
    """Mirrors (H, W, C) half of the time, by one bit of `random`."""

    def __call__(self, img):
        return np.fliplr(img).copy() if random.getrandbits(1) else img


class AvgPool2d:
    """Mean over ksize x ksize cells of (H, W, C). The last cells are filled up with zeros and divided by ksize**2."""

    def __init__(self, ksize):
        self.ksize = ksize

    def __call__(self, img):
        k = self.ksize
        img = np.pad(img, ((0, -img.shape[0] % k), (0, -img.shape[1] % k), (0, 0)))
        h, w, c = img.shape
        rows = img.reshape(h // k, k, w, c).sum(axis=1)         # both axes in one go take five times as long
        return rows.reshape(h // k, w // k, k, c).sum(axis=2) / k ** 2


# ----- transforms of an image and its labels: (img, label) -> the same, both changed alike -----

class OnImage:
    """Applies a transform of images; the label stays."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, img, label):
        return self.transform(img), label


class OnLabel(OnImage):
    """Applies a transform to the label; the image stays."""

    def __call__(self, img, label):
        return img, self.transform(label)


class OnBoth(OnImage):
    """Applies one draw of a transform of (H, W, C) to img (H, W, 3) and label (H, W, K), as one array of 3 + K."""

    def __call__(self, img, label):
        both = self.transform(np.concatenate([img, label], axis=-1))
        return both[..., :3], both[..., 3:]


# for segmentation: img (H, W, 3), label (H, W); the draws of Python's `random` are in the order of the reference, which
# rescales with OpenCV and not with Pillow

class JitterHSV:
    """Adds whole numbers within +-hue, +-saturation, +-value to the channels of 8-bit HSV (hue 0..179, which goes
    round; the others stop at 0 and 255). img: uint8 RGB."""

    def __init__(self, hue, saturation, value):
        self.most = hue, saturation, value

    def __call__(self, img, label):
        shift = np.array([random.randint(-most, most) for most in self.most], np.int16)
        hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV) + shift
        hsv[..., 0] %= 180
        return cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB), label


def mirror_at_random(img, label):
    """Mirrors both half of the time."""
    if random.random() < 0.5:
        return np.fliplr(img).copy(), np.fliplr(label).copy()
    return img, label


def rescale(img, factor, interpolation=cv2.INTER_CUBIC):
    """(H, W[, C]) scaled by a factor: sides rounded half to even, samples exactly 1/factor apart, not smoothed. A
    factor that would leave less than a pixel is enlarged."""
    factor = max(factor, 0.51 / min(img.shape[:2]))
    return cv2.resize(img, None, fx=factor, fy=factor, interpolation=interpolation)


class RandomScale:
    """Scales both by a factor uniform in low..high: the image bicubic, the label to the nearest pixel."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, img, label):
        factor = random.random() * (self.high - self.low) + self.low
        return rescale(img, factor), rescale(label, factor, cv2.INTER_NEAREST)


def normalize_image(img, label):
    """`normalize` in float32 arithmetic throughout; the label stays."""
    return normalize(img.astype(np.float32)), label


class RandomCropBoth(RandomCrop):
    """Crops both to cropsize x cropsize; outside the image is 0 (the mean colour, once normalised), the label 255."""

    def __call__(self, img, label):
        both = super().__call__(np.dstack([img, label.astype(np.float32) - IGNORE]))        # 0 is outside of both
        return both[..., :3], (both[..., 3] + IGNORE).astype(np.uint8)
