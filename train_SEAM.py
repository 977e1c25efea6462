"""Step 1: trains ResNet38 with SEAM on image-level labels.

Reads images and labels. Writes the weights <session_name>.pth, the checkpoint _last.pth for --resume, .log and .jsonl.
"""
import argparse
import functools
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from network.classifier import check_mean_pooling, fit_classifier
from network.seam import class_scores, pseudo_label
from network.weights import choose_memory_format, load_weights
from tool import imutils, visualization
from tool.cli import BadInput, HelpFormatter, check_range, exit_on_bad_input, import_network
from tool.devices import autocast, describe_run, get_rank, mean_over_ranks, parallel, sum_over_ranks
from tool.metrics import ClassificationMeter
from tool.pyutils import AverageMeter, Timer
from tool.torchutils import (PolyOptimizer, SeededDataset, StepBatches, calibrate_batch_norm, collate, list_batches,
                             read_batches)
from tool.training import (MEMORY_HELP, Checkpoint, check_batch_size, check_training_args, digest_inputs, open_log,
                           outlive_sigterm, report_progress, save_weights, set_up, training_steps)
from tool.validation import HeldOut, Validation, check_validation_args, measure_cams
from tool.views import draw_view, second_view
from voc12.canonical import describe_list
from voc12.data import VOC12ClsDataset
from voc12.lists import GT_FOLDER, check_training_labels, load_class_names

PRINTED_LOSSES = 'loss', 'loss_cls', 'loss_er', 'loss_ecr'      # terms of the objective, in the order of the log

# ----- the objective -----

def max_norm(cam):
    """(N, K, H, W), any sign -> [0, 1): relu, then relu(x - min - 1e-5) / (max - min + 1e-5) for each map.
    Carries gradient, through the extremes too."""
    cam = F.relu(cam)
    maximum = cam.amax(dim=(2, 3), keepdim=True)
    minimum = cam.amin(dim=(2, 3), keepdim=True)
    return F.relu(cam - minimum - 1e-5) / (maximum - minimum + 1e-5)


def classification_loss(cam, label):
    """Multi-label soft margin loss of the foreground `class_scores`. cam: raw (N, 1+C, H, W); label: (N, C)."""
    return F.multilabel_soft_margin_loss(class_scores(cam[:, 1:]), label)


def adaptive_min_pooling_loss(cam, weight):
    """Takes the strongest class at each pixel of (N, C, H, W) and averages the weakest quarter of the pixels: every
    image has some background. weight: (N,), a weight for each image, 1 on average."""
    n, _, h, w = cam.shape
    k = h * w // 4
    strongest = cam.amax(dim=1).flatten(1)                                   # (N, HW)
    return (F.relu(strongest.topk(k, dim=1, largest=False).values) * weight[:, None]).sum() / (k * n)


def hard_example_mean(difference, topk_ratio, inside=None, weight=1):
    """Averages the largest share `topk_ratio` of the values of each image of (N, K, h, w), then over the images.
    inside: bool (N, 1, h, w), the pixels that count; None means all. weight: (N,), 1 on average."""
    if inside is None:
        values = difference.flatten(1)                                      # (N, Khw)
    else:
        values = [image[mask.expand_as(image)] for image, mask in zip(difference, inside)]
    if topk_ratio < 1:
        values = [image.topk(int(len(image) * topk_ratio)).values for image in values]
    return (torch.stack([image.mean() for image in values]) * weight).mean()


def count_positives(label):
    """Returns how many images show a class, float32 (); the others are negatives. label: (N, C) multi-hot."""
    return label.amax(dim=1).sum()


