"""Step 7: trains DeepLabv1 on label maps, the pseudo labels of step 5.

Reads images and label maps. Writes the weights <session_name>.pth, the checkpoint _last.pth for --resume, .log and
.jsonl.
"""
import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from network.weights import choose_memory_format, load_weights
from tool import imutils, visualization
from tool.cli import BadInput, HelpFormatter, check_dir, check_range, exit_on_bad_input, import_network
from tool.devices import autocast, describe_run, get_rank, mean_over_ranks, parallel, sum_over_ranks
from tool.image_files import IGNORE
from tool.outputs import describe_folder
from tool.pyutils import AverageMeter, Timer
from tool.torchutils import PolyOptimizer, SeededDataset, StepBatches, collate
from tool.training import (MEMORY_HELP, Checkpoint, check_batch_size, check_training_args, digest_inputs, open_log,
                           outlive_sigterm, report_progress, save_weights, set_up, training_steps)
from tool.validation import HeldOut, Validation, check_validation_args, measure_labels
from voc12.canonical import describe_list
from voc12.data import VOC12ImageDataset, VOC12SegDataset
from voc12.lists import GT_FOLDER, load_class_names
from voc12.masks import find_labels

# ----- the objective -----

def count_pixels(label):
    """Returns how many pixels of label maps (N, H, W) are not ignored, a tensor."""
    return (label != IGNORE).sum()


def segmentation_loss(logits, label, count=None):
    """Cross entropy, averaged over all pixels of the batch that are not 255.

    logits: (N, 1+C, H, W); label: integers (N, H, W), 0 background, 1..C, 255 ignored. count: if this is a part of a
    batch, pass `count_pixels` of the whole batch; the losses of the parts then add up. Returns a dict with the scalar
    `loss`, which is 0 if all pixels are ignored.
    """
    count = count_pixels(label) if count is None else count
    total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction='sum')
    return {'loss': total / count.clamp(min=1)}


def normalize_whole_image(img):
    """Normalises a PIL image for the validation, as infer_seg.py does. Returns float32 (3, H, W)."""
    return imutils.HWC_to_CHW(imutils.normalize_float32(img))


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012', help='data root; contains JPEGImages/')
    add('--train_list', default='voc12/train_aug.txt', help='list of the training images')
    add('--val_list', default='voc12/val.txt', help='list of the held-out images that --val_every validates on')
    add('--val_every', default=0, type=int,
        help='validate on the images of --val_list after every so many epochs, and at the end; 0: never')
    add('--label_dir', required=True,
        help='folder of label maps NAME.png: pseudo labels of infer_aff.py, or ground truth')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--hsv', default=[10, 10, 10], type=int, nargs=3, metavar=('H', 'S', 'V'),
        help='largest random change of hue (in 0..179), saturation and value (in 0..255)')
    add('--scale_range', default=[0.5, 1.5], type=float, nargs=2, metavar=('MIN', 'MAX'),
        help='each training image is rescaled by a random factor in this range')
    add('--crop_size', default=448, type=int, help='side of the square training crop, in pixels')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_deeplab', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_deeplab')
    add('--weights',
        help="pretrained weights to start from, .params or .pth. Default: timm's weights for its networks, random for "
             "others")
    add('--freeze_bn', action='store_true',
        help='use the running statistics in batch norm; by default, as published, batch norm normalises by the batch')
    add('--bn_momentum', default=3e-4, type=float,
        help='share by which a step moves the running statistics of batch norm; short runs need about 0.05')
    add('--sync_bn', action='store_true', help='normalise over the batch of all ranks; needs torchrun and GPUs')
    # optimisation
    add('--batch_size', default=10, type=int, help='number of images per step, over all GPUs')
    add('--accum', default=1, type=int,
        help='split each batch into this many parts and accumulate the gradient: less memory, but batch norm '
             'normalises each part by itself')
    add('--max_iters', default=20000, type=int, help='number of training steps')
    add('--lr', default=0.001, type=float,
        help='initial learning rate of the backbone; new layers get 10 times as much')
    add('--wt_dec', default=5e-4, type=float, help='weight decay')
    add('--momentum', default=0.9, type=float, help='momentum of SGD')
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
    add('--session_name', default='resnet38_deeplab',
        help='prefix of the output files: .pth (weights), _last.pth (checkpoint), .log, .jsonl')
    add('--resume', nargs='?', const=True, metavar='PATH',
        help='continue a stopped training from the checkpoint PATH, by default <session_name>_last.pth')
    add('--save_every', default=1000, type=int,
        help='number of steps between checkpoints; one is also written after every epoch')
    add('--log_every', default=50, type=int,
        help='number of steps between two lines of the log; the last step is always logged')
    add('--keep_best', action='store_true',
        help='with --val_every: write <session_name>_best.pth too, the weights with the best mIoU')
    add('--tblog_dir', default='./tblog',
        help='TensorBoard folder of the validation; used when TensorBoard is installed')
    return parser


