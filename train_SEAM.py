"""Step 1: trains ResNet38 with SEAM on image-level labels. See the README."""
import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.resnet38_SEAM import suppress_weaker_classes
from network.resnet38d import load_weights
from tool import imutils, visualization
from tool.pyutils import (AverageMeter, BadInput, Logger, Timer, check_file, check_range, exit_on_bad_input,
                          import_network, progress_line)
from tool.torchutils import PolyOptimizer, calibrate_batch_norm, get_device, parallel, save_weights, set_seed
from voc12.data import VOC12ClsDataset
from voc12.lists import NUM_CLASSES


VIEW_SCALE = 0.3        # size of the second view


# ----- the objective -----

def max_norm(cam):
    """(N, K, H, W), any sign -> [0, 1): relu, then relu(x - min - 1e-5) / (max - min + 1e-5) for each map.
    Carries gradient, through the extremes too."""
    cam = F.relu(cam)
    maximum = cam.amax(dim=(2, 3), keepdim=True)
    minimum = cam.amin(dim=(2, 3), keepdim=True)
    return F.relu(cam - minimum - 1e-5) / (maximum - minimum + 1e-5)


def classification_loss(cam, label):
    """Multi-label soft margin of the mean foreground scores. cam: raw (N, 1+C, H, W); label: (N, C)."""
    return F.multilabel_soft_margin_loss(cam[:, 1:].mean(dim=(2, 3)), label)


def adaptive_min_pooling_loss(cam):
    """Mean over the weakest quarter of the pixels of their strongest class (N, C, H, W): an image has background."""
    n, _, h, w = cam.shape
    k = h * w // 4
    strongest = cam.amax(dim=1).flatten(1)                                   # (N, HW)
    return F.relu(strongest.topk(k, dim=1, largest=False).values).sum() / (k * n)


def normalize_views(cam1, cam_rv1, cam2, cam_rv2, label, scale_factor):
    """The four maps that ER and ECR compare, all (N, 1+C, h, w): normalised, the first view's brought to the
    second's size, absent classes 0. label: (N, 1+C, 1, 1) with a 1 for the background."""
    def shrink(cam):
        return F.interpolate(cam, scale_factor=scale_factor, mode='bilinear', align_corners=True)
    return (shrink(max_norm(cam1)) * label, shrink(max_norm(cam_rv1)) * label,
            max_norm(cam2) * label, max_norm(cam_rv2) * label)


def pseudo_label(cam):
    """What ECR pulls the other view to, without gradient: channel 0 := 1 - the largest foreground value, then
    each pixel keeps its strongest foreground classes at their magnitude ("one-hot" in the reference)."""
    cam = cam.detach()
    background = 1 - cam[:, 1:].amax(dim=1, keepdim=True)
    return suppress_weaker_classes(torch.cat([background, cam[:, 1:]], dim=1))


def hard_example_mean(difference, topk_ratio):
    """Mean of the largest share `topk_ratio` of the values of each image of (N, K, h, w)."""
    flat = difference.flatten(1)
    return flat.topk(int(flat.shape[1] * topk_ratio), dim=1).values.mean()


def seam_loss(cam1, cam_rv1, cam2, cam_rv2, label, scale_factor=VIEW_SCALE, topk_ratio=0.2):
    """The SEAM objective (paper eq. 8-12; published implementation where they differ). Writes into no argument.

    cam1, cam_rv1: raw network outputs (N, 1+C, H, W) of the images. cam2, cam_rv2: of the images scaled by
    scale_factor, (N, 1+C, floor(scale_factor H), floor(scale_factor W)). label: (N, C) multi-hot.
    Returns a dict of scalars: loss_cls1, loss_cls2, loss_rvmin1, loss_rvmin2, loss_er, loss_ecr1, loss_ecr2,
    and loss_cls (both means of pairs summed), loss_ecr (sum), loss (sum of loss_cls, loss_er, loss_ecr).
    """
    label21 = F.pad(label, (1, 0), value=1.)[:, :, None, None]              # (N, 1+C, 1, 1), background present
    norm1, norm_rv1, norm2, norm_rv2 = normalize_views(cam1, cam_rv1, cam2, cam_rv2, label21, scale_factor)
    terms = {
        'loss_cls1': classification_loss(cam1, label),
        'loss_cls2': classification_loss(cam2, label),
        'loss_rvmin1': adaptive_min_pooling_loss((cam_rv1 * label21)[:, 1:]),
        'loss_rvmin2': adaptive_min_pooling_loss((cam_rv2 * label21)[:, 1:]),
        # over all classes: absent ones count in the mean with 0
        'loss_er': (norm1[:, 1:] - norm2[:, 1:]).abs().mean(),
        # crossed: each refined map learns from the other view
        'loss_ecr1': hard_example_mean((pseudo_label(norm2) - norm_rv1).abs(), topk_ratio),
        'loss_ecr2': hard_example_mean((pseudo_label(norm1) - norm_rv2).abs(), topk_ratio),
    }
    terms['loss_cls'] = (terms['loss_cls1'] + terms['loss_cls2'] + terms['loss_rvmin1'] + terms['loss_rvmin2']) / 2
    terms['loss_ecr'] = terms['loss_ecr1'] + terms['loss_ecr2']
    terms['loss'] = terms['loss_cls'] + terms['loss_er'] + terms['loss_ecr']
    return terms


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/ and Annotations/')
    parser.add_argument('--train_list', default='voc12/train_aug.txt', help='training images')
    parser.add_argument('--val_list', default='voc12/val.txt', help='unused, as in the reference')
    parser.add_argument('--cls_labels', default='voc12/cls_labels.npy',
                        help='image-level labels; where the file is missing, the XML annotations are read')
    parser.add_argument('--resize_long', default=[448, 768], type=int, nargs=2, metavar=('MIN', 'MAX'),
                        help='range of the random long side, in pixels')
    parser.add_argument('--crop_size', default=448, type=int, help='side of the training crop, in pixels')
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_SEAM', help='module with a class Net')
    parser.add_argument('--weights', help='ImageNet .params or .pth to start from; random without it')
    # objective
    parser.add_argument('--classifier_only', action='store_true',
                        help='classification loss on one view, no SEAM: the CAM baseline of table 1')
    parser.add_argument('--train_bn', action='store_true',
                        help='train batch norm and the early layers too, to pretrain from random weights')
    parser.add_argument('--dropout', default=1.0, type=float,
                        help='factor on the dropout rates; 0 learns faster from random weights')
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
    parser.add_argument('--session_name', default='resnet38_SEAM',
                        help='writes <session_name>.pth and .log; folders are created')
    parser.add_argument('--tblog_dir', default='./tblog', help='TensorBoard folder; used when TensorBoard is installed')
    return parser


