"""Step 5: a random walk with AffinityNet's affinities turns CAMs into pseudo labels.

Reads weights, images and the CAM dicts of step 2. Writes label maps, --out_rw/NAME.png.
"""
import argparse
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from network.weights import load_trained
from tool import crf, image_files, imutils, score_files, visualization
from tool.affinity_pairs import STRIDE, fit_radius, pair_indices
from tool.cli import (BadInput, HelpFormatter, check_dir, check_file, check_range, exit_on_bad_input, import_network,
                      str2bool)
from tool.devices import autocast, get_device, get_rank
from tool.files import file_digest
from tool.on_error import Errors, no_more_than_a_warning
from tool.outputs import ResultFolder, SpaceCheck, describe_folder, open_folders, warn_of_background
from tool.torchutils import read_items
from tool.workers import BoundedPool
from voc12.data import VOC12ImageDataset
from voc12.lists import get_img_path, load_class_names

MEMORY_HELP = ('--device cpu and, for the CRF on a GPU, --crf_backend pydensecrf (both work with --resume); --amp bf16 '
               '(it changes the results: leave --resume out)')


def walk_seeds(cam_dict, alpha, size):
    """Returns the seeds of the random walk from a CAM dict {class from 0: (H, W)}: float32 (1 + classes in it, *size),
    first the background, (1 - the largest map)^alpha, then the classes in order. size: (H, W) with the padding, which
    is 0 in all of them."""
    h, w = next(iter(cam_dict.values())).shape
    scores = np.zeros((1 + len(cam_dict), *size), np.float32)
    scores[1:, :h, :w] = [cam_dict[key] for key in sorted(cam_dict)]
    # not below 0, where absent classes compete with 0
    scores[0, :h, :w] = np.power(1 - np.maximum(scores[1:, :h, :w].max(axis=0), 0), alpha)
    return scores


def random_walk(scores, aff, radius, beta, logt):
    """Spreads scores (K, h, w) to pixels with high affinity in 2^logt steps (Ahn and Kwak 2018, eq. 9-10).

    aff: (1, offsets, from) of AffinityNet at `radius`. The transition matrix is the symmetric affinity (unit
    diagonal) to the power beta, each column divided by its sum. It has at most 69 entries a column, so each
    step is a product with a sparse matrix. Returns (K, h, w).
    """
    k, h, w = scores.shape
    ind_from, ind_to = (torch.from_numpy(index).to(aff.device) for index in pair_indices(h, w, radius))
    ind_from, ind_to = ind_from.expand_as(ind_to).reshape(-1), ind_to.reshape(-1)
    diagonal = torch.arange(h * w, device=aff.device)
    rows = torch.cat([ind_from, ind_to, diagonal])
    columns = torch.cat([ind_to, ind_from, diagonal])
    values = torch.cat([aff.reshape(-1), aff.reshape(-1), aff.new_ones(h * w)]) ** beta
    values = values / values.new_zeros(h * w).index_add(0, columns, values)[columns]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse')         # PyTorch warns that CSR is in beta
        # transposed, so that a step is `matrix @ scores`
        matrix = torch.sparse_coo_tensor(torch.stack([columns, rows]), values, (h * w, h * w), check_invariants=False)
        matrix = matrix.to_sparse_csr()
    scores = scores.reshape(k, -1).T                                    # (hw, K)
    for _ in range(2 ** logt):
        scores = matrix @ scores
    return scores.T.reshape(k, h, w)


def crf_disagreement(name, folders, size, num_classes):
    """Returns where the labels in two CRF folders differ, bool (H, W) = size. Raises BadInput for wrong files."""
    low, high = (score_files.load_fitting(folder, name, '--ignore_crf', 'crf', size, num_classes) for folder in folders)
    return score_files.strongest_label(low) != score_files.strongest_label(high)


def refine_walk(scores, present, img, num_classes, backend, device):
    """Applies the CRF to the walk's scores, float32 (K, H, W), of the labels `present`; all other labels have 0. The
    scores are not normalised first. img: the normalised image, float32 (3, H, W). Returns float32 (K, H, W)."""
    everything = np.zeros((1 + num_classes, *scores.shape[1:]), np.float32)
    everything[present] = scores
    return crf.crf_inference(imutils.denormalize(img), everything, crf.WALK_CRF.iterations,
                             kernels=crf.WALK_CRF.kernels, backend=backend, device=device)[present]


def normalize_scores(scores):
    """Scales scores, float32 (K, H, W), background first, so that they are >= 0 and sum to 1 at each pixel. Where no
    score is above 0, the background becomes 1."""
    scores = np.maximum(scores, 0)
    scores[0, scores.max(axis=0) == 0] = 1
    return scores / scores.sum(axis=0)


