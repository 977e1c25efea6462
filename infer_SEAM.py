"""Step 2: computes class activation maps (CAMs) over scales and mirrors, and their dense CRF at several exponents.

Reads weights, images and labels. Writes CAM dicts, --out_cam/NAME.npy, and CRF dicts, <out_crf>_4.0/NAME.npy.
"""
import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from network.grad_cam import grad_cam
from network.seam import class_scores
from network.weights import load_trained
from tool import crf, image_files, imutils, score_files, visualization
from tool.cli import BadInput, HelpFormatter, check_dir, check_file, check_range, exit_on_bad_input, import_network
from tool.devices import autocast, get_device, get_rank
from tool.files import atomic_write, file_digest
from tool.on_error import Errors, no_more_than_a_warning
from tool.outputs import ResultFolder, SpaceCheck, describe_folder, open_folders, warn_of_background
from tool.thresholds import threshold_of
from tool.torchutils import read_items
from tool.workers import BoundedPool
from voc12.data import VOC12ClsDatasetMSF, VOC12ImageDataset
from voc12.lists import load_class_names
from voc12.tags import load_tag_thresholds, write_tag_tables

LARGE_VIEW = 3 * 360 * 360      # values; one batch of a larger view and its mirror needs twice the memory, no less time
MEMORY_HELP = ('--device cpu and, for the CRF on a GPU, --crf_backend pydensecrf (both work with --resume); smaller '
               '--scales and --amp bf16 (they change the results: leave --resume out)')


def class_maps(net, x, kind):
    """Returns the raw maps that `--map` names, (N, 1+C, h, w) at the size of the features, of normalised images
    (N, 3, H, W), and the scores (N, 1+C) that the classification loss sees."""
    if kind.startswith('gradcam'):
        return grad_cam(net, x, plus=kind == 'gradcam++')
    cam, cam_rv = net.class_maps(x)
    return cam_rv if kind == 'cam_rv' else cam, class_scores(cam)


@torch.inference_mode()
def run_views(net, views, kind='cam_rv', flip=True, device='cpu', amp='off'):
    """Runs the network on one image's views.

    views: normalised (3, h, w) tensors, one for each scale. kind: see `class_maps`. flip: run each view together with
    its mirror image, as one batch. Returns (maps, probability): for each view its foreground maps (2, C, h', w') or,
    without `flip`, (1, C, h', w'); and float32 (C,), the largest probability of each class over all of them.
    """
    maps, scores = [], []
    for view in views:
        view = view.to(device, non_blocking=True)
        x = torch.stack([view, view.flip(-1)] if flip else [view])
        batch = 1 if view.numel() > LARGE_VIEW else 2
        with autocast(x.device, amp):
            parts = [class_maps(net, part, kind) for part in x.split(batch)]
        maps.append(torch.cat([cam for cam, _ in parts])[:, 1:])
        scores += [score[:, 1:].float() for _, score in parts]
    return maps, torch.cat(scores).amax(dim=0).sigmoid().cpu().numpy()


@torch.inference_mode()
def multi_scale_cam(maps, views, classes, size):
    """Sums one image's maps over its views, mirrored ones turned back. Returns float32 (classes, H, W).

    maps, views: see `run_views`. classes: foreground classes 0..C-1 to keep. size: (H, W) of the image.
    """
    if not classes:
        return np.zeros((0, *size), np.float32)
    total = torch.zeros(len(classes), *size, device=maps[0].device)
    for cam, view in zip(maps, views):
        cam = cam[:, classes].float()                                              # (2, classes, h, w)
        cam = F.interpolate(cam, view.shape[1:], mode='bilinear', align_corners=True)
        cam = F.interpolate(cam, size, mode='bilinear', align_corners=False)
        total += cam[0]
        if len(cam) > 1:
            total += cam[1].flip(-1)
    return total.cpu().numpy()


