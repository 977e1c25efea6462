"""Times every stage against the reference's way of computing it, in one process, in turns, on the same made-up input.

Prints a markdown table with a row for each of our ways. Seconds are medians after a warm-up, for one image. Memory is
the peak of a call beyond what was held before it (inputs, weights): of the GPU where the call used one, else of the
process (Linux only). The difference is the largest between both results, as a share of the largest value. The
reference's ways (`reference_*`) are written here, from what it does. Networks have random weights, sizes are height x
width.

`voc`, by itself, runs the scripts in place of that, steps 1 to 9 of the README, and says how many hours VOC takes.
"""
import argparse
import ctypes
import functools
import gc
import os
import platform
import re
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import evaluation
import infer_aff
import infer_SEAM
import pipeline
import train_SEAM
from network import resnet38_SEAM, slim_SEAM
from network.affinity import AffinityHead, to_dense_matrix
from network.seam import NUM_CLASSES, normalize_cam_for_pcm
from tool import crf, image_files, imutils, score_files
from tool.affinity_pairs import STRIDE, pair_indices
from tool.cli import BadInput, HelpFormatter, exit_on_bad_input
from tool.densecrf import DenseCRF, unary_energy
from tool.devices import get_device
from tool.metrics import mean_measures
from tool.text_files import write_csv
from tool.torchutils import PolyOptimizer, calibrate_batch_norm, set_seed
from tool.workers import BoundedPool, available_cores
from voc12.data import VOC12AffDataset, fuse_crf_labels

CLASSES = [8, 14]               # of every image
RADIUS, CROP, ALPHAS = AffinityHead.radius, 448, (4, 24)
HAS_PEAK = os.access('/proc/self/clear_refs', os.W_OK) and platform.libc_ver()[0] == 'glibc'


# ----- measuring -----

def host_mib(field):
    """VmRSS of this process in MiB, or VmHWM, its highest since the last reset; nan where the system does not tell. The
    kernel counts, for a thread of Python would miss the peaks of code that holds the GIL."""
    if not HAS_PEAK:
        return np.nan
    with open('/proc/self/status', encoding='ascii') as file:
        return int(re.search(rf'{field}:\s+(\d+)', file.read())[1]) / 1024


def measure(work, on_gpu):
    """(what work() returns, as a float64 array; seconds; peak memory beyond what was held before, in MiB)."""
    gc.collect()
    if HAS_PEAK:
        ctypes.CDLL(None).malloc_trim(0)            # what is free but kept would hide what the call takes
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')                         # resets VmHWM
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held, held_gpu = host_mib('VmRSS'), torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    taken, taken_gpu = host_mib('VmHWM') - held, torch.cuda.max_memory_allocated() - held_gpu
    return torch.as_tensor(result).cpu().double().numpy(), seconds, taken_gpu / 2 ** 20 if taken_gpu > 0 else taken


def compare(stage, size, reference, ours, args, images=1, factor=1, slow=False, apart=False):
    """Runs the reference's way (a function, or None) and ours (dict label -> function) in turns, and prints a row for
    each of ours. A call is of so many `images`; factor: of the reference's time, where it does a part of the work.
    slow: no warm-up, and one turn unless --repeat says otherwise. apart: other processes do the work, whose memory and
    results are not seen."""
    ways = {'reference': reference, **ours} if reference else ours
    repeat = args.repeat or (1 if slow else 5)
    runs, results = {label: [] for label in ways}, {}
    for _ in range(repeat + (not slow)):
        for label, work in ways.items():
            results[label], *numbers = measure(work, args.on_gpu)
            runs[label].append(numbers)
    seconds = {label: statistics.median(run[0] for run in runs[label][-repeat:]) / images for label in ways}
    peak = {label: '-' if apart else f'{max(run[1] for run in runs[label][-repeat:]):.0f}' for label in ways}
    for label in ours:
        row = [f'{stage}: {label}', size, f'{seconds[label]:.3g}', '-', '-', peak[label], '-', '-']
        if reference:
            theirs, expected = seconds['reference'] * factor, results['reference']
            row[3:5], row[6] = (f'{theirs:.3g}', f'{theirs / seconds[label]:.3g}'), peak['reference']
            if not apart:
                row[7] = f'{np.abs(results[label] - expected).max() / np.abs(expected).max():.1g}'
        print('| ' + ' | '.join(row) + ' |', flush=True)


