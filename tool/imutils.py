"""Images, their transforms, score files, and the dense CRF. Images are (H, W, C) unless a name says CHW."""
import random

import numpy as np
from PIL import Image

from tool.pyutils import BadInput, atomic_write

MEAN = (0.485, 0.456, 0.406)       # of ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)


# ----- files -----

def read_image(path):
    """Opens an image as PIL RGB, whatever its mode. EXIF orientation is ignored, as in the reference.
    Raises BadInput for a missing, damaged or truncated file."""
    try:
        with Image.open(path) as img:
            return img.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f'cannot read the image {path} (--voc12_root): {error}') from error


def read_label_map(path, flag):
    """Opens a label image (mode L or P) as uint8 (H, W) class indices; `flag` names its folder in messages."""
    try:
        with Image.open(path) as img:
            mode, labels = img.mode, np.array(img)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f'cannot read the label map {path} ({flag}): {error}') from error
    if mode not in ('L', 'P'):
        raise BadInput(f'{path} ({flag}) is a picture of mode {mode}, not a map of class indices (mode L or P)')
    return labels


def save_label_map(path, labels):
    """Writes class indices (H, W) as an 8-bit grey PNG."""
    with atomic_write(path) as file:
        Image.fromarray(labels.astype(np.uint8)).save(file, format='PNG')


def save_scores(path, scores):
    """Writes a dict {int class: float32 (H, W)} as the reference does: a pickled dict in a .npy file."""
    with atomic_write(path) as file:
        np.save(file, scores, allow_pickle=True)


def load_scores(path, flag, kind):
    """Reads what `save_scores` wrote: dict {int: float (H, W)}, empty for an image without classes.

    kind 'cam': keys are the foreground classes from 0; 'crf': 0 is the background, class + 1 the others, and
    the scores of a pixel sum to 1. `flag` is the flag that named the folder, for messages. The file is a
    pickle, which can run code: open only files that you trust. Raises BadInput for other content, and for
    one kind where the other is needed, which would shift all classes by one.
    """
    try:
        scores = np.load(path, allow_pickle=True).item()
    except Exception as error:          # a damaged pickle raises whatever it likes
        raise BadInput(f'cannot read the score file {path} ({flag}): {error}') from error
    if not isinstance(scores, dict) or not all(
            isinstance(key, (int, np.integer)) and key >= 0 and getattr(value, 'ndim', 0) == 2
            for key, value in scores.items()) or len({value.shape for value in scores.values()}) > 1:
        raise BadInput(f'{path} ({flag}) holds no dict of class -> scores (H, W), all of one size')
    if kind == 'crf' and scores and 0 not in scores:
        raise BadInput(f'{path} ({flag}) has no background, key 0: a CAM file where a CRF file is needed')
    if kind == 'cam' and 0 in scores and len(scores) > 1 and np.allclose(sum(scores.values()), 1, atol=1e-3):
        raise BadInput(f'{path} ({flag}) sums to 1 at every pixel: a CRF file where a CAM file is needed')
    return scores


def strongest_label(scores):
    """Label map (H, W) of a dict {label: scores (H, W)} that is not empty: the highest score's, the first of equals."""
    return np.array(list(scores))[np.stack(list(scores.values())).argmax(axis=0)]


# ----- transforms -----

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
        w, h = img.size
        if w < h:
            size = (max(round(w * long_side / h), 1), long_side)
        else:
            size = (long_side, max(round(h * long_side / w), 1))
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
        return img.reshape(h // k, k, w // k, k, c).mean(axis=(1, 3))


# ----- dense CRF -----

def check_crf(flag):
    """Raises BadInput where pydensecrf is not installed."""
    try:
        import pydensecrf.densecrf      # noqa: F401
    except ImportError as error:
        raise BadInput(f'{flag} needs the dense CRF: pip install pydensecrf2 (a C++ compiler, Python 3.11 or 3.12), '
                       'or leave the flag out') from error


def crf_inference(img, probs, t=10, scale_factor=1, labels=21):
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) with the kernels of AffinityNet.

    img: uint8 (H, W, 3) RGB. probs: float32 (labels, H, W); clipped to [1e-5, 1], columns need not sum to 1.
    t: mean-field iterations. scale_factor divides the spatial extents (pixels).
    Returns float32 (labels, H, W) posteriors that sum to 1 per pixel.
    """
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax

    h, w = img.shape[:2]
    if probs.shape != (labels, h, w):
        raise ValueError(f'probs have shape {probs.shape}, the image and labels ask for {(labels, h, w)}')
    crf = dcrf.DenseCRF2D(w, h, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs, clip=1e-5)))
    crf.addPairwiseGaussian(sxy=3 / scale_factor, compat=3)
    crf.addPairwiseBilateral(sxy=80 / scale_factor, srgb=13, rgbim=np.array(img, order='C'), compat=10)
    return np.array(crf.inference(t), np.float32).reshape(labels, h, w)
