"""Pictures: CAMs on images, label maps in colour, contact sheets, TensorBoard.

    python tool/visualization.py --voc12_root VOC2012 --list LIST --out sheet.png \\
        --cam_dir plain_cam cam --crf_dir crf_4.0 crf_24.0 --label_dir out_rw

draws the results in finished folders side by side, one row for each of the first images of the list.

    python tool/visualization.py --voc12_root VOC2012 --list LIST --out sheet.png --count 20 --seed 0 \\
        --cam_dir cam --t 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8

draws the labels of one CAM folder at several background thresholds, so that you can choose one without masks. Pixels
that the next threshold also labels are in full colour; pixels that it turns into background are white. The title of a
column and the printed table give the share of pixels that the threshold labels as object, the share that the next one
turns into background, and the exponents to begin with if you choose this threshold: --crf_alpha LOW HIGH of
infer_SEAM.py, and --alpha of infer_aff.py.

Choose in five minutes: for each image, note the threshold where the label exceeds the object about as much as it misses
parts of it. Skip images whose CAM is on something else. Take the median.
"""
import argparse
import os
import random
import sys

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:        # run as a script: Python puts tool/ on the path, not the repository root
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool import image_files, imutils, score_files
from tool.cli import BadInput, HelpFormatter, check_dir, check_range, exit_on_bad_input
from tool.files import atomic_write, describe
from tool.image_lists import get_img_path, load_img_name_list
from tool.thresholds import exponents_to_start_with

MAX_SIDE = 65500        # pixels of a JPEG file
MAX_CELL = 1030         # pixels of a cell's side in the pictures of a run


def normalize_for_picture(cam):
    """Scales maps (..., H, W), any sign, as the reference does for pictures: relu, 0 below min + 1e-5, then
    (x - min - 1e-5) / (max + 1e-5). (The training loss divides by max - min + 1e-5.) The weakest pixels come out
    slightly below 0."""
    cam = np.maximum(cam, 0)
    maximum = cam.max(axis=(-2, -1), keepdims=True)
    minimum = cam.min(axis=(-2, -1), keepdims=True)
    return (np.where(cam < minimum + 1e-5, 0, cam) - minimum - 1e-5) / (maximum + 1e-5)