def write_results(name, scores, present, img, ignored, num_classes, label_folder, score_folder, use_crf, ignore_below,
                  backend, device):
    """Writes the pseudo label of the image `name` and, if there is a score_folder, its scores. With a CRF it may run in
    a worker process.

    scores: float32 (K, H', W') of the walk at the padded size, for the labels `present`. img: the padded normalised
    image, float32 (3, H', W'). ignored: bool (H, W), pixels that become 255. Returns the share of background pixels, or
    None if the background is the only label.
    """
    if use_crf and len(present) > 1:
        scores = refine_walk(scores, present, img, num_classes, backend, device)
    h, w = ignored.shape
    scores = scores[:, :h, :w]
    labels = np.array(present)[scores.argmax(axis=0)]
    share = (labels == 0).mean() if len(present) > 1 else None
    unsure = scores.max(axis=0) < ignore_below * np.maximum(scores, 0).sum(axis=0)
    labels[ignored | unsure] = image_files.IGNORE
    with label_folder.writing(name) as path:
        image_files.save_label_map(path, labels)
    if score_folder:
        with score_folder.writing(name) as path:
            score_files.save_scores(path, dict(zip(present, normalize_scores(scores))))
    return share


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012', help='data root; contains JPEGImages/')
    add('--infer_list', default='voc12/val.txt', help='list of the images to process')
    add('--cam_dir', required=True, help='folder of the CAM dicts, the --out_cam of infer_SEAM.py; not a CRF folder')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_aff', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_aff')
    add('--weights', required=True, help='trained weights, .pth')
    add('--device', help='cuda (the first GPU), cuda:N or cpu. Default: cuda if it is available')
    add('--tf32', action='store_true',
        help='allow TF32 matrix products on recent GPUs: several times faster, changes results slightly')
    add('--amp', default='off', choices=['off', 'bf16', 'fp16'],
        help='run the network in half precision: less memory, faster on a GPU, changes results slightly')
    # random walk
    add('--alpha', default=6.0, type=float,
        help='exponent of the background score (1 - CAM)^alpha; a higher one labels less background')
    add('--beta', default=8, type=int, help='exponent of the affinities; a higher one suppresses weak affinities more')
    add('--logt', default=6, type=int, help='the random walk takes 2^logt steps')
    add('--crf', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
        help='apply one iteration of the dense CRF to the scores of the walk')
    add('--crf_backend', choices=['pydensecrf', 'torch'],
        help='implementation of the CRF; torch runs on --device. Default: pydensecrf if it is installed, else torch')
    add('--crf_workers', type=int,
        help='number of pydensecrf processes. Default: all cores if a GPU runs the network, else 0')
    # outputs
    add('--out_rw', default='out_rw', help='folder to write the pseudo labels to, NAME.png')
    add('--out_prob', help='folder to write the scores of the walk to, NAME.npy, in the format of the CRF dicts')
    add('--ignore_below', default=0.0, type=float,
        help='write 255 (ignored) where the largest score is less than this share of the sum of all scores')
    add('--ignore_crf', nargs=2, metavar=('LA', 'HA'),
        help='write 255 (ignored) where the labels of these two CRF folders differ')
    add('--vis_dir', help='folder to write pictures of the labels to, NAME.jpg')
    add('--vis_count', default=20, type=int, help='number of images to draw, from the start of the list')
    add('--resume', action='store_true', help='keep finished files; refused if they were made with other settings')
    add('--on_error', default='stop', choices=['stop', 'skip'],
        help='what to do with an image that cannot be processed: stop, or skip it, list it at the end and exit with '
             'code 3')
    return parser


def check_args(args):
    check_range(args, 0, 256, 'num_workers', 'crf_workers', 'beta')
    check_range(args, 0, 10 ** 9, 'vis_count')
    check_range(args, 0.01, 100, 'alpha')
    check_range(args, 0, 20, 'logt')
    check_range(args, 0, 1, 'ignore_below')
    check_file(args.weights, '--weights')
    check_dir(args.cam_dir, '--cam_dir')
    for folder in args.ignore_crf or ():
        check_dir(folder, '--ignore_crf')


