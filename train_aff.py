"""Step 4: trains AffinityNet on the CRF labels of a low and a high background alpha.

Reads images and the two CRF folders of step 2. Writes the weights <session_name>.pth, the checkpoint _last.pth for
--resume, .log and .jsonl.
"""
import argparse
import functools

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import ColorJitter

from network.weights import choose_memory_format, load_weights
from tool import imutils
from tool.affinity_pairs import STRIDE
from tool.cli import BadInput, HelpFormatter, check_dir, check_range, exit_on_bad_input, import_network
from tool.devices import autocast, describe_run, get_rank, mean_over_ranks, parallel, sum_over_ranks
from tool.outputs import describe_folder, read_settings
from tool.pyutils import AverageMeter, Timer
from tool.torchutils import PolyOptimizer, SeededDataset, StepBatches, calibrate_batch_norm, collate, read_batches
from tool.training import (MEMORY_HELP, Checkpoint, check_batch_size, check_training_args, digest_inputs, open_log,
                           outlive_sigterm, report_progress, save_weights, set_up, training_steps)
from voc12.canonical import describe_list
from voc12.data import VOC12AffDataset
from voc12.lists import load_class_names
from voc12.masks import find_labels

PRINTED_LOSSES = 'loss', 'bg_loss', 'fg_loss', 'neg_loss'       # terms of the objective, in the order of the log
COUNTS = 'bg_cnt', 'fg_cnt', 'neg_cnt'                          # of the pairs, as in `pair_counts`

# ----- the objective -----

def pair_counts(labels):
    """Returns how many pairs are background, foreground and different, float32 (3,). labels: three (N, offsets, from).
    """
    return torch.stack([label.sum() for label in labels])


def affinity_loss(aff, bg_label, fg_label, neg_label, counts=None):
    """AffinityNet's loss (Ahn and Kwak 2018, eq. 5-7). All (N, offsets, from): aff in (0, 1], labels 0 or 1.

    Returns a dict of scalars: bg_loss, fg_loss, neg_loss, each a mean over the pairs of its kind in the batch (0 if
    there are none), and loss = bg_loss/4 + fg_loss/4 + neg_loss/2.
    counts: if these are one of n parts of a batch, pass `pair_counts` of the whole batch / n. The mean of the parts'
    losses is then the loss of the batch, whichever parts the pairs are in.
    """
    labels = bg_label, fg_label, neg_label
    counts = pair_counts(labels) if counts is None else counts
    alike = -torch.log(aff + 1e-5)
    different = -torch.log(1 + 1e-5 - aff)
    terms = {}
    for kind, cost, label, count in zip(('bg', 'fg', 'neg'), (alike, alike, different), labels, counts):
        terms[kind + '_loss'] = (cost * label).sum() / (count + 1e-5)
    terms['loss'] = terms['bg_loss'] / 4 + terms['fg_loss'] / 4 + terms['neg_loss'] / 2
    return terms


# ----- the script -----

def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    # data
    add('--voc12_root', default='VOC2012', help='data root; contains JPEGImages/')
    add('--train_list', default='voc12/train_aug.txt', help='list of the training images')
    add('--val_list', default='voc12/val.txt', help='ignored; accepted because the original has this flag')
    add('--la_crf_dir', required=True,
        help='folder of CRF scores at the low alpha, <out_crf>_4.0: what it labels as an object is learned as one')
    add('--ha_crf_dir', required=True,
        help='folder of CRF scores at the high alpha, <out_crf>_24.0: its background is learned as background')
    add('--class_names',
        help='text file with the names of the foreground classes, one per line. Default: the 20 classes of VOC')
    add('--crop_size', default=448, type=int, help='side of the square training crop, in pixels')
    add('--num_workers', default=8, type=int, help='number of loader processes; 0 loads images in the main process')
    # network
    add('--network', default='network.resnet38_aff', help='Python module that contains the network, a class Net')
    add('--backbone', help='name of a timm model; needs a --network of timm such as network.timm_aff')
    add('--weights',
        help="pretrained weights to start from, .params or .pth. Default: timm's weights for its networks, random for "
             "others")
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
    add('--session_name', default='resnet38_aff',
        help='prefix of the output files: .pth (weights), _last.pth (checkpoint), .log, .jsonl')
    add('--resume', nargs='?', const=True, metavar='PATH',
        help='continue a stopped training from the checkpoint PATH, by default <session_name>_last.pth')
    add('--save_every', default=1000, type=int,
        help='number of steps between checkpoints; one is also written after every epoch')
    add('--log_every', default=50, type=int,
        help='number of steps between two lines of the log; the last step is always logged')
    return parser


