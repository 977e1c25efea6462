"""Reads all images, masks and labels of a data set once, and says what is wrong with them, before hours of training do.

    python voc12/check.py --voc12_root VOC2012 --list voc12/train_aug.txt

Prints one line for each check: `ok`, `note` (worth knowing, harmless or normal) or `PROBLEM`, with the count and the
first five names. Exit code 0 without a PROBLEM, 1 with one, 2 for flags that name nothing to check.
"""
import argparse
import collections
import functools
import os
import sys

import numpy as np

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import BadInput, HelpFormatter, check_dir, check_range, dead_link, exit_on_bad_input
from tool.files import describe
from tool.image_files import IGNORE, decode_image, read_image, read_label_map, stored_mode
from tool.workers import parallel_map
from voc12.canonical import compare_labels, describe_list, find_canonical
from voc12.lists import (AUG_GT_FOLDER, CAT_LIST, GT_FOLDER, IMG_FOLDER, absent_classes, common_classes,
                         describe_unknown, join_first, get_img_path, load_class_names, load_img_name_list, read_labels)
from voc12.masks import MOVED, NOT_OFFICIAL, mask_form, moved_colours, wrong_values

OK, NOTE, PROBLEM = 'ok', 'note', 'PROBLEM'
ORIENTATION = 0x0112               # tag of EXIF: 1 is upright, 2 to 8 are mirrored or turned
FEW = 0.1                          # share of the images whose mask and label may differ without a PROBLEM


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('--voc12_root', default='VOC2012',
                        help='folder VOC2012 of the devkit, or a folder of the same layout')
    parser.add_argument('--list', default='voc12/train_aug.txt', help='list of the images')
    parser.add_argument('--gt_dir',
                        help='folder of masks, in which every image must have one (default: SegmentationClass in '
                             '--voc12_root, where only images of VOC train and val must have one)')
    parser.add_argument('--cls_labels', default='voc12/cls_labels.npy',
                        help='image-level labels; if the file is missing, the XML files are read')
    parser.add_argument('--class_names',
                        help="text file with the names of the foreground classes, one per line (default: VOC's 20)")
    parser.add_argument('--num_workers', default=8, type=int, help='number of processes; 0 uses the main process')
    return parser


# ----- one image -----

def exif_orientation(img):
    """Returns the orientation in the EXIF data of a PIL image; 1, upright, if it has none that can be read."""
    try:
        return img.getexif().get(ORIENTATION, 1)
    except Exception:                   # damaged EXIF can raise any exception; training ignores EXIF
        return 1


def look_at(name, voc12_root, gt_dir, num_classes):
    """Checks an image and its mask, which are read as in training and evaluation. Returns (findings, classes): a dict
    kind of finding -> detail, and the set of the mask's class indices from 0, None if it cannot be read."""
    found, size = {}, None
    image_path, mask_path = get_img_path(name, voc12_root), os.path.join(gt_dir, name + '.png')
    for path in image_path, mask_path:
        if dead_link(path):
            found['dead link'] = os.path.basename(path)
    if not os.path.isfile(image_path):
        found['no image'] = ''
    else:
        try:
            size = read_image(image_path).size                          # (width, height)
            mode, stored, turned = decode_image(
                image_path, image_path, lambda img: (img.mode, stored_mode(img), exif_orientation(img)))
            if turned in range(2, 9):
                found['turned'] = f'orientation {turned}'
            if mode != 'RGB' or '16' in stored:
                found['image mode'] = stored if '16' in stored else mode
        except BadInput as error:
            found['damaged image'] = describe(error.__cause__)
    if not os.path.isfile(mask_path):
        return {**found, 'no mask': ''}, None
    try:
        labels = read_label_map(mask_path, '--gt_dir')                  # uint8 (H, W)
        mode, official = mask_form(mask_path)
        moved = {} if official else moved_colours(mask_path, labels, num_classes)
    except BadInput as error:
        return {**found, 'damaged mask': describe(error.__cause__)}, None
    if moved:
        found['moved colours'] = ', '.join(f'{index} has the colour of {value}' for index, value in moved.items())
    elif not official:
        found['mask form'] = f'mode {mode}'
    if size and labels.shape != size[::-1]:
        found['size'] = f'mask {labels.shape[1]}x{labels.shape[0]}, image {size[0]}x{size[1]}'
    if not (labels == IGNORE).any():
        found['no 255'] = ''
    wrong = wrong_values(labels, num_classes)
    if wrong:
        found['values'] = wrong
    return found, {value - 1 for value in np.unique(labels).tolist() if 1 <= value <= num_classes}


