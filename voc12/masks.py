"""What ground truth looks like: the form of VOC's masks, and values that no class has. Needs no torch."""
import contextlib
import os

import numpy as np

from tool.cli import BadInput
from tool.image_files import IGNORE, decode_image, voc_palette
from voc12.lists import CAT_LIST

VOC_COLOURS = voc_palette().tobytes()
SAMPLE = 24                        # masks that `ground_truth_warnings` looks at
NOT_OFFICIAL = ("not the official SegmentationClass files, perhaps SBD's or SegmentationClassAug (no 255 border), "
                'or ground truth overwritten with predictions')


def mask_form(path):
    """(mode, whether it is P with VOC's colours) of a mask, from the header alone. A shorter palette may be a part
    of VOC's. Raises BadInput."""
    def look(img):      # tobytes() of a palette from a header is an error before Pillow 13
        return img.mode, img.mode == 'P' and VOC_COLOURS.startswith(img.palette.getdata()[1])
    return decode_image(path, f'the header of {path} as PNG', look, ('PNG',))


def wrong_values(labels, num_classes):
    """dict value -> pixels of a label map, uint8 (H, W), for the values that are neither 0..num_classes nor 255."""
    pixels = np.bincount(labels.ravel(), minlength=256)
    return {value: int(pixels[value]) for value in range(num_classes + 1, IGNORE) if pixels[value]}


def find_labels(maps, most=2):
    """Set of the labels besides 255 in label maps, uint8 (H, W), which are looked at in turn until `most` labels are
    found. From maps with fewer than two there is nothing to learn."""
    found = set()
    for labels in maps:
        found.update(np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORE]).tolist())
        if len(found) >= most:
            break
    return found


def ground_truth_warnings(gt_dir, names, class_names):
    """Warning lines about masks that are not VOC's official files; empty where all is well, or the classes are others.

    Reads the headers of at most SAMPLE masks, spread over the list; passes over those that are missing or damaged.
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
