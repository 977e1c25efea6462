"""Pictures: CAMs on images, label maps in colour, contact sheets, TensorBoard. No loss imports this.

    python tool/visualization.py --voc12_root VOC2012 --list LIST --out sheet.png \\
        --cam_dir plain_cam cam --crf_dir crf_4.0 crf_24.0 --label_dir out_rw

draws the results of finished folders side by side: a row for each of the first images of the list.

    python tool/visualization.py --voc12_root VOC2012 --list LIST --out sheet.png --count 20 --seed 0 \\
        --cam_dir cam --t 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8

draws the labels of one folder of CAMs at several background thresholds, to choose one where there are no masks. In full
colour are the pixels that the next threshold labels too, in white those that it turns into background. The title of a
column and the printed table say which share of the pixels each threshold labels as object, which share the next one
turns into background, and which exponents to begin with if this threshold is the best one: --crf_alpha LOW HIGH of
infer_SEAM.py, and --alpha of infer_aff.py.

How to choose in five minutes: for each image note the threshold where the label runs over the background about as much
as it misses parts of the object, pass over the images whose CAM is on something else, and take the median.
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
from tool.cli import BadInput, check_dir, check_range, exit_on_bad_input
from tool.files import atomic_write, describe
from tool.image_lists import get_img_path, load_img_name_list
from tool.thresholds import exponents_to_start_with

MAX_SIDE = 65500        # pixels of a JPEG file
MAX_CELL = 1030         # pixels of a picture that a run makes by the way


def normalize_for_picture(cam):
    """(..., H, W), any sign -> the reference's normalisation for pictures: relu, 0 below min + 1e-5, then
    (x - min - 1e-5) / (max + 1e-5). The training loss divides otherwise. Weakest pixels end slightly below 0."""
    cam = np.maximum(cam, 0)
    maximum = cam.max(axis=(-2, -1), keepdims=True)
    minimum = cam.min(axis=(-2, -1), keepdims=True)
    return (np.where(cam < minimum + 1e-5, 0, cam) - minimum - 1e-5) / (maximum + 1e-5)


def cam_on_image(img, cam):
    """Heat map over an image. img: uint8 (H, W, 3) RGB; cam: (H, W) in [0, 1]. Returns uint8 (H, W, 3) RGB."""
    heat = cv2.applyColorMap((np.clip(cam, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return (0.5 * img + 0.5 * heat).astype(np.uint8)


def labels_on_image(img, labels):
    """Label map (H, W) in VOC's colours over a dimmed uint8 (H, W, 3) RGB image."""
    return (0.3 * img + 0.7 * image_files.voc_palette()[labels]).astype(np.uint8)


def labels_until_next(img, labels, stays):
    """Label map (H, W), 0 background, over a uint8 (H, W, 3) RGB image that is dimmed where it is background: in VOC's
    colours where `stays`, bool (H, W), in white elsewhere."""
    colours = np.where(stays[..., None], image_files.voc_palette()[labels], 255)
    return np.where(labels[..., None] > 0, 0.5 * img + 0.5 * colours, 0.6 * img).astype(np.uint8)