def seam_loss(cam1, cam_rv1, cam2, cam_rv2, label, view=second_view, inside=None, positives=None, topk_ratio=0.2,
              er_weight=1., ecr_weight=1., rvmin_weight=1.):
    """The SEAM objective (paper eq. 8-12; published implementation where they differ). Writes into no argument.

    cam1, cam_rv1: raw network outputs (N, 1+C, H, W) of the images. cam2, cam_rv2: of the second view of the images,
    (N, 1+C, h, w). label: (N, C) multi-hot. view: the function that made the second view, `second_view` with its
    arguments bound. inside: bool (N, 1, h, w), the pixels that count for ER and ECR; None means all.
    Images without a class (negatives) count only for the classification loss; the other terms are means over the rest.
    positives: if the images are one of n parts of a batch, pass `count_positives` of the whole batch / n. The mean of
    the parts' losses is then the loss of the batch, whichever parts the negatives are in.
    Returns a dict of scalars: loss_cls1, loss_cls2, loss_rvmin1, loss_rvmin2, loss_er, loss_ecr1, loss_ecr2,
    and loss_cls (both means of pairs summed), loss_ecr (sum), loss (weighted sum of loss_cls, loss_er, loss_ecr). The
    terms themselves are not weighted, so a term whose weight is 0 can still be read.
    """
    positives = count_positives(label) if positives is None else positives
    weight = label.amax(dim=1) * len(label) / positives.clamp(min=1e-5)     # (N,); all 1 without negatives
    label21 = F.pad(label, (1, 0), value=1.)[:, :, None, None]              # (N, 1+C, 1, 1), background present
    # the maps that ER and ECR compare, (N, 1+C, h, w): normalised, in the second view, absent classes set to 0
    norm1, norm_rv1 = view(max_norm(cam1)) * label21, view(max_norm(cam_rv1)) * label21
    norm2, norm_rv2 = max_norm(cam2) * label21, max_norm(cam_rv2) * label21
    terms = {
        'loss_cls1': classification_loss(cam1, label),
        'loss_cls2': classification_loss(cam2, label),
        'loss_rvmin1': adaptive_min_pooling_loss((cam_rv1 * label21)[:, 1:], weight),
        'loss_rvmin2': adaptive_min_pooling_loss((cam_rv2 * label21)[:, 1:], weight),
        # over all classes: absent ones count in the mean with 0
        'loss_er': hard_example_mean((norm1[:, 1:] - norm2[:, 1:]).abs(), 1, inside, weight),
        # crossed: each refined map learns from the other view
        'loss_ecr1': hard_example_mean((pseudo_label(norm2) - norm_rv1).abs(), topk_ratio, inside, weight),
        'loss_ecr2': hard_example_mean((pseudo_label(norm1) - norm_rv2).abs(), topk_ratio, inside, weight),
    }
    terms['loss_cls'] = (terms['loss_cls1'] + terms['loss_cls2']
                         + rvmin_weight * (terms['loss_rvmin1'] + terms['loss_rvmin2'])) / 2
    terms['loss_ecr'] = terms['loss_ecr1'] + terms['loss_ecr2']
    terms['loss'] = terms['loss_cls'] + er_weight * terms['loss_er'] + ecr_weight * terms['loss_ecr']
    return terms


def forward_losses(model, img, label, draw=draw_view, objective=seam_loss, amp='off', positives=None):
    """Runs the network on one or two views of images (N, 3, H, W). Returns (terms, cam (N, 1+C, H, W), cam_rv).
    draw, objective: `draw_view` and `seam_loss` with their settings bound. With draw=None there is one view and only
    the classification loss. positives: see `seam_loss`."""
    def forward(img):
        with autocast(img.device, amp):
            return [cam.float() for cam in model(img)]

    cam1, cam_rv1 = forward(img)
    if draw is None:
        return {'loss': classification_loss(cam1, label)}, cam1, cam_rv1
    view, inside = draw(img)
    cam2, cam_rv2 = forward(view(img))
    return objective(cam1, cam_rv1, cam2, cam_rv2, label, view, inside, positives), cam1, cam_rv1