def normalize_cam(cam):
    """Scales the sums of maps (classes, H, W) to scores of about 0..1, as for the published CAMs.

    Negatives become 0; values below min + 1e-5 become 0; then (x - min - 1e-5) / (max - min + 1e-5) with the
    minimum from before. If a map's minimum is above 0, its weakest pixels therefore come out negative: a quirk of the
    reference that the published numbers contain. A flat map becomes -1 everywhere.
    """
    cam = np.maximum(cam, 0)
    maximum = cam.max(axis=(1, 2), keepdims=True)
    minimum = cam.min(axis=(1, 2), keepdims=True)
    cam[cam < minimum + 1e-5] = 0
    return (cam - minimum - 1e-5) / (maximum - minimum + 1e-5)


def compute_cams(name, net, views, label, size, num_scales, thresholds, with_tags, kind, flip, device, amp):
    """Runs the network on the image `name`. Returns (CAM dict {class: float32 (H, W)}, probability of each class,
    float32 (C,)). The probability is None if the network did not run because the image has no class.

    views: normalised (3, h, w) tensors: the first `num_scales` make the maps, the rest (--tag_scales) the
    probabilities. label: (C,) multi-hot. size: (H, W). thresholds: if given, the classes whose probability is higher
    replace `label`. with_tags: always compute the probabilities. kind, flip, device, amp: see `run_views`.
    Raises BadInput for results that are not finite.
    """
    views, tag_views = views[:num_scales], views[num_scales:]
    maps, probability = [], None
    if with_tags or label.any():
        maps, probability = run_views(net, views, kind, flip, device, amp)
    if tag_views:
        _, probability = run_views(net, tag_views, 'cam', flip, device, amp)
    classes = np.flatnonzero(label > 1e-5 if thresholds is None else probability > thresholds).tolist()
    cam = multi_scale_cam(maps, views, classes, size)
    if not np.isfinite(cam).all() or (with_tags and not np.isfinite(probability).all()):
        raise BadInput(f'the maps or the probabilities of {name} are NaN or infinite; the cause is --weights or --amp '
                       f'{amp}')
    return dict(zip(classes, normalize_cam(cam))), probability


def crf_with_alphas(cam_dict, alphas, orig_img, backend='pydensecrf', device='cpu'):
    """Returns a list with the CRF scores {0: background, class + 1: ...}, float32 (H, W), for each alpha.

    cam_dict: {class: (H, W)}. orig_img: uint8 (H, W, 3). The background score is (1 - the largest map)^alpha, so a
    higher alpha means less background. Without any class, the background is 1."""
    if not cam_dict:
        return [{0: np.ones(orig_img.shape[:2], np.float32)} for _ in alphas]
    maps = np.stack(list(cam_dict.values()))
    with np.errstate(over='ignore'):    # a nearly flat map can be far below 0; the CRF clips the score to 1
        backgrounds = [np.power(1 - maps.max(axis=0, keepdims=True), alpha) for alpha in alphas]
    posteriors = crf.crf_inferences(orig_img, [np.concatenate([background, maps]) for background in backgrounds],
                                    backend=backend, device=device)
    return [dict(zip([0] + [key + 1 for key in cam_dict], posterior)) for posterior in posteriors]


def write_crf(name, cam_dict, alphas, orig_img, folders, dtype, backend, device):
    """Computes and writes the CRF scores of the image `name`, one file per alpha in its ResultFolder; runs in a worker
    process. Returns the share of background pixels for each alpha, None for an image without any class."""
    shares = []
    for folder, scores in zip(folders, crf_with_alphas(cam_dict, alphas, orig_img, backend, device)):
        with folder.writing(name) as path:
            score_files.save_scores(path, scores, dtype)
        shares.append((score_files.strongest_label(scores) == 0).mean() if cam_dict else None)
    return shares