# ----- made-up data -----

def smooth_maps(h, w, count=len(CLASSES), seed=0):
    """float32 (count, h, w) in 0..1: random values at a few places, smooth between them."""
    grids = (Image.fromarray(grid) for grid in np.random.default_rng(seed).random((count, 6, 8), np.float32))
    return np.stack([np.asarray(grid.resize((w, h), Image.Resampling.BICUBIC)) for grid in grids]).clip(0, 1)


def with_background(maps, alpha):
    """float32 (1 + classes, h, w): the scores of the walk and of the CRF."""
    return np.concatenate([(1 - maps.max(axis=0, keepdims=True)) ** alpha, maps])


def picture(h, w, seed=0):
    """uint8 (h, w, 3): smooth colours, and some noise as in a photograph."""
    noise = np.random.default_rng(seed).normal(0, 8, (h, w, 3))
    return np.clip(smooth_maps(h, w, 3, seed).transpose(1, 2, 0) * 255 + noise, 0, 255).astype(np.uint8)


def normalized(h, w, seed=0):
    return torch.from_numpy(np.ascontiguousarray(imutils.HWC_to_CHW(imutils.normalize(picture(h, w, seed)))))


def write_files(root, count, h, w):
    """Images, ground truth, CAM and CRF dicts under `root`, in the folders JPEGImages, gt, cam, 4, 24, and list.txt.
    Returns the names."""
    names = [f'2007_{number:06}' for number in range(count)]
    for folder in ('JPEGImages', 'gt', 'cam', *map(str, ALPHAS)):
        os.mkdir(f'{root}/{folder}')
    for number, name in enumerate(names):
        Image.fromarray(picture(h, w, number)).save(f'{root}/JPEGImages/{name}.jpg')
        maps, truth = (smooth_maps(h, w, seed=(number, kind)) for kind in range(2))
        truth = infer_SEAM.label_map(dict(zip(CLASSES, truth)), 0.5, (h, w))
        truth[:, :9] = image_files.IGNORE
        image_files.save_label_map(f'{root}/gt/{name}.png', truth)
        score_files.save_scores(f'{root}/cam/{name}.npy', dict(zip(CLASSES, maps)))
        for alpha in ALPHAS:
            scores = with_background(maps, alpha)
            score_files.save_scores(f'{root}/{alpha}/{name}.npy', dict(zip([0, 9, 15], scores / scores.sum(axis=0))))
    with open(f'{root}/list.txt', 'w', encoding='utf-8') as file:
        file.write('\n'.join(names))
    return names


def seam_net(args, memory_format=torch.contiguous_format, checkpointing=False):
    """SEAM with random weights, always the same, that a signal gets through."""
    set_seed(0)
    net = (resnet38_SEAM if args.width == 64 else slim_SEAM).Net(checkpointing=checkpointing)
    calibrate_batch_norm(net, [torch.stack([normalized(96, 96), normalized(96, 96, 1)])])
    return net.eval().to(args.device, memory_format=memory_format)


# ----- stages -----

def reference_walk(scores, aff, beta, logt):
    """All classes, with the dense matrix, squared logt times."""
    _, h, w = scores.shape
    matrix = to_dense_matrix(aff, h, w, RADIUS) ** beta
    matrix = matrix / matrix.sum(dim=0, keepdim=True)
    for _ in range(logt):
        matrix = matrix @ matrix
    everything = F.pad(scores.flatten(1), (0, 0, 0, 1 + NUM_CLASSES - len(scores)))
    return (everything @ matrix).view(-1, h, w)[:len(scores)]


