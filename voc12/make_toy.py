"""Writes a small synthetic data set in the layout of PASCAL VOC 2012.

It is a miniature of weakly supervised segmentation, to try the whole pipeline without VOC. An object has a small
striking head, whose pattern identifies the class, and a larger body in colours that all classes share. The body carries
only a weak cue, a faint trace of the head's pattern and colours, like the fur of an animal. Some classes often have a
background of their own. A plain classifier's CAM therefore highlights the heads and some background; the method has to
find the bodies.
"""
import argparse
import colorsys
import os
import sys
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image

if not __package__:        # run as a script: Python puts voc12/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool.cli import HelpFormatter, check_range, exit_on_bad_input, make_dir
from tool.files import atomic_write
from tool.image_files import IGNORE, save_label_map
from voc12.data_root import check_out, write_lines
from voc12.lists import ANNOT_FOLDER, GT_FOLDER, IMG_FOLDER, LIST_FOLDER, load_class_names

MARKER = 'TOY.txt'                 # marks a folder of this script, so that it never overwrites a real VOC2012
MOST_CLASSES = 24                  # number of heads that differ clearly
MIN_SIDE = 48                      # pixels; in smaller images heads have only a few pixels
VAL_EVERY = 4                      # one image in four is in val

# muted, so that the saturated heads stand out
BODY_COLOURS = np.array([
    (124, 92, 73), (194, 171, 140), (197, 199, 203), (73, 73, 80), (45, 39, 38), (233, 226, 211),
    (100, 114, 139), (111, 111, 75), (108, 62, 68), (121, 101, 134), (167, 113, 94), (76, 116, 114)], np.float32)
BACKGROUND_COLOURS = np.array([
    (99, 128, 83), (109, 140, 171), (195, 180, 151), (147, 102, 89), (113, 113, 117), (224, 226, 232),
    (128, 112, 142)], np.float32)
TRACE = .25                        # share of the head's pattern in the body
MIN_CONTRAST = 60.                 # least RGB distance of a body's colour, without the trace, from its background


def smooth_noise(rng, h, w, cell):
    """Returns noise, float32 (h, w), of about unit deviation, with blobs about `cell` pixels wide."""
    coarse = rng.standard_normal((int(h / cell) + 2, int(w / cell) + 2)).astype(np.float32)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def background_texture(rng, kind, h, w):
    """Returns a relief, float32 (h, w), of about -1..1: blotches, grain, waves, bricks or planks, by `kind`."""
    y, x = np.mgrid[:h, :w].astype(np.float32) + rng.uniform(0, 50, (2, 1, 1)).astype(np.float32)
    scale = rng.uniform(.8, 1.3) * min(h, w) / 128
    blur = smooth_noise(rng, h, w, max(10 * scale, 2.))
    if kind % 5 == 0:
        return .4 * blur + .4 * smooth_noise(rng, h, w, 1.5)
    if kind % 5 == 1:
        return np.sin(y / (2.2 * scale) + 1.2 * blur) * .7
    if kind % 5 == 2:
        return .7 * blur
    if kind % 5 == 3:
        row = np.floor(y / (9 * scale))
        mortar = (y % (9 * scale) < 1.5) | ((x + row % 2 * 9 * scale) % (18 * scale) < 1.5)
        return np.where(mortar, 1., -.3 + .25 * blur)
    return np.where(x % (13 * scale) < 1.5, -1., .2 + .5 * np.sin(x / (1.5 * scale) + blur))


def make_background(rng, own_kind, num_kinds, h, w):
    """Draws a background. Returns it, float32 (h, w, 3) RGB, and the list of its one or two base colours.

    In 40% of the images of every third class its kind is `own_kind`, else any: like the water around a boat, it is a
    cue for the class without being it. Half of the images have another kind above a horizon.
    """
    kind = own_kind if own_kind % 3 == 0 and rng.random() < .4 else int(rng.integers(num_kinds))
    kinds = [kind] if rng.random() < .5 else [kind, int(rng.integers(num_kinds))]
    horizon = h * rng.uniform(.15, .5) + h * .04 * smooth_noise(rng, 1, w, w / 4)[0]
    img, colours = None, []
    for kind in kinds:
        colours.append(BACKGROUND_COLOURS[kind % len(BACKGROUND_COLOURS)] + rng.uniform(-14, 14, 3))
        layer = colours[-1] + 24 * background_texture(rng, kind, h, w)[..., None]
        img = layer if img is None else np.where((np.arange(h)[:, None] < horizon)[..., None], layer, img)
    return img.astype(np.float32), colours


