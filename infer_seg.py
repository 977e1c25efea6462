"""Step 8: segments images with a trained network.

Reads weights and images, no labels. Writes label maps, --out_seg/NAME.png, or probabilities, --out_prob/NAME.npy.
"""
import argparse
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from network.weights import load_trained
from tool import imutils, visualization
from tool.cli import BadInput, HelpFormatter, check_file, check_range, exit_on_bad_input, import_network, str2bool
from tool.crf import SEGMENTATION_CRF, choose_crf_backend, choose_crf_workers, crf_inference, describe_crf
from tool.devices import autocast, get_device, get_rank
from tool.files import file_digest
from tool.image_files import save_label_map
from tool.on_error import Errors, no_more_than_a_warning
from tool.outputs import ResultFolder, SpaceCheck, open_folders
from tool.score_files import save_scores
from tool.torchutils import read_items
from tool.workers import BoundedPool
from voc12.data import VOC12ImageDataset
from voc12.lists import load_class_names

MEMORY_HELP = ('--device cpu and, for the CRF on a GPU, --crf_backend pydensecrf (both work with --resume); smaller '
               '--scales, --tile and --amp bf16 (they change the results: leave --resume out)')


@torch.inference_mode()
def multi_scale_probability(net, img, scales, flip=True, device='cpu', amp='off'):
    """Returns class probabilities, float32 (1+C, H, W): the softmax of the mean logits over scales and mirrors.

    img: float32 (H, W, 3), normalised before it is rescaled. The logits of each pass are resized to (H, W) first.
    """
    total, passes = 0, 0
    for scale in scales:
        view = torch.from_numpy(imutils.HWC_to_CHW(imutils.rescale(img, scale)).copy())[None].to(device)
        for mirrored in (False, True) if flip else (False,):
            with autocast(view.device, amp):
                logits = net(view.flip(-1) if mirrored else view)
            logits = F.interpolate(logits.float(), img.shape[:2], mode='bilinear', align_corners=True)
            total = total + (logits.flip(-1) if mirrored else logits)
            passes += 1
    return F.softmax(total[0] / passes, dim=0).cpu().numpy()


def tile_starts(side, tile):
    """Returns where the tiles of an image's side begin, in pixels: the smallest number of evenly spaced tiles that
    overlap by a quarter or more."""
    last = max(side - tile, 0)
    count = math.ceil(last / (tile * 3 // 4)) + 1
    return [last * number // max(count - 1, 1) for number in range(count)]


def tiled_probability(net, img, tile, scales, flip=True, device='cpu', amp='off'):
    """Runs `multi_scale_probability` on overlapping tiles and averages their probabilities. tile: side of a tile in
    pixels, before it is rescaled; if the image is smaller, there is one tile, the image."""
    h, w = img.shape[:2]
    total, count = None, np.zeros((h, w), np.float32)
    for top in tile_starts(h, tile):
        for left in tile_starts(w, tile):
            window = np.s_[..., top:top + tile, left:left + tile]
            part = multi_scale_probability(net, img[window[1:]], scales, flip, device, amp)
            if total is None:
                total = np.zeros((len(part), h, w), np.float32)
            total[window] += part
            count[window] += 1
    return total / count


def write_results(name, prob, img, label_folder, prob_folder, use_crf, backend, device, class_names=(), vis_dir=None):
    """Writes the label map and the probabilities of the image `name` into their ResultFolders, and a picture into
    vis_dir; each of these three may be None. With a CRF it may run in a worker process.

    prob: float32 (1+C, H, W); img: float32 (H, W, 3), normalised.
    """
    if use_crf or vis_dir:
        orig_img = imutils.denormalize(imutils.HWC_to_CHW(img))     # a tenth of the values end 1 lower, as published
    if use_crf:
        prob = crf_inference(orig_img, prob, SEGMENTATION_CRF.iterations, kernels=SEGMENTATION_CRF.kernels,
                             backend=backend, device=device)
    labels = prob.argmax(axis=0)
    if label_folder:
        with label_folder.writing(name) as path:
            save_label_map(path, labels)
    if prob_folder:
        with prob_folder.writing(name) as path:
            save_scores(path, dict(enumerate(prob)))
    if vis_dir:
        with no_more_than_a_warning(f'no picture of {name}'):
            present = [class_names[label - 1] for label in np.unique(labels) if label]
            visualization.save_picture(os.path.join(vis_dir, name + '.jpg'),
                                       [orig_img, visualization.labels_on_image(orig_img, labels)],
                                       ['image', ', '.join(present) or 'background'])


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012', help='data root; contains JPEGImages/')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--infer_list', default='voc12/val.txt', help='list of the images to process')
    either('--images', nargs='+', metavar='PATH', help='image files and folders (with sub-folders) to process instead '
           'of --voc12_root and --infer_list')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_deeplab', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_deeplab')
    add('--weights', required=True, help='trained weights, .pth')
    add('--device', help='cuda (the first GPU), cuda:N or cpu. Default: cuda if it is available')
    add('--tf32', action='store_true',
        help='allow TF32 matrix products on recent GPUs: several times faster, changes results slightly')
    add('--amp', default='off', choices=['off', 'bf16', 'fp16'],
        help='run the network in half precision: less memory, faster on a GPU, changes results slightly')
    # test protocol; the defaults are those of the published numbers
    add('--scales', default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], type=float, nargs='+',
        help='test scales, as factors of the image size')
    add('--flip', default=1, type=int, choices=[0, 1], help='1 also runs the mirror image at each scale; 0 does not')
    add('--tile', type=int, metavar='SIDE', help='for large images: run the network on overlapping squares of this '
        'side, in pixels, and average their probabilities; less memory, but the network sees less around each pixel')
    add('--crf', default=True, type=str2bool, nargs='?', const=True, metavar='BOOL',
        help='apply one iteration of the dense CRF to the probabilities')
    add('--crf_backend', choices=['pydensecrf', 'torch'],
        help='implementation of the CRF; torch runs on --device. Default: pydensecrf if it is installed, else torch')
    add('--crf_workers', type=int,
        help='number of pydensecrf processes. Default: all cores if a GPU runs the network, else 0')
    # outputs
    add('--out_seg', help='folder to write the label maps to, NAME.png')
    add('--out_prob',
        help='folder to write the class probabilities to, NAME.npy, in the format of the CRF dicts with all classes')
    add('--vis_dir', help='folder for pictures of the labels beside the image, NAME.jpg')
    add('--vis_count', default=20, type=int,
        help='number of images to draw, from the start of the list; finished images are not drawn again')
    add('--resume', action='store_true', help='keep finished files; refused if they were made with other settings')
    add('--on_error', default='stop', choices=['stop', 'skip'],
        help='what to do with an image that cannot be processed: stop, or skip it, list it at the end and exit with '
             'code 3')
    return parser


