"""Checks of ground truth: the form of VOC's masks, and values that are no class. Needs no torch."""
import contextlib
import os

import numpy as np

from tool.cli import BadInput
from tool.image_files import IGNORE, decode_image, read_label_map, voc_palette
from voc12.lists import CAT_LIST

VOC_COLOURS = voc_palette().tobytes()
SAMPLE = 24                        # number of masks that `ground_truth_warnings` reads
NOT_OFFICIAL = ("not the official SegmentationClass files, perhaps SBD's or SegmentationClassAug (no 255 border), "
                'or ground truth overwritten with predictions')
MOVED = ('the program that saved them chose its own order of the colours, so their values are not the classes; convert '
         "the original masks anew, with VOC's palette")


def mask_form(path):
    """Reads the header of a mask. Returns (mode, whether it is P with VOC's colours, of which a shorter palette may be
    a part). Raises BadInput."""
    def look(img):      # before Pillow 13, tobytes() of a palette from a header fails
        return img.mode, img.mode == 'P' and VOC_COLOURS.startswith(img.palette.getdata()[1])
    return decode_image(path, f'the header of {path} as PNG', look, ('PNG',))


def moved_colours(path, labels, num_classes):
    """Returns a dict index -> class for the indices of a mask that have VOC's colour of another class. Programs that
    choose a palette by the colours of each picture make such masks. labels: the mask, uint8 (H, W). Raises BadInput."""
    def look(img):
        return np.frombuffer(img.palette.getdata()[1] if img.mode == 'P' else b'', np.uint8).reshape(-1, 3).tolist()
    palette = decode_image(path, f'the header of {path} as PNG', look, ('PNG',))
    colours = list(map(tuple, voc_palette().tolist()))
    # without 0: palettes have black at indices that they do not use
    classes = {colours[index]: index for index in (*range(1, num_classes + 1), IGNORE)}
    return {index: classes[tuple(palette[index])] for index in np.unique(labels).tolist()
            if index < len(palette) and classes.get(tuple(palette[index]), index) != index}


def wrong_values(labels, num_classes):
    """Returns a dict value -> number of pixels for the values other than 0..num_classes and 255 in a label map.
    labels: uint8 (H, W)."""
    pixels = np.bincount(labels.ravel(), minlength=256)
    return {value: int(pixels[value]) for value in range(num_classes + 1, IGNORE) if pixels[value]}


def find_labels(maps, most=2):
    """Returns the set of the labels except 255 in label maps, uint8 (H, W). It stops after the map with which it has
    found `most` labels. Maps with fewer than two labels are useless for training."""
    found = set()
    for labels in maps:
        found.update(np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORE]).tolist())
        if len(found) >= most:
            break
    return found


def ground_truth_warnings(gt_dir, names, class_names):
    """Returns a list of warnings about masks whose indices have VOC's colours of other classes and, if the classes are
    VOC's, about masks that are not VOC's official files; empty if there are none.

    Looks at no more than SAMPLE masks, spread over the list, and ignores those that are missing or damaged. Of masks in
    the official form it reads the header alone.
    """
    odd, moved, looked_at = 0, 0, 0
    for index in np.unique(np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).astype(int)):
        path = os.path.join(gt_dir, names[index] + '.png')
        with contextlib.suppress(BadInput):
            mode, official = mask_form(path)
            looked_at += 1
            odd += not official
            if mode == 'P' and not official:
                moved += bool(moved_colours(path, read_label_map(path, '--gt_dir'), len(class_names)))
    warnings = []
    if moved:
        warnings.append(f"{moved} of {looked_at} masks looked at in {gt_dir} (--gt_dir) have VOC's colours at other "
                        f'indices: perhaps {MOVED}')
    if odd and list(class_names) == CAT_LIST:
        warnings.append(f"{odd} of {looked_at} masks looked at in {gt_dir} (--gt_dir) are not indexed images in VOC's "
                        f'colours: {NOT_OFFICIAL}')
    return warnings
