"""Step 2: class activation maps over scales and mirrors, and their dense CRF. See the README."""
import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from network.resnet38d import load_weights
from tool import imutils
from tool.pyutils import BadInput, check_file, check_range, exit_on_bad_input, import_network, make_dir
from tool.torchutils import get_device
from voc12.data import VOC12ClsDatasetMSF
from voc12.lists import NUM_CLASSES, get_img_path


@torch.inference_mode()
def multi_scale_cam(net, views, classes, size, output):
    """Sum of one image's maps over its views.

    views: normalised (1, 3, h, w) tensors, every second one the mirror of the one before. classes: foreground
    classes 0..C-1 to keep. size: (H, W) of the image. output: which of the network's maps, 0 raw, 1 refined.
    Returns float32 (classes, H, W).
    """
    total = np.zeros((len(classes), *size), np.float32)
    for view, mirrored in zip(views[::2], views[1::2]):
        cam = net(torch.cat([view, mirrored]))[output][:, 1:][:, classes]          # (2, classes, h, w)
        cam = F.interpolate(cam, size, mode='bilinear', align_corners=False).cpu().numpy()
        total += cam[0]
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


def crf_with_alpha(cam_dict, alpha, orig_img):
    """CRF scores {0: background, class + 1: ...} of a CAM dict {class: (H, W)}; orig_img uint8 (H, W, 3).

    The background score is (1 - the largest map)^alpha: the higher alpha, the less background.
    """
    maps = np.stack(list(cam_dict.values()))
    with np.errstate(over='ignore'):    # a nearly flat map can be far below 0; the CRF clips the score to 1
        background = np.power(1 - maps.max(axis=0, keepdims=True), alpha)
    posterior = imutils.crf_inference(orig_img, np.concatenate([background, maps]), labels=1 + len(maps))
    return dict(zip([0] + [key + 1 for key in cam_dict], posterior))


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
    parser.add_argument('--num_workers', default=8, type=int, help='loader processes; 0 loads in the main one')
    # network
    parser.add_argument('--network', default='network.resnet38_SEAM', help='module with a class Net')
    parser.add_argument('--weights', required=True, help='trained .pth')
    parser.add_argument('--device', help='cuda (the first GPU), cuda:N or cpu; not given: cuda where there is one')
    # maps
    parser.add_argument('--scales', default=[0.5, 1.0, 1.5, 2.0], type=float, nargs='+',
                        help='factors of the image size; each is run with its mirror image')
    parser.add_argument('--map', default='cam_rv', choices=['cam_rv', 'cam'],
                        help='the map refined by PCM, or the plain CAM')
    parser.add_argument('--crf_alpha', default=[4.0, 24.0], type=float, nargs='+',
                        help='background exponents of the CRF, one output folder each')
    # outputs
    parser.add_argument('--out_cam', help='folder for the CAM dicts, NAME.npy')
    parser.add_argument('--out_crf', help='folder prefix for the CRF dicts: <out_crf>_4.0/NAME.npy, ...')
    parser.add_argument('--out_cam_pred', help='folder for label maps, NAME.png')
    parser.add_argument('--out_cam_pred_alpha', default=0.26, type=float,
                        help='background score of these label maps (not an exponent)')
    return parser


def main(args):
    if not (args.out_cam or args.out_crf or args.out_cam_pred):
        raise BadInput('nothing to write: give --out_cam, --out_crf or --out_cam_pred')
    check_range(args, 0.01, 100, 'scales', 'crf_alpha')
    check_range(args, 0, 256, 'num_workers')
    check_file(args.weights, '--weights')
    device = get_device(args.device)
    crf_dirs = {alpha: f'{args.out_crf}_{alpha:.1f}' for alpha in args.crf_alpha} if args.out_crf else {}
    if len(set(crf_dirs.values())) < len(crf_dirs):
        raise BadInput(f'--crf_alpha {args.crf_alpha}: two of them share the folder name, which has one decimal')
    if crf_dirs:
        imutils.check_crf('--out_crf')

    to_array = transforms.Compose([np.asarray, imutils.normalize, imutils.HWC_to_CHW])
    dataset = VOC12ClsDatasetMSF(args.infer_list, voc12_root=args.voc12_root, scales=args.scales,
                                 inter_transform=to_array, cls_labels=args.cls_labels)
    loader = DataLoader(dataset, batch_size=1, num_workers=args.num_workers, pin_memory=device.type == 'cuda')
    net = import_network(args.network, 'PCM').Net(num_classes=NUM_CLASSES)
    load_weights(net, args.weights)
    net.eval().to(device)
    for folder, flag in ((args.out_cam, '--out_cam'), (args.out_cam_pred, '--out_cam_pred'),
                         *((folder, '--out_crf') for folder in crf_dirs.values())):
        if folder:
            make_dir(folder, flag)

    for (name,), views, label in tqdm(loader, desc='CAM', dynamic_ncols=True):
        orig_img = np.asarray(imutils.read_image(get_img_path(name, args.voc12_root)))
        classes = np.flatnonzero(label[0].numpy() > 1e-5).tolist()
        views = [view.to(device, non_blocking=True) for view in views]
        cam = multi_scale_cam(net, views, classes, orig_img.shape[:2], output=int(args.map == 'cam_rv'))
        cam_dict = dict(zip(classes, normalize_cam(cam)))
        if args.out_cam:
            imutils.save_scores(os.path.join(args.out_cam, name + '.npy'), cam_dict)
        if args.out_cam_pred:
            imutils.save_label_map(os.path.join(args.out_cam_pred, name + '.png'),
                                   label_map(cam_dict, args.out_cam_pred_alpha))
        for alpha, folder in crf_dirs.items():
            imutils.save_scores(os.path.join(folder, name + '.npy'), crf_with_alpha(cam_dict, alpha, orig_img))


if __name__ == '__main__':
    with exit_on_bad_input():
        main(get_args_parser().parse_args())