def check_args(args):
    check_training_args(args)
    check_range(args, 1, 10 ** 6, 'max_epoches')
    if args.crop_size % STRIDE or args.crop_size < 5 * STRIDE:      # on 4 x 4 cells no two form a pair
        raise BadInput(f'--crop_size {args.crop_size} must be a multiple of {STRIDE}, and {5 * STRIDE} or more')
    check_dir(args.la_crf_dir, '--la_crf_dir')
    check_dir(args.ha_crf_dir, '--ha_crf_dir')
    low, high = ((read_settings(folder) or {}).get('alpha') for folder in (args.la_crf_dir, args.ha_crf_dir))
    if low and high and low > high:         # of folders of other programs nothing is known
        raise BadInput(f'{args.la_crf_dir} (--la_crf_dir) has the exponent {low}, {args.ha_crf_dir} (--ha_crf_dir) '
                       f'only {high}: exchange them')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    _, ranks = get_rank()
    device = set_up(args.seed, args.device, args.tf32, args.amp, args.deterministic)

    # ----- data -----
    net = import_network(args.network, 'affinity', args.backbone)(checkpointing=args.checkpointing)
    dataset = VOC12AffDataset(
        args.train_list, label_la_dir=args.la_crf_dir, label_ha_dir=args.ha_crf_dir,
        cropsize=args.crop_size, voc12_root=args.voc12_root, radius=net.radius, num_classes=len(class_names),
        # the crop comes before the normalisation, so pixels outside the image are black, not of the mean colour
        transforms=[imutils.OnImage(ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)),
                    imutils.OnBoth(imutils.RandomCrop(args.crop_size)), imutils.OnImage(imutils.normalize),
                    imutils.OnBoth(imutils.RandomHorizontalFlip()), imutils.OnLabel(imutils.AvgPool2d(STRIDE))])
    check_batch_size(len(dataset), args.batch_size, args.train_list)
    max_step = len(dataset) // args.batch_size * args.max_epoches

    # ----- network and optimizer -----
    groups = net.get_parameter_groups()         # weights, biases, new weights, new biases
    optimizer = PolyOptimizer([
        {'params': groups[0], 'lr': args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[1], 'lr': 2 * args.lr, 'weight_decay': 0},
        {'params': groups[2], 'lr': 10 * args.lr, 'weight_decay': args.wt_dec},
        {'params': groups[3], 'lr': 20 * args.lr, 'weight_decay': 0},
    ], lr=args.lr, weight_decay=args.wt_dec, max_step=max_step, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if args.weights and not args.resume:
        load_weights(net, args.weights, new_heads=net.new_heads)
    from_scratch = not (args.weights or args.resume or net.load_pretrained())
    net.to(device)
    inputs = digest_inputs(train_list=dataset.img_name_list, class_names=class_names,
                           la_crf_dir=describe_folder(args.la_crf_dir, 'la_crf_dir'),
                           ha_crf_dir=describe_folder(args.ha_crf_dir, 'ha_crf_dir'))
    checkpoint = Checkpoint(args.session_name, net, optimizer, scaler, vars(args), inputs, args.save_every)
    if args.resume:
        checkpoint.resume(args.resume)

    batches = StepBatches(len(dataset), args.batch_size, optimizer.global_step, max_step, args.seed)
    log = open_log(args.session_name, optimizer.global_step if args.resume else None, [
        *describe_run(vars(args), device), f'{args.train_list}: {describe_list(dataset.img_name_list, class_names)}'])
    if len(find_labels(dataset.sample_labels())) < 2:
        log('warning: a sample of the images has fewer than two labels, so there is nothing to learn. '
            f'{args.la_crf_dir} (--la_crf_dir) decides what is object, {args.ha_crf_dir} (--ha_crf_dir) what is '
            'background: choose other exponents (--crf_alpha of infer_SEAM.py)')
    make_loader = functools.partial(
        DataLoader, SeededDataset(dataset, args.seed), collate_fn=collate, num_workers=args.num_workers,
        pin_memory=device.type == 'cuda', worker_init_fn=outlive_sigterm)
    loader = make_loader(batch_sampler=batches)
    if from_scratch:
        log('no --weights: training starts from random weights; expect weak affinities. Calibrating batch norm ...')
        first = StepBatches(len(dataset), args.batch_size, 0, min(10, max_step), args.seed, share=False)
        calibrate_batch_norm(net, (img.to(device) for _, img, _ in read_batches(make_loader(batch_sampler=first))))
    net.to(memory_format=choose_memory_format(net, device, args.amp, training=True))
    model = parallel(net.train(), device)

    # ----- training -----
    meter, timer = AverageMeter(), Timer(optimizer.global_step)

    for step, names, img, labels in training_steps(loader, meter, log, checkpoint):
        counts = sum_over_ranks(pair_counts(labels))
        optimizer.zero_grad()
        parts = [tensor.chunk(args.accum) for tensor in (img, *labels)]
        for img_part, *label_parts in zip(*parts):
            with autocast(device, args.amp):
                aff = model(img_part)
            terms = affinity_loss(aff.float(), *label_parts, counts / (args.accum * ranks))
            scaler.scale(terms['loss'] / args.accum).backward()
            meter.add({name: term.detach() for name, term in terms.items()}, step, names)
        scaler.step(optimizer)
        scaler.update()
        meter.add(dict(zip(COUNTS, counts)), step, names)
        if step % args.log_every == 0 or step == batches.max_step - 1:
            report_progress(log, timer, batches, optimizer, step, mean_over_ranks(meter.pop()), PRINTED_LOSSES, COUNTS)

    save_weights(net, args.session_name + '.pth')
    log(f'wrote {args.session_name}.pth')


if __name__ == '__main__':
    with exit_on_bad_input(MEMORY_HELP):
        main(get_args_parser().parse_args())
