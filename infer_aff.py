"""Step 5: a random walk with AffinityNet's affinities turns CAMs into pseudo labels. See the README."""
import argparse
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.weights import load_weights
from tool import crf, image_files, imutils, score_files, visualization
from tool.affinity_pairs import fit_radius, pair_indices
from tool.cli import BadInput, check_dir, check_file, check_range, exit_on_bad_input, import_network, make_dir, str2bool
from tool.devices import autocast, get_device, get_rank
from tool.files import file_digest
from tool.outputs import Errors, SkipBad, is_whole, open_folder, read_settings
from tool.workers import BoundedPool, available_cores
from voc12.data import STRIDE, VOC12ImageDataset
from voc12.lists import get_img_path, load_class_names


def class_scores(cam_dict, alpha, size):
    """Random-walk seeds of a CAM dict {class from 0: (H, W)}: float32 (1 + classes in it, *size), the background first,
    (1 - the largest map)^alpha, then the classes in order. `size` is the padded size; the padding is 0 throughout."""
    h, w = next(iter(cam_dict.values())).shape
    scores = np.zeros((1 + len(cam_dict), *size), np.float32)
    scores[1:, :h, :w] = [cam_dict[key] for key in sorted(cam_dict)]
    # classes that are not in the image compete with 0
    scores[0, :h, :w] = np.power(1 - np.maximum(scores[1:, :h, :w].max(axis=0), 0), alpha)
    return scores