def paint_head(k, u, v):
    """Draws the head of class `k` (from 0). Returns float32 (..., 3) RGB and its shape, bool (...).

    u, v: coordinates in head radii, 0 at the centre. The class determines pattern, outline and both colours.
    """
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    pattern = [np.sin(5 * u) > 0,                            # stripes
               np.sin(4 * u) * np.sin(4 * v) > 0,            # checker
               np.cos(7.5 * radius) > -.3,                   # rings
               np.sin(4 * angle) > 0,                        # spokes
               np.minimum(abs(u), abs(v)) < .28,             # cross
               np.cos(6 * u) + np.cos(6 * v) > -.3,          # dots
               radius < .45 + .3 * np.cos(5 * angle)][k % 7]  # star
    power = (2., 6., 1.6)[k % 3]                             # disc, square, rounded diamond
    # six hues, which the colour jitter of training does not confuse; classes from 6 on lie between them
    saturated = np.array(colorsys.hsv_to_rgb(k % 6 / 6 + k // 6 / 24, 1., .95)) * 255
    partner = np.array((250., 250., 250.) if k % 2 else (15., 15., 15.))
    return np.where(pattern[..., None], saturated, partner), abs(u) ** power + abs(v) ** power < 1


def make_object(rng, k, length, head_radius, colour):
    """Draws an object of class `k` (from 0) on a square patch. Returns float32 (s, s, 3) RGB, and the shapes of the
    object and of its head, bool (s, s).

    length, head_radius: in pixels. colour: (3,) RGB of the body.
    """
    reach = int(length / 2 * 1.2 + 2 * head_radius) + 2
    y, x = np.mgrid[-reach:reach + 1, -reach:reach + 1].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    long, short = length / 2, length / 2 * rng.uniform(.55, .8) * (1 + .1 * (k % 3))
    power = rng.uniform(1.8, 2.4) + .6 * (k % 2)             # mild class differences of the outline
    wobble = 1 + .09 * np.sin(int(rng.integers(2, 5)) * np.arctan2(v, u) + rng.uniform(0, 6))
    body = abs(u / long) ** power + abs(v / short) ** power < wobble
    # the weave, the same for all classes, and slow shading; then the trace of the class
    weave = 5 * np.sin(u * 1.6) * np.sin(v * 1.6) + 4 * smooth_noise(rng, *u.shape, 8)
    rgb = colour + (weave + rng.uniform(-14, 14) * u / long)[..., None]
    # coordinates of paint_head, -1..1 over and over: its pattern in tiles of the head's size
    tiles = (((axis / head_radius + 1) % 2) - 1 for axis in (u, v))
    rgb += TRACE * (paint_head(k, *tiles)[0] - rgb)
    head_rgb, head = paint_head(k, (u - long * .95) / head_radius, v / head_radius)
    return np.where(head[..., None], head_rgb, rgb).astype(np.float32), body | head, head


def choose_body_colour(rng, k, taken):
    """Chooses a body colour, (3,) RGB, that all classes share and that differs from the `taken` ones of the image."""
    contrast = np.min([np.linalg.norm(BODY_COLOURS - colour, axis=1) for colour in taken], axis=0)
    weights = np.ones(len(BODY_COLOURS))
    weights[[2 * k % len(weights), (2 * k + 5) % len(weights)]] = 2.    # a class has two of them more often
    weights *= contrast >= min(MIN_CONTRAST, contrast.max())
    return BODY_COLOURS[rng.choice(len(weights), p=weights / weights.sum())] + rng.uniform(-10, 10, 3)


def place_object(rng, shape, head, instances, areas, pad, tries):
    """Puts another object into an instance map. Returns the new map, (h + 2 pad, w + 2 pad), or None, and the slices of
    the object's patch.

    instances: int map, 0 nothing, i the i-th object, whose full pixel count is areas[i - 1], -i its head. A place is
    good if every object, also the new one, shows at least 65% of its pixels inside the frame, the new head is in the
    frame, and no head is hidden.
    """
    h, w = instances.shape[0] - 2 * pad, instances.shape[1] - 2 * pad
    size = shape.shape[0]
    for _ in range(tries):
        top, left = (int(rng.integers(pad, pad + side)) - size // 2 for side in (h, w))
        window = np.s_[top:top + size, left:left + size]
        if (instances[window][shape] < 0).any():
            continue
        trial = instances.copy()
        trial[window][shape] = len(areas) + 1
        trial[window][head] = -len(areas) - 1
        frame = trial[pad:pad + h, pad:pad + w]
        shown = [(abs(frame) == i).sum() / area for i, area in enumerate(areas + [shape.sum()], 1)]
        if min(shown) >= .65 and (frame == -len(areas) - 1).sum() >= .9 * head.sum():
            return trial, window
    return None, None


def make_image(seed, index, size, num_classes):
    """Draws image number `index`. Returns uint8 (h, w, 3) RGB, the instances, int (h, w), 0 nothing, i the i-th object,
    and the list of the objects' classes, 0..num_classes-1.

    size: (H, W); each side varies by 0.85..1.15. The image depends only on (seed, index, size, num_classes). The first
    object's class cycles with the index, so every class has its share.
    """
    rng = np.random.default_rng([seed, index])
    h, w = (int(round(side * rng.uniform(.85, 1.15))) for side in size)
    first = index % num_classes
    img, colours = make_background(rng, first, max(num_classes, 6), h, w)
    pad = min(h, w)                                          # any patch fits: its half size is below this
    img = np.pad(img, ((pad, pad), (pad, pad), (0, 0)))
    instances, areas, classes = np.zeros((h + 2 * pad, w + 2 * pad), np.int32), [], []
    for number in range(int(rng.choice([1, 2, 3], p=[.55, .35, .1]))):
        k = first if number == 0 or rng.random() < .25 else int(rng.integers(num_classes))
        length = min(h, w) * rng.uniform(.4, .9)
        # a small classifier learned little in 250 steps from scratch if heads were a quarter narrower
        head_radius = max(.115 * min(h, w), .2 * length)
        colour = choose_body_colour(rng, k, colours)
        rgb, shape, head = make_object(rng, k, length, head_radius, colour)
        # the frame is empty for the first object, so there is always a good place; for others there may be none
        trial, window = place_object(rng, shape, head, instances, areas, pad, tries=25 if number else 1000)
        if trial is None:
            continue
        instances = trial
        areas.append(shape.sum())
        classes.append(k)
        colours.append(colour)
        alpha = cv2.GaussianBlur(shape.astype(np.float32), (3, 3), .6)[..., None]
        img[window] += alpha * (rgb - img[window])
    img, instances = img[pad:pad + h, pad:pad + w], abs(instances[pad:pad + h, pad:pad + w])
    light = rng.uniform(-.15, .15, 2)                        # a slow illumination gradient
    img = img * (1 + light[0] * np.linspace(-1, 1, h)[:, None, None] + light[1] * np.linspace(-1, 1, w)[:, None])
    img = img + rng.normal(0, 4, img.shape)
    return np.clip(img, 0, 255).astype(np.uint8), instances, classes


def make_mask(instances, classes):
    """Returns the label map, uint8 (h, w): 0 background, class + 1, 255 on the two pixels along every border."""
    mask = np.array([0] + [k + 1 for k in classes], np.uint8)[instances]
    levels, kernel = instances.astype(np.uint8), np.ones((3, 3), np.uint8)
    mask[cv2.dilate(levels, kernel) != cv2.erode(levels, kernel)] = IGNORE
    return mask


def make_annotation(name, instances, classes, class_names):
    """Returns the lines of VOC's XML for one image; boxes count from 1 and include both ends."""
    h, w = instances.shape
    lines = ['<annotation>', f'\t<filename>{name}.jpg</filename>',
             f'\t<size><width>{w}</width><height>{h}</height><depth>3</depth></size>']
    for number, k in enumerate(classes, 1):
        x, y, box_w, box_h = cv2.boundingRect((instances == number).astype(np.uint8))
        lines += ['\t<object>', f'\t\t<name>{escape(class_names[k])}</name>', '\t\t<difficult>0</difficult>',
                  f'\t\t<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + box_w}</xmax>'
                  f'<ymax>{y + box_h}</ymax></bndbox>', '\t</object>']
    return lines + ['</annotation>']


def split_indices(count, num_classes):
    """Returns the index lists (train, val): every fourth image of each class is in val, so with 4 * num_classes images
    or more, every class is in both."""
    by_class = sorted(range(count), key=lambda index: (index % num_classes, index))
    val = sorted(by_class[1::VAL_EVERY])
    return sorted(set(range(count)) - set(val)), val


def get_args_parser():
    parser = argparse.ArgumentParser(description='Writes a synthetic data set in the layout of VOC2012.',
                                     formatter_class=HelpFormatter)
    parser.add_argument('--out', required=True, metavar='ROOT',
                        help='folder to write, the --voc12_root of the other scripts; an older toy set is overwritten')
    parser.add_argument('--count', default=400, type=int, metavar='N',
                        help='number of images, a quarter of them in val; use 4 per class or more')
    parser.add_argument('--size', default=[128, 160], type=int, nargs=2, metavar=('H', 'W'),
                        help='height and width in pixels, from which each image differs by up to 15%%')
    parser.add_argument('--classes', type=int, metavar='K',
                        help='draw objects of only the first K classes (default: 6, or all if there are fewer); '
                             'networks still have an output for every class')
    parser.add_argument('--class_names',
                        help="text file with the names of the foreground classes, one per line (default: VOC's 20)")
    parser.add_argument('--seed', default=0, type=int, metavar='S',
                        help='the same seed and flags make the same files')
    return parser


def main(args):
    class_names = load_class_names(args.class_names)
    if args.classes is None:
        args.classes = min(6, len(class_names))
    check_range(args, 1, min(len(class_names), MOST_CLASSES), 'classes')
    check_range(args, 2, 999999, 'count')
    check_range(args, MIN_SIDE, 10000, 'size')
    check_range(args, 0, 2 ** 63, 'seed')
    check_out(args.out, MARKER)
    make_dir(args.out, '--out')
    write_lines(os.path.join(args.out, MARKER),
                [f'made by voc12/make_toy.py --count {args.count} --size {args.size[0]} {args.size[1]} '
                 f'--classes {args.classes} --seed {args.seed}'])
    for folder in (IMG_FOLDER, GT_FOLDER, ANNOT_FOLDER, LIST_FOLDER):
        make_dir(os.path.join(args.out, folder), '--out')

    names = [f'2007_{index + 1:06d}' for index in range(args.count)]
    for index, name in enumerate(names):
        img, instances, classes = make_image(args.seed, index, args.size, args.classes)
        with atomic_write(os.path.join(args.out, IMG_FOLDER, name + '.jpg')) as file:
            Image.fromarray(img).save(file, format='JPEG', quality=92)
        save_label_map(os.path.join(args.out, GT_FOLDER, name + '.png'), make_mask(instances, classes))
        write_lines(os.path.join(args.out, ANNOT_FOLDER, name + '.xml'),
                    make_annotation(name, instances, classes, class_names))

    train, val = split_indices(args.count, args.classes)
    for split, indices in (('train', train), ('val', val), ('trainval', range(args.count))):
        write_lines(os.path.join(args.out, LIST_FOLDER, split + '.txt'), [names[index] for index in indices])
    print(f'{args.count} images ({len(train)} train, {len(val)} val) of {args.classes} classes in {args.out}')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
