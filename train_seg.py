"""Step 7: trains DeepLabv1 on label maps, the pseudo labels of step 5. See the README."""
import argparse
import functools

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from network.weights import load_weights
from tool import imutils
from tool.cli import BadInput, check_dir, check_range, exit_on_bad_input, import_network
from tool.devices import (autocast, check_replicas, describe_run, get_device, get_rank, mean_over_ranks, parallel,
                          sum_over_ranks, use_deterministic)
from tool.image_files import IGNORE
from tool.outputs import describe_folder
from tool.pyutils import AverageMeter, Logger, Timer
from tool.torchutils import PolyOptimizer, SeededDataset, StepBatches, collate, set_seed
from tool.training import (MEMORY_HELP, check_training_args, digest_inputs, outlive_sigterm, report_progress, resume,
                           save_checkpoint, save_weights, training_steps)
from voc12.canonical import describe_list
from voc12.data import VOC12SegDataset
from voc12.lists import load_class_names

# ----- the objective -----

def count_pixels(label):
    """How many pixels of label maps (N, H, W) count, a tensor."""
    return (label != IGNORE).sum()


def segmentation_loss(logits, label, count=None):
    """Cross entropy, the mean over all pixels of the batch that are not 255.

    logits: (N, 1+C, H, W); label: integers (N, H, W), 0 background, 1..C, 255 ignored. count: `count_pixels` of the
    whole batch, where this is a part of it: the losses of the parts then add up. Returns a dict with `loss`, a scalar,
    0 where no pixel counts.
    """
    count = count_pixels(label) if count is None else count
    total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction='sum')
    return {'loss': total / count.clamp(min=1)}


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/')
    parser.add_argument('--train_list', default='voc12/train_aug.txt', help='training images')
    parser.add_argument('--label_dir', required=True,
                        help='label maps NAME.png: the pseudo labels of infer_aff.py, or ground truth')
    parser.add_argument('--class_names', help="names of the foreground classes, one a line; VOC's without it")
    parser.add_argument('--hsv', default=[10, 10, 10], type=int, nargs=3, metavar=('H', 'S', 'V'),
                        help='most that the colour jitter adds to hue (of 180), saturation and value (of 255)')
    parser.add_argument('--scale_range', default=[0.5, 1.5], type=float, nargs=2, metavar=('MIN', 'MAX'),
                        help='range of the random factor of the image size')
    parser.add_argument('--crop_size', default=448, type=int, help='side of the training crop, in pixels')
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_deeplab', help='module with a class Net')
    parser.add_argument('--backbone', help='model of timm, for a --network of timm such as network.timm_deeplab')
    parser.add_argument('--weights', help='ImageNet .params or .pth to start from, or weights of another network; not '
                                          'given: the ImageNet weights that timm has for its models, else random')
    parser.add_argument('--freeze_bn', action='store_true',
                        help='batch norm uses its running statistics; as published, it trains')
    parser.add_argument('--bn_momentum', default=3e-4, type=float,
                        help='share by which a step moves the running statistics; a run much shorter than the '
                             'published one needs more, such as 0.05')
    parser.add_argument('--sync_bn', action='store_true', help='batch norm over the whole batch of all ranks')
    # optimisation
    parser.add_argument('--batch_size', default=10, type=int, help='images per step, over all GPUs')
    parser.add_argument('--accum', default=1, type=int,
                        help='parts that a batch goes through the network in, for less memory; batch norm then sees '
                             'the parts')
    parser.add_argument('--max_iters', default=20000, type=int, help='steps')
    parser.add_argument('--lr', default=0.001, type=float, help='of the backbone; the head gets 10 times as much')
    parser.add_argument('--wt_dec', default=5e-4, type=float, help='weight decay')
    parser.add_argument('--momentum', default=0.9, type=float, help='of SGD')
    # the machine
    parser.add_argument('--seed', default=0, type=int, help='of all random numbers')
    parser.add_argument('--device', help='cuda (all visible GPUs), cuda:N or cpu; not given: cuda where there is one')
    parser.add_argument('--deterministic', action='store_true', help='same bits from the same seed on a GPU; slower')
    parser.add_argument('--tf32', action='store_true', help='faster, less exact products on recent GPUs')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'],
                        help='half-precision network, float32 losses: less memory and time on a GPU')
    parser.add_argument('--checkpointing', action='store_true',
                        help='compute the blocks again in the backward pass: much less memory, a fifth more operations')
    # outputs
    parser.add_argument('--session_name', default='resnet38_deeplab',
                        help='writes <session_name>.pth, _last.pth, .log and .jsonl; folders are created')
    parser.add_argument('--resume', nargs='?', const=True, metavar='PATH',
                        help='go on from a checkpoint; without a path, from <session_name>_last.pth')
    parser.add_argument('--save_every', default=1000, type=int,
                        help='steps between checkpoints, which are also written after every epoch')
    parser.add_argument('--log_every', default=50, type=int, help='steps between the lines of the log')
    return parser