def label_map(cam_dict, background_score, size):
    """Returns the label map, uint8 (H, W) = size, 0 or class + 1: the largest of a constant background score and the
    maps. Ties go to the background, then to the lower class. It is all 0 if cam_dict is empty."""
    background = np.full(size, background_score, np.result_type(np.float32, *cam_dict.values()))
    labels = score_files.strongest_label({0: background, **{key + 1: cam for key, cam in cam_dict.items()}})
    return labels.astype(np.uint8)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012',
        help='data root; contains JPEGImages/, and Annotations/ if --cls_labels does not exist')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--infer_list', default='voc12/train.txt', help='list of the images to process')
    either('--images', nargs='+', metavar='PATH', help='image files and folders (with sub-folders) to process instead '
           'of --voc12_root and --infer_list')
    add('--cls_labels', default='voc12/cls_labels.npy',
        help='image-level labels, a dict of multi-hot vectors; if the file is missing, the XML files are read')
    add('--tag_threshold', metavar='NUMBER_OR_FILE', help='predict the classes of each image instead of reading '
        '--cls_labels: those whose largest probability over scales and mirrors is above this number; a file with lines '
        'CLASS,THRESHOLD sets one number for each class')
    add('--tag_scales', type=float, nargs='+', help='scales of these probabilities, which are most reliable where '
        'objects are as large as in training. Default: those of --scales')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_SEAM', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_SEAM')
    add('--weights', help='trained weights, .pth; required unless --cam_dir is given')
    add('--device', help='cuda (the first GPU), cuda:N or cpu. Default: cuda if it is available')
    add('--tf32', action='store_true',
        help='allow TF32 matrix products on recent GPUs: several times faster, changes results slightly')
    add('--amp', default='off', choices=['off', 'bf16', 'fp16'],
        help='run the network in half precision: less memory, faster on a GPU, changes results slightly')
    # maps
    add('--scales', default=[0.5, 1.0, 1.5, 2.0], type=float, nargs='+',
        help='test scales, as factors of the image size (the scale table of the paper)')
    add('--flip', default=1, type=int, choices=[0, 1], help='1 also runs the mirror image at each scale; 0 does not')
    add('--cam_dir', help='folder of finished CAMs to make --out_crf and --out_cam_pred from, instead of --weights')
    add('--map', default='cam_rv', choices=['cam_rv', 'cam', 'gradcam', 'gradcam++'],
        help='which map to save: cam_rv is refined by PCM, cam is the plain CAM')
    add('--pcm', default='on', choices=['on', 'off'], help='off replaces the refined map by the plain CAM')
    add('--crf_alpha', default=[4.0, 24.0], type=float, nargs='+',
        help='exponents of the background score (1 - CAM)^alpha, one output folder for each; a higher one labels less '
             'background')
    add('--crf_backend', choices=['pydensecrf', 'torch'],
        help='implementation of the CRF; torch runs on --device. Default: pydensecrf if it is installed, else torch')
    add('--crf_workers', type=int,
        help='number of pydensecrf processes. Default: all cores if a GPU runs the network, else 0')
    # outputs
    add('--out_cam', help='folder to write the CAM dicts to, NAME.npy')
    add('--out_crf', help='prefix of the folders to write the CRF dicts to: <out_crf>_4.0/NAME.npy, ...')
    add('--out_tags', help='folder to write probabilities.csv to, the probability of every class in every image. With '
        '--tag_threshold also tags.csv; without it, the script prints the threshold that fits the known labels best')
    add('--out_cam_pred', help='folder to write label maps to, NAME.png')
    add('--out_cam_pred_alpha', default=0.26, type=float,
        help='background score of --out_cam_pred, in 0..1 (not an exponent)')
    add('--cam_dtype', default='float32', choices=['float32', 'float16'],
        help='number format of the CAM and CRF dicts; float16 halves the files')
    add('--cam_format', default='npy', choices=['npy', 'npz'],
        help='file format of the CAM and CRF dicts; npz is compressed and contains no pickle, but is slower to write')
    add('--vis_dir', help='folder for pictures, NAME.jpg: the maps, and labels at the background scores of the label '
        'maps and of --crf_alpha')
    add('--vis_count', default=20, type=int,
        help='number of images to draw, from the start of the list; finished images are not drawn again')
    add('--resume', action='store_true', help='keep finished files; refused if they were made with other settings')
    add('--on_error', default='stop', choices=['stop', 'skip'],
        help='what to do with an image that cannot be processed: stop, or skip it, list it at the end and exit with '
             'code 3')
    return parser