def check_args(args):
    if not (args.out_seg or args.out_prob):
        raise BadInput('there is nothing to write: give --out_seg or --out_prob')
    check_range(args, 0.01, 100, 'scales')
    check_range(args, 0, 256, 'num_workers', 'crf_workers')
    check_range(args, 0, 10 ** 9, 'vis_count')
    check_range(args, 32, 100000, 'tile')
    check_file(args.weights, '--weights')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    device = get_device(args.device, args.tf32)
    backend = choose_crf_backend(args.crf_backend) if args.crf else None

    # ----- data and network -----
    dataset = VOC12ImageDataset(args.infer_list, args.voc12_root, transform=imutils.normalize_float32,
                                images=args.images)
    net = import_network(args.network, 'segmentation', args.backbone)(num_classes=len(class_names))
    load_trained(net, args.weights, device, args.amp)

    # ----- outputs -----
    settings = {key: getattr(args, key) for key in ('network', 'backbone', 'scales', 'flip', 'amp', 'tile')}
    settings.update(weights=file_digest(args.weights), class_names=class_names,
                    crf=describe_crf(SEGMENTATION_CRF) if args.crf else None)
    label_folder = ResultFolder(args.out_seg, '--out_seg', '.png', settings) if args.out_seg else None
    prob_folder = ResultFolder(args.out_prob, '--out_prob', '.npy', settings) if args.out_prob else None
    folders = [folder for folder in (label_folder, prob_folder) if folder]
    rank, ranks = get_rank()
    todo = open_folders(folders, dataset.img_name_list[rank::ranks], args.resume, dataset.input_folders(), args.vis_dir)
    pictured = set(dataset.img_name_list[:args.vis_count]) if args.vis_dir else ()
    errors = Errors(args.on_error, MEMORY_HELP, folders)
    space = SpaceCheck(folders, todo)

    # ----- inference -----
    with BoundedPool(choose_crf_workers(args.crf_workers, backend, device), errors) as pool:
        for name, img in read_items(dataset, todo, errors, args.num_workers, device, 'segmentation'):
            with errors.caught(name):
                img = img.numpy()                                           # (H, W, 3)
                prob = tiled_probability(net, img, args.tile or max(img.shape), args.scales, args.flip, device,
                                         args.amp)
                if not np.isfinite(prob).all():
                    raise BadInput(f'the probabilities of {name} are NaN (--weights {args.weights}, --amp {args.amp})')
                pool.submit(write_results, name, prob, img, label_folder, prob_folder, args.crf, backend,
                            device, class_names, args.vis_dir if name in pictured else None, name=name)
                space.count_image()
    sys.exit(errors.report())


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
