"""PASCAL VOC 2012 as PyTorch datasets."""
import os

import numpy as np
import torch
from torch.utils.data import Dataset

from tool import image_files, imutils, score_files
from tool.affinity_pairs import STRIDE, fit_radius, pair_indices
from tool.cli import BadInput, check_file
from tool.image_files import IGNORE
from tool.outputs import warn_of_older_files
from voc12.data_root import find_images
from voc12.lists import (AUG_GT_FOLDER, CAT_LIST, GT_FOLDER, IMG_FOLDER, check_images, get_img_path,
                         load_img_name_list, load_labels)
from voc12.masks import wrong_values


class VOC12ImageDataset(Dataset):
    """Items (name, image) for the names in a list, or for `images`, the files and folders of --images, which replace
    list and data root. The image is PIL RGB, or the result of `transform`. paths: dict name -> path of the image;
    folder: a folder that contains all images."""

    def __init__(self, img_name_list_path, voc12_root, transform=None, images=None):
        self.transform, self.voc12_root = transform, voc12_root
        if images:
            self.flag, (self.paths, self.folder) = '--images', find_images(images)
            self.img_name_list = list(self.paths)
            return
        self.flag, self.folder = '--voc12_root', os.path.join(voc12_root, IMG_FOLDER)
        self.img_name_list = load_img_name_list(img_name_list_path)
        check_images(self.img_name_list, img_name_list_path, voc12_root)
        self.paths = {name: get_img_path(name, voc12_root) for name in self.img_name_list}

    def input_folders(self):
        """Returns the folders of the images, also of those that are links, and of the data root's ground truth."""
        images = {os.path.dirname(find(path)) for find in (os.path.abspath, os.path.realpath)
                  for path in self.paths.values()}
        return [self.folder, *images, *(os.path.join(self.voc12_root, name) for name in (GT_FOLDER, AUG_GT_FOLDER))]

    def __len__(self):
        return len(self.img_name_list)

    def __getitem__(self, idx):
        name = self.img_name_list[idx]
        img = image_files.read_image(self.paths[name], self.flag)
        if self.transform:
            img = self.transform(img)
        return name, img


class VOC12ClsDataset(VOC12ImageDataset):
    """Items (name, image, label): label is a float32 (C,) multi-hot of the image's classes; all zeros without
    `cls_labels`, where the classes are not known."""

    def __init__(self, img_name_list_path, voc12_root, transform=None, cls_labels='voc12/cls_labels.npy',
                 class_names=CAT_LIST, images=None):
        super().__init__(img_name_list_path, voc12_root, transform, images)
        unknown = dict.fromkeys(self.img_name_list, np.zeros(len(class_names), np.float32))
        self.labels = load_labels(self.img_name_list, cls_labels, voc12_root, class_names) if cls_labels else unknown

    def __getitem__(self, idx):
        name, img = super().__getitem__(idx)
        return name, img, torch.from_numpy(self.labels[name])


class VOC12ClsDatasetMSF(VOC12ClsDataset):
    """Items (name, image, views, label): the image, uint8 (H, W, 3), and a CHW array of it at each of `scales`, which
    are factors of its size. `inter_transform` converts the resized PIL image to CHW."""

    def __init__(self, img_name_list_path, voc12_root, scales, inter_transform, cls_labels='voc12/cls_labels.npy',
                 class_names=CAT_LIST, images=None):
        super().__init__(img_name_list_path, voc12_root, None, cls_labels, class_names, images)
        self.scales = scales
        self.inter_transform = inter_transform

    def __getitem__(self, idx):
        name, img, label = super().__getitem__(idx)
        views = [self.inter_transform(imutils.resize(img, scale)) for scale in self.scales]
        return name, np.array(img), views, label


class ExtractAffinityLabelInRadius:
    """Computes the labels of the pairs of `pair_offsets(radius)` from a label map of cropsize x cropsize cells."""

    def __init__(self, cropsize, radius=5):
        self.ind_from, self.ind_to = pair_indices(cropsize, cropsize, radius)

    def __call__(self, label):
        """label: (cropsize, cropsize) integers, 0 background, 255 ignored.

        Returns (bg, fg, neg), float32 tensors (offsets, from) of 0 and 1: whether both cells are background, have the
        same foreground label, or have different labels. A pair with an ignored cell is 0 in all three.
        """
        label = label.reshape(-1)
        start, end = label[self.ind_from], label[self.ind_to]        # (from,), (offsets, from)
        valid = (start < IGNORE) & (end < IGNORE)
        equal = valid & (start == end)
        masks = equal & (start == 0), equal & (start > 0), valid & (start != end)
        return tuple(torch.from_numpy(mask.astype(np.float32)) for mask in masks)


