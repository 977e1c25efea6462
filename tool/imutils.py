"""Images, their transforms, score files, and the dense CRF. Images are (H, W, C) unless a name says CHW."""
import contextlib
import os
import random
import warnings

import numpy as np
from PIL import Image

from tool.pyutils import BadInput, atomic_write, check_file
from tool.safe_npy import load_dict
from tool.safe_pickle import describe

MEAN = (0.485, 0.456, 0.406)       # of ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
IGNORE = 255                       # in label maps: ground truth that does not count (object borders)
IMAGE_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')     # of Pillow's others, EPS starts Ghostscript


# ----- files -----

def decode_image(path, what, decode):
    """decode(img) of the PIL image in a file of IMAGE_FORMATS. `what` it is, for messages.
    Raises BadInput for a missing, damaged or truncated file, and for more pixels than Pillow thinks safe (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as img:
                return decode(img)
    except Exception as error:          # damaged files raise whatever they lead to, struct.error to KeyError
        raise BadInput(f'cannot read {what}: {describe(error)}') from error


def read_image(path):
    """Opens an image as PIL RGB, whatever its mode. EXIF orientation is ignored, as in the reference.
    Raises BadInput for a missing, damaged, truncated or oversized file, and for a format not in IMAGE_FORMATS."""
    return decode_image(path, f'the image {path} (--voc12_root)', lambda img: img.convert('RGB'))


def read_label_map(path, flag):
    """Opens a label image (mode L or P) as uint8 (H, W) class indices; `flag` names its folder in messages.
    Raises BadInput as `read_image` does, and for other modes."""
    mode, labels = decode_image(path, f'the label map {path} ({flag})', lambda img: (img.mode, np.array(img)))
    if mode not in ('L', 'P'):
        raise BadInput(f'{path} ({flag}) is a picture of mode {mode}, not a map of class indices (mode L or P)')
    return labels


def voc_palette():
    """uint8 (256, 3) RGB colours of PASCAL VOC: the bits of the class index, spread over the channels."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def save_label_map(path, labels):
    """Writes class indices (H, W) as a PNG in the form of VOC's masks: 8-bit indices, with VOC's colours as palette.
    Everything that does not convert to RGB reads the indices."""
    img = Image.fromarray(labels.astype(np.uint8))
    img.putpalette(voc_palette().tobytes())
    with atomic_write(path) as file:
        img.save(file, format='PNG')


def save_scores(path, scores, dtype='float32'):
    """Writes a dict {int class: float (H, W)}: to NAME.npy as the reference does, a pickled dict; to NAME.npz as
    compressed arrays under the numbers of the classes, without any pickle."""
    scores = {key: value.astype(dtype) for key, value in scores.items()}
    with atomic_write(path) as file:
        if path.endswith('.npz'):
            np.savez_compressed(file, **{str(key): value for key, value in scores.items()})
        else:
            np.save(file, scores, allow_pickle=True)
    stem, extension = os.path.splitext(path)
    with contextlib.suppress(FileNotFoundError):        # of an earlier run in the other format
        os.unlink(stem + {'.npy': '.npz', '.npz': '.npy'}[extension])


def find_scores(path, flag):
    """The file that `load_scores` reads: `path` (NAME.npy) or, where that is missing, NAME.npz. Raises BadInput."""
    zipped = os.path.splitext(path)[0] + '.npz'
    if not os.path.isfile(path) and os.path.isfile(zipped):
        return zipped
    check_file(path, flag)
    return path


def sums_to_one(scores):
    """bool (H, W): whether the scores of a pixel sum to 1, up to the rounding of their type. scores: not empty."""
    half = any(value.dtype == np.float16 for value in scores.values())
    with np.errstate(over='ignore'):
        total = sum(value.astype(np.float32, copy=False) for value in scores.values())
    return np.abs(total - 1) <= (4e-3 if half else 1e-3)


