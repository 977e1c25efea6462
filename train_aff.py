"""Step 4: trains AffinityNet on the CRF labels of a low and a high background alpha. See the README."""
import argparse
import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.resnet38d import load_weights
from tool import imutils
from tool.pyutils import (AverageMeter, BadInput, Logger, Timer, check_dir, check_file, check_range, exit_on_bad_input,
                          import_network, progress_line)
from tool.torchutils import PolyOptimizer, calibrate_batch_norm, get_device, parallel, save_weights, set_seed
from voc12.data import STRIDE, VOC12AffDataset


# ----- the objective -----

def affinity_loss(aff, bg_label, fg_label, neg_label):
    """AffinityNet's loss (Ahn and Kwak 2018, eq. 5-7). All arguments (N, offsets, from): aff in (0, 1], labels 0 or 1.

    Returns a dict of scalars: bg_loss, fg_loss, neg_loss, each a mean over the pairs of its kind in the batch
    (0 where there is none), loss = bg_loss/4 + fg_loss/4 + neg_loss/2, and the counts bg_cnt, fg_cnt, neg_cnt.
    """
    alike = -torch.log(aff + 1e-5)
    different = -torch.log(1 + 1e-5 - aff)
    terms = {}
    for kind, cost, label in (('bg', alike, bg_label), ('fg', alike, fg_label), ('neg', different, neg_label)):
        terms[kind + '_cnt'] = label.sum()
        terms[kind + '_loss'] = (cost * label).sum() / (terms[kind + '_cnt'] + 1e-5)
    terms['loss'] = terms['bg_loss'] / 4 + terms['fg_loss'] / 4 + terms['neg_loss'] / 2
    return terms


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/')
    parser.add_argument('--train_list', default='voc12/train_aug.txt', help='training images')
    parser.add_argument('--val_list', default='voc12/val.txt', help='unused, as in the reference')
    parser.add_argument('--la_crf_dir', required=True, help='CRF scores of the low alpha: <out_crf>_4.0')
    parser.add_argument('--ha_crf_dir', required=True, help='CRF scores of the high alpha: <out_crf>_24.0')
    parser.add_argument('--crop_size', default=448, type=int, help='side of the training crop, in pixels')
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_aff', help='module with a class Net')
    parser.add_argument('--weights', help='ImageNet .params or .pth to start from; random without it')
    # optimisation
    parser.add_argument('--batch_size', default=8, type=int, help='images per step, over all GPUs')
    parser.add_argument('--max_epoches', '--max_epochs', default=8, type=int, help='passes over the training list')
    parser.add_argument('--lr', default=0.01, type=float, help='of the backbone; new heads get 10 times as much')
    parser.add_argument('--wt_dec', default=5e-4, type=float, help='weight decay')
    parser.add_argument('--momentum', type=float,
                        help='of SGD; not given: the value of --wt_dec, which is what the reference ran')
    parser.add_argument('--seed', default=0, type=int, help='of all random numbers')
    parser.add_argument('--device', help='cuda (all visible GPUs), cuda:N or cpu; not given: cuda where there is one')
    # outputs
    parser.add_argument('--session_name', default='resnet38_aff',
                        help='writes <session_name>.pth and .log; folders are created')
    return parser


def main(args):
    if args.crop_size % STRIDE or args.crop_size < 5 * STRIDE:      # on 4 x 4 cells no two form a pair
        raise BadInput(f'--crop_size {args.crop_size}: a multiple of {STRIDE} from {5 * STRIDE} on is needed')
    check_dir(args.la_crf_dir, '--la_crf_dir')
    check_dir(args.ha_crf_dir, '--ha_crf_dir')
    check_range(args, 1, 10 ** 6, 'batch_size', 'max_epoches')
    check_range(args, 0, 256, 'num_workers')
    check_range(args, 0, 100, 'lr', 'wt_dec')
    if args.weights:
        check_file(args.weights, '--weights')
    set_seed(args.seed)
    device = get_device(args.device)

    # ----- data -----
    net = import_network(args.network, 'radius').Net()
    dataset = VOC12AffDataset(
        args.train_list, label_la_dir=args.la_crf_dir, label_ha_dir=args.ha_crf_dir,
        cropsize=args.crop_size, voc12_root=args.voc12_root, radius=net.radius,
        # the crop comes before the normalisation: what lies outside the image is black, not the mean colour
        joint_transform_list=[None, None, imutils.RandomCrop(args.crop_size), imutils.RandomHorizontalFlip()],
        img_transform_list=[transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
                            np.asarray, imutils.normalize, imutils.HWC_to_CHW],
        label_transform_list=[None, None, None, imutils.AvgPool2d(STRIDE)])
    if len(dataset) < args.batch_size:
        raise BadInput(f'{args.train_list} (--train_list) has {len(dataset)} images, fewer than --batch_size')
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, num_workers=args.num_workers,
                        pin_memory=device.type == 'cuda', drop_last=True,
                        persistent_workers=args.num_workers > 0)
    max_step = len(dataset) // args.batch_size * args.max_epoches

    # ----- network and optimizer -----
    groups = net.get_parameter_groups()         # weights, biases, new weights, new biases
    optimizer = PolyOptimizer([
        {'params': groups[0], 'lr': args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[1], 'lr': 2 * args.lr, 'weight_decay': 0},
        {'params': groups[2], 'lr': 10 * args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[3], 'lr': 20 * args.lr, 'weight_decay': 0},
    ], lr=args.lr, weight_decay=args.wt_dec, max_step=max_step, momentum=args.momentum)
    if args.weights:
        load_weights(net, args.weights, new_heads=net.new_heads)
    net.to(device)
    log = Logger(args.session_name + '.log')
    log(' '.join(f'{key}={value}' for key, value in vars(args).items()))
    if not args.weights:
        log('no --weights: starts from random weights; expect weak affinities. Calibrating batch norm ...')
        calibrate_batch_norm(net, (img.to(device) for img, _ in itertools.islice(loader, 10)))
    model = parallel(net.train(), device)

    # ----- training -----
    meter, timer = AverageMeter(), Timer()
    try:
        for _ in range(args.max_epoches):
            for img, (bg_label, fg_label, neg_label) in tqdm(loader, desc='train', dynamic_ncols=True):
                aff = model(img.to(device))
                terms = affinity_loss(aff, bg_label.to(device), fg_label.to(device), neg_label.to(device))
                optimizer.zero_grad()
                terms['loss'].backward()
                optimizer.step()

                meter.add({key: value.detach() for key, value in terms.items()})
                if (optimizer.global_step - 1) % 50 == 0:
                    means = meter.pop()
                    log(progress_line(optimizer, timer, args.batch_size,
                                      [means[key] for key in ('loss', 'bg_loss', 'fg_loss', 'neg_loss')],
                                      [means[key] for key in ('bg_cnt', 'fg_cnt', 'neg_cnt')]))
    except (BadInput, KeyboardInterrupt):
        save_weights(net, args.session_name + '_stopped.pth')
        log(f'stopped at step {optimizer.global_step}; the weights so far: {args.session_name}_stopped.pth')
        raise
    save_weights(net, args.session_name + '.pth')
    log(f'wrote {args.session_name}.pth')


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