def fuse_crf_labels(scores):
    """Combines the pooled scores of both CRFs into one label map.

    scores: float32 (h, w, 2K): K maps of the low background alpha, then K of the high one, background first.
    A cell is background if the high alpha labels it as background; else it has the foreground label of the low alpha;
    if that labels it as background, or if it has no score at all, it is 255.
    Returns uint8 (h, w); the values are positions in the score dict, not class ids.
    """
    low, high = np.split(scores, 2, axis=-1)
    label = low.argmax(axis=-1).astype(np.uint8)
    label[label == 0] = IGNORE
    label[high.argmax(axis=-1) == 0] = 0
    label[scores.max(axis=-1) < 1e-5] = IGNORE
    return label


class VOC12AffDataset(VOC12ImageDataset):
    """Items (name, image, (bg, fg, neg)): pair labels from the CRF score files of a low and a high background alpha.

    Each of `transforms` is called with (img, scores) and returns both: first a PIL image and (H, W, 2K), in the end
    arrays (cropsize, cropsize, 3) and (cropsize // 8, cropsize // 8, 2K).
    """

    def __init__(self, img_name_list_path, label_la_dir, label_ha_dir, cropsize, voc12_root, radius=5,
                 num_classes=len(CAT_LIST), transforms=()):
        super().__init__(img_name_list_path, voc12_root)
        self.label_dirs = {'--la_crf_dir': label_la_dir, '--ha_crf_dir': label_ha_dir}
        self.num_classes, self.transforms = num_classes, transforms
        cells = cropsize // STRIDE
        self.extract_aff_label = ExtractAffinityLabelInRadius(cells, fit_radius(cells, cells, radius))
        for flag, folder in self.label_dirs.items():
            score_files.check_scores(folder, self.img_name_list, flag)

    def read_scores(self, name, size):
        """Reads the scores (H, W, 2K) of an image of that size, see `fuse_crf_labels`. Raises BadInput."""
        low, high = (score_files.load_fitting(folder, name, flag, 'crf', size, self.num_classes)
                     for flag, folder in self.label_dirs.items())
        if list(low) != list(high):
            raise BadInput(f'{name}.npy has the labels {list(low)} in --la_crf_dir, {list(high)} in --ha_crf_dir')
        return np.stack([*low.values(), *high.values()], axis=-1)

    def sample_labels(self, most=24):
        """Yields the label maps (positions in the score dict) of some images of the list, without augmentation."""
        for idx in np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)):
            name, img = super().__getitem__(idx)
            yield fuse_crf_labels(self.read_scores(name, img.size[::-1])[::STRIDE, ::STRIDE])

    def __getitem__(self, idx):
        name, img = super().__getitem__(idx)
        scores = self.read_scores(name, img.size[::-1])
        for transform in self.transforms:
            img, scores = transform(img, scores)
        return name, imutils.HWC_to_CHW(img), self.extract_aff_label(fuse_crf_labels(scores))


class VOC12SegDataset(VOC12ImageDataset):
    """Items (name, image, label): float32 (3, S, S) and int64 (S, S), 0 background, 1..C, 255 ignored, from the label
    maps `label_dir`/NAME.png. Each of `transforms` is called with (img (H, W, 3), label (H, W)) and returns both."""

    def __init__(self, img_name_list_path, voc12_root, label_dir, num_classes=len(CAT_LIST), transforms=()):
        super().__init__(img_name_list_path, voc12_root)
        self.label_dir, self.num_classes, self.transforms = label_dir, num_classes, transforms
        for name in self.img_name_list:
            check_file(self.label_path(name), '--label_dir')
        warn_of_older_files(label_dir, self.img_name_list, '--label_dir')

    def label_path(self, name):
        return os.path.join(self.label_dir, name + '.png')

    def read_label(self, name, size=None):
        """Reads the label map, uint8 (H, W), of an image of that size; None allows any size. All pixels may be 255, if
        infer_aff.py --ignore_below found none that is certain. Raises BadInput for maps that cannot be used."""
        path = self.label_path(name)
        label = image_files.read_label_map(path, '--label_dir')
        if size and label.shape != size:
            raise BadInput(f'{path} (--label_dir) is {label.shape[0]}x{label.shape[1]}, its image {size[0]}x{size[1]}')
        wrong = wrong_values(label, self.num_classes)
        if wrong:
            raise BadInput(f'{path} (--label_dir) has the label {min(wrong)}, more than the {self.num_classes} classes '
                           'of --class_names')
        return label

    def __getitem__(self, idx):
        name, img = super().__getitem__(idx)
        img = np.asarray(img)
        label = self.read_label(name, img.shape[:2])
        for transform in self.transforms:
            img, label = transform(img, label)
        return name, torch.from_numpy(np.ascontiguousarray(imutils.HWC_to_CHW(img))), torch.from_numpy(label).long()