def cam_on_image(img, cam):
    """Draws a heat map over an image. img: uint8 (H, W, 3) RGB; cam: (H, W) in [0, 1]. Returns uint8 (H, W, 3) RGB."""
    heat = cv2.applyColorMap((np.clip(cam, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return (0.5 * img + 0.5 * heat).astype(np.uint8)


def labels_on_image(img, labels):
    """Draws a label map (H, W) in VOC's colours over a dimmed image, uint8 (H, W, 3) RGB. Returns such an image."""
    return (0.3 * img + 0.7 * image_files.voc_palette()[labels]).astype(np.uint8)


def labels_until_next(img, labels, stays):
    """Draws a label map (H, W), 0 background, over an image, uint8 (H, W, 3) RGB: in VOC's colours where `stays`, bool
    (H, W), is true, in white elsewhere. The background is dimmed."""
    colours = np.where(stays[..., None], image_files.voc_palette()[labels], 255)
    return np.where(labels[..., None] > 0, 0.5 * img + 0.5 * colours, 0.6 * img).astype(np.uint8)


def write_on(sheet, text, x, y, size=0.42):
    """Writes a line of black text into a picture, uint8 (H, W, 3). x, y: pixels of its lower left corner."""
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)


def contact_sheet(rows, titles, names=None, cell=160):
    """Returns a uint8 RGB sheet with one row for each list of pictures, uint8 (H, W, 3), resized into square cells.
    None leaves its cell blank. titles: of the columns, with one line or several. names: of the rows, written above
    them. cell: pixels of a cell's side; fewer if the sheet would be too wide for a JPEG file."""
    cell = max(min(cell, MAX_SIDE // len(titles)), 8)
    lines = max(len(title.splitlines()) for title in titles)
    header = np.full((8 + 16 * lines, cell * len(titles), 3), 255, np.uint8)
    for i, title in enumerate(titles):
        for j, line in enumerate(title.splitlines()):
            write_on(header, line, i * cell + 6, 17 + 16 * j)
    strips = [header]
    for number, row in enumerate(rows):
        if names:
            strips.append(np.full((14, cell * len(titles), 3), 255, np.uint8))
            write_on(strips[-1], names[number], 4, 11, size=0.36)
        strip = np.full((cell, cell * len(titles), 3), 255, np.uint8)
        for i, picture in enumerate(row):
            if picture is None:
                continue
            factor = (cell - 6) / max(picture.shape[:2])
            h, w = (max(int(side * factor), 1) for side in picture.shape[:2])
            strip[3:3 + h, i * cell + 3:i * cell + 3 + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
        strips.append(strip)
    return np.concatenate(strips)


def save_picture(path, pictures, titles):
    """Writes one row of pictures, uint8 (H, W, 3) RGB of one size, as a JPEG."""
    sheet = contact_sheet([pictures], titles, cell=min(max(pictures[0].shape[:2]) + 6, MAX_CELL))
    with atomic_write(path) as file:
        Image.fromarray(sheet).save(file, format='JPEG', quality=90)


def draw_curve(path, background_scores, miou, title):
    """Writes a PNG of mIoU (percent) over the background score, with the best point marked. Returns a line that says
    so, or why there is no picture: it comes after hours of work and must not stop the script."""
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(6, 4), layout='constrained')
        axes = figure.subplots()
        best = miou.argmax()
        axes.plot(background_scores, miou)
        axes.plot(background_scores[best], miou[best], 'o',
                  label=f'best: {miou[best]:.2f} at {background_scores[best]:.2f}')
        axes.set(xlabel='background score', ylabel='mIoU (%)')
        axes.set_title(title, parse_math=False)         # a $ in it is no formula
        axes.legend()
        axes.grid(alpha=.3)
        with atomic_write(path) as file:
            figure.savefig(file, format='png', dpi=120)
        return f'wrote {path}'
    except ImportError:
        return f'no picture {path}: pip install matplotlib to get one'
    except Exception as error:          # of a font, a damaged installation, the disk
        return f'warning: no picture {path}: {describe(error)}'


# ----- TensorBoard -----

def open_writer(tblog_dir, session_name, step, log):
    """Opens a TensorBoard writer. If that fails it logs why and returns None: a training must not stop for it.

    Every session has its own folder in `tblog_dir`, a run of TensorBoard. step: number of the first update, from 0;
    TensorBoard no longer shows what earlier runs of the session wrote for this step and later ones.
    """
    parts = os.path.normpath(os.path.splitdrive(session_name)[1]).split(os.sep)
    folder = os.path.join(tblog_dir, *(part for part in parts if part not in ('', os.pardir)))
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(folder, purge_step=step)
    except ImportError:
        log(f'no TensorBoard log in {folder} (--tblog_dir): pip install tensorboard to get one')
    except Exception as error:          # of the folder, of a damaged installation
        log(f'warning: no TensorBoard log in {folder} (--tblog_dir): {describe(error)}')
    return None


def write_scalars(writer, step, values):
    """Sends numbers to TensorBoard. values: dict name -> number."""
    try:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    except OSError as error:            # the disk is full
        tqdm.write(f'warning: not in the TensorBoard log (--tblog_dir): {describe(error)}')


def write_cams(writer, step, terms, img, label, cam, cam_rv):
    """Sends the loss terms to TensorBoard and, for one image, both maps of each of its classes.

    img: normalised (3, H, W); label: (C,) multi-hot; cam, cam_rv: raw (1+C, H, W); all tensors.
    """
    orig_img = imutils.denormalize(img.cpu().numpy())
    present = label.cpu().numpy() > 0
    try:
        for name, value in terms.items():
            writer.add_scalar(name, value, step)
        writer.add_image('image', orig_img, step, dataformats='HWC')
        for name, scores in (('cam', cam), ('cam_rv', cam_rv)) if present.any() else ():
            maps = normalize_for_picture(scores.detach().float().cpu().numpy()[1:][present])
            overlays = [cam_on_image(orig_img, class_map) for class_map in maps]
            writer.add_image(name, np.concatenate(overlays, axis=1), step, dataformats='HWC')
    except OSError as error:            # the disk is full
        tqdm.write(f'warning: not in the TensorBoard log (--tblog_dir): {describe(error)}')


# ----- the command -----

def draw_cell(img, name, kind, folder, flag):
    """Draws the label map (kind 'label') or the scores ('cam', 'crf') of an image in a folder over the image, uint8
    (H, W, 3). Returns such an image. Raises BadInput."""
    path = os.path.join(folder, name + ('.png' if kind == 'label' else '.npy'))
    if kind == 'label':
        picture = image_files.read_label_map(path, flag)
    else:
        scores = score_files.load_scores(path, flag, kind)
        if kind == 'crf' and not scores:
            raise BadInput(f'{path} ({flag}) has no scores')
        maps = list(scores.values()) or [np.zeros(img.shape[:2])]       # of an image without any class: 0
        picture = score_files.strongest_label(scores) if kind == 'crf' else np.max(maps, axis=0)
    if picture.shape != img.shape[:2]:
        raise BadInput(f'{path} ({flag}) is {picture.shape[0]}x{picture.shape[1]}, but its image is '
                       f'{img.shape[0]}x{img.shape[1]}')
    return cam_on_image(img, picture) if kind == 'cam' else labels_on_image(img, picture)


def or_warning(draw, *args):
    """Returns draw(*args), or None after a warning if a file is missing or cannot be drawn."""
    try:
        return draw(*args)
    except BadInput as error:
        print(f'warning: left out: {error}')
    return None


def draw_folders(names, voc12_root, columns):
    """Draws the images and what finished folders have of them, side by side. Returns dict name -> row for
    `contact_sheet`. columns: list of (kind, folder, flag), see `draw_cell`."""
    rows = {}
    for name in names:
        img = or_warning(image_files.read_image, get_img_path(name, voc12_root))
        if img is not None:
            img = np.asarray(img)
            rows[name] = [img, *(or_warning(draw_cell, img, name, *column) for column in columns)]
    return rows


def draw_thresholds(names, voc12_root, cam_dir, thresholds, count):
    """Draws the first `count` images that have a class, and their CAMs at the thresholds, which ascend. Returns (dict
    name -> row, titles) for `contact_sheet`, and prints a table of the thresholds. Raises BadInput."""
    rows, shares, empty = {}, [], 0
    for name in names:
        if len(rows) == count:
            break
        path = os.path.join(cam_dir, name + '.npy')
        scores = score_files.load_scores(path, '--cam_dir', 'cam')
        if not scores:
            empty += 1
            continue
        img = np.asarray(image_files.read_image(get_img_path(name, voc12_root)))
        strongest = score_files.strongest_label(scores) + 1
        highest = np.max(list(scores.values()), axis=0)
        if highest.shape != img.shape[:2]:
            raise BadInput(f'{path} (--cam_dir) does not fit the image, which is {img.shape[0]}x{img.shape[1]}')
        objects = np.stack([highest > t for t in thresholds])                       # (thresholds, H, W)
        shares.append(objects.mean(axis=(1, 2)) * 100)
        stays = [*objects[1:], objects[-1]]                                         # what the next threshold labels
        rows[name] = [img, cam_on_image(img, highest),
                      *(labels_until_next(img, strongest * now, later) for now, later in zip(objects, stays))]
    if empty:
        print(f'{len(rows)} images with a class are drawn; {empty} without a class, whose CAM is empty, are left out')
    return rows, ['image', 'strongest class', *(describe_thresholds(thresholds, shares) if rows else [])]


def describe_thresholds(thresholds, shares):
    """Prints a table of the thresholds and returns their titles for the sheet. shares: for each image, the percentages
    of its pixels that the thresholds label as object, (thresholds,)."""
    share = np.mean(shares, axis=0)
    print(f'mean of {len(shares)} images\nthreshold   object  next: background   --crf_alpha   --alpha')
    titles = []
    for t, object_share, loss in zip(thresholds, share, [*(share[:-1] - share[1:]), None]):
        low, high, walk = exponents_to_start_with(t)
        change = '' if loss is None else f'{loss:.1f}%'
        print(f'{t:9.2f} {object_share:7.1f}% {change:>17} {low:6.1f} {high:6.1f} {walk:9.1f}')
        titles.append(f'{t:g}: {object_share:.0f}% object\n{change and "next: -" + change}\n'
                      f'CRF {low:.1f} {high:.1f}\nwalk {walk:.1f}')
    return titles


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add('--voc12_root', required=True, help='data root; contains JPEGImages/, and SegmentationClass/ if you have masks')
    add('--list', required=True, help='list of the images')
    add('--count', default=5, type=int, help='number of images to draw')
    add('--seed', type=int, metavar='N', help='draw random images of the list, others for each N. Default: the first')
    add('--cam_dir', default=[], nargs='+', help='folders of CAM dicts; the strongest class is drawn')
    add('--t', type=float, nargs='+', metavar='T',
        help='background thresholds from 0.01 to 0.99: draw the labels of one --cam_dir at each of them')
    add('--crf_dir', default=[], nargs='+', help='folders of CRF dicts')
    add('--label_dir', default=[], nargs='+', help='folders of label maps')
    add('--out', required=True, help='PNG file to write')
    return parser


def main(args):
    check_range(args, 1, 1000, 'count')
    check_range(args, 0.01, 0.99, 't')
    if args.t and (len(args.cam_dir) != 1 or args.crf_dir or args.label_dir):
        raise BadInput('--t draws one folder of CAMs: name one --cam_dir, and leave --crf_dir and --label_dir out')
    columns = [(kind, folder, f'--{kind}_dir') for kind, folders in
               (('cam', args.cam_dir), ('crf', args.crf_dir), ('label', args.label_dir)) for folder in folders]
    for _, folder, flag in columns:
        check_dir(folder, flag)
    names = load_img_name_list(args.list, '--list')
    if args.seed is not None:
        random.Random(args.seed).shuffle(names)
    if args.t:
        rows, titles = draw_thresholds(names, args.voc12_root, *args.cam_dir, sorted(set(args.t)), args.count)
    else:
        titles = ['image', *(os.path.basename(os.path.abspath(folder)) for _, folder, _ in columns)]
        truth = os.path.join(args.voc12_root, 'SegmentationClass')
        if os.path.isdir(truth):
            columns.insert(0, ('label', truth, '--voc12_root'))
            titles.insert(1, 'ground truth')
        rows = draw_folders(names[:args.count], args.voc12_root, columns)
    if not rows:
        where = f'has a class in {args.cam_dir[0]} (--cam_dir)' if args.t else f'is in {args.voc12_root} (--voc12_root)'
        raise BadInput(f'there is nothing to draw: no image of {args.list} (--list) {where}')
    sheet = contact_sheet(list(rows.values()), titles, list(rows))
    with atomic_write(args.out) as file:
        Image.fromarray(sheet).save(file, format='PNG', optimize=True)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
