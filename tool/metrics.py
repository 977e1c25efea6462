"""Measures of segmentation, from counts of pixels, and of classification. K = 1 + number of classes; index K stands for
values that are no class."""
import numpy as np

from tool.image_files import IGNORE


def confusion(gt, pred, num_classes):
    """Counts pixels: returns int64 (K+1, K+1), rows ground truth, columns prediction. Leaves out 255 in gt."""
    other = 1 + num_classes
    counted = gt != IGNORE
    gt, pred = np.minimum(gt[counted], other).astype(np.int64), np.minimum(pred[counted], other).astype(np.int64)
    return np.bincount(gt * (other + 1) + pred, minlength=(other + 1) ** 2).reshape(other + 1, other + 1)


def confusion_curve(gt, scores, thresholds, num_classes):
    """Computes the `confusion` of a CAM dict at each of the ascending background thresholds in one pass, int64
    (thresholds, K+1, K+1).

    A pixel belongs to its best class (the lowest of equals; absent classes compete with 0) if that score is strictly
    above the threshold, compared in float32, and otherwise to the background.
    """
    absent = [key for key in range(num_classes) if key not in scores][:1]       # all have 0, so the lowest wins
    keys = sorted([*scores, *absent])
    stack = np.stack([scores[key] if key in scores else np.zeros(gt.shape) for key in keys]).astype(np.float32)
    best = np.array(keys)[stack.argmax(axis=0)]
    # number of thresholds, from the lowest, at which the best class wins over the background
    wins = np.searchsorted(thresholds.astype(np.float32), stack.max(axis=0), side='left')
    counted = gt != IGNORE
    bins = (len(thresholds) + 1, num_classes + 2, num_classes + 2)
    index = np.ravel_multi_index((wins[counted], np.minimum(gt[counted], num_classes + 1), best[counted] + 1), bins)
    histogram = np.bincount(index, minlength=np.prod(bins)).reshape(bins)
    # the class wins at threshold number i where wins > i
    curve = histogram[::-1].cumsum(axis=0)[::-1][1:]
    curve[:, :, 0] = histogram.sum(axis=(0, 2)) - curve.sum(axis=2)
    return curve


def class_measures(matrix):
    """Returns the IoU of each class, and the shares of false positives and of false negatives in the union, each
    float64 (..., K) in percent. The three sum to 100; for a class that no pixel has, all are 0.
    matrix: int64 (..., K+1, K+1), see `confusion`."""
    true_positive = np.diagonal(matrix, axis1=-2, axis2=-1)
    truth, prediction = matrix.sum(axis=-1), matrix.sum(axis=-2)
    union = truth + prediction - true_positive + 1e-10
    return tuple((count / union * 100)[..., :-1]
                 for count in (true_positive, prediction - true_positive, truth - true_positive))


def mean_measures(matrix, chosen=None):
    """Returns the mean measures of a confusion matrix, int64 (..., K+1, K+1): dict of float64 (...) in percent.

    mIoU is the mean over all K classes, as in the reference; mIoU_present is the mean over those that occur in the
    ground truth (fewer in a small data set); mIoU_chosen is the mean over `chosen`, a list of class indices or None.
    mFP (over-activation) and mFN (under-activation) are means over the chosen classes or, without `chosen`, over those
    present. accuracy is the share of correct pixels."""
    iou, false_positive, false_negative = class_measures(matrix)
    present = matrix.sum(axis=-1)[..., :-1] > 0                         # (..., K)
    counted = present if chosen is None else np.isin(np.arange(iou.shape[-1]), chosen)

    def mean(values, classes):
        return (values * classes).sum(axis=-1) / np.maximum(classes.sum(axis=-1), 1)

    means = {'mIoU': iou.mean(axis=-1), 'mIoU_present': mean(iou, present)}
    if chosen is not None:
        means['mIoU_chosen'] = mean(iou, counted)
    pixels = np.maximum(matrix.sum(axis=(-2, -1)), 1)
    return means | {'mFP': mean(false_positive, counted), 'mFN': mean(false_negative, counted),
                    'accuracy': np.trace(matrix, axis1=-2, axis2=-1) / pixels * 100}


def average_precision(scores, labels):
    """Returns the average precision of each class, float64 (C,) in percent: 100 if the scores rank all images of the
    class first, nan for a class without images. scores: (N, C); labels: (N, C) of 0 and 1."""
    order = np.argsort(-scores, axis=0, kind='stable')
    hits = np.take_along_axis(labels > 0, order, axis=0)                # (N, C), best score first
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    with np.errstate(invalid='ignore'):
        return (precision * hits).sum(axis=0) / hits.sum(axis=0) * 100


def best_tag_threshold(probability, labels):
    """Finds the threshold of the probabilities, of 0.01, 0.02, ... 0.99, whose tags have the best F1 over all classes
    together; the lowest of equals. A class is tagged if its probability is above the threshold.
    Returns (threshold, precision, recall, F1), the last three in percent.
    probability: (N, C) in 0..1; labels: (N, C) of 0 and 1."""
    thresholds = np.arange(1, 100) / 100
    tagged = probability > thresholds[:, None, None]                    # (99, N, C)
    hits, tags = (tagged & (labels > 0)).sum(axis=(1, 2)), tagged.sum(axis=(1, 2))
    f1 = 2 * hits / np.maximum(tags + (labels > 0).sum(), 1)
    best = f1.argmax()
    shares = hits[best] / max(tags[best], 1), hits[best] / max((labels > 0).sum(), 1), f1[best]
    return thresholds[best].item(), *(share.item() * 100 for share in shares)


class ClassificationMeter:
    """Mean average precision (mAP) over the images since the last `pop`. Tensors stay on the GPU until then."""

    def __init__(self):
        self._batches = []

    def add(self, scores, labels):
        """scores, labels: tensors (n, C) without gradient."""
        self._batches.append((scores, labels))

    def pop(self):
        """Returns (mAP, the mAP of random scores) in percent, None if no image has a class. Then starts over."""
        scores, labels = (np.concatenate([part.cpu().numpy() for part in parts]) for parts in zip(*self._batches))
        self._batches = []
        share = labels.mean(axis=0)
        if not share.any():
            return None, None
        return np.nanmean(average_precision(scores, labels)).item(), share[share > 0].mean().item() * 100