def walk_image(net, img, cam_dict, alpha, beta, logt, device='cpu', amp='off'):
    """Runs the random walk of one image. img: normalised (3, H, W), whose sides are multiples of STRIDE. cam_dict: its
    CAMs, up to STRIDE - 1 pixels smaller. Returns float32 (1 + classes in cam_dict, H, W), the background first.
    Without any class the network does not run and the background is 1."""
    if not cam_dict:
        return np.ones((1, *img.shape[1:]), np.float32)
    img = img.to(device)
    scores = F.avg_pool2d(torch.from_numpy(walk_seeds(cam_dict, alpha, img.shape[1:])).to(device), STRIDE)
    with autocast(img.device, amp):
        aff = net(img[None])
    radius = fit_radius(*scores.shape[1:], net.radius)
    scores = random_walk(scores, aff.float(), radius, beta, logt)
    return F.interpolate(scores[None], img.shape[1:], mode='bilinear', align_corners=False)[0].cpu().numpy()


def save_pictures(names, folder, voc12_root, vis_dir):
    """Writes a JPEG for each image: the image and its pseudo label from a ResultFolder, side by side."""
    finished = folder.finished()        # other images were skipped, or belong to another rank
    for name in filter(finished.__contains__, names):
        with no_more_than_a_warning(f'no picture of {name}'):
            img = np.asarray(image_files.read_image(get_img_path(name, voc12_root)))
            labels = visualization.labels_on_image(img, image_files.read_label_map(folder.file(name), folder.flag))
            visualization.save_picture(os.path.join(vis_dir, name + '.jpg'), [img, labels], ['image', 'label'])


@torch.inference_mode()
def main(args):
    check_args(args)
    num_classes = len(load_class_names(args.class_names))
    device = get_device(args.device, args.tf32)
    backend = crf.choose_crf_backend(args.crf_backend) if args.crf else None
    dataset = VOC12ImageDataset(args.infer_list, voc12_root=args.voc12_root, transform=imutils.to_network_input)
    names = dataset.img_name_list
    if args.on_error == 'stop':         # better now than after hours
        score_files.check_scores(args.cam_dir, names, '--cam_dir')
        for crf_dir in args.ignore_crf or ():
            score_files.check_scores(crf_dir, names, '--ignore_crf')
    net = load_trained(import_network(args.network, 'affinity', args.backbone)(), args.weights, device, args.amp)

    # ----- outputs -----
    settings = {key: getattr(args, key) for key in ('network', 'backbone', 'alpha', 'beta', 'logt', 'amp')}
    settings.update(weights=file_digest(args.weights), crf=crf.describe_crf(crf.WALK_CRF) if args.crf else None,
                    **describe_folder(args.cam_dir, 'cam_dir'))
    label_settings = {**settings, 'ignore_below': args.ignore_below}
    for flag, path in zip(('ignore_crf LA', 'ignore_crf HA'), args.ignore_crf or ()):
        label_settings.update(describe_folder(path, flag))
    label_folder = ResultFolder(args.out_rw, '--out_rw', '.png', label_settings)
    score_folder = ResultFolder(args.out_prob, '--out_prob', '.npy', settings) if args.out_prob else None
    folders = [folder for folder in (label_folder, score_folder) if folder]
    rank, ranks = get_rank()        # each rank has its share of the whole list, whatever is finished of it
    todo = open_folders(folders, names[rank::ranks], args.resume,
                        [args.cam_dir, *(args.ignore_crf or ()), *dataset.input_folders()], args.vis_dir)
    errors = Errors(args.on_error, MEMORY_HELP, folders)
    space = SpaceCheck(folders, todo)

    # ----- inference -----
    with BoundedPool(crf.choose_crf_workers(args.crf_workers, backend, device), errors) as pool:
        for name, img in read_items(dataset, todo, errors, args.num_workers, device, 'random walk'):     # (3, H, W)
            with errors.caught(name):
                h, w = img.shape[1:]
                cam_dict = score_files.load_fitting(args.cam_dir, name, '--cam_dir', 'cam', (h, w), num_classes)
                ignored = np.zeros((h, w), bool)
                if args.ignore_crf:
                    ignored = crf_disagreement(name, args.ignore_crf, (h, w), num_classes)
                img = F.pad(img, (0, -w % STRIDE, 0, -h % STRIDE))
                scores = walk_image(net, img, cam_dict, args.alpha, args.beta, args.logt, device, args.amp)
                if not np.isfinite(scores).all():
                    raise BadInput(f'the random walk of {name} ends in NaN or infinite scores (--weights '
                                   f'{args.weights}, --cam_dir {args.cam_dir}, --amp {args.amp})')
                present = [0] + [key + 1 for key in sorted(cam_dict)]
                pool.submit(write_results, name, scores, present, img.numpy(), ignored, num_classes, label_folder,
                            score_folder, args.crf, args.ignore_below, backend, device, name=name)
                space.count_image()
    if args.vis_dir:
        save_pictures(names[:args.vis_count], label_folder, args.voc12_root, args.vis_dir)
    warn_of_background(pool.results, label_folder.path, '--alpha')
    sys.exit(errors.report())


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
