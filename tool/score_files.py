"""Reads and writes the score files of CAMs and of the CRF: dicts of class -> map."""
import contextlib
import os

import numpy as np

from tool.cli import BadInput, check_file
from tool.files import atomic_write
from tool.image_files import IGNORE
from tool.outputs import warn_of_older_files
from tool.unpickle import load_dict

# key in a file -> class: a key is a number in .npy, and the text of that number in .npz
CLASSES = {key: number for number in range(IGNORE) for key in (number, str(number))}


def save_scores(path, scores, dtype='float32'):
    """Writes a dict {int class: float (H, W)}. NAME.npy is a pickled dict, as in the reference; NAME.npz has compressed
    arrays, named by the numbers of the classes, and no pickle. dtype: 'float16', 'float32' or 'float64'.
    Raises BadInput, and writes nothing, for scores that are NaN or infinite, also if only in that dtype."""
    with np.errstate(over='ignore'):
        scores = {key: value.astype(dtype) for key, value in scores.items()}
    for key, value in scores.items():
        if not np.isfinite(value).all():
            raise BadInput(f'{path} is not written: NaN or infinite scores under key {key}, in {dtype} '
                           '(--weights, --amp, --cam_dtype)')
    with atomic_write(path) as file:
        if path.endswith('.npz'):
            np.savez_compressed(file, **{str(key): value for key, value in scores.items()})
        else:
            np.save(file, scores, allow_pickle=True)
    stem, extension = os.path.splitext(path)
    with contextlib.suppress(FileNotFoundError):        # an earlier run may have written the other format
        os.unlink(stem + {'.npy': '.npz', '.npz': '.npy'}[extension])


def find_scores(path, flag):
    """Returns the file that `load_scores` reads: `path` (NAME.npy), or NAME.npz if that is missing. Raises BadInput."""
    zipped = os.path.splitext(path)[0] + '.npz'
    if not os.path.isfile(path) and os.path.isfile(zipped):
        return zipped
    check_file(path, flag)
    return path


def check_scores(folder, names, flag):
    """Raises BadInput for the first of these images without a score file in `folder`. Warns of older files."""
    for name in names:
        find_scores(os.path.join(folder, name + '.npy'), flag)
    warn_of_older_files(folder, names, flag)


def sums_to_one(scores):
    """Whether the scores of each pixel sum to 1 up to rounding, bool (H, W). scores: a dict that is not empty."""
    half = any(value.dtype == np.float16 for value in scores.values())
    with np.errstate(over='ignore'):
        total = sum(value.astype(np.float32, copy=False) for value in scores.values())
    return np.abs(total - 1) <= (4e-3 if half else 1e-3)


def load_scores(path, flag, kind):
    """Reads a file of `save_scores`: returns a dict {int: float32 or float64 (H, W)}, empty for an image without class.

    kind 'cam': keys are the foreground classes from 0; 'crf': 0 is the background, class + 1 the others, and the scores
    of a pixel sum to 1. path: NAME.npy; NAME.npz is read if that is missing. flag: the flag that named the folder. No
    code in the file is run (see tool/unpickle.py), and float16 becomes float32.
    Raises BadInput for other content, NaN and infinite scores, CAMs above 1, and for a file of the other kind, which
    would shift all classes by one: CRF scores sum to 1 at every pixel and have the key 0, CAMs do not.
    """
    path = find_scores(path, flag)
    scores = {CLASSES.get(key): value for key, value in load_dict(path, flag).items()}
    if (None in scores or not all(getattr(value, 'ndim', 0) == 2 and value.size for value in scores.values())
            or len({value.shape for value in scores.values()}) > 1):
        raise BadInput(f'{path} ({flag}) has no dict of class -> scores (H, W), all of one size')
    for key, value in scores.items():
        if value.dtype.kind != 'f':
            raise BadInput(f'{path} ({flag}) has {value.dtype} under key {key}; scores must be floats')
        if not np.isfinite(value).all():
            raise BadInput(f'{path} ({flag}) has NaN or infinite scores under key {key}')
    if kind == 'crf' and scores and 0 not in scores:
        raise BadInput(f'{path} ({flag}) has no background, key 0: it is a CAM file, and a CRF file is needed')
    if kind == 'crf' and scores and sums_to_one(scores).mean() < 0.5:
        raise BadInput(f'{path} ({flag}) does not sum to 1 at most pixels, so its key 0 is a class and not background: '
                       'it is a CAM file, and a CRF file is needed')
    largest = max((value.max() for value in scores.values()), default=0)
    if kind == 'cam' and largest > 1.001:
        raise BadInput(f'{path} ({flag}) has scores up to {largest:g}; divide each map by its largest value, so that '
                       'they are 1 at most')
    if kind == 'cam' and 0 in scores and len(scores) > 1 and sums_to_one(scores).all():
        raise BadInput(f'{path} ({flag}) sums to 1 at every pixel: it is a CRF file, and a CAM file is needed')
    return {key: value.astype(np.float32) if value.dtype == np.float16 else value for key, value in scores.items()}


def load_fitting(folder, name, flag, kind, size, num_classes):
    """Reads the scores of the image `name` from a folder, like `load_scores`. CAMs are empty for an image without any
    class, CRF scores never are. Raises BadInput also for scores that do not fit the image's size (H, W) or the number
    of classes."""
    path = os.path.join(folder, name + '.npy')
    scores = load_scores(path, flag, kind)
    if kind == 'crf' and not scores:
        raise BadInput(f'{path} ({flag}) has no scores, not even of the background: take the image out of the list')
    most = num_classes - (kind == 'cam')
    if max(scores, default=0) > most:
        raise BadInput(f'{path} ({flag}) has the key {max(scores)}, beyond 0..{most} for the {num_classes} classes of '
                       '--class_names')
    if any(value.shape != size for value in scores.values()):
        raise BadInput(f'{path} ({flag}) does not fit the image, which is {size[0]}x{size[1]}')
    return scores


def strongest_label(scores):
    """Returns the label map (H, W) with the label of the highest score at each pixel, the lowest of equals.
    scores: dict {label: scores (H, W)}, not empty."""
    labels = sorted(scores)
    return np.array(labels)[np.stack([scores[label] for label in labels]).argmax(axis=0)]
