"""Pictures: CAMs on images, label maps in colour, contact sheets, TensorBoard. No loss imports this.

    python tool/visualization.py --voc12_root VOC2012 --list LIST --out sheet.png \\
        --cam_dir plain_cam cam --crf_dir crf_4.0 crf_24.0 --label_dir out_rw

draws the results of finished folders side by side: a row for each of the first images of the list.
"""
import argparse
import os
import sys

import cv2
import numpy as np
from PIL import Image

# `python tool/visualization.py` puts tool/ on the path, not the repository root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tool import image_files, imutils, score_files
from tool.cli import check_dir, check_file, exit_on_bad_input
from tool.files import atomic_write


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


def contact_sheet(rows, titles, cell=160):
    """uint8 RGB sheet: one row per list of uint8 (H, W, 3) pictures, shrunk or grown into square cells."""
    header = np.full((24, cell * len(titles), 3), 255, np.uint8)
    for i, title in enumerate(titles):
        cv2.putText(header, title, (i * cell + 6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    strips = [header]
    for row in rows:
        strip = np.full((cell, cell * len(titles), 3), 255, np.uint8)
        for i, picture in enumerate(row):
            h, w = picture.shape[:2]
            h, w = max(int(h * (cell - 6) / max(h, w)), 1), max(int(w * (cell - 6) / max(h, w)), 1)
            strip[3:3 + h, i * cell + 3:i * cell + 3 + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
        strips.append(strip)
    return np.concatenate(strips)


def save_picture(path, pictures, titles):
    """Writes one row of pictures, uint8 (H, W, 3) RGB of one size, as a JPEG."""
    sheet = contact_sheet([pictures], titles, cell=max(pictures[0].shape[:2]) + 6)
    with atomic_write(path) as file:
        Image.fromarray(sheet).save(file, format='JPEG', quality=90)


def draw_curve(path, background_scores, miou, title):
    """PNG of mIoU (percent) over the background score, its best point marked. False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    best = miou.argmax()
    axes.plot(background_scores, miou)
    axes.plot(background_scores[best], miou[best], 'o',
              label=f'best: {miou[best]:.2f} at {background_scores[best]:.2f}')
    axes.set(xlabel='background score', ylabel='mIoU (%)', title=title)
    axes.legend()
    axes.grid(alpha=.3)
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=120)
    return True


def open_writer(tblog_dir, log):
    """A TensorBoard writer, or None with a notice where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log('no TensorBoard log: pip install tensorboard to get one in --tblog_dir')
        return None
    return SummaryWriter(tblog_dir)


def write_cams(writer, step, terms, img, label, cam, cam_rv):
    """Sends the loss terms and, for one image, both maps of its classes to TensorBoard.

    img: normalised (3, H, W); label: (C,) multi-hot; cam, cam_rv: raw (1+C, H, W); all tensors.
    """
    for name, value in terms.items():
        writer.add_scalar(name, value, step)
    orig_img = imutils.denormalize(img.cpu().numpy())
    writer.add_image('image', orig_img, step, dataformats='HWC')
    present = label.cpu().numpy() > 0
    for name, scores in (('cam', cam), ('cam_rv', cam_rv)):
        maps = normalize_for_picture(scores.detach().float().cpu().numpy()[1:][present])
        overlays = [cam_on_image(orig_img, class_map) for class_map in maps]
        writer.add_image(name, np.concatenate(overlays, axis=1), step, dataformats='HWC')


# ----- the command -----

def draw_row(name, args):
    """uint8 (H, W, 3) pictures of one image: itself, its ground truth where there is one, CAMs, CRFs, label maps."""
    img = np.asarray(image_files.read_image(os.path.join(args.voc12_root, 'JPEGImages', name + '.jpg')))
    row = [img]
    if has_truth(args):
        path = os.path.join(args.voc12_root, 'SegmentationClass', name + '.png')
        row.append(labels_on_image(img, image_files.read_label_map(path, '--voc12_root')))
    for folder in args.cam_dir:
        cams = score_files.load_scores(os.path.join(folder, name + '.npy'), '--cam_dir', 'cam')
        row.append(cam_on_image(img, np.max(list(cams.values()), axis=0)))
    for folder in args.crf_dir:
        scores = score_files.load_scores(os.path.join(folder, name + '.npy'), '--crf_dir', 'crf')
        row.append(labels_on_image(img, score_files.strongest_label(scores)))
    for folder in args.label_dir:
        row.append(labels_on_image(img, image_files.read_label_map(os.path.join(folder, name + '.png'), '--label_dir')))
    return row


def has_truth(args):
    return os.path.isdir(os.path.join(args.voc12_root, 'SegmentationClass'))


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--voc12_root', required=True, help='data root: JPEGImages/, perhaps SegmentationClass/')
    parser.add_argument('--list', required=True, help='image names, one a line')
    parser.add_argument('--count', default=5, type=int, help='how many of them')
    parser.add_argument('--cam_dir', default=[], nargs='+', help='folders of CAM dicts; the strongest class is drawn')
    parser.add_argument('--crf_dir', default=[], nargs='+', help='folders of CRF dicts')
    parser.add_argument('--label_dir', default=[], nargs='+', help='folders of label maps')
    parser.add_argument('--out', required=True, help='PNG to write')
    return parser


def main(args):
    check_file(args.list, '--list')
    folders = args.cam_dir + args.crf_dir + args.label_dir
    for folder in folders:
        check_dir(folder, '--cam_dir, --crf_dir, --label_dir')
    with open(args.list, encoding='utf-8') as file:
        names = [os.path.splitext(os.path.basename(line.split()[0]))[0] for line in file if line.strip()]
    titles = ['image'] + ['ground truth'] * has_truth(args) + [os.path.basename(os.path.abspath(folder))
                                                               for folder in folders]
    sheet = contact_sheet([draw_row(name, args) for name in names[:args.count]], titles)
    with atomic_write(args.out) as file:
        Image.fromarray(sheet).save(file, format='PNG', optimize=True)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