def check_args(args):
    if not (args.out_cam or args.out_crf or args.out_cam_pred or args.out_tags):
        raise BadInput('there is nothing to write: give --out_cam, --out_crf, --out_cam_pred or --out_tags')
    if args.cam_dir:
        check_dir(args.cam_dir, '--cam_dir')
        needless = [flag for flag in ('weights', 'out_cam', 'tag_threshold', 'out_tags') if getattr(args, flag)]
        if needless:
            raise BadInput(f'--cam_dir reads finished CAMs, so --{needless[0]} is not possible: leave one of them out')
    elif not args.weights:
        raise BadInput('give --weights to compute CAMs, or --cam_dir to read finished ones')
    else:
        check_file(args.weights, '--weights')
        if args.images and not args.tag_threshold:
            check_file(args.cls_labels, '--cls_labels; with --tag_threshold the classifier predicts the classes')
        if args.tag_threshold and not args.out_tags:
            raise BadInput('--tag_threshold needs --out_tags, the folder for the list of predicted tags')
    if args.tag_scales and not args.out_tags:
        raise BadInput('--tag_scales needs --out_tags, whose scales they are')
    check_range(args, 0.01, 100, 'scales', 'tag_scales', 'crf_alpha')
    check_range(args, -1000, 1000, 'out_cam_pred_alpha')
    check_range(args, 0, 256, 'num_workers', 'crf_workers')
    check_range(args, 0, 10 ** 9, 'vis_count')
    if args.out_crf and len({f'{alpha:.1f}' for alpha in args.crf_alpha}) < len(args.crf_alpha):
        raise BadInput(f'--crf_alpha {args.crf_alpha}: two of them would write to the same folder, whose name has one '
                       'decimal')


def scores_of_pictures(crf_alphas, has_label_maps, label_score):
    """Returns the background scores at which pictures show labels: `label_score` if the run writes label maps or no
    CRFs, and the score that corresponds to each CRF exponent. The CRF itself is not drawn."""
    of_crfs = [threshold_of(alpha) for alpha in crf_alphas]
    return of_crfs if of_crfs and not has_label_maps else [label_score, *of_crfs]


