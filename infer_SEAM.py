"""Step 2: class activation maps over scales and mirrors, and their dense CRF. See the README."""
import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.weights import load_weights
from tool import crf, image_files, imutils, score_files, visualization
from tool.cli import BadInput, check_file, check_range, exit_on_bad_input, import_network, make_dir
from tool.devices import autocast, get_device, get_rank
from tool.files import file_digest
from tool.outputs import Errors, SkipBad, SpaceCheck, is_whole, open_folder
from tool.workers import BoundedPool, available_cores
from voc12.data import VOC12ClsDatasetMSF
from voc12.lists import get_img_path, load_class_names

LARGE_VIEW = 3 * 360 * 360      # above this a view and its mirror go one by one: a batch takes memory, no less time


def grad_cam(net, x, plus):
    """Grad-CAM (Selvaraju et al. 2017) or, with `plus`, Grad-CAM++ (Chattopadhay et al. 2018) at conv6, times the
    number of pixels: (N, 3, H, W) -> (N, 1+C, h, w), >= 0.

    A class's score is the mean of its map, so its gradient is the classifier's weight / pixels everywhere and both
    methods have closed forms. That of Grad-CAM is the ReLU of the CAM.
    """
    features = net.forward_as_dict(x)['conv6']                                     # (N, D, h, w)
    weight = net.fc8.weight[None, :, :, 0, 0]                                      # (1, 1+C, D)
    if plus:
        # alpha = g^2 / (2 g^2 + sum(A) g^3), and only positive gradients count
        gradient = F.relu(weight) / features[0, 0].numel()
        weight = F.relu(weight) / (2 + features.sum(dim=(2, 3))[:, None] * gradient)
    return F.relu(torch.einsum('nkd,ndhw->nkhw', weight.expand(len(x), -1, -1), features))


def class_maps(net, x, kind):
    """Raw maps (N, 1+C, h, w) of normalised images (N, 3, H, W): what `--map` asks for, at the size of the features."""
    if kind.startswith('gradcam'):
        return grad_cam(net, x, plus=kind == 'gradcam++')
    return net.class_maps(x)[kind == 'cam_rv']


@torch.inference_mode()
def multi_scale_cam(net, views, classes, size, kind='cam_rv', flip=True, device='cpu', amp='off'):
    """Sum of one image's maps over its views.

    views: normalised (3, h, w) tensors, every second one the mirror of the one before, which only counts with `flip`.
    classes: foreground classes 0..C-1 to keep. size: (H, W) of the image. kind: see `class_maps`.
    Returns float32 (classes, H, W).
    """
    total = np.zeros((len(classes), *size), np.float32)
    for view, mirrored in zip(views[::2], views[1::2]):
        x = torch.stack([view, mirrored] if flip else [view]).to(device, non_blocking=True)
        with autocast(x.device, amp):
            cam = torch.cat([class_maps(net, part, kind)[:, 1:][:, classes]
                             for part in x.split(1 if view.numel() > LARGE_VIEW else 2)])
        cam = cam.float()                                                          # (2, classes, h, w)
        cam = F.interpolate(cam, x.shape[2:], mode='bilinear', align_corners=True)
        cam = F.interpolate(cam, size, mode='bilinear', align_corners=False).cpu().numpy()
        total += cam[0]
        if flip:
            total += cam[1, ..., ::-1]
    return total


def normalize_cam(cam):
    """(classes, H, W) sums -> scores of about 0..1, as the published CAMs.

    Negatives become 0; values below min + 1e-5 become 0; then (x - min - 1e-5) / (max - min + 1e-5) with the
    minimum from before. So a map's weakest pixels come out negative where its minimum is above 0: a quirk of the
    reference that the published numbers contain. A flat map becomes -1 everywhere.
    """
    cam = np.maximum(cam, 0)
    maximum = cam.max(axis=(1, 2), keepdims=True)
    minimum = cam.min(axis=(1, 2), keepdims=True)
    cam[cam < minimum + 1e-5] = 0
    return (cam - minimum - 1e-5) / (maximum - minimum + 1e-5)


def crf_with_alphas(cam_dict, alphas, orig_img, backend='pydensecrf', device='cpu'):
    """For each alpha, the CRF scores {0: background, class + 1: ...} of a CAM dict {class: (H, W)}; orig_img uint8
    (H, W, 3). The background score is (1 - the largest map)^alpha: the higher alpha, the less background."""
    maps = np.stack(list(cam_dict.values()))
    with np.errstate(over='ignore'):    # a nearly flat map can be far below 0; the CRF clips the score to 1
        backgrounds = [np.power(1 - maps.max(axis=0, keepdims=True), alpha) for alpha in alphas]
    posteriors = crf.crf_inferences(orig_img, [np.concatenate([background, maps]) for background in backgrounds],
                                        backend=backend, device=device)
    return [dict(zip([0] + [key + 1 for key in cam_dict], posterior)) for posterior in posteriors]


