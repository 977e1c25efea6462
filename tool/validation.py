"""Validation during a training: measures on held-out images, and the weights with the best of them."""
import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset

from tool import image_files, visualization
from tool.cli import BadInput, check_range
from tool.devices import autocast, copy_buffers_of_first_rank, get_rank, sum_over_ranks
from tool.image_lists import load_img_name_list
from tool.metrics import average_precision, class_measures, confusion, confusion_curve, mean_measures
from tool.on_error import Errors
from tool.torchutils import read_items
from tool.training import digest, outlive_sigterm, save_weights

BACKGROUND_SCORES = np.arange(100) / 100
MAPS = 'cam', 'cam_rv'      # plain and refined CAMs


def check_validation_args(args):
    """Raises BadInput for flags of the validation that contradict each other, and for a list that cannot be read."""
    check_range(args, 0, 10 ** 6, 'val_every')
    if args.keep_best and not args.val_every:
        raise BadInput('--keep_best needs a validation: add --val_every 1')
    if args.val_every:
        load_img_name_list(args.val_list, '--val_list')


@dataclasses.dataclass
class HeldOut:
    """Held-out images, and how the network runs on them. dataset: items (name, img, ...), img float32 (3, H, W),
    normalised. truth_dir: folder of ground truth NAME.png; images without it count only for the mAP."""
    dataset: Dataset
    truth_dir: str
    class_names: list
    num_workers: int
    device: torch.device
    amp: str

    def __post_init__(self):
        self.names = self.dataset.img_name_list
        self.errors = Errors('skip', 'smaller images in --val_list')

    def truth_path(self, name):
        return os.path.join(self.truth_dir, name + '.png')

    def check_truth(self, val_list, needed):
        """Raises BadInput if no mask of the list, which is in the file `val_list`, has an object, so that background
        everywhere would be best; if ground truth is `needed`, also if there is none."""
        masks = [self.truth_path(name) for name in self.names if os.path.isfile(self.truth_path(name))]
        if needed and not masks:
            raise BadInput(f'--val_every needs ground truth, but no image of {val_list} (--val_list) has a mask in '
                           f'{self.truth_dir} (--voc12_root)')
        if masks and not any(map(self.has_object, masks)):
            raise BadInput(f'no mask of {val_list} (--val_list) in {self.truth_dir} (--voc12_root) has an object, a '
                           f'value of 1 to {len(self.class_names)}: run voc12/check.py, or leave --val_every out')

    def has_object(self, path):
        with contextlib.suppress(BadInput):     # the validation leaves such a mask out, and says so
            labels = image_files.read_label_map(path, '--voc12_root')
            return ((labels > 0) & (labels <= len(self.class_names))).any()
        return False

    def read_truth(self, name, size):
        """Returns the ground truth of an image, uint8 (H, W) = size, or None if it has none. Raises BadInput."""
        path = self.truth_path(name)
        if not os.path.isfile(path):
            return None
        truth = image_files.read_label_map(path, '--voc12_root')
        if truth.shape != size:
            raise BadInput(f'{path} (--voc12_root) is {truth.shape[0]}x{truth.shape[1]}, but its image is '
                           f'{size[0]}x{size[1]}')
        return truth

    def run(self, predict, count):
        """Calls count(number, outputs, truth) for each image of this rank's share: its place in the list, the result
        of predict(img (1, 3, H, W)), and that of `read_truth`. Images that cause a BadInput are left out."""
        rank, ranks = get_rank()
        numbers = {name: number for number, name in enumerate(self.names)}
        for name, img, *_ in read_items(self.dataset, self.names[rank::ranks], self.errors, self.num_workers,
                                        self.device, 'validation', outlive_sigterm):
            with self.errors.caught(name):
                truth = self.read_truth(name, tuple(img.shape[1:]))
                with autocast(self.device, self.amp):
                    outputs = predict(img[None].to(self.device).contiguous())
                count(numbers[name], outputs, truth)

    def sum(self, array):
        """Returns the sum of an array over the ranks."""
        return sum_over_ranks(torch.from_numpy(array).to(self.device)).cpu().numpy()