def check_args(args):
    check_training_args(args)
    check_validation_args(args)
    check_dir(args.label_dir, '--label_dir')
    check_range(args, 16, 10 ** 5, 'crop_size')
    check_range(args, 1, 10 ** 8, 'max_iters')
    check_range(args, 0, 255, 'hsv')
    check_range(args, 0, 1, 'bn_momentum')
    check_range(args, 0.05, 20, 'scale_range')
    if args.scale_range[0] > args.scale_range[1]:
        raise BadInput(f'--scale_range {args.scale_range}: the smaller value comes first')
    if args.sync_bn and (args.freeze_bn or get_rank()[1] == 1):
        raise BadInput('--sync_bn needs torchrun with several GPUs, and no --freeze_bn')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    rank, ranks = get_rank()
    device = set_up(args.seed, args.device, args.tf32, args.amp, args.deterministic)
    if args.sync_bn and device.type != 'cuda':
        raise BadInput('--sync_bn needs GPUs')

    # ----- data -----
    dataset = VOC12SegDataset(
        args.train_list, args.voc12_root, args.label_dir, num_classes=len(class_names),
        transforms=[imutils.JitterHSV(*args.hsv), imutils.mirror_at_random, imutils.RandomScale(*args.scale_range),
                    imutils.normalize_image, imutils.RandomCropBoth(args.crop_size)])
    check_batch_size(len(dataset), args.batch_size, args.train_list)
    validation = None
    if args.val_every:
        held_out = HeldOut(VOC12ImageDataset(args.val_list, args.voc12_root, normalize_whole_image),
                           os.path.join(args.voc12_root, GT_FOLDER), class_names, args.num_workers, device, args.amp)
        held_out.check_truth(args.val_list, needed=True)
        validation = Validation(args.val_every, measure_labels, held_out, args.keep_best)

    # ----- network and optimizer -----
    net = import_network(args.network, 'segmentation', args.backbone)(
        num_classes=len(class_names), freeze_bn=args.freeze_bn, bn_momentum=args.bn_momentum,
        checkpointing=args.checkpointing)
    if args.sync_bn and net.takes_backbone:
        raise BadInput(f'--sync_bn is not possible with {args.network} (--network): the batch norms of timm contain '
                       'activations')
    groups = net.get_parameter_groups()         # weights, biases, new weights, new biases
    optimizer = PolyOptimizer([
        {'params': groups[0], 'lr': args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[1], 'lr': 2 * args.lr, 'weight_decay': 0},
        {'params': groups[2], 'lr': 10 * args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[3], 'lr': 20 * args.lr, 'weight_decay': 0},
    ], lr=args.lr, weight_decay=args.wt_dec, max_step=args.max_iters, lr_steps=args.max_iters + 1,
        momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if args.weights and not args.resume:
        load_weights(net, args.weights, new_heads=net.new_heads)
    from_scratch = not (args.weights or args.resume or net.load_pretrained())
    if from_scratch and args.freeze_bn:
        raise BadInput('--freeze_bn needs --weights, because random weights have no statistics to keep')
    net.to(device)
    inputs = digest_inputs(train_list=dataset.img_name_list, class_names=class_names,
                           label_dir=describe_folder(args.label_dir, 'label_dir'))
    checkpoint = Checkpoint(args.session_name, net, optimizer, scaler, vars(args), inputs, args.save_every)
    if args.resume:
        checkpoint.resume(args.resume)

    batches = StepBatches(len(dataset), args.batch_size, optimizer.global_step, args.max_iters, args.seed)
    log = open_log(args.session_name, optimizer.global_step if args.resume else None, [
        *describe_run(vars(args), device),
        f'{args.train_list}: {describe_list(dataset.img_name_list, class_names)}'], args.keep_best)
    if from_scratch:
        log('no --weights: starts from random weights')
    labels = find_labels(dataset.read_label(name) for name in dataset.img_name_list)
    if len(labels) < 2:
        log(f'warning: the label maps in {args.label_dir} (--label_dir) contain only '
            f'{" and ".join(map(str, [*labels, IGNORE]))}, so there is nothing to learn: 0 is the background, '
            f'{IGNORE} is ignored, and 1 to {len(class_names)} are the classes of --class_names')
    loader = DataLoader(SeededDataset(dataset, args.seed), batch_sampler=batches, collate_fn=collate,
                        num_workers=args.num_workers, pin_memory=device.type == 'cuda', worker_init_fn=outlive_sigterm)
    if args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(memory_format=choose_memory_format(net, device, args.amp, training=True))
    model = parallel(net.train(), device)

    # ----- training -----
    writer = None
    if validation and rank == 0:
        writer = visualization.open_writer(args.tblog_dir, args.session_name, batches.start, log)
    meter, timer = AverageMeter(), Timer(optimizer.global_step)

    for step, names, img, label in training_steps(loader, meter, log, checkpoint, validation, writer):
        count = sum_over_ranks(count_pixels(label)) / (args.accum * ranks)
        optimizer.zero_grad()
        for img_part, label_part in zip(img.chunk(args.accum), label.chunk(args.accum)):
            with autocast(device, args.amp):
                logits = model(img_part)
            terms = segmentation_loss(logits.float(), label_part, count)
            scaler.scale(terms['loss'] / args.accum).backward()
            meter.add({'loss': terms['loss'].detach()}, step, names)
        scaler.step(optimizer)
        scaler.update()
        if step % args.log_every == 0 or step == batches.max_step - 1:
            report_progress(log, timer, batches, optimizer, step, mean_over_ranks(meter.pop()), ['loss'])

    save_weights(net, args.session_name + '.pth')
    log(f'wrote {args.session_name}.pth')


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