def write_crf(cam_dict, alphas, orig_img, paths, dtype, backend, device):
    """Writes the CRF scores of one image, a file for each alpha; the job of a worker process."""
    for path, scores in zip(paths, crf_with_alphas(cam_dict, alphas, orig_img, backend, device)):
        score_files.save_scores(path, scores, dtype)


def label_map(cam_dict, background_score):
    """uint8 (H, W) of 0 and class + 1: the largest of a constant background score and the maps; ties go to the
    background, then to the lower class."""
    maps = np.stack(list(cam_dict.values()))
    scores = np.concatenate([np.full_like(maps[:1], background_score), maps])
    return np.array([0] + [key + 1 for key in cam_dict], np.uint8)[scores.argmax(axis=0)]


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    parser.add_argument('--voc12_root', default='VOC2012', help='data root, with JPEGImages/ and Annotations/')
    parser.add_argument('--infer_list', default='voc12/train.txt', help='images to work on')
    parser.add_argument('--cls_labels', default='voc12/cls_labels.npy',
                        help='image-level labels; where the file is missing, the XML annotations are read')
    parser.add_argument('--class_names', help="names of the foreground classes, one a line; VOC's without it")
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_SEAM', help='module with a class Net')
    parser.add_argument('--weights', required=True, help='trained .pth')
    parser.add_argument('--device', help='cuda (the first GPU), cuda:N or cpu; not given: cuda where there is one')
    parser.add_argument('--tf32', action='store_true', help='faster, less exact products on recent GPUs')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'],
                        help='half-precision network: less memory and time on a GPU')
    # maps
    parser.add_argument('--scales', default=[0.5, 1.0, 1.5, 2.0], type=float, nargs='+',
                        help='factors of the image size (the scale table)')
    parser.add_argument('--flip', default=1, type=int, choices=[0, 1],
                        help='1: each scale is run with its mirror image; 0: without')
    parser.add_argument('--map', default='cam_rv', choices=['cam_rv', 'cam', 'gradcam', 'gradcam++'],
                        help='the map refined by PCM; the plain CAM; Grad-CAM and Grad-CAM++ of the classifier')
    parser.add_argument('--pcm', default='on', choices=['on', 'off'], help='off: the refined map is the plain CAM')
    parser.add_argument('--crf_alpha', default=[4.0, 24.0], type=float, nargs='+',
                        help='background exponents of the CRF, one output folder each')
    parser.add_argument('--crf_backend', choices=['pydensecrf', 'torch'],
                        help='torch: the same CRF in PyTorch, on --device; not given: pydensecrf where it is installed')
    parser.add_argument('--crf_workers', type=int, help='processes for pydensecrf, 0 for none of its own; not given: '
                                                        'all cores where a GPU runs the network, else 0')
    # outputs
    parser.add_argument('--out_cam', help='folder for the CAM dicts, NAME.npy')
    parser.add_argument('--out_crf', help='folder prefix for the CRF dicts: <out_crf>_4.0/NAME.npy, ...')
    parser.add_argument('--out_cam_pred', help='folder for label maps, NAME.png')
    parser.add_argument('--out_cam_pred_alpha', default=0.26, type=float,
                        help='background score of these label maps (not an exponent)')
    parser.add_argument('--cam_dtype', default='float32', choices=['float32', 'float16'],
                        help='of the CAM and CRF dicts; float16 takes half the space')
    parser.add_argument('--cam_format', default='npy', choices=['npy', 'npz'],
                        help="npy: the reference's pickled dicts; npz: compressed, without pickle, slower to write")
    parser.add_argument('--vis_dir', help='folder for pictures of the maps, NAME.jpg')
    parser.add_argument('--vis_count', default=20, type=int,
                        help='how many images of the list get one; those that are finished already get none')
    parser.add_argument('--overwrite', action='store_true', help='redo what is finished, in folders of any settings')
    parser.add_argument('--on_error', default='stop', choices=['stop', 'skip'],
                        help='skip: go on past a bad image, list it at the end, exit code 3')
    return parser


def check_args(args):
    if not (args.out_cam or args.out_crf or args.out_cam_pred):
        raise BadInput('nothing to write: give --out_cam, --out_crf or --out_cam_pred')
    if args.out_cam and args.out_cam == args.out_cam_pred:
        raise BadInput(f'--out_cam and --out_cam_pred are one folder, {args.out_cam}')
    check_range(args, 0.01, 100, 'scales', 'crf_alpha')
    check_range(args, 0, 256, 'num_workers')
    check_file(args.weights, '--weights')
    if args.out_crf and len({f'{alpha:.1f}' for alpha in args.crf_alpha}) < len(args.crf_alpha):
        raise BadInput(f'--crf_alpha {args.crf_alpha}: two of them share the folder name, which has one decimal')


