"""Image transforms. Images are (H, W, C) unless a name says CHW."""
import random

import cv2
import numpy as np
from PIL import Image

# people expect these functions here
from tool.crf import crf_inference      # noqa: F401
from tool.image_files import IGNORE, read_image, read_label_map, save_label_map      # noqa: F401
from tool.score_files import load_scores, save_scores      # noqa: F401

MEAN = (0.485, 0.456, 0.406)       # of ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)


def normalize(img):
    """Normalises an RGB image with values 0..255 to zero mean and unit deviation over ImageNet, float32 (H, W, 3).
    uint8 is computed in double and rounded once, float32 stays float32, as in the reference."""
    img = np.asarray(img)
    if img.dtype == np.uint8:
        return cv2.LUT(np.ascontiguousarray(img), NORMALIZED)           # ten times faster than to compute each pixel
    return _normalize(img)


def _normalize(img):
    x = img / 255.
    return ((x - np.asarray(MEAN, x.dtype)) / np.asarray(STD, x.dtype)).astype(np.float32)


NORMALIZED = _normalize(np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2))    # of each uint8


def normalize_float32(img):
    """Like `normalize`, but in float32 arithmetic throughout, as published for segmentation: the last digits differ."""
    return normalize(np.asarray(img, np.float32))


def denormalize(img):
    """Converts a normalised image, float32 CHW, back to uint8 (H, W, 3). It computes in float32 in this order and
    truncates, because the CRF of the published random walk saw these values; two fifths are one below the file's."""
    x = np.stack([(img[i] * np.float32(STD[i]) + np.float32(MEAN[i])) * np.float32(255) for i in range(3)], axis=-1)
    return np.clip(x, 0, 255).astype(np.uint8)


def HWC_to_CHW(img):
    """Returns a (C, H, W) view of an (H, W, C) array."""
    return np.transpose(img, (2, 0, 1))


def to_network_input(img):
    """Returns an RGB image, PIL or array (H, W, 3) with values 0..255, normalised as float32 (3, H, W)."""
    return HWC_to_CHW(normalize(img))


def resize(img, scale):
    """Resizes a PIL image by a factor, bicubic; each side is rounded half to even."""
    w, h = img.size
    return img.resize((max(round(w * scale), 1), max(round(h * scale), 1)), Image.Resampling.BICUBIC)


class RandomResizeLong:
    """Resizes a PIL image, bicubic, so that its long side is a random integer in [min_long, max_long]."""

    def __init__(self, min_long, max_long):
        self.min_long, self.max_long = min_long, max_long

    def __call__(self, img):
        long_side = random.randint(self.min_long, self.max_long)
        size = tuple(max(round(side * long_side / max(img.size)), 1) for side in img.size)
        return img.resize(size, Image.Resampling.BICUBIC)


def get_random_crop_box(imgsize, cropsize):
    """Chooses the place of a random crop. imgsize: (h, w). Returns eight ints: top, bottom, left, right in the
    cropsize x cropsize container, then in the image. A smaller image is put at a random place of the container.
    Draws one number of `random` per axis, horizontal first."""
    h, w = imgsize
    (img_left, cont_left), (img_top, cont_top) = (
        (offset, 0) if side > cropsize else (0, offset)
        for side, offset in ((side, random.randint(0, abs(side - cropsize))) for side in (w, h)))
    ch, cw = min(cropsize, h), min(cropsize, w)
    return cont_top, cont_top + ch, cont_left, cont_left + cw, img_top, img_top + ch, img_left, img_left + cw


class RandomCrop:
    """Crops (H, W, C) to float32 (cropsize, cropsize, C), with 0 outside the image."""

    def __init__(self, cropsize):
        self.cropsize = cropsize

    def __call__(self, img):
        ct, cb, cl, cr, it, ib, il, ir = get_random_crop_box(img.shape[:2], self.cropsize)
        container = np.zeros((self.cropsize, self.cropsize, img.shape[2]), np.float32)
        container[ct:cb, cl:cr] = img[it:ib, il:ir]
        return container


class RandomHorizontalFlip:
    """Mirrors (H, W, C) with probability 1/2, by one bit of `random`."""

    def __call__(self, img):
        return np.fliplr(img).copy() if random.getrandbits(1) else img


class AvgPool2d:
    """Means over ksize x ksize cells of (H, W, C). The last cells are padded with zeros and divided by ksize**2."""

    def __init__(self, ksize):
        self.ksize = ksize

    def __call__(self, img):
        k = self.ksize
        img = np.pad(img, ((0, -img.shape[0] % k), (0, -img.shape[1] % k), (0, 0)))
        h, w, c = img.shape
        rows = img.reshape(h // k, k, w, c).sum(axis=1)         # both axes in one go take five times as long
        return rows.reshape(h // k, w // k, k, c).sum(axis=2) / k ** 2


# ----- transforms of an image and its label together: (img, label) -> (img, label) -----

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
    """Applies a transform of (H, W, C) with the same random numbers to img (H, W, 3) and label (H, W, K)."""

    def __call__(self, img, label):
        both = self.transform(np.concatenate([img, label], axis=-1))
        return both[..., :3], both[..., 3:]


# for segmentation: img (H, W, 3), label (H, W). Random numbers are drawn in the order of the reference, which resizes
# with OpenCV and not with Pillow

class JitterHSV:
    """Shifts hue, saturation and value by random whole numbers of at most these sizes. img: uint8 RGB. The channels are
    those of 8-bit HSV: hue 0..179 wraps around, the others are clipped to 0..255."""

    def __init__(self, hue, saturation, value):
        self.most = hue, saturation, value

    def __call__(self, img, label):
        shift = np.array([random.randint(-most, most) for most in self.most], np.int16)
        hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV) + shift
        hsv[..., 0] %= 180
        return cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB), label


def mirror_at_random(img, label):
    """Mirrors both with probability 1/2."""
    if random.random() < 0.5:
        return np.fliplr(img).copy(), np.fliplr(label).copy()
    return img, label


def rescale(img, factor, interpolation=cv2.INTER_CUBIC):
    """Resizes (H, W[, C]) by a factor: sides are rounded half to even, samples lie exactly 1/factor apart, without
    smoothing. A factor that would leave less than a pixel is enlarged."""
    factor = max(factor, 0.51 / min(img.shape[:2]))
    return cv2.resize(img, None, fx=factor, fy=factor, interpolation=interpolation)


class RandomScale:
    """Resizes both by a random factor, uniform in low..high: the image bicubic, the label to the nearest pixel."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, img, label):
        factor = random.random() * (self.high - self.low) + self.low
        return rescale(img, factor), rescale(label, factor, cv2.INTER_NEAREST)


def normalize_image(img, label):
    """Normalises the image with `normalize_float32`; the label stays."""
    return normalize_float32(img), label


class RandomCropBoth(RandomCrop):
    """Crops both to cropsize x cropsize. Outside, the image is 0 (the mean colour, if normalised), the label 255."""

    def __call__(self, img, label):
        both = super().__call__(np.dstack([img, label.astype(np.float32) - IGNORE]))        # 0 is outside of both
        return both[..., :3], (both[..., 3] + IGNORE).astype(np.uint8)
