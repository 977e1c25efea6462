"""Score files in and out: dicts of class -> map, of CAMs and of the CRF."""
import contextlib
import os

import numpy as np

from tool.cli import BadInput, check_file
from tool.files import atomic_write
from tool.image_files import IGNORE
from tool.unpickle import load_dict

# class of a key, which is a number in .npy and its text in .npz
CLASSES = {key: number for number in range(IGNORE) for key in (number, str(number))}


def save_scores(path, scores, dtype='float32'):
    """Writes a dict {int class: float (H, W)}: to NAME.npy as the reference does, a pickled dict; to NAME.npz as
    compressed arrays under the numbers of the classes, without any pickle. dtype: 'float16', 'float32' or 'float64'.
    Raises BadInput, and writes nothing, for scores that are NaN or infinite, or become so in that dtype."""
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
    with contextlib.suppress(FileNotFoundError):        # of an earlier run in the other format
        os.unlink(stem + {'.npy': '.npz', '.npz': '.npy'}[extension])


def find_scores(path, flag):
    """The file that `load_scores` reads: `path` (NAME.npy) or, where that is missing, NAME.npz. Raises BadInput."""
    zipped = os.path.splitext(path)[0] + '.npz'
    if not os.path.isfile(path) and os.path.isfile(zipped):
        return zipped
    check_file(path, flag)
    return path


def check_scores(folder, names, flag):
    """Raises BadInput for the first of these images that has no score file in a folder."""
    for name in names:
        find_scores(os.path.join(folder, name + '.npy'), flag)


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
    named the folder, for messages. Nothing in the file is run (see tool/unpickle.py), and float16 becomes float32.
    Raises BadInput for other content, NaN and infinite scores, and for one kind where the other is needed, which
    would shift all classes by one: CRF scores sum to 1 at every pixel and have the key 0, maps do not.
    """
    path = find_scores(path, flag)
    scores = {CLASSES.get(key): value for key, value in load_dict(path, flag).items()}
    if (None in scores or not all(getattr(value, 'ndim', 0) == 2 and value.size for value in scores.values())
            or len({value.shape for value in scores.values()}) > 1):
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
    if kind == 'cam' and 0 in scores and len(scores) > 1 and sums_to_one(scores).all():
        raise BadInput(f'{path} ({flag}) sums to 1 at every pixel: a CRF file where a CAM file is needed')
    return {key: value.astype(np.float32) if value.dtype == np.float16 else value for key, value in scores.items()}


def load_fitting(folder, name, flag, kind, size, num_classes):
    """`load_scores` of the image `name` in a folder: CAMs are empty for an image without any class, CRF scores never.
    Raises BadInput also for scores that do not fit the image's size (H, W) or the number of classes."""
    path = os.path.join(folder, name + '.npy')
    scores = load_scores(path, flag, kind)
    if kind == 'crf' and not scores:
        raise BadInput(f'{path} ({flag}) has no scores, not even of the background: take the image out of the list')
    most = num_classes - (kind == 'cam')
    if max(scores, default=0) > most:
        raise BadInput(f'{path} ({flag}) has the key {max(scores)}, beyond 0..{most} ({num_classes} classes of '
                       '--class_names)')
    if any(value.shape != size for value in scores.values()):
        raise BadInput(f'{path} ({flag}) does not fit the image, which is {size[0]}x{size[1]}')
    return scores


def strongest_label(scores):
    """Label map (H, W) of a dict {label: scores (H, W)} that is not empty: the highest score's, the first of equals."""
    return np.array(list(scores))[np.stack(list(scores.values())).argmax(axis=0)]