def main(args):
    check_args(args)
    class_names = load_class_names(args.class_names)
    device = get_device(args.device, args.tf32)
    backend = crf.choose_crf_backend(args.crf_backend) if args.out_crf else None
    crf_dirs = [f'{args.out_crf}_{alpha:.1f}' for alpha in args.crf_alpha] if args.out_crf else []

    # ----- data and network -----
    dataset = VOC12ClsDatasetMSF(args.infer_list, voc12_root=args.voc12_root, scales=args.scales,
                                 inter_transform=transforms.Compose([np.asarray, imutils.normalize,
                                                                     imutils.HWC_to_CHW]),
                                 cls_labels=args.cls_labels, class_names=class_names)
    net = import_network(args.network, 'PCM').Net(num_classes=len(class_names),
                                                  pcm=args.pcm == 'on' and args.map == 'cam_rv')
    load_weights(net, args.weights)
    # faster on a CPU, by a fifth; not measured on GPUs
    net.eval().to(device, memory_format=torch.channels_last if device.type == 'cpu' else torch.contiguous_format)

    # ----- outputs: what is finished is left alone -----
    names = dataset.img_name_list
    rank, ranks = get_rank()
    mine = range(rank, len(names), ranks)       # shared out before looking what is there: ranks look at different times
    settings = {key: getattr(args, key) for key in ('network', 'scales', 'flip', 'map', 'pcm', 'amp')}
    settings.update(weights=file_digest(args.weights), class_names=class_names,
                    cls_labels=file_digest(args.cls_labels) if os.path.isfile(args.cls_labels) else None)
    dicts = {'cam_dtype': args.cam_dtype, 'cam_format': args.cam_format}     # the CRF backends are equal
    for folder, flag, more in ((args.out_cam, '--out_cam', dicts),
                               (args.out_cam_pred, '--out_cam_pred', {'background_score': args.out_cam_pred_alpha}),
                               *((folder, '--out_crf', {**dicts, 'alpha': alpha})
                                 for folder, alpha in zip(crf_dirs, args.crf_alpha))):
        if folder:
            ends = ['.png'] if flag == '--out_cam_pred' else ['.npy', '.npz']       # either format may be there
            open_folder(folder, flag, {**settings, **more}, args.overwrite,
                        [os.path.join(folder, names[index] + end) for index in mine for end in ends])

    def outputs(name):
        """Paths of the files of one image: CAM, label map, CRFs; None for what is not asked for."""
        return [folder and os.path.join(folder, name + end) for folder, end in
                ((args.out_cam, '.' + args.cam_format), (args.out_cam_pred, '.png'),
                 *((folder, '.' + args.cam_format) for folder in crf_dirs))]

    todo = [index for index in mine if not all(is_whole(path) for path in outputs(names[index]) if path)]
    if len(todo) < len(mine):
        print(f'{len(mine) - len(todo)} of {len(mine)} images are finished')
    loader = DataLoader(SkipBad(dataset, todo), batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == 'cuda')
    workers = args.crf_workers
    if workers is None:
        workers = available_cores() if device.type == 'cuda' else 0
    if not crf_dirs or backend == 'torch':
        workers = 0
    pictured = set(names[:args.vis_count]) if args.vis_dir else ()
    if args.vis_dir:
        make_dir(args.vis_dir, '--vis_dir')
    errors, space = Errors(args.on_error), SpaceCheck(len(todo))

    # ----- inference -----
    with BoundedPool(workers) as pool:
        for item in tqdm(loader, desc='CAM', dynamic_ncols=True, disable=None):
            if isinstance(item, BadInput):
                errors.add(item)
                continue
            name, views, label = item
            orig_img = np.asarray(image_files.read_image(get_img_path(name, args.voc12_root)))
            classes = np.flatnonzero(label.numpy() > 1e-5).tolist()
            cam = multi_scale_cam(net, views, classes, orig_img.shape[:2], args.map, args.flip, device, args.amp)
            cam_dict = dict(zip(classes, normalize_cam(cam)))
            cam_path, label_path, *crf_paths = outputs(name)
            if cam_path:
                score_files.save_scores(cam_path, cam_dict, args.cam_dtype)
            if label_path:
                image_files.save_label_map(label_path, label_map(cam_dict, args.out_cam_pred_alpha))
            if crf_paths:
                pool.submit(write_crf, cam_dict, args.crf_alpha, orig_img, crf_paths, args.cam_dtype,
                            backend, device)
            space.add([path for path in outputs(name) if path])
            if name in pictured:
                visualization.save_picture(os.path.join(args.vis_dir, name + '.jpg'), [
                    orig_img, *(visualization.cam_on_image(orig_img, cam) for cam in cam_dict.values()),
                    visualization.labels_on_image(orig_img, label_map(cam_dict, args.out_cam_pred_alpha))],
                    ['image', *(class_names[key] for key in cam_dict), f'at {args.out_cam_pred_alpha}'])
    sys.exit(errors.report())


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
