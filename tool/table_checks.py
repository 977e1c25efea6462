"""What tool/tables.py checks before its first training: all that a script would otherwise refuse only hours later.

The flags of a script are checked by the script's own parser and `check_args`. The scripts and voc12/lists.py are
imported by name, because nothing in tool/ depends on them otherwise.
"""
import importlib
import os
import shlex

from tool.cli import BadInput, check_dir, check_file, check_range, import_network
from tool.commands import ROOT
from tool.image_lists import load_img_name_list

# flag of tables.py with more flags for a script -> the script, and what tables.py adds so that its check passes
SCRIPTS = {'pretrain': ['train_SEAM'],
           'train': ['train_SEAM'],
           'train_aff': ['train_aff', '--la_crf_dir', ROOT, '--ha_crf_dir', ROOT],
           'infer': ['infer_SEAM', '--weights', __file__, '--out_cam', 'cam'],
           'walk': ['infer_aff', '--weights', __file__, '--cam_dir', ROOT],
           'train_seg': ['train_seg', '--label_dir', ROOT],
           'seg': ['infer_seg', '--weights', __file__, '--out_seg', 'seg']}
# the same flag of a training -> the flag of its network, and the network's kind
NETWORKS = {'train': ('network', 'SEAM'), 'train_aff': ('network_aff', 'affinity'),
            'train_seg': ('network_seg', 'segmentation')}


def check_numbers(args):
    """Raises BadInput for seeds, scales and exponents that are out of range or given twice."""
    check_range(args, 0, 2 ** 31, 'seeds')
    check_range(args, 0.01, 100, 'scales', 'alphas')
    folders = [f'{alpha:.1f}' for alpha in args.alphas]         # of infer_SEAM.py, named with one decimal
    for name, values in (('seeds', args.seeds), ('scales', args.scales), ('alphas', folders)):
        if len(set(values)) < len(values):
            raise BadInput(f'--{name} {" ".join(map(str, values))}: give each of them once')


def check_masks(names, folder, flag, whose):
    """Raises BadInput unless the folder has a mask NAME.png of every image."""
    check_dir(folder, flag)
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name + '.png'))]
    if missing:
        raise BadInput(f'no such file: {os.path.join(folder, missing[0] + ".png")} ({flag}); {len(missing):,} of '
                       f'{len(names):,} masks are missing, {whose}')


def check_data(args, scored, train_gt):
    """Raises BadInput for missing lists, images, labels, masks and weights. Returns dict flag of a list -> its names.
    scored: set of the `scored` of all rows, see `Row` in tool/tables.py. train_gt: folder of masks to retrain on."""
    lists = importlib.import_module('voc12.lists')
    class_names = lists.load_class_names(args.class_names)
    for name in args.mean_classes or ():
        if name not in ('background', *class_names):
            raise BadInput(f'--mean_classes {name}: no such class; there are background, {", ".join(class_names)}')
    if args.toy:                                                # its drawings are not there yet
        return {}
    retrained = scored & {'seg', 'seg_truth'}
    needed = {'list': scored - retrained, 'train_list': True, 'aff_list': args.aff_list, 'val_list': retrained}
    names = {flag: load_img_name_list(getattr(args, flag), '--' + flag) for flag in needed if needed[flag]}
    for flag in names:
        lists.check_images(names[flag], getattr(args, flag), args.voc12_root)
        whose = f'of the images of {getattr(args, flag)} (--{flag})'
        if flag in ('list', 'val_list'):
            check_masks(names[flag], os.path.join(args.voc12_root, lists.GT_FOLDER), '--voc12_root', whose)
        if flag == 'train_list' and 'seg_truth' in scored:
            check_masks(names[flag], train_gt, '--train_gt', whose + '; voc12/make_seg_aug.py makes the masks of '
                        'train_aug, see voc12/README.md')
    labelled = [name for flag in names if flag != 'val_list' for name in names[flag]]
    lists.load_labels(labelled, args.cls_labels or 'voc12/cls_labels.npy', args.voc12_root, class_names)
    if args.weights:
        check_file(args.weights, '--weights')
    return names


def check_scripts(args, scored, names):
    """Raises BadInput for flags that a script refuses, for networks that do not exist or fit, and for lists that are
    shorter than a batch. scored: see `check_data`. names: what it returned."""
    needed = {'train': scored - {'seg_truth'}, 'train_aff': scored & {'walk', 'seg'},
              'train_seg': scored & {'seg', 'seg_truth'}}
    for flag, (script, *added) in SCRIPTS.items():
        words, script = getattr(args, flag), importlib.import_module(script)

        def refuse(message):
            raise BadInput(f'--{flag} "{shlex.join(words)}": {message}')

        parser = script.get_args_parser()
        parser.error = refuse
        flags = parser.parse_args([*added, *words])
        try:
            script.check_args(flags)
        except BadInput as error:
            refuse(error)
        if needed.get(flag):
            network, kind = NETWORKS[flag]
            import_network(getattr(args, network), kind, args.backbone)
            images = names.get('aff_list' if flag == 'train_aff' and args.aff_list else 'train_list')
            if images and len(images) < flags.batch_size:
                refuse(f'there are {len(images)} images to train on, fewer than --batch_size {flags.batch_size}')