def scores_and_maps(net, img):
    """Returns what the validation measures for an image (1, 3, H, W): class scores (1, C), and a list of CAMs
    (1, C, H, W) in [0, 1): the plain ones and, with PCM, the refined ones. Values above 0 are those of infer_SEAM.py
    at scale 1."""
    maps = [cam[:, 1:].float() for cam in net(img)][:1 + net.pcm]
    return class_scores(maps[0]), [max_norm(cam) for cam in maps]


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012',
        help='data root; contains JPEGImages/, and Annotations/ if --cls_labels does not exist')
    add('--train_list', default='voc12/train_aug.txt', help='list of the training images')
    add('--val_list', default='voc12/val.txt', help='list of the held-out images that --val_every validates on')
    add('--val_every', default=0, type=int,
        help='validate on the images of --val_list after every so many epochs, and at the end; 0: never')
    add('--cls_labels', default='voc12/cls_labels.npy',
        help='image-level labels, a dict of multi-hot vectors; if the file is missing, the XML files are read')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--resize_long', default=[448, 768], type=int, nargs=2, metavar=('MIN', 'MAX'),
        help='the long side of each training image is rescaled to a random length in this range, in pixels')
    add('--crop_size', default=448, type=int, help='side of the square training crop, in pixels')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_SEAM', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_SEAM')
    add('--weights',
        help="pretrained weights to start from, .params or .pth. Default: timm's weights for its networks, random for "
             "others")
    add('--reset_head', action='store_true',
        help='start with a new classifier layer, for --weights that were trained on other classes')
    add('--fit_classifier', action='store_true',
        help='before the first step, fit the classifier to the features of all training images; for pretrained '
             'networks that have no classifier yet, such as those of timm')
    # objective; the defaults are the paper's, table 1 takes the parts out one by one
    add('--classifier_only', action='store_true',
        help='train the classifier on one view without ER, ECR and PCM: the CAM baseline of table 1')
    add('--er_weight', default=1.0, type=float, help='weight of the equivariance loss (ER); 0 disables it (table 1)')
    add('--ecr_weight', default=1.0, type=float,
        help='weight of the cross regularisation (ECR); 0 disables it (table 1)')
    add('--rvmin_weight', default=1.0, type=float,
        help='weight of the min-pooling loss on the refined maps; 0 disables it')
    add('--topk_ratio', default=0.2, type=float,
        help='share of the largest differences that ECR averages (hard-example mining); 1 disables mining (table 1)')
    add('--pcm', default='on', choices=['on', 'off'], help='off replaces the refined map by the plain CAM (table 1)')
    add('--transform', default=['rescale'], nargs='+', choices=['rescale', 'flip', 'rotation', 'translation'],
        help='transforms that make the second view (the transform table of the paper)')
    add('--scale_factor', default=0.3, type=float, help='size of the second view as a factor, for --transform rescale')
    add('--max_rotation', default=20.0, type=float, help='largest rotation in degrees, for --transform rotation')
    add('--max_translation', default=15.0, type=float, help='largest shift in pixels, for --transform translation')
    add('--train_bn', action='store_true',
        help='also train batch norm and the early layers, which are otherwise frozen; for training from random weights')
    add('--dropout', default=1.0, type=float, help='factor on all dropout rates; 0 disables dropout')
    # optimisation
    add('--batch_size', default=8, type=int, help='number of images per step, over all GPUs')
    add('--accum', default=1, type=int,
        help='split each batch into this many parts and accumulate the gradient: less memory, same gradient except '
             'for dropout')
    add('--max_epoches', '--max_epochs', default=8, type=int, help='number of passes over the training list')
    add('--lr', default=0.01, type=float, help='initial learning rate of the backbone; new layers get 10 times as much')
    add('--wt_dec', default=5e-4, type=float, help='weight decay')
    add('--momentum', type=float, help='momentum of SGD. Default: the value of --wt_dec, as in the published runs')
    # the machine
    add('--seed', default=0, type=int, help='seed of all random numbers')
    add('--device', help='cuda (all visible GPUs), cuda:N (one GPU) or cpu. Default: cuda if it is available')
    add('--deterministic', action='store_true',
        help='use deterministic GPU kernels, so that the same seed gives the same bits; slower')
    add('--tf32', action='store_true',
        help='allow TF32 matrix products on recent GPUs: several times faster, changes results slightly')
    add('--amp', default='off', choices=['off', 'bf16', 'fp16'],
        help='run the network in half precision; losses stay in float32. Less memory, faster on a GPU')
    add('--checkpointing', action='store_true',
        help='recompute activations in the backward pass: less memory, about a fifth more computation')
    # outputs
    add('--session_name', default='resnet38_SEAM',
        help='prefix of the output files: .pth (weights), _last.pth (checkpoint), .log, .jsonl')
    add('--resume', nargs='?', const=True, metavar='PATH',
        help='continue a stopped training from the checkpoint PATH, by default <session_name>_last.pth')
    add('--save_every', default=1000, type=int,
        help='number of steps between checkpoints; one is also written after every epoch')
    add('--log_every', default=50, type=int,
        help='number of steps between two lines of the log; the last step is always logged')
    add('--keep_best', action='store_true',
        help='with --val_every: write <session_name>_best.pth too, by the mIoU where there are masks, else by the mAP')
    add('--tblog_dir', default='./tblog', help='folder of the TensorBoard logs; used if TensorBoard is installed')
    return parser