@torch.inference_mode()
def bench_walk(args):
    for height, width, dense in (*(args.size or (375, 500)), True), (1024, 2048, False):
        h, w = -(-height // STRIDE), -(-width // STRIDE)
        scores = torch.from_numpy(with_background(smooth_maps(h, w), 6)).to(args.device)
        aff = torch.empty(1, *pair_indices(h, w, RADIUS)[1].shape, device=args.device).exponential_().neg_().exp_()
        compare('walk', f'{height}x{width}', (lambda: reference_walk(scores, aff, 8, 6)) if dense else None,
                {'sparse': lambda: infer_aff.random_walk(scores, aff, RADIUS, 8, 6)}, args)


def reference_curve(names, root, thresholds):
    """mIoU at each threshold, in percent: every file is read for each, and every class counted by itself."""
    means = []
    for threshold in thresholds:
        true_positive, truth, prediction = np.zeros((3, 1 + NUM_CLASSES), np.int64)
        for name in names:
            gt = np.array(Image.open(f'{root}/gt/{name}.png'))
            stack = np.zeros((1 + NUM_CLASSES, *gt.shape), np.float32)
            stack[0] = threshold
            for key, value in np.load(f'{root}/cam/{name}.npy', allow_pickle=True).item().items():
                stack[key + 1] = value
            pred, counted = stack.argmax(axis=0), gt < image_files.IGNORE
            for label in range(1 + NUM_CLASSES):
                true_positive[label] += ((gt == label) * (pred == gt) * counted).sum()
                truth[label] += ((gt == label) * counted).sum()
                prediction[label] += ((pred == label) * counted).sum()
        means.append(np.mean(true_positive / (truth + prediction - true_positive + 1e-10)) * 100)
    return means


def bench_curve(args, files=40):
    h, w = args.size or (375, 500)
    some = [0, 26, 59]          # the thresholds that the reference's way is timed on
    with tempfile.TemporaryDirectory() as root:
        names = write_files(root, files, h, w)

        def one_pass():
            matrices, _ = evaluation.evaluate(names, root + '/cam', root + '/gt', 'npy', evaluation.CURVE, NUM_CLASSES,
                                              num_workers=0)
            return mean_measures(matrices)['mIoU'][some]
        compare('curve', f'{h}x{w}, {files} files, 60 scores (reference: {len(some)}, scaled up)',
                lambda: reference_curve(names, root, evaluation.CURVE[some]), {'one pass': one_pass}, args, files,
                factor=len(evaluation.CURVE) / len(some))


def bench_crf(args):
    h, w = args.size or (375, 500)
    img, probs = picture(h, w), [with_background(smooth_maps(h, w), alpha) for alpha in ALPHAS]
    compare('CRF', f'{h}x{w}, 2 alphas, 3 labels', lambda: np.stack([crf.crf_inference(img, x) for x in probs]),
            {'pydensecrf, one lattice': lambda: np.stack(crf.crf_inferences(img, probs)),
             'PyTorch': lambda: (
                 DenseCRF(img, crf.Kernels(), args.device).inference(unary_energy(np.stack(probs))).cpu())}, args)
    workers = available_cores()
    jobs = 2 * workers

    def run_jobs(pool):
        for _ in range(jobs):
            pool.submit(crf.crf_inferences, img, probs)
        for _ in range(2 * workers):        # once the pool has taken these, the jobs are done
            pool.submit(time.time)
        return 0
    with BoundedPool(workers) as pool:
        compare('CRF', f'{h}x{w}, {jobs} images', lambda: run_jobs(BoundedPool(0)),
                {f'{workers} processes (reference: one)': lambda: run_jobs(pool)}, args, jobs, apart=True)


def reference_maps(net, x):
    """Both maps, all classes, at the size of x (N, 3, H, W). PCM divides its whole matrix, which makes a second one."""
    features = net.forward_as_dict(x)
    cam = net.fc8(net.dropout7(features['conv6']))
    f = net.f9(torch.cat([F.interpolate(x, cam.shape[2:], mode='bilinear', align_corners=True),
                          F.relu(net.f8_3(features['conv4'].detach())),
                          F.relu(net.f8_4(features['conv5'].detach()))], dim=1)).flatten(2)
    f = f / (f.norm(dim=1, keepdim=True) + 1e-5)
    affinity = F.relu(f.transpose(1, 2) @ f)                                        # (N, hw, hw)
    affinity = affinity / (affinity.sum(dim=1, keepdim=True) + 1e-5)
    refined = (normalize_cam_for_pcm(cam).flatten(2) @ affinity).view_as(cam)
    return [F.interpolate(maps, x.shape[2:], mode='bilinear', align_corners=True) for maps in (cam, refined)]


@torch.no_grad()
def reference_cam(net, views, size, device):
    """float32 (classes, H, W): a forward for each view, all classes to the size of the image, absent ones times 0."""
    label = np.isin(np.arange(NUM_CLASSES), CLASSES)[:, None, None].astype(np.float32)
    total = np.zeros((NUM_CLASSES, *size), np.float32)
    for view in views:
        for mirrored in False, True:
            x = view.flip(-1) if mirrored else view
            refined = reference_maps(net, x[None].to(device))[1][:, 1:]
            refined = F.interpolate(refined, size, mode='bilinear', align_corners=False)[0].cpu().numpy() * label
            total += refined[..., ::-1] if mirrored else refined
    return total[CLASSES]


def our_cam(net, views, size, device, amp):
    maps, _ = infer_SEAM.run_views(net, views, device=device, amp=amp)
    return infer_SEAM.multi_scale_cam(maps, views, CLASSES, size)


def bench_cam(args):
    size = h, w = args.size or (375, 500)
    views = [normalized(round(h * scale), round(w * scale)) for scale in (0.5, 1, 1.5, 2)]
    nets = {'': seam_net(args), ', channels_last': seam_net(args, torch.channels_last)}
    ways = {name + end: functools.partial(our_cam, nets[end], views, size, args.device, amp)
            for name, amp in (('float32', 'off'), ('bf16', 'bf16'))[:1 + args.on_gpu] for end in nets}
    compare('CAM', f'{h}x{w}, 4 scales, width {args.width}', lambda: reference_cam(nets[''], views, size, args.device),
            ways, args, slow=args.slow)


def bench_train(args):
    h, w = args.size or (CROP, CROP)
    n = 8 if args.on_gpu else 1
    img = torch.stack([normalized(h, w, number) for number in range(n)]).to(args.device)
    label = torch.isin(torch.arange(NUM_CLASSES), torch.tensor(CLASSES)).float().expand(n, -1).to(args.device)

    def make(memory_format=torch.contiguous_format, checkpointing=False):
        """A network and its optimizer, with SGD's buffers. The learning rate of 0 keeps the steps alike."""
        net = seam_net(args, memory_format, checkpointing).train()
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        optimizer = PolyOptimizer([{'params': weights, 'weight_decay': 5e-4}], lr=0, weight_decay=5e-4, max_step=1)
        for weight in weights:
            optimizer.state[weight]['momentum_buffer'] = torch.zeros_like(weight)
        return net, optimizer

    def step(net, optimizer, amp=None, tf32=False):
        """One step, in the reference's way unless `amp` is given; returns the parts of the loss."""
        get_device(args.device.type, tf32)
        set_seed(0)             # dropout
        if amp:
            terms = train_SEAM.forward_losses(net, img, label, amp=amp)[0]
        else:
            second = train_SEAM.second_view(img)
            terms = train_SEAM.seam_loss(*reference_maps(net, img), *reference_maps(net, second), label)
            for term in terms.values():
                term.item()     # as for its log, in every step
        terms['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([term.detach() for term in terms.values()])
    plain, last = make(), make(torch.channels_last)
    ways = {name + end: functools.partial(step, *made, amp, tf32)
            for name, amp, tf32 in (('float32', 'off', False), ('tf32', 'off', True), ('bf16', 'bf16', False))
            for end, made in (('', plain), (', channels_last', last)) if args.on_gpu or name == 'float32'}
    ways['float32, checkpointing'] = functools.partial(step, *make(checkpointing=True), 'off')
    compare('train', f'{n} x {h}x{w}, width {args.width}', lambda: step(*plain), ways, args, n, slow=args.slow)


def reference_pairs(dataset, name, jitter):
    """The pair labels of VOC12AffDataset, from unpickled dicts and means over a view in blocks."""
    scores = [score for folder in dataset.label_dirs.values()
              for score in np.load(f'{folder}/{name}.npy', allow_pickle=True).item().values()]
    img = jitter(Image.open(dataset.paths[name]).convert('RGB'))
    both = imutils.RandomCrop(CROP)(np.concatenate([img, np.stack(scores, axis=-1)], axis=-1))
    both = np.concatenate([imutils.normalize(both[..., :3]), both[..., 3:]], axis=-1)
    blocks = imutils.RandomHorizontalFlip()(both)[..., 3:].reshape(CROP // STRIDE, STRIDE, CROP // STRIDE, STRIDE, -1)
    return dataset.extract_aff_label(fuse_crf_labels(blocks.transpose(0, 2, 4, 1, 3).mean(axis=(3, 4))))


def bench_aff_data(args, files=8):
    h, w = args.size or (375, 500)
    jitter = transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
    with tempfile.TemporaryDirectory() as root:
        names = write_files(root, files, h, w)
        dataset = VOC12AffDataset(        # as in train_aff.py
            f'{root}/list.txt', *(f'{root}/{alpha}' for alpha in ALPHAS), CROP, root,
            transforms=[imutils.OnImage(jitter), imutils.OnBoth(imutils.RandomCrop(CROP)),
                        imutils.OnImage(imutils.normalize), imutils.OnBoth(imutils.RandomHorizontalFlip()),
                        imutils.OnLabel(imutils.AvgPool2d(STRIDE))])

        def run(sample):
            set_seed(0)
            return [[pairs.sum().item() for pairs in sample(number)] for number in range(files)]
        compare('affinity data', f'{h}x{w}, 3 labels',
                lambda: run(lambda number: reference_pairs(dataset, names[number], jitter)),
                {'dataset': lambda: run(lambda number: dataset[number][2])}, args, files)


STAGES = {'walk': bench_walk, 'curve': bench_curve, 'crf': bench_crf, 'cam': bench_cam, 'train': bench_train,
          'aff_data': bench_aff_data}


def bench_voc(args, machine):
    """Writes the CSV of `pipeline.bench_voc`, with the machine and the settings in its first line."""
    rows = pipeline.bench_voc(args)
    if args.csv:
        test = '' if args.on_gpu and args.width == 64 and not args.size else 'A test of the benchmark itself: '
        write_csv(args.csv, [f'# {test}bench.py voc --count {args.count} --width {args.width} --amp {args.amp} '
                             f'--num_workers {args.num_workers} on {machine.replace(",", ";")}'],
                  [pipeline.COLUMNS, *rows])
    if failed := [row[0] for row in rows if row[1] == 'failed']:
        raise BadInput(f'these steps failed, see above: {", ".join(failed)}')


def cpu_name():
    """As Linux calls it; elsewhere, and where Linux does not say, the kind of machine."""
    if not os.path.isfile('/proc/cpuinfo'):
        return platform.machine()
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        return (re.findall(r'model name\s*:\s*(.*)', file.read()) or [platform.machine()])[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument('stages', nargs='*', metavar='stage', choices=[[], *STAGES, 'voc'],
                        help=f'{", ".join(STAGES)}, or voc by itself; without any: all but voc, and cam and train only '
                             'on a GPU or at --width 16, for they take minutes')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'),
                        help='size of the images. Default: 375 500, and 448 448 for train')
    parser.add_argument('--repeat', type=int,
                        help='number of timed turns. Default: 5, or 1 for stages that take minutes')
    parser.add_argument('--device', choices=['cuda', 'cpu'], help='Default: cuda if it is available')
    parser.add_argument('--threads', type=int, help="threads of PyTorch on the CPU. Default: PyTorch's choice")
    parser.add_argument('--width', default=64, type=int, choices=[16, 64], help='of the network; 16 for a quick trial')
    # for voc
    parser.add_argument('--count', default=800, type=int, help='images, for voc; a quarter of them for steps 8 and 9')
    parser.add_argument('--amp', choices=['off', 'bf16'], help='precision of the scripts. Default: bf16 on a GPU')
    parser.add_argument('--num_workers', default=available_cores(), type=int, help='loader processes of the scripts')
    parser.add_argument('--csv', help='CSV file to write the result of voc to')
    args = parser.parse_args()
    args.device = get_device(args.device)
    args.on_gpu = args.device.type == 'cuda'
    args.amp = args.amp or ('bf16' if args.on_gpu else 'off')
    args.slow = not args.on_gpu and args.width > 16
    torch.set_num_threads(args.threads or torch.get_num_threads())
    gpu = torch.cuda.get_device_name(args.device) + ', ' if args.on_gpu else ''
    machine = (f'{gpu}{cpu_name()}, {available_cores()} cores, {torch.get_num_threads()} threads, '
               f'torch {torch.__version__}, Python {platform.python_version()}')
    print(machine + '\n')
    if 'voc' in args.stages:
        bench_voc(args, machine)
        return
    header = 'stage', 'size', 's/image', 'reference s/image', 'ratio', 'peak MiB', 'reference MiB', 'difference'
    print('| ' + ' | '.join(header) + ' |\n' + '|---' * len(header) + '|')
    for stage in args.stages or [name for name in STAGES if not (args.slow and name in ('cam', 'train'))]:
        STAGES[stage](args)


if __name__ == '__main__':
    with exit_on_bad_input():
        main()