def check_args(args):
    check_training_args(args)
    check_dir(args.label_dir, '--label_dir')
    check_range(args, 16, 10 ** 5, 'crop_size')
    check_range(args, 1, 10 ** 8, 'max_iters')
    check_range(args, 0, 255, 'hsv')
    check_range(args, 0, 1, 'bn_momentum')
    check_range(args, 0.05, 20, 'scale_range')
    if args.scale_range[0] > args.scale_range[1]:
        raise BadInput(f'--scale_range {args.scale_range}: the smaller value comes first')
    if args.sync_bn and (args.freeze_bn or get_rank()[1] == 1):
        raise BadInput('--sync_bn is for ranks of torchrun with GPUs, and without --freeze_bn')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    set_seed(args.seed)
    rank, ranks = get_rank()
    device = get_device(args.device, args.tf32)
    check_replicas(device, args.amp)
    if args.sync_bn and device.type != 'cuda':
        raise BadInput('--sync_bn needs GPUs')
    if args.deterministic:
        use_deterministic()

    # ----- data -----
    dataset = VOC12SegDataset(
        args.train_list, args.voc12_root, args.label_dir, num_classes=len(class_names),
        transforms=[imutils.JitterHSV(*args.hsv), imutils.mirror_at_random, imutils.RandomScale(*args.scale_range),
                    imutils.normalize_image, imutils.RandomCropBoth(args.crop_size)])
    if len(dataset) < args.batch_size:
        raise BadInput(f'{args.train_list} (--train_list) has {len(dataset)} images, fewer than --batch_size')

    # ----- network and optimizer -----
    net = import_network(args.network, 'segments', args.backbone)(
        num_classes=len(class_names), freeze_bn=args.freeze_bn, bn_momentum=args.bn_momentum,
        checkpointing=args.checkpointing)
    if args.sync_bn and net.takes_backbone:
        raise BadInput(f'--sync_bn is not for {args.network}: the batch norms of timm have activations in them')
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
        raise BadInput('--freeze_bn needs --weights: random ones have no statistics to keep')
    net.to(device)
    last = args.session_name + '_last.pth'
    inputs = digest_inputs(train_list=dataset.img_name_list, class_names=class_names,
                           label_dir=describe_folder(args.label_dir, 'label_dir'))
    if args.resume:
        resume(last if args.resume is True else args.resume, net, optimizer, scaler, args, inputs)

    log = Logger(args.session_name, append=args.resume, quiet=rank > 0)
    for line in describe_run(args, device):
        log(line)
    log(f'{args.train_list}: {describe_list(dataset.img_name_list, class_names)}')
    if from_scratch:
        log('no --weights: starts from random weights')
    batches = StepBatches(len(dataset), args.batch_size, optimizer.global_step, args.max_iters, args.seed)
    loader = DataLoader(SeededDataset(dataset, args.seed), batch_sampler=batches, collate_fn=collate,
                        num_workers=args.num_workers, pin_memory=device.type == 'cuda', worker_init_fn=outlive_sigterm)
    if args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = parallel(net.train(), device)

    # ----- training -----
    meter, timer = AverageMeter(), Timer(optimizer.global_step)
    save = functools.partial(save_checkpoint, last, net, optimizer, scaler, args, inputs)

    for step, names, img, label in training_steps(loader, optimizer, meter, save, args, log):
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
        if step % args.log_every == 0:
            report_progress(log, timer, batches, optimizer, step, mean_over_ranks(meter.pop()))

    if rank == 0:
        save_weights(net, args.session_name + '.pth')
    log(f'wrote {args.session_name}.pth')


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