def check_args(args):
    check_training_args(args)
    check_validation_args(args)
    check_range(args, 1, 10 ** 6, 'max_epoches')
    check_range(args, 0, 100, 'er_weight', 'ecr_weight', 'rvmin_weight')
    check_range(args, 1, 10 ** 6, 'resize_long')
    check_range(args, 16, 10 ** 5, 'crop_size')
    check_range(args, 0, 1, 'dropout')
    check_range(args, 0.001, 1, 'topk_ratio')
    check_range(args, 0.05, 4, 'scale_factor')
    check_range(args, 0, 180, 'max_rotation')
    if 'translation' in args.transform:
        check_range(args, 0, args.crop_size / 2, 'max_translation')
    if args.resize_long[0] > args.resize_long[1]:
        raise BadInput(f'--resize_long {args.resize_long}: the smaller value comes first')
    if args.train_bn and (args.accum > 1 or args.checkpointing or get_rank()[1] > 1):
        raise BadInput('--train_bn needs whole batches: leave out --accum, --checkpointing and torchrun')
    if args.crop_size * args.scale_factor < 8:
        raise BadInput(f'--scale_factor {args.scale_factor} makes fewer than 8 pixels of --crop_size {args.crop_size}')
    if args.deterministic and {'rotation', 'translation'} & set(args.transform):
        raise BadInput(f'--deterministic is not possible with --transform {" ".join(args.transform)}: on a GPU the '
                       'gradient of rotated and moved maps is summed in a varying order')