def save_picture(path, orig_img, cam_dict, class_names, background_scores):
    """Writes a JPEG of the image, its maps, and their labels at each of the background scores, side by side."""
    labels = [label_map(cam_dict, score, orig_img.shape[:2]) for score in background_scores]
    visualization.save_picture(
        path, [orig_img, *(visualization.cam_on_image(orig_img, cam) for cam in cam_dict.values()),
               *(visualization.labels_on_image(orig_img, at_score) for at_score in labels)],
        ['image', *(class_names[key] for key in cam_dict), *(f'at {score:.2f}' for score in background_scores)])


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    device = get_device(args.device, args.tf32)
    backend = crf.choose_crf_backend(args.crf_backend) if args.out_crf else None
    thresholds = load_tag_thresholds(args.tag_threshold, class_names) if args.tag_threshold else None

    # ----- the images, and where their CAMs come from -----
    if args.cam_dir:
        dataset = VOC12ImageDataset(args.infer_list, args.voc12_root, transform=np.array, images=args.images)
        if args.on_error == 'stop':         # better now than after hours
            score_files.check_scores(args.cam_dir, dataset.img_name_list, '--cam_dir')
        settings = describe_folder(args.cam_dir, 'cam_dir')
    else:
        cls_labels = None if args.tag_threshold else args.cls_labels
        dataset = VOC12ClsDatasetMSF(
            args.infer_list, voc12_root=args.voc12_root, scales=args.scales + (args.tag_scales or []),
            cls_labels=cls_labels, images=args.images, class_names=class_names,
            inter_transform=imutils.to_network_input)
        net = import_network(args.network, 'SEAM', args.backbone)(
            num_classes=len(class_names), pcm=args.pcm == 'on' and args.map == 'cam_rv')
        load_trained(net, args.weights, device, args.amp)
        settings = {key: getattr(args, key) for key in ('network', 'backbone', 'scales', 'flip', 'map', 'pcm', 'amp')}
        has_labels = cls_labels is not None and os.path.isfile(cls_labels)
        settings.update(weights=file_digest(args.weights), class_names=class_names, tag_threshold=thresholds,
                        tag_scales=args.tag_scales, cls_labels=file_digest(cls_labels) if has_labels else None)

    # ----- outputs: None or [] for those that are not asked for -----
    extension = '.' + args.cam_format
    label_settings = {**settings, 'background_score': args.out_cam_pred_alpha}
    score_settings = {**settings, 'cam_dtype': args.cam_dtype, 'cam_format': args.cam_format}
    tag_folder = ResultFolder(args.out_tags, '--out_tags', '.npy', settings) if args.out_tags else None
    cam_folder = ResultFolder(args.out_cam, '--out_cam', extension, score_settings) if args.out_cam else None
    label_folder = (ResultFolder(args.out_cam_pred, '--out_cam_pred', '.png', label_settings)
                    if args.out_cam_pred else None)
    crf_folders = [ResultFolder(f'{args.out_crf.rstrip("/")}_{alpha:.1f}', '--out_crf', extension,
                                {**score_settings, 'alpha': alpha, 'crf': crf.describe_crf(crf.CAM_CRF)})
                   for alpha in (args.crf_alpha if args.out_crf else [])]
    folders = [folder for folder in (tag_folder, cam_folder, label_folder, *crf_folders) if folder]
    rank, ranks = get_rank()        # each rank has its share of the whole list, whatever is finished of it
    todo = open_folders(folders, dataset.img_name_list[rank::ranks], args.resume,
                        [args.cam_dir, *dataset.input_folders()], args.vis_dir)
    pictured = set(dataset.img_name_list[:args.vis_count]) if args.vis_dir else ()
    drawn_scores = scores_of_pictures(args.crf_alpha if args.out_crf else [], bool(args.out_cam_pred),
                                      args.out_cam_pred_alpha)
    errors = Errors(args.on_error, MEMORY_HELP, folders)
    space = SpaceCheck(folders, todo)

    # ----- inference -----
    with BoundedPool(crf.choose_crf_workers(args.crf_workers, backend, device), errors) as pool:
        for name, img, *item in read_items(dataset, todo, errors, args.num_workers, device, 'CAM'):
            with errors.caught(name):
                orig_img = img.numpy()                                          # uint8 (H, W, 3)
                size = orig_img.shape[:2]
                if args.cam_dir:
                    cam_dict = score_files.load_fitting(args.cam_dir, name, '--cam_dir', 'cam', size, len(class_names))
                else:
                    cam_dict, probability = compute_cams(name, net, *item, size, len(args.scales), thresholds,
                                                         bool(tag_folder), args.map, args.flip, device, args.amp)
                if tag_folder:
                    with tag_folder.writing(name) as path, atomic_write(path) as file:
                        np.save(file, probability)
                if cam_folder:
                    with cam_folder.writing(name) as path:
                        score_files.save_scores(path, cam_dict, args.cam_dtype)
                if label_folder:
                    with label_folder.writing(name) as path:
                        image_files.save_label_map(path, label_map(cam_dict, args.out_cam_pred_alpha, size))
                if name in pictured:
                    with no_more_than_a_warning(f'no picture of {name}'):
                        save_picture(os.path.join(args.vis_dir, name + '.jpg'), orig_img, cam_dict, class_names,
                                     drawn_scores)
                if crf_folders:
                    pool.submit(write_crf, name, cam_dict, args.crf_alpha, orig_img, crf_folders, args.cam_dtype,
                                backend, device, name=name)
                space.count_image()
    for index, folder in enumerate(crf_folders):
        warn_of_background([shares[index] for shares in pool.results], folder.path, '--crf_alpha')
    if tag_folder:
        paths = {name: os.path.relpath(path, dataset.folder) for name, path in dataset.paths.items()}
        write_tag_tables(tag_folder, dataset.img_name_list, paths, class_names, thresholds, dataset.labels)
    sys.exit(errors.report())


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
