"""Checks of ground truth: the form of VOC's masks, and values that are no class. Needs no torch."""
import contextlib
import os

import numpy as np

from tool.cli import BadInput
from tool.image_files import IGNORE, decode_image, voc_palette
from voc12.lists import CAT_LIST

VOC_COLOURS = voc_palette().tobytes()
SAMPLE = 24                        # number of masks that `ground_truth_warnings` reads
NOT_OFFICIAL = ("not the official SegmentationClass files, perhaps SBD's or SegmentationClassAug (no 255 border), "
                'or ground truth overwritten with predictions')


def mask_form(path):
    """Reads the header of a mask. Returns (mode, whether it is P with VOC's colours, of which a shorter palette may be
    a part). Raises BadInput."""
    def look(img):      # before Pillow 13, tobytes() of a palette from a header fails
        return img.mode, img.mode == 'P' and VOC_COLOURS.startswith(img.palette.getdata()[1])
    return decode_image(path, f'the header of {path} as PNG', look, ('PNG',))


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
    """Returns a list of warnings about masks that are not VOC's official files; empty if there are none, or if the
    classes are not VOC's.

    Reads the headers of at most SAMPLE masks, spread over the list, and ignores those that are missing or damaged.
    """
    if list(class_names) != CAT_LIST:
        return []
    forms = []
    for index in np.unique(np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).astype(int)):
        with contextlib.suppress(BadInput):
            forms.append(mask_form(os.path.join(gt_dir, names[index] + '.png')))
    odd = sum(not official for _, official in forms)
    if not odd:
        return []
    return [f"{odd} of {len(forms)} masks looked at in {gt_dir} (--gt_dir) are not indexed images in VOC's colours: "
            f'{NOT_OFFICIAL}']