@torch.inference_mode()
def measure_cams(predict, net, held_out):
    """Measures a classifier and its CAMs. Returns (means, per_class, best): dicts of numbers in percent, and the name
    of the mean by which networks are compared. The mAP needs only labels. If there is ground truth, the means include
    the mIoU of each kind of CAMs over the classes present, at its best background score. They also count the images and
    masks.

    predict(net, img (1, 3, H, W)) -> class scores (1, C) and a list of CAMs (1, C, H, W), normalised, one for each of
    MAPS or only for the first. The dataset has `labels`, dict name -> (C,) multi-hot.
    """
    labels = np.stack([held_out.dataset.labels[name] for name in held_out.names])              # (N, C)
    num_classes = labels.shape[1]
    scores = np.zeros((len(labels), num_classes + 2))           # last columns: 1 if it was measured, 1 if it has a mask
    curves = np.zeros((len(MAPS), len(BACKGROUND_SCORES), num_classes + 2, num_classes + 2), np.int64)

    def count(number, outputs, truth):
        class_scores, maps = outputs
        row = class_scores[0].float().cpu().numpy()
        maps = [cam[0].float().cpu().numpy() for cam in maps]
        if not all(np.isfinite(values).all() for values in (row, *maps)):
            raise BadInput(f'the maps of {held_out.names[number]} are NaN or infinite')
        scores[number] = [*row, 1, truth is not None]
        for curve, cam in zip(curves, maps if truth is not None else ()):
            curve += confusion_curve(truth, {key: cam[key] for key in np.flatnonzero(labels[number])},
                                     BACKGROUND_SCORES, num_classes)

    held_out.run(lambda img: predict(net, img), count)
    scores, curves = held_out.sum(scores), held_out.sum(curves)
    measured = scores[:, -2] > 0
    means, best = {'images': int(measured.sum()), 'masks': int(scores[:, -1].sum())}, 'mAP'
    precisions = average_precision(scores[measured, :-2], labels[measured])
    per_class = {f'AP_{name}': value.item() for name, value in zip(held_out.class_names, precisions)
                 if not np.isnan(value)}
    if per_class:
        means['mAP'] = np.mean(list(per_class.values())).item()
    for kind, curve in zip(MAPS, curves):
        if curve.any():
            mious = mean_measures(curve)['mIoU_present']
            best = f'mIoU_{kind}'
            means |= {best: mious.max().item(), f'background_score_{kind}': BACKGROUND_SCORES[mious.argmax()].item()}
    return means, per_class, best


@torch.inference_mode()
def measure_labels(net, held_out):
    """Measures a segmentation network at one scale, without mirror and CRF: the mIoU over the classes present and the
    IoU of each of them. Returns the same three as `measure_cams`."""
    matrix, masks = np.zeros((len(held_out.class_names) + 2,) * 2, np.int64), np.zeros(1, np.int64)

    def count(number, logits, truth):
        if truth is None:
            return
        if not logits.isfinite().all():
            raise BadInput(f'the class scores of {held_out.names[number]} are NaN or infinite')
        matrix[...] += confusion(truth, logits[0].argmax(dim=0).cpu().numpy(), len(held_out.class_names))
        masks[...] += 1

    held_out.run(net, count)
    total, means = held_out.sum(matrix), {'masks': held_out.sum(masks).item()}
    if total.any():
        means['mIoU'] = mean_measures(total)['mIoU_present'].item()
    present = total.sum(axis=1)[:-1] > 0
    ious = zip(['background', *held_out.class_names], class_measures(total)[0], present)
    return means, {f'IoU_{name}': value.item() for name, value, is_there in ious if is_there}, 'mIoU'


@dataclasses.dataclass
class Validation:
    """Measures the network after every `every` epochs and at the end, on every rank. It does not change the training.

    measure: a function of (net, held_out), see `measure_cams`. keep_best: save the best weights as
    <session_name>_best.pth; the checkpoint stores the best value.
    """
    every: int
    measure: Callable
    held_out: HeldOut
    keep_best: bool

    def run(self, step, batches, checkpoint, log, writer):
        """Validates after `step` updates of the network, if it is time to. The checkpoint must be of the same step, so
        that a run that ends here can be resumed here. batches: StepBatches; log: Logger; writer: TensorBoard's, or
        None. Raises BadInput if no image can be measured."""
        if step == 0 or step % (self.every * batches.epoch_steps) and step < batches.max_step:
            return
        net = copy.deepcopy(checkpoint.net).eval()          # the one that trains stays as it is
        copy_buffers_of_first_rank(net)                     # its running statistics are those that are saved
        means, per_class, best = self.measure(net, self.held_out)
        lines = self.held_out.errors.pop()
        if best not in means:
            raise BadInput('no image of --val_list could be measured; the first: '
                           f'{[*lines, "it has no class and no ground truth"][0]}')
        for line in lines:
            log.warn_once(line, f'left out of the validation (--val_list): {line}')
        log(f'Val: after {step} steps: ' + ', '.join(f'{name} {value:.4g}' for name, value in means.items()))
        log('Val: ' + ', '.join(f'{name} {value:.1f}' for name, value in per_class.items()))
        values = {**means, **per_class}
        log.record({'step': step, 'epoch': step // batches.epoch_steps,
                    **{f'val_{name}': value for name, value in values.items()}})
        if writer:
            visualization.write_scalars(writer, step, {f'val/{name}': value for name, value in values.items()})
        self._keep(net, step, best, means[best], checkpoint, log)

    def _keep(self, net, step, name, value, checkpoint, log):
        """Remembers, and with keep_best saves, the best network by the measure `name`."""
        path = checkpoint.session_name + '_best.pth'
        before, of = checkpoint.best, f'{name} of {digest(self.held_out.names)}'     # others cannot be compared
        if before and before['of'] == of and before['value'] >= value and (os.path.isfile(path) or not self.keep_best):
            log(f'Val: the best {name} is still {before["value"]:.4g}, after {before["step"]} steps')
            return
        checkpoint.best = {'of': of, 'value': value, 'step': step}
        if self.keep_best:
            save_weights(net, path)
            log(f'Val: the best {name} so far; wrote {path}')