# ----- verdict: lines of (level, text) -----

def judge(level, what, found, hint=''):
    """Returns one line of the verdict, (level, text): ok if nothing was found. found: list of (name, detail or '')."""
    if not found:
        return OK, f'{what}: none'
    names = join_first([f'{name} ({detail})' if detail else name for name, detail in found])
    return level, f'{what}: {len(found):,}: {names}' + (f'; {hint}' if hint else '')


def pick(results, key):
    """Returns a list of (name, detail) of the images with the finding `key`."""
    return [(name, found[key]) for name, (found, _) in results.items() if key in found]


def values_line(results, num_classes):
    """Returns the line on label values that are no class: which masks have them, and the pixels of each value."""
    found = pick(results, 'values')                         # (name, dict value -> pixels)
    pixels = sum((collections.Counter(wrong) for _, wrong in found), collections.Counter())
    counts = ', '.join(f'{value}: {count:,}' for value, count in pixels.most_common(10))
    return judge(PROBLEM, f'masks with values other than 0..{num_classes} and {IGNORE}',
                 [(name, ' '.join(map(str, [*wrong][:5]))) for name, wrong in found],
                 f'pixels of each value: {counts}; is --class_names the right list, and are these label maps?')


def mask_lines(results, gt_dir, needed, class_names):
    """Returns the lines on the ground truth: whether it exists, can be read, has the official form and valid values.
    needed: whether every image must have a mask."""
    lines = [judge(PROBLEM if needed else NOTE, f'images without a mask in {gt_dir}', pick(results, 'no mask'),
                   'training needs none, evaluation does'),
             judge(PROBLEM, 'masks that cannot be read', pick(results, 'damaged mask'))]
    readable = sum(classes is not None for _, classes in results.values())
    if not readable:
        return lines
    # masks of other data sets, and those of SBD, need neither VOC's colours nor its border
    if list(class_names) != CAT_LIST:
        level, hint = NOTE, 'harmless outside VOC'
    elif os.path.basename(os.path.abspath(gt_dir)) == AUG_GT_FOLDER:
        level, hint = NOTE, f"usual in {AUG_GT_FOLDER}; the paper's evaluation uses the official {GT_FOLDER}"
    else:
        level, hint = PROBLEM, NOT_OFFICIAL
    if not any(classes for _, classes in results.values()):
        lines.append((PROBLEM, f'no mask in {gt_dir} has a class: 0 is the background, {IGNORE} is ignored, and the '
                               'classes of --class_names count from 1'))
    lines += [judge(PROBLEM, 'masks of another size than their image (width x height)', pick(results, 'size')),
              values_line(results, len(class_names)),
              judge(level, "masks that are not indexed images in VOC's colours", pick(results, 'mask form'), hint)]
    moved = pick(results, 'moved colours')
    if moved:       # a palette of the user's own may have some of these colours too
        lines.append(judge(level, "masks with VOC's colours at other indices", moved, 'perhaps ' + MOVED))
    bare = pick(results, 'no 255')
    if len(bare) == readable:
        lines.append((level, f'no mask has a pixel of {IGNORE}, the border of VOC: {hint}'))
    else:
        lines.append(judge(NOTE, f'masks without a pixel of {IGNORE}, the border of VOC', bare,
                           f'{readable - len(bare):,} have it'))
    return lines