def random_walk(scores, aff, radius, beta, logt):
    """Spreads scores (K, h, w) over pixels with high affinity: 2^logt steps (Ahn and Kwak 2018, eq. 9-10).

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
    # transposed, so that a step is `matrix @ scores`
    matrix = torch.sparse_coo_tensor(torch.stack([columns, rows]), values, (h * w, h * w), check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse')         # CSR is called beta, whatever its use
        matrix = matrix.to_sparse_csr()
    scores = scores.reshape(k, -1).T                                    # (hw, K)
    for _ in range(2 ** logt):
        scores = matrix @ scores
    return scores.T.reshape(k, h, w)


def read_cams(name, cam_dir, size, num_classes):
    """The CAM dict of an image of size (h, w). Raises BadInput for one that does not fit it or the classes."""
    path = os.path.join(cam_dir, name + '.npy')
    cam_dict = score_files.load_scores(path, '--cam_dir', 'cam')
    if not cam_dict or max(cam_dict) >= num_classes:
        raise BadInput(f'{path} (--cam_dir) has the classes {list(cam_dict)}, not some of 0..{num_classes - 1} '
                       '(--class_names)')
    if any(class_map.shape != size for class_map in cam_dict.values()):
        raise BadInput(f'{path} (--cam_dir) does not fit the image, which is {size[0]}x{size[1]}')
    return cam_dict


def crf_disagreement(name, folders, size):
    """bool, of size (H, W): where the labels of two CRF folders differ. Raises BadInput for files that do not fit."""
    labels = []
    for folder in folders:
        path = os.path.join(folder, name + '.npy')
        scores = score_files.load_scores(path, '--ignore_crf', 'crf')
        if not scores or next(iter(scores.values())).shape != size:
            raise BadInput(f'{path} (--ignore_crf) does not fit the image, which is {size[0]}x{size[1]}')
        labels.append(score_files.strongest_label(scores))
    return labels[0] != labels[1]


def write_labels(path, scores, present, img, ignored, args, num_classes, backend, device):
    """Writes the pseudo label of one image; the job of a worker process where there is a CRF.

    scores: float32 (K, H', W') of the walk, for the labels `present`, at the padded size; img: the padded normalised
    image, float32 (3, H', W'). ignored: bool (H, W), where 255 is written in any case.
    """
    if args.crf:        # with all classes, as in the reference: the absent ones have score 0
        everything = np.zeros((1 + num_classes, *scores.shape[1:]), np.float32)
        everything[present] = scores
        scores = crf.crf_inference(imutils.denormalize(img), everything, t=1, backend=backend,
                                       device=device)[present]
    h, w = ignored.shape
    scores = scores[:, :h, :w]
    labels = np.array(present)[scores.argmax(axis=0)]
    unsure = scores.max(axis=0) < args.ignore_below * np.maximum(scores, 0).sum(axis=0)
    labels[ignored | unsure] = image_files.IGNORE
    image_files.save_label_map(path, labels)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/')
    parser.add_argument('--infer_list', default='voc12/val.txt', help='images to work on')
    parser.add_argument('--cam_dir', required=True,
                        help='CAM dicts: the --out_cam folder of infer_SEAM.py, not a CRF folder')
    parser.add_argument('--class_names', help="names of the foreground classes, one a line; VOC's without it")
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_aff', help='module with a class Net')
    parser.add_argument('--weights', required=True, help='trained .pth')
    parser.add_argument('--device', help='cuda (the first GPU), cuda:N or cpu; not given: cuda where there is one')
    parser.add_argument('--tf32', action='store_true', help='faster, less exact products on recent GPUs')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'],
                        help='half-precision network: less memory and time on a GPU')
    # random walk
    parser.add_argument('--alpha', default=6.0, type=float, help='background exponent: the higher, the less background')
    parser.add_argument('--beta', default=8, type=int,
                        help='exponent of the affinities: the higher, the more weak ones are suppressed')
    parser.add_argument('--logt', default=6, type=int, help='the walk takes 2^logt steps')
    parser.add_argument('--crf', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
                        help='one iteration of the dense CRF on the result')
    parser.add_argument('--crf_backend', choices=['pydensecrf', 'torch'],
                        help='torch: the same CRF in PyTorch, on --device; not given: pydensecrf where it is installed')
    parser.add_argument('--crf_workers', type=int, help='processes for pydensecrf, 0 for none of its own; not given: '
                                                        'all cores where a GPU runs the network, else 0')
    # outputs
    parser.add_argument('--out_rw', default='out_rw', help='folder for the pseudo labels, NAME.png')
    parser.add_argument('--ignore_below', default=0.0, type=float,
                        help='write 255 where the winning class has less than this share of the scores')
    parser.add_argument('--ignore_crf', nargs=2, metavar=('LA', 'HA'),
                        help='write 255 where the labels of these two CRF folders of infer_SEAM.py differ')
    parser.add_argument('--vis_dir', help='folder for pictures of the labels, NAME.jpg')
    parser.add_argument('--vis_count', default=20, type=int, help='how many images of the list get one')
    parser.add_argument('--overwrite', action='store_true', help='redo what is finished, in folders of any settings')
    parser.add_argument('--on_error', default='stop', choices=['stop', 'skip'],
                        help='skip: go on past a bad image, list it at the end, exit code 3')
    return parser


def check_args(args):
    check_range(args, 0, 256, 'num_workers', 'beta')
    check_range(args, 0, 20, 'logt')
    check_range(args, 0, 1, 'ignore_below')
    check_file(args.weights, '--weights')
    check_dir(args.cam_dir, '--cam_dir')
    for folder in args.ignore_crf or ():
        check_dir(folder, '--ignore_crf')


@torch.inference_mode()
def main(args):
    check_args(args)
    num_classes = len(load_class_names(args.class_names))
    device = get_device(args.device, args.tf32)

    backend = crf.choose_crf_backend(args.crf_backend) if args.crf else None

    # ----- data and network -----
    dataset = VOC12ImageDataset(args.infer_list, voc12_root=args.voc12_root,
                                transform=transforms.Compose([np.asarray, imutils.normalize, imutils.HWC_to_CHW]))
    names = dataset.img_name_list
    for name in names if args.on_error == 'stop' else ():
        score_files.find_scores(os.path.join(args.cam_dir, name + '.npy'), '--cam_dir')
    net = import_network(args.network, 'radius').Net()
    load_weights(net, args.weights)
    # faster on a CPU, by a fifth; not measured on GPUs
    net.eval().to(device, memory_format=torch.channels_last if device.type == 'cpu' else torch.contiguous_format)

    # ----- outputs: what is finished is left alone -----
    settings = {key: getattr(args, key) for key in ('network', 'cam_dir', 'alpha', 'beta', 'logt', 'crf', 'amp',
                                                    'ignore_below', 'ignore_crf')}
    settings.update(weights=file_digest(args.weights), cams=read_settings(args.cam_dir))
    rank, ranks = get_rank()
    mine = range(rank, len(names), ranks)       # shared out before looking what is there: ranks look at different times
    paths = {index: os.path.join(args.out_rw, names[index] + '.png') for index in mine}
    open_folder(args.out_rw, '--out_rw', settings, args.overwrite, paths.values())
    todo = [index for index in mine if not is_whole(paths[index])]
    if len(todo) < len(mine):
        print(f'{len(mine) - len(todo)} of {len(mine)} images are finished')
    loader = DataLoader(SkipBad(dataset, todo), batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == 'cuda')
    workers = args.crf_workers
    if workers is None:
        workers = available_cores() if device.type == 'cuda' else 0
    if not args.crf or backend == 'torch':
        workers = 0
    pictured = names[:args.vis_count] if args.vis_dir else []
    if args.vis_dir:
        make_dir(args.vis_dir, '--vis_dir')
    errors = Errors(args.on_error)

    # ----- inference -----
    with BoundedPool(workers) as pool:
        for item in tqdm(loader, desc='random walk', dynamic_ncols=True, disable=None):
            try:
                if isinstance(item, BadInput):
                    raise item
                name, img = item                                            # (3, H, W)
                h, w = img.shape[1:]
                cam_dict = read_cams(name, args.cam_dir, (h, w), num_classes)
                ignored = np.zeros((h, w), bool)
                if args.ignore_crf:
                    ignored = crf_disagreement(name, args.ignore_crf, (h, w))
            except BadInput as error:
                errors.add(error)
                continue
            img = F.pad(img[None], (0, -w % STRIDE, 0, -h % STRIDE))
            size = img.shape[2:]
            scores = F.avg_pool2d(torch.from_numpy(class_scores(cam_dict, args.alpha, size)).to(device), STRIDE)
            with autocast(device, args.amp):
                aff = net(img.to(device))
            radius = fit_radius(*scores.shape[1:], net.radius)
            scores = random_walk(scores, aff.float(), radius, args.beta, args.logt)
            scores = F.interpolate(scores[None], size, mode='bilinear', align_corners=False)[0].cpu().numpy()
            present = [0] + [key + 1 for key in sorted(cam_dict)]
            pool.submit(write_labels, os.path.join(args.out_rw, name + '.png'), scores, present, img[0].numpy(),
                        ignored, args, num_classes, backend, device)
    for name in pictured:
        path = os.path.join(args.out_rw, name + '.png')
        if os.path.isfile(path):        # of another rank, or skipped
            img = np.asarray(image_files.read_image(get_img_path(name, args.voc12_root)))
            labels = visualization.labels_on_image(img, image_files.read_label_map(path, '--out_rw'))
            visualization.save_picture(os.path.join(args.vis_dir, name + '.jpg'), [img, labels], ['image', 'label'])
    sys.exit(errors.report())


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
