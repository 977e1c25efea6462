"""Step 5: a random walk with AffinityNet's affinities turns CAMs into pseudo labels. See the README."""
import argparse
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.resnet38d import load_weights
from tool import imutils
from tool.pairs import fit_radius, pair_indices
from tool.pyutils import (BadInput, check_dir, check_file, check_range, exit_on_bad_input, import_network, make_dir,
                          str2bool)
from tool.torchutils import get_device
from voc12.data import STRIDE, VOC12ImageDataset
from voc12.lists import NUM_CLASSES


def class_scores(cam_dict, alpha, size):
    """Random-walk seeds of a CAM dict {class 0..19: (H, W)}: float32 (21, *size), absent classes 0, channel 0
    the background, (1 - the largest map)^alpha. `size` is the padded size; the padding is 0 in all channels."""
    h, w = next(iter(cam_dict.values())).shape
    scores = np.zeros((1 + NUM_CLASSES, *size), np.float32)
    for key, class_map in cam_dict.items():
        scores[key + 1, :h, :w] = class_map
    scores[0, :h, :w] = np.power(1 - scores[1:, :h, :w].max(axis=0), alpha)
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


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/')
    parser.add_argument('--infer_list', default='voc12/val.txt', help='images to work on')
    parser.add_argument('--cam_dir', required=True,
                        help='CAM dicts: the --out_cam folder of infer_SEAM.py, not a CRF folder')
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_aff', help='module with a class Net')
    parser.add_argument('--weights', required=True, help='trained .pth')
    parser.add_argument('--device', help='cuda (the first GPU), cuda:N or cpu; not given: cuda where there is one')
    # random walk
    parser.add_argument('--alpha', default=6.0, type=float, help='background exponent: the higher, the less background')
    parser.add_argument('--beta', default=8, type=int,
                        help='exponent of the affinities: the higher, the more weak ones are suppressed')
    parser.add_argument('--logt', default=6, type=int, help='the walk takes 2^logt steps')
    parser.add_argument('--crf', default=False, type=str2bool, nargs='?', const=True, metavar='BOOL',
                        help='one iteration of the dense CRF on the result')
    # outputs
    parser.add_argument('--out_rw', default='out_rw', help='folder for the pseudo labels, NAME.png')
    return parser


@torch.inference_mode()
def main(args):
    check_range(args, 0, 256, 'num_workers', 'beta')
    check_range(args, 0, 20, 'logt')
    check_file(args.weights, '--weights')
    check_dir(args.cam_dir, '--cam_dir')
    device = get_device(args.device)
    if args.crf:
        imutils.check_crf('--crf')
    dataset = VOC12ImageDataset(args.infer_list, voc12_root=args.voc12_root,
                                transform=transforms.Compose([np.asarray, imutils.normalize, imutils.HWC_to_CHW]))
    for name in dataset.img_name_list:
        check_file(os.path.join(args.cam_dir, name + '.npy'), '--cam_dir')
    loader = DataLoader(dataset, batch_size=1, num_workers=args.num_workers, pin_memory=device.type == 'cuda')
    net = import_network(args.network, 'radius').Net()
    load_weights(net, args.weights)
    net.eval().to(device)
    make_dir(args.out_rw, '--out_rw')

    for (name,), img in tqdm(loader, desc='random walk', dynamic_ncols=True):
        h, w = img.shape[2:]
        img = F.pad(img, (0, -w % STRIDE, 0, -h % STRIDE))
        size = img.shape[2:]
        cam_path = os.path.join(args.cam_dir, name + '.npy')
        cam_dict = imutils.load_scores(cam_path, '--cam_dir', 'cam')
        if not cam_dict or max(cam_dict) >= NUM_CLASSES:
            raise BadInput(f'{cam_path} (--cam_dir) has the classes {list(cam_dict)}, not some of 0..{NUM_CLASSES - 1}')
        if any(class_map.shape != (h, w) for class_map in cam_dict.values()):
            raise BadInput(f'{cam_path} (--cam_dir) does not fit the image, which is {h}x{w}')
        scores = F.avg_pool2d(torch.from_numpy(class_scores(cam_dict, args.alpha, size)).to(device), STRIDE)
        present = [0] + [key + 1 for key in sorted(cam_dict)]
        radius = fit_radius(*scores.shape[1:], net.radius)
        scores[present] = random_walk(scores[present], net(img.to(device)), radius, args.beta, args.logt)
        scores = F.interpolate(scores[None], size, mode='bilinear', align_corners=False)[0].cpu().numpy()
        if args.crf:
            scores = imutils.crf_inference(imutils.denormalize(img[0].numpy()), scores, t=1, labels=len(scores))
        imutils.save_label_map(os.path.join(args.out_rw, name + '.png'), scores.argmax(axis=0)[:h, :w])


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