def contact_sheet(rows, titles, cell=160):
    """uint8 RGB sheet: one row per list of uint8 (H, W, 3) pictures, shrunk or grown into square cells; None leaves its
    cell blank. titles: of the columns, a line or several. cell: pixels of a cell's side, fewer where the sheet would
    be too wide for a JPEG file."""
    cell = max(min(cell, MAX_SIDE // len(titles)), 8)
    lines = max(len(title.splitlines()) for title in titles)
    header = np.full((8 + 16 * lines, cell * len(titles), 3), 255, np.uint8)
    for i, title in enumerate(titles):
        for j, line in enumerate(title.splitlines()):
            cv2.putText(header, line, (i * cell + 6, 17 + 16 * j), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1,
                        cv2.LINE_AA)
    strips = [header]
    for row in rows:
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
    """PNG of mIoU (percent) over the background score, its best point marked. Returns a line: that there is one, or why
    there is none. It comes after hours of work, and must not end them."""
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
        return 'no picture of the curve: pip install matplotlib to get one'
    except Exception as error:          # of a font, a damaged installation, the disk
        return f'warning: no picture {path}: {describe(error)}'


# ----- TensorBoard -----

def open_writer(tblog_dir, session_name, step, log):
    """A TensorBoard writer, or None and a notice: a log that cannot be written must not end a training.

    Every session has a folder of its own in `tblog_dir`, TensorBoard's run. step: of the first update, from 0; what
    earlier runs of the session wrote for this step and later ones is no longer shown.
    """
    parts = os.path.normpath(os.path.splitdrive(session_name)[1]).split(os.sep)
    folder = os.path.join(tblog_dir, *(part for part in parts if part not in ('', os.pardir)))
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(folder, purge_step=step)
    except ImportError:
        log('no TensorBoard log: pip install tensorboard to get one in --tblog_dir')
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
    """Sends the loss terms and, for one image, both maps of its classes to TensorBoard.

    img: normalised (3, H, W); label: (C,) multi-hot, with zeros alone the image has no maps; cam, cam_rv: raw
    (1+C, H, W); all tensors.
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
    """uint8 (H, W, 3) picture of an image's label map (kind 'label') or scores in a folder, over the image.
    Raises BadInput."""
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
        raise BadInput(f'{path} ({flag}) is {picture.shape[0]}x{picture.shape[1]}, its image '
                       f'{img.shape[0]}x{img.shape[1]}')
    return cam_on_image(img, picture) if kind == 'cam' else labels_on_image(img, picture)


def or_warning(draw, *args):
    """What `draw` returns, or None and a warning for a file that is missing or cannot be drawn."""
    try:
        return draw(*args)
    except BadInput as error:
        print(f'warning: left out: {error}')
    return None


def draw_folders(names, args):
    """(rows, titles) of the contact sheet that shows finished folders side by side."""
    columns = []                # (title, kind, folder, flag)
    truth = os.path.join(args.voc12_root, 'SegmentationClass')
    if os.path.isdir(truth):
        columns.append(('ground truth', 'label', truth, '--voc12_root'))
    for kind in ('cam', 'crf', 'label'):
        flag = f'--{kind}_dir'
        for folder in getattr(args, f'{kind}_dir'):
            check_dir(folder, flag)
            columns.append((os.path.basename(os.path.abspath(folder)), kind, folder, flag))
    rows = []
    for name in names[:args.count]:
        img = or_warning(image_files.read_image, get_img_path(name, args.voc12_root))
        if img is not None:
            img = np.asarray(img)
            rows.append([img, *(or_warning(draw_cell, img, name, *column) for _, *column in columns)])
    return rows, ['image', *(title for title, *_ in columns)]


def draw_thresholds(names, args):
    """(rows, titles) of the contact sheet that shows the CAMs of one folder at the thresholds args.t, which ascend; and
    prints the table of the thresholds. Images without a class are passed over. Raises BadInput."""
    folder, = args.cam_dir
    check_dir(folder, '--cam_dir')
    rows, shares, empty = [], [], 0
    for name in names:
        if len(rows) == args.count:
            break
        path = os.path.join(folder, name + '.npy')
        scores = score_files.load_scores(path, '--cam_dir', 'cam')
        if not scores:
            empty += 1
            continue
        img = np.asarray(image_files.read_image(get_img_path(name, args.voc12_root)))
        strongest = score_files.strongest_label(scores) + 1
        highest = np.max(list(scores.values()), axis=0)
        if highest.shape != img.shape[:2]:
            raise BadInput(f'{path} (--cam_dir) does not fit the image, which is {img.shape[0]}x{img.shape[1]}')
        objects = np.stack([highest > t for t in args.t])                           # (thresholds, H, W)
        shares.append(objects.mean(axis=(1, 2)) * 100)
        stays = [*objects[1:], objects[-1]]                                         # what the next threshold labels
        rows.append([img, cam_on_image(img, highest),
                     *(labels_until_next(img, strongest * now, later) for now, later in zip(objects, stays))])
    if empty:
        print(f'{empty} of the images are passed over: they have no class, so no CAM')
    if not rows:
        raise BadInput(f'nothing to draw: no image of {args.list} (--list) has a class in {folder} (--cam_dir)')
    return rows, ['image', 'strongest class', *describe_thresholds(args.t, shares)]


def describe_thresholds(thresholds, shares):
    """Prints the table of the thresholds, and returns their titles on the sheet. shares: for each image, (thresholds,)
    percentages of its pixels that each of them labels as object."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--voc12_root', required=True, help='data root: JPEGImages/, perhaps SegmentationClass/')
    parser.add_argument('--list', required=True, help='image names, one a line')
    parser.add_argument('--count', default=5, type=int, help='how many of them')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='draw images of the list at random, other ones with another number; not given: the first')
    parser.add_argument('--cam_dir', default=[], nargs='+', help='folders of CAM dicts; the strongest class is drawn')
    parser.add_argument('--t', type=float, nargs='+', metavar='T',
                        help='background thresholds, 0.01 to 0.99: draw the labels of one --cam_dir at each of them, '
                             'without ground truth')
    parser.add_argument('--crf_dir', default=[], nargs='+', help='folders of CRF dicts')
    parser.add_argument('--label_dir', default=[], nargs='+', help='folders of label maps')
    parser.add_argument('--out', required=True, help='PNG to write')
    return parser


def main(args):
    check_range(args, 1, 1000, 'count')
    check_range(args, 0.01, 0.99, 't')
    if args.t and (len(args.cam_dir) != 1 or args.crf_dir or args.label_dir):
        raise BadInput('--t draws one folder of CAMs: name one --cam_dir, and leave --crf_dir and --label_dir out')
    names = load_img_name_list(args.list, '--list')
    if args.seed is not None:
        random.Random(args.seed).shuffle(names)
    if args.t:
        args.t = sorted(set(args.t))
    rows, titles = (draw_thresholds if args.t else draw_folders)(names, args)
    if not rows:
        raise BadInput(f'nothing to draw: no image of {args.list} (--list) is in {args.voc12_root} (--voc12_root)')
    sheet = contact_sheet(rows, titles)
    with atomic_write(args.out) as file:
        Image.fromarray(sheet).save(file, format='PNG', optimize=True)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