def label_lines(names, labels, unusable, source, key, class_names):
    """Returns the lines on the image-level labels: whether they exist, which classes they have, and whether they are
    SEAM's. key: which of VOC's lists it is, or None."""
    level = NOTE if key == 'test' else PROBLEM              # VOC does not publish the labels of test
    lines = [judge(level, f'images without a usable label in {source}',
                   [(name, describe(error.__cause__ or error)) for name, error in unusable.items()]),
             judge(level if key else NOTE, 'images without any class',
                   [(name, '') for name in labels if not labels[name].any()], 'they show no class of --class_names')]
    if labels and not key:              # VOC's own lists need no such lines
        lines += [judge(NOTE, 'classes of --class_names that no image of the list has',
                        [(c, '') for c in absent_classes(labels, class_names)], 'nothing is learned about them'),
                  judge(NOTE, 'classes that every image of the list has',
                        [(c, '') for c in common_classes(labels, class_names)],
                        'the classifier has nothing to compare them with: add images without them')]
    if key and not unusable:
        verdict = compare_labels(names, labels)
        lines.append((NOTE if 'NOT' in verdict else OK, f'digests of list and labels: {verdict}'))
    return lines


def agreement_lines(results, labels, class_names):
    """Returns the lines on whether masks and image-level labels have the same classes."""
    found = {'masks with a class that the label lacks': [], 'labels with a class that the mask lacks': []}
    both = [name for name, (_, classes) in results.items() if classes is not None and name in labels]
    for name in both:
        of_label, of_mask = set(np.flatnonzero(labels[name]).tolist()), results[name][1]
        for what, missing in zip(found, (of_mask - of_label, of_label - of_mask)):
            if missing:
                found[what].append((name, ', '.join(class_names[c] for c in sorted(missing))))
    hint = (f'of {len(both):,} compared; a few are normal (VOC does not segment some difficult objects), more than '
            f'{FEW:.0%} are not')
    return [judge(PROBLEM if len(differing) > FEW * len(both) else NOTE, what, differing, hint)
            for what, differing in found.items()]


def main(args):
    """Returns the exit code: 0 without a PROBLEM, else 1."""
    check_range(args, 0, 256, 'num_workers')
    check_dir(os.path.join(args.voc12_root, IMG_FOLDER), '--voc12_root')
    if args.gt_dir:
        check_dir(args.gt_dir, '--gt_dir')
    class_names = load_class_names(args.class_names)
    counts = collections.Counter(load_img_name_list(args.list, '--list'))
    names = list(counts)
    is_voc = list(class_names) == CAT_LIST
    key = find_canonical(names) if is_voc else None
    gt_dir = args.gt_dir or os.path.join(args.voc12_root, GT_FOLDER)
    # before the images: a wrong file ends the run at once
    labels, unusable, unknown, source = read_labels(names, args.cls_labels, args.voc12_root, class_names)
    work = functools.partial(look_at, voc12_root=args.voc12_root, gt_dir=gt_dir, num_classes=len(class_names))
    results = dict(zip(names, list(parallel_map(work, names, args.num_workers, 'check'))))

    lines = [(NOTE if is_voc and not key else OK, f'the list: {describe_list(names, class_names)}'),
             judge(PROBLEM, 'names more than once in the list', [(name, '') for name in names if counts[name] > 1]),
             judge(PROBLEM, 'missing images', pick(results, 'no image')),
             judge(PROBLEM, 'images that cannot be read', pick(results, 'damaged image')),
             judge(PROBLEM, 'images and masks that are links to missing files', pick(results, 'dead link'),
                   'were they moved, or is a disk not mounted?'),
             judge(NOTE, 'images whose EXIF orientation is not normal', pick(results, 'turned'),
                   'they are read as stored, without turning, so masks made by tools that turn them do not fit'),
             judge(NOTE, 'images that are not RGB of 8 bits', pick(results, 'image mode'),
                   'they are converted: 16 bits by their range, without transparency')]
    lines += mask_lines(results, gt_dir, bool(args.gt_dir) or key in ('train', 'val'), class_names)
    lines += label_lines(names, labels, unusable, source, key, class_names)
    if unknown:
        lines.append((PROBLEM, describe_unknown(unknown)))
    lines += agreement_lines(results, labels, class_names)
    for level, text in lines:
        print(f'{level:7}  {text}')
    levels = collections.Counter(level for level, _ in lines)
    print(f'verdict: {PROBLEM if levels[PROBLEM] else OK} (PROBLEM: {levels[PROBLEM]}, note: {levels[NOTE]}, '
          f'ok: {levels[OK]})')
    return int(levels[PROBLEM] > 0)


if __name__ == '__main__':
    with exit_on_bad_input():
        sys.exit(main(get_args_parser().parse_args()))