def main(args):
    check_range(args, 1, 10 ** 6, 'batch_size', 'max_epoches', 'resize_long')
    check_range(args, 0, 256, 'num_workers')
    check_range(args, 0, 100, 'lr', 'wt_dec')
    check_range(args, 16, 10 ** 5, 'crop_size')
    check_range(args, 0, 1, 'dropout')
    if args.resize_long[0] > args.resize_long[1]:
        raise BadInput(f'--resize_long {args.resize_long}: the smaller value comes first')
    if args.weights:
        check_file(args.weights, '--weights')
    set_seed(args.seed)
    device = get_device(args.device)

    # ----- data -----
    dataset = VOC12ClsDataset(args.train_list, voc12_root=args.voc12_root, cls_labels=args.cls_labels,
                              transform=transforms.Compose([
                                  imutils.RandomResizeLong(*args.resize_long),
                                  transforms.RandomHorizontalFlip(),
                                  transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
                                  np.asarray,
                                  imutils.normalize,
                                  imutils.RandomCrop(args.crop_size),
                                  imutils.HWC_to_CHW,
                                  torch.from_numpy]))
    if len(dataset) < args.batch_size:
        raise BadInput(f'{args.train_list} (--train_list) has {len(dataset)} images, fewer than --batch_size')
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, num_workers=args.num_workers,
                        pin_memory=device.type == 'cuda', drop_last=True,
                        persistent_workers=args.num_workers > 0)
    max_step = len(dataset) // args.batch_size * args.max_epoches

    # ----- network and optimizer -----
    net = import_network(args.network, 'PCM').Net(num_classes=NUM_CLASSES)
    net.train_bn = args.train_bn
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p *= args.dropout
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
        log('no --weights: starts from random weights; its CAMs will be of little use unless it is pretrained '
            '(--classifier_only --train_bn --dropout 0). Calibrating batch norm ...')
        calibrate_batch_norm(net, (img.to(device) for _, img, _ in itertools.islice(loader, 10)))
    model = parallel(net.train(), device)

    # ----- training -----
    writer = visualization.open_writer(args.tblog_dir, log)
    meter, timer = AverageMeter(), Timer()
    try:
        for _ in range(args.max_epoches):
            for _, img, label in tqdm(loader, desc='train', dynamic_ncols=True):
                img, label = img.to(device), label.to(device)
                cam1, cam_rv1 = model(img)
                if args.classifier_only:
                    terms = {'loss': classification_loss(cam1, label)}
                else:
                    img2 = F.interpolate(img, scale_factor=VIEW_SCALE, mode='bilinear', align_corners=True)
                    cam2, cam_rv2 = model(img2)
                    terms = seam_loss(cam1, cam_rv1, cam2, cam_rv2, label)
                optimizer.zero_grad()
                terms['loss'].backward()
                optimizer.step()

                meter.add({key: value.detach() for key, value in terms.items()})
                if (optimizer.global_step - 1) % 50 == 0:
                    means = meter.pop()
                    shown = [means[key] for key in ('loss', 'loss_cls', 'loss_er', 'loss_ecr') if key in means]
                    log(progress_line(optimizer, timer, args.batch_size, shown))
                    if writer:
                        visualization.write_cams(writer, optimizer.global_step, means, img[0], label[0],
                                                 cam1[0], cam_rv1[0])
    except (BadInput, KeyboardInterrupt):
        save_weights(net, args.session_name + '_stopped.pth')
        log(f'stopped at step {optimizer.global_step}; the weights so far: {args.session_name}_stopped.pth')
        raise
    save_weights(net, args.session_name + '.pth')
    log(f'wrote {args.session_name}.pth')
    if args.classifier_only:        # what both training scripts take as --weights, in place of ImageNet's
        save_weights(net, args.session_name + '_backbone.pth', leave_out=net.new_heads)


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