def warn_of_poor_training(log, means, chance):
    """Warns, once each, when the classifier is poor or ER has collapsed. means: of the last steps. chance: the mAP of
    guessing in percent; it and the mAP are None if all images of these steps were negatives."""
    if chance is not None and means['mAP'] < chance + (100 - chance) / 4:
        log.warn_once('mAP', f'the mean average precision on the training crops is {means["mAP"]:.1f} (chance: '
                             f'{chance:.1f}), too low for useful CAMs. Train for more steps, start from '
                             'pretrained --weights, or fit the classifier first (--fit_classifier)')
    if means.get('loss_er', 1) < 5e-4 and means['loss_ecr'] > .1:
        log.warn_once('ER', f'ER has collapsed to {means["loss_er"]:.6f} while ECR stays at {means["loss_ecr"]:.3f}: '
                            'the CAMs are flat. Start from pretrained --weights, or train the classifier first '
                            '(--classifier_only)')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    rank, ranks = get_rank()
    device = set_up(args.seed, args.device, args.tf32, args.amp, args.deterministic, args.train_bn)

    # ----- data -----
    dataset = VOC12ClsDataset(args.train_list, voc12_root=args.voc12_root, cls_labels=args.cls_labels,
                              class_names=class_names, transform=transforms.Compose([
                                  imutils.RandomResizeLong(*args.resize_long),
                                  transforms.RandomHorizontalFlip(),
                                  transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
                                  np.asarray, imutils.normalize,
                                  imutils.RandomCrop(args.crop_size),
                                  imutils.HWC_to_CHW, torch.from_numpy]))
    check_batch_size(len(dataset), args.batch_size, args.train_list)
    max_step = len(dataset) // args.batch_size * args.max_epoches
    label_lines = check_training_labels(dataset.labels, class_names, args.train_list, args.cls_labels, args.class_names)
    validation = None
    if args.val_every:
        whole_images = VOC12ClsDataset(args.val_list, args.voc12_root, imutils.to_network_input, args.cls_labels,
                                       class_names)
        held_out = HeldOut(whole_images, os.path.join(args.voc12_root, GT_FOLDER), class_names, args.num_workers,
                           device, args.amp)
        held_out.check_truth(args.val_list, needed=False)
        validation = Validation(args.val_every, functools.partial(measure_cams, scores_and_maps), held_out,
                                args.keep_best)

    # ----- network and optimizer -----
    net = import_network(args.network, 'SEAM', args.backbone)(
        num_classes=len(class_names), pcm=args.pcm == 'on' and not args.classifier_only, train_bn=args.train_bn,
        checkpointing=args.checkpointing, dropout=args.dropout)
    if args.fit_classifier and not args.resume:
        check_mean_pooling(net)
    groups = net.get_parameter_groups()         # weights, biases, new weights, new biases
    optimizer = PolyOptimizer([
        {'params': groups[0], 'lr': args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[1], 'lr': 2 * args.lr, 'weight_decay': 0},
        {'params': groups[2], 'lr': 10 * args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[3], 'lr': 20 * args.lr, 'weight_decay': 0},
    ], lr=args.lr, weight_decay=args.wt_dec, max_step=max_step, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if args.weights and not args.resume:
        load_weights(net, args.weights, new_heads=net.new_heads, reset=net.classifier if args.reset_head else ())
    from_scratch = not (args.weights or args.resume or net.load_pretrained())
    net.to(device)
    inputs = digest_inputs(train_list=dataset.img_name_list, cls_labels=dataset.labels, class_names=class_names)
    checkpoint = Checkpoint(args.session_name, net, optimizer, scaler, vars(args), inputs, args.save_every)
    if args.resume:
        checkpoint.resume(args.resume)

    batches = StepBatches(len(dataset), args.batch_size, optimizer.global_step, max_step, args.seed)
    log = open_log(args.session_name, optimizer.global_step if args.resume else None, [
        *describe_run(vars(args), device), f'{args.train_list}: {describe_list(dataset.img_name_list, class_names)}',
        *label_lines], args.keep_best)
    make_loader = functools.partial(
        DataLoader, SeededDataset(dataset, args.seed), collate_fn=collate, num_workers=args.num_workers,
        pin_memory=device.type == 'cuda', worker_init_fn=outlive_sigterm)
    loader = make_loader(batch_sampler=batches)
    if from_scratch:
        log('no --weights: training starts from random weights, and its CAMs will be of little use. Pretrain a '
            'network with --classifier_only --train_bn --dropout 0. Calibrating batch norm ...')
        first = StepBatches(len(dataset), args.batch_size, 0, min(10, max_step), args.seed, share=False)
        calibrate_batch_norm(net, (img.to(device) for _, img, _ in read_batches(make_loader(batch_sampler=first))))
    if args.fit_classifier and not args.resume:
        log('fitting the classifier ...')
        whole_list = make_loader(batch_sampler=list_batches(len(dataset), args.batch_size))
        fit_classifier(net, ((img.to(device), label.to(device)) for _, img, label in read_batches(whole_list)))
    net.to(memory_format=choose_memory_format(net, device, args.amp, training=True))
    model = parallel(net.train(), device)

    # ----- training -----
    writer = visualization.open_writer(args.tblog_dir, args.session_name, batches.start, log) if rank == 0 else None
    meter, quality, timer = AverageMeter(), ClassificationMeter(), Timer(optimizer.global_step)
    draw = None if args.classifier_only else functools.partial(
        draw_view, transform=args.transform, scale_factor=args.scale_factor, max_rotation=args.max_rotation,
        max_translation=args.max_translation)
    objective = functools.partial(seam_loss, topk_ratio=args.topk_ratio, er_weight=args.er_weight,
                                  ecr_weight=args.ecr_weight, rvmin_weight=args.rvmin_weight)

    for step, names, img, label in training_steps(loader, meter, log, checkpoint, validation, writer):
        positives = sum_over_ranks(count_positives(label)) / (args.accum * ranks)
        optimizer.zero_grad()
        for img_part, label_part in zip(img.chunk(args.accum), label.chunk(args.accum)):
            terms, cam, cam_rv = forward_losses(model, img_part, label_part, draw, objective, args.amp, positives)
            scaler.scale(terms['loss'] / args.accum).backward()
            meter.add({name: term.detach() for name, term in terms.items()}, step, names)
            quality.add(class_scores(cam.detach()[:, 1:]), label_part)
        scaler.step(optimizer)
        scaler.update()
        if step % args.log_every == 0 or step == batches.max_step - 1:
            means = mean_over_ranks(meter.pop())
            means['mAP'], chance = quality.pop()
            report_progress(log, timer, batches, optimizer, step, means, PRINTED_LOSSES)
            if step + 1 >= max_step / 4:
                warn_of_poor_training(log, means, chance)
            if writer:
                visualization.write_cams(writer, step, terms, img_part[0], label_part[0], cam[0], cam_rv[0])

    save_weights(net, args.session_name + '.pth')
    if args.classifier_only:      # weights that all training scripts can start from, instead of ImageNet's
        save_weights(net, args.session_name + '_backbone.pth', leave_out=net.new_heads)
    log(f'wrote {args.session_name}.pth')


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