def load_scores(path, flag, kind):
    """Reads what `save_scores` wrote: dict {int: float32 or float64 (H, W)}, empty for an image without classes.

    kind 'cam': keys are the foreground classes from 0; 'crf': 0 is the background, class + 1 the others, and
    the scores of a pixel sum to 1. path: NAME.npy; NAME.npz is read where that is missing. `flag` is the flag that
    named the folder, for messages. Nothing in the file is run (see tool/safe_npy.py), and float16 becomes float32.
    Raises BadInput for other content, NaN and infinite scores, and for one kind where the other is needed, which
    would shift all classes by one: CRF scores sum to 1 at every pixel and have the key 0, maps do not.
    """
    path = find_scores(path, flag)
    scores = {int(key) if str(key).isdecimal() and len(str(key)) < 4 else key: value        # .npz: keys are text
              for key, value in load_dict(path, flag).items()}
    if not all(isinstance(key, int) and 0 <= key < IGNORE and getattr(value, 'ndim', 0) == 2 and value.size
               for key, value in scores.items()) or len({value.shape for value in scores.values()}) > 1:
        raise BadInput(f'{path} ({flag}) holds no dict of class -> scores (H, W), all of one size')
    for key, value in scores.items():
        if value.dtype.kind != 'f':
            raise BadInput(f'{path} ({flag}) has {value.dtype} under key {key}; scores are floats')
        if not np.isfinite(value).all():
            raise BadInput(f'{path} ({flag}) has NaN or infinite scores under key {key}')
    if kind == 'crf' and scores and 0 not in scores:
        raise BadInput(f'{path} ({flag}) has no background, key 0: a CAM file where a CRF file is needed')
    if kind == 'crf' and scores and sums_to_one(scores).mean() < 0.5:
        raise BadInput(f'{path} ({flag}) does not sum to 1 at most pixels, so its key 0 is a class and not background: '
                       'a CAM file where a CRF file is needed')
    if kind == 'cam' and 0 in scores and sums_to_one(scores).all():
        raise BadInput(f'{path} ({flag}) sums to 1 at every pixel: a CRF file where a CAM file is needed')
    return {key: value.astype(np.float32) if value.dtype == np.float16 else value for key, value in scores.items()}


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
        rows = img.reshape(h // k, k, w, c).sum(axis=1)         # both axes in one go take five times as long
        return rows.reshape(h // k, w // k, k, c).sum(axis=2) / k ** 2


# ----- dense CRF -----

def choose_crf_backend(backend):
    """What `--crf_backend` stands for: pydensecrf or torch; None: pydensecrf where it is installed. Raises BadInput."""
    if backend == 'torch':
        return backend
    try:
        import pydensecrf.densecrf      # noqa: F401
    except ImportError as error:
        if backend is None:
            print('pydensecrf is not installed: the CRF runs in PyTorch (--crf_backend torch)')
            return 'torch'
        raise BadInput('--crf_backend pydensecrf: pip install pydensecrf2 (a C++ compiler, Python 3.11 or 3.12), or '
                       'take --crf_backend torch') from error
    return 'pydensecrf'


def crf_inference(img, probs, t=10, scale_factor=1, labels=None, backend='pydensecrf', device='cpu'):
    """The dense CRF of one set of scores, float32 (labels, H, W), whose number may be left out: see `crf_inferences`.
    Returns float32 (labels, H, W)."""
    if labels is not None and len(probs) != labels:
        raise ValueError(f'probs have {len(probs)} labels, not {labels}')
    return crf_inferences(img, [probs], t, scale_factor, backend, device)[0]


def crf_inferences(img, several_probs, t=10, scale_factor=1, backend='pydensecrf', device='cpu'):
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) with the kernels of AffinityNet, for several sets of scores of
    one image: its filters are set up once.

    img: uint8 (H, W, 3) RGB. several_probs: list of float32 (labels, H, W); clipped to [1e-5, 1], columns need not sum
    to 1. t: mean-field iterations. scale_factor divides the spatial extents (pixels). backend: pydensecrf, or torch on
    `device`, the same up to rounding.
    Returns a list of float32 (labels, H, W), posteriors that sum to 1 per pixel.
    """
    shape = (len(several_probs[0]), *img.shape[:2])
    if any(probs.shape != shape for probs in several_probs):
        raise ValueError(f'probs have the shapes {[probs.shape for probs in several_probs]}, not all {shape}')
    if backend == 'torch':
        from tool.densecrf import DenseCRF, unary_energy
        energies = unary_energy(np.stack(several_probs))
        return list(DenseCRF(img, scale_factor, device=device).inference(energies, t).cpu().numpy())

    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax
    labels, h, w = shape
    crf = dcrf.DenseCRF2D(w, h, labels)
    crf.addPairwiseGaussian(sxy=3 / scale_factor, compat=3)
    crf.addPairwiseBilateral(sxy=80 / scale_factor, srgb=13, rgbim=np.array(img, order='C'), compat=10)
    posteriors = []
    for probs in several_probs:
        crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs, clip=1e-5)))
        posteriors.append(np.array(crf.inference(t), np.float32).reshape(shape))
    return posteriors
