"""voc12/make_coco.py on a COCO of a few small images, whose annotation files are made here."""
import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('pycocotools')

from tool.cli import BadInput
from tool.image_files import read_image, read_label_map
from voc12 import make_coco
from voc12.lists import get_img_path, load_class_names, load_img_name_list, load_labels

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, 'voc12', 'make_coco.py')
H, W = 20, 30
# not by id, and with gaps: person is class 1, traffic light 2, dog 3
CATEGORIES = [{'id': 18, 'name': 'dog'}, {'id': 1, 'name': 'person'}, {'id': 10, 'name': 'traffic light'}]
NAMES = ['person', 'traffic light', 'dog']
PERSON, LIGHT, DOG = 1, 10, 18


# ---------------------------------------------------------------- COCO's forms, written from their description

def box(x, y, w, h):
    """Polygon around columns x..x+w-1 and rows y..y+h-1."""
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def box_mask(x, y, w, h):
    mask = np.zeros((H, W), bool)
    mask[y:y + h, x:x + w] = True
    return mask


def run_lengths(mask):
    """Lengths of the runs of equal values down the columns, the first of them zeros."""
    flat = [0] + [int(value) for column in mask.T for value in column]
    starts = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    edges = [1] + starts + [len(flat)]
    return [end - start for start, end in zip(edges, edges[1:])]


def compress(counts):
    """COCO's string of run lengths."""
    text = ''
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return text


def rle(mask, compressed):
    counts = run_lengths(mask)
    return {'size': list(mask.shape), 'counts': compress(counts) if compressed else counts}


# image name -> (category, outline, is a crowd) of its annotations
CROWD = box_mask(2, 1, 5, 6) | box_mask(20, 10, 3, 8)
TRAIN = {'train_1': [(PERSON, [box(2, 3, 10, 8)], 0)],
         'train_2': [(DOG, [box(0, 0, 4, 5), box(2, 2, 4, 5), box(20, 12, 10, 8)], 0)],
         # the small one first, so that the order of the file would hide it
         'train_3': [(LIGHT, [box(5, 5, 2, 2)], 0), (DOG, [box(1, 1, 20, 15)], 0)],
         # the object is larger than the crowd that it stands in
         'train_4': [(LIGHT, [box(3, 2, 12, 12)], 0), (PERSON, rle(CROWD, compressed=False), 1)],
         'train_5': []}
VAL = {'val_1': [(DOG, rle(CROWD, compressed=True), 1), (PERSON, [box(25, 0, 5, 20)], 0)],
       'val_2': [(PERSON, [box(0, 0, 3, 3)], 0), (PERSON, [box(9, 9, 3, 3)], 0)],
       'val_3': []}


def instances(images, first):
    """The dict of an instances file; ids count from `first`."""
    data = {'info': {'year': 2014}, 'categories': CATEGORIES, 'images': [], 'annotations': []}
    for image_id, (name, objects) in enumerate(images.items(), first):
        data['images'].append({'id': image_id, 'file_name': name + '.jpg', 'height': H, 'width': W, 'license': 1})
        for category, outline, crowd in objects:
            data['annotations'].append({'id': len(data['annotations']) + 70, 'image_id': image_id, 'iscrowd': crowd,
                                        'category_id': category, 'segmentation': outline, 'bbox': [0, 0, 1, 1]})
    return data


def write_json(root, split, data):
    path = root / 'annotations' / f'instances_{split}2014.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def write_coco(root, train=TRAIN, val=VAL, folder='.'):
    for split, images, first in (('train', train, 5), ('val', val, 1005)):
        write_json(root, split, instances(images, first))
        (root / folder / f'{split}2014').mkdir(parents=True)
        for name in images:
            Image.new('RGB', (W, H), (9, 99, 199)).save(root / folder / f'{split}2014' / f'{name}.jpg')
    return root


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco')


def run(coco, *flags):
    """Runs the script in this process, with masks, into COCO beside `coco`; returns that folder."""
    out = coco.parent / 'COCO'
    make_coco.main(make_coco.get_args_parser().parse_args([
        '--coco_root', str(coco), '--out', str(out), '--names', str(coco.parent / 'names.txt'), '--masks',
        '--num_workers', '0', *flags]))
    return out


def run_script(cwd, *command):
    return subprocess.run([sys.executable, SCRIPT, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          timeout=60)


def list_of(out, split):
    return load_img_name_list(str(out / 'ImageSets' / 'Segmentation' / f'{split}.txt'))


def mask_of(out, name):
    return read_label_map(str(out / 'SegmentationClass' / f'{name}.png'), '--out')


def masks_in(out):
    return {path.name: path.read_bytes() for path in (out / 'SegmentationClass').glob('*.png')}


def tree(folder):
    """Returns a dict of every path below a folder -> content of the file."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


# ---------------------------------------------------------------- what the scripts read

def test_class_names_are_by_ascending_category_id(coco):
    run(coco)
    assert load_class_names(str(coco.parent / 'names.txt')) == NAMES


def test_lists_are_sorted_and_without_unlabelled_images(coco, capsys):
    out = run(coco)
    assert list_of(out, 'train') == ['train_1', 'train_2', 'train_3', 'train_4']
    assert list_of(out, 'val') == ['val_1', 'val_2']
    assert sorted(os.listdir(out / 'JPEGImages')) == [name + '.jpg' for name in list_of(out, 'train')
                                                      + list_of(out, 'val')]
    assert capsys.readouterr().out.count('1 more without any annotation are left out') == 2


def test_images_without_annotation_are_negatives_where_that_is_asked_for(coco, capsys):
    out = run(coco, '--negatives')
    assert list_of(out, 'train') == list(TRAIN) and list_of(out, 'val') == list(VAL)
    labels = np.load(out / 'cls_labels.npy', allow_pickle=True).item()
    assert [name for name in labels if not labels[name].any()] == ['train_5', 'val_3']
    assert capsys.readouterr().out.count('1 of them without any annotation') == 2
    assert mask_of(out, 'val_3').shape == (H, W) and not mask_of(out, 'val_3').any()
    assert (mask_of(out, 'train_1') == box_mask(2, 3, 10, 8)).all()


def test_names_are_sorted_whatever_the_order_of_the_json(tmp_path):
    out = run(write_coco(tmp_path / 'coco', train=dict(reversed(TRAIN.items()))))
    assert list_of(out, 'train') == ['train_1', 'train_2', 'train_3', 'train_4']


def test_labels_are_float32_multi_hot_by_ascending_category_id(coco):
    out = run(coco)
    labels = load_labels(list_of(out, 'train') + list_of(out, 'val'), str(out / 'cls_labels.npy'), str(out), NAMES)
    expected = {'train_1': [1, 0, 0], 'train_2': [0, 0, 1], 'train_3': [0, 1, 1], 'train_4': [1, 1, 0],
                'val_1': [1, 0, 1], 'val_2': [1, 0, 0]}
    assert list(labels) == list(expected)
    for name, label in labels.items():
        np.testing.assert_array_equal(label, np.array(expected[name], np.float32), strict=True)


def test_labels_and_masks_have_the_same_classes(coco):
    out = run(coco)
    names = list_of(out, 'train') + list_of(out, 'val')
    for name, label in load_labels(names, str(out / 'cls_labels.npy'), str(out), NAMES).items():
        assert sorted(set(np.unique(mask_of(out, name))) - {0}) == list(np.flatnonzero(label) + 1), name


def test_without_masks_labels_are_the_same_and_outlines_are_not_read(coco):
    with_masks = np.load(run(coco) / 'cls_labels.npy', allow_pickle=True).item()
    data = instances(TRAIN, 5)
    for entry in data['annotations']:
        entry['segmentation'] = 'no outline'
    write_json(coco, 'train', data)
    args = ['--coco_root', str(coco), '--out', str(coco.parent / 'bare'), '--names', str(coco.parent / 'names.txt')]
    make_coco.main(make_coco.get_args_parser().parse_args(args))
    labels = np.load(coco.parent / 'bare' / 'cls_labels.npy', allow_pickle=True).item()
    assert list(labels) == list(with_masks) and all((labels[name] == with_masks[name]).all() for name in labels)
    assert not (coco.parent / 'bare' / 'SegmentationClass').exists()


@pytest.mark.parametrize('folder', ['.', 'images'])
def test_images_are_absolute_links_from_both_places(folder, tmp_path, monkeypatch):
    coco = write_coco(tmp_path / 'coco', folder=folder)
    monkeypatch.chdir(tmp_path)
    out = run(coco.relative_to(tmp_path))
    for name in ('train_1', 'val_2'):
        path = get_img_path(name, str(out))
        assert os.readlink(path) == str(coco / folder / f'{name[:-2]}2014' / f'{name}.jpg')
        monkeypatch.chdir('/')
        assert read_image(str(tmp_path / path)).size == (W, H)
        monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- masks

def test_masks_have_the_exact_pixels(coco):
    out = run(coco)
    expected = {'train_1': 1 * box_mask(2, 3, 10, 8),
                'train_2': 3 * (box_mask(0, 0, 4, 5) | box_mask(2, 2, 4, 5) | box_mask(20, 12, 10, 8)),
                'train_3': np.where(box_mask(5, 5, 2, 2), 2, 3 * box_mask(1, 1, 20, 15)),
                'train_4': np.where(box_mask(3, 2, 12, 12), 2, 1 * CROWD),
                'val_1': np.where(box_mask(25, 0, 5, 20), 1, 3 * CROWD),
                'val_2': 1 * (box_mask(0, 0, 3, 3) | box_mask(9, 9, 3, 3))}
    for name, mask in expected.items():
        np.testing.assert_array_equal(mask_of(out, name), mask.astype(np.uint8), strict=True)
    assert sorted(masks_in(out)) == [name + '.png' for name in expected]


def test_masks_are_palette_pngs_in_the_colours_of_voc(coco):
    with Image.open(run(coco) / 'SegmentationClass' / 'train_1.png') as img:
        assert img.mode == 'P' and img.convert('RGB').getpixel((2, 3)) == (128, 0, 0)


def test_polygons_are_not_thickened_by_their_outline():
    rng = np.random.default_rng(0)
    pixels = areas = perimeter = 0.
    for _ in range(100):
        points = np.round(rng.uniform(0, 200, (3, 2)), 2)
        pixels += make_coco.fill_polygons([points.astype(np.float32)], 200, 200).sum()
        (ax, ay), (bx, by) = points[1] - points[0], points[2] - points[0]
        areas += abs(ax * by - ay * bx) / 2
        perimeter += np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum()
    assert abs(pixels - areas) < .01 * perimeter     # in pixels; cv2.fillPoly gives above .5


def test_polygons_are_those_of_an_object_whatever_they_share():
    """Within a call, some rasterizers leave out what two polygons share."""
    polygons = [np.array(box(*corner, 8, 6), np.float32).reshape(-1, 2) for corner in ((2, 3), (5, 5))]
    expected = box_mask(2, 3, 8, 6) | box_mask(5, 5, 8, 6)
    np.testing.assert_array_equal(make_coco.fill_polygons(polygons, H, W), expected, strict=True)


def test_without_pycocotools_masks_are_refused_in_one_line_and_labels_are_written(coco, monkeypatch):
    monkeypatch.setattr(make_coco, 'coco_mask', None)
    with pytest.raises(BadInput, match='--masks.*pip install pycocotools'):
        run(coco)
    out = coco.parent / 'COCO'
    assert not out.exists()
    make_coco.main(make_coco.get_args_parser().parse_args(
        ['--coco_root', str(coco), '--out', str(out), '--names', str(coco.parent / 'names.txt')]))
    assert list_of(out, 'val') == ['val_1', 'val_2']


def test_polygons_reaching_over_the_border_are_cut():
    mask = make_coco.fill_polygons([np.array(box(-5, -5, 8, 9), np.float32).reshape(-1, 2)], H, W)
    assert mask[:4, :3].all() and mask.sum() == 12
    assert not make_coco.fill_polygons([np.array(box(W + 5, 0, 8, 9), np.float32).reshape(-1, 2)], H, W).any()


@pytest.mark.parametrize('compressed', [False, True])
def test_run_lengths_give_the_mask_back(compressed):
    rng = np.random.default_rng(1)
    for density in (0., .02, .5, .98, 1.):
        for h, w in ((1, 1), (1, 40), (7, 1), (23, 200), (200, 23)):
            mask = rng.random((h, w)) < density
            counts = make_coco.read_outline(rle(mask, compressed), h, w)
            np.testing.assert_array_equal(make_coco.fill_runs(counts, h, w), mask, strict=True)


def test_known_compressed_string():
    # by hand: 6 -> '6'; 1 -> '1'; 40 = 8 + 32, 1 -> 'X1'; difference 4 - 1 = 3 -> '3'; 9 - 40 = -31 = 1 - 32 -> 'QO'
    assert make_coco.decode_counts('61X13QO') == [6, 1, 40, 4, 9]


def test_finished_masks_are_kept_with_resume_alone(coco):
    out = run(coco)
    kept, lost = out / 'SegmentationClass' / 'train_1.png', out / 'SegmentationClass' / 'val_1.png'
    before = masks_in(out)
    os.utime(kept, (1, 1))
    lost.unlink()
    run(coco, '--resume')
    assert kept.stat().st_mtime == 1 and masks_in(out) == before
    run(coco)
    assert kept.stat().st_mtime > 1 and masks_in(out) == before


def test_masks_of_other_annotations_are_not_resumed(coco):
    out = run(coco)
    first, of_first = tree(out), masks_in(out)
    for name, images, start in (('train', TRAIN, 5), ('val', VAL, 1005)):
        data = instances(images, start)
        data['categories'] = CATEGORIES + [{'id': 2, 'name': 'bicycle'}]         # the class numbers shift
        write_json(coco, name, data)
    with pytest.raises(BadInput, match='SegmentationClass.*--out.*--resume'):
        run(coco, '--resume')
    assert tree(out) == first
    run(coco)
    assert masks_in(out) != of_first
    run(coco, '--resume')


def test_another_list_of_names_is_not_replaced_silently(coco, capsys):
    (coco.parent / 'names.txt').write_text('cat\n')
    for warnings in (1, 0):
        run(coco)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning')]
        assert len(lines) == warnings and all('names.txt (--names)' in line for line in lines)


# ---------------------------------------------------------------- files of other tools

def change(section, key, value, index=0):
    """Returns a function that sets one value in an instances dict; None deletes the key."""
    def apply(data):
        entry = data if section is None else data[section][index]
        entry.update({key: value})
        if value is None:
            del entry[key]
    return apply


def outline(segmentation):
    return change('annotations', 'segmentation', segmentation)


def rewrite(coco, apply, encoding='utf-8'):
    data = copy.deepcopy(instances(TRAIN, 5))
    apply(data)
    (coco / 'annotations' / 'instances_train2014.json').write_text(json.dumps(data), encoding=encoding)


@pytest.mark.parametrize('file, name', [('train 1.jpg', 'train_1'), ('cam 1/train_1.PNG', 'train_1'),
                                        ('cam\\train_1.png', 'train_1'), ('a.rf.1b.jpg', 'a_rf_1b')])
def test_png_images_folders_blanks_and_dots_become_plain_names(file, name, coco):
    rewrite(coco, change('images', 'file_name', file))
    path = coco / 'train2014' / file.replace('\\', '/')
    path.parent.mkdir(exist_ok=True)
    (coco / 'train2014' / 'train_1.jpg').rename(path)
    out = run(coco)
    assert name in list_of(out, 'train') and read_image(get_img_path(name, str(out))).size == (W, H)
    assert (mask_of(out, name) == box_mask(2, 3, 10, 8)).all()


def test_two_images_that_would_have_one_name_are_refused(coco):
    rewrite(coco, change('images', 'file_name', 'sub/train_2.png'))
    (coco / 'train2014' / 'sub').mkdir()
    (coco / 'train2014' / 'train_1.jpg').rename(coco / 'train2014' / 'sub' / 'train_2.png')
    with pytest.raises(BadInput, match='sub/train_2.png.*train_2.jpg'):
        run(coco)


def test_sizes_as_64_0_and_a_byte_order_mark_are_read(coco):
    rewrite(coco, lambda data: [entry.update(width=float(W), height=float(H)) for entry in data['images']], 'utf-8-sig')
    assert (mask_of(run(coco), 'train_1') == box_mask(2, 3, 10, 8)).all()


@pytest.mark.parametrize('segmentation', [[], None, [[1, 1, 5, 5]], [[]], {'size': [H, W], 'counts': ''}])
def test_empty_outlines_are_counted_and_left_out_of_the_mask_alone(segmentation, coco, capsys):
    rewrite(coco, outline(segmentation))
    out = run(coco)
    assert 'warning: 1 of 6 annotations have no outline, the first is number 70' in capsys.readouterr().out
    assert not mask_of(out, 'train_1').any() and (mask_of(out, 'train_2') == 3).any()
    assert load_labels(['train_1'], str(out / 'cls_labels.npy'), '', NAMES)['train_1'].tolist() == [1, 0, 0]


def test_absolute_file_name_in_the_image_folder_and_sizes_as_text_are_read(coco):
    data = copy.deepcopy(instances(TRAIN, 5))
    data['images'][0] |= {'file_name': str(coco / 'train2014' / 'train_1.jpg'), 'width': str(W), 'height': f'{H}.0'}
    write_json(coco, 'train', data)
    assert (mask_of(run(coco), 'train_1') == box_mask(2, 3, 10, 8)).all()


def test_crowd_as_text_is_a_number(coco):
    rewrite(coco, lambda data: [entry.update(iscrowd='0') for entry in data['annotations']])
    before = masks_in(run(coco))
    rewrite(coco, lambda data: [entry.update(iscrowd=0) for entry in data['annotations']])
    assert masks_in(run(coco)) == before


@pytest.mark.parametrize('flags', [[], ['--negatives']])
def test_file_without_any_annotation_is_refused(flags, coco):
    rewrite(coco, change(None, 'annotations', []))
    with pytest.raises(BadInput, match='train.*--coco_root'):
        run(coco, *flags)


def test_val_may_be_missing(coco):
    run(coco)
    (coco / 'annotations' / 'instances_val2014.json').unlink()
    out = run(coco)
    assert os.listdir(out / 'ImageSets' / 'Segmentation') == ['train.txt'] and len(list_of(out, 'train')) == 4


# ---------------------------------------------------------------- bad input

BAD = {
    'no_images': (change(None, 'images', None), "'images'"),
    'captions': (change(None, 'categories', None), 'categories'),
    'no_categories': (change(None, 'categories', []), 'annotation 70.*1'),
    'annotations_no_list': (change(None, 'annotations', 7), 'instances_train2014.json'),
    'unknown_image': (change('annotations', 'image_id', 99), 'annotation 70.*99'),
    'unknown_category': (change('annotations', 'category_id', 2), 'annotation 70.*2'),
    'image_id_missing': (change('annotations', 'image_id', None), 'image_id'),
    'category_name_twice': (change('categories', 'name', 'person'), 'person'),
    'category_background': (change('categories', 'name', 'background'), 'background'),
    'folder_above': (change('images', 'file_name', '../train_1.jpg'), 'train_1.jpg'),
    'absolute_path': (change('images', 'file_name', '/train_1.jpg'), 'train_1.jpg'),
    'no_image_format': (change('images', 'file_name', 'train_1.txt'), 'train_1.txt'),
    'file_name_number': (change('images', 'file_name', 7), 'instances_train2014.json'),
    'half_a_pixel': (change('images', 'width', 30.5), '30.5'),
    'no_size': (change('images', 'height', float('inf')), 'instances_train2014.json'),
    'image_id_twice': (change('images', 'id', 6), 'images.* id'),
    'category_id_twice': (change('categories', 'id', 1), 'categories.* id'),
    'polygon_far_away': (outline([[1, 1, 1e9, 1, 5, 5]]), 'annotation 70'),
    'huge_size': (change('images', 'width', 1e9), '1000000000'),
    'one_file_twice': (change('images', 'file_name', 'train_2.jpg'), 'train_2'),
    'category_bg': (change('categories', 'name', '_background_'), '_background_'),
    'endless_polygon': (outline([[1, 1, 5, 1, float('inf'), 5]]), 'annotation 70'),
    'odd_polygon': (outline([[1, 1, 5, 1, 5, 5, 9]]), 'annotation 70.*polygon'),
    'flat_polygon': (outline(box(1, 1, 2, 2)), 'annotation 70'),
    'list_of_run_lengths': (outline([{'size': [H, W], 'counts': [600]}]), 'annotation 70.*polygon'),
    'text_in_polygon': (outline([['a'] * 6]), 'annotation 70'),
    'rle_too_short': (outline({'size': [H, W], 'counts': [1, 2]}), 'annotation 70.*20 x 30'),
    'rle_negative': (outline({'size': [H, W], 'counts': [601, -1]}), 'annotation 70'),
    'rle_of_another_image': (outline({'size': [W, H], 'counts': [600]}), 'annotation 70'),
    'rle_string_cut': (outline({'size': [H, W], 'counts': '6X'}), 'annotation 70'),
    'rle_empty': (outline({}), 'annotation 70.*counts'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_annotations_are_one_line_and_nothing_is_written(case, coco):
    apply, message = BAD[case]
    data = copy.deepcopy(instances(TRAIN, 5))
    apply(data)
    write_json(coco, 'train', data)
    before = tree(coco.parent)
    with pytest.raises(BadInput, match=message) as error:
        run(coco)
    assert '\n' not in str(error.value) and 'instances_train2014.json (--coco_root)' in str(error.value)
    assert tree(coco.parent) == before


@pytest.mark.parametrize('text', ['', '{"images": [', '[1]', '{"images": 1}', '[' * 10 ** 5])
def test_malformed_json_is_one_line_and_nothing_is_written(text, coco):
    write_json(coco, 'val', text)
    before = tree(coco.parent)
    with pytest.raises(BadInput, match=r'instances_val2014.json \(--coco_root\)'):
        run(coco)
    assert tree(coco.parent) == before


def test_missing_images_are_counted_with_the_first_name(coco):
    for name in ('train_2', 'train_5'):
        (coco / 'train2014' / f'{name}.jpg').unlink()
    before = tree(coco.parent)
    with pytest.raises(BadInput, match='2 of the 5 .*train_2.jpg'):
        run(coco)
    assert tree(coco.parent) == before


def test_splits_that_do_not_belong_together_are_refused(coco):
    data = copy.deepcopy(instances(VAL, 1005))
    data['categories'][0]['name'] = 'cat'
    write_json(coco, 'val', data)
    with pytest.raises(BadInput, match='categories'):
        run(coco)
    assert not (coco.parent / 'COCO').exists()


def test_image_in_both_splits_is_refused(tmp_path):
    with pytest.raises(BadInput, match='both'):
        run(write_coco(tmp_path / 'coco', val={'train_1': VAL['val_1']}))


@pytest.mark.parametrize('missing, words', [('annotations/instances_train2014.json', 'no such file'),
                                            ('val2014', 'val2014, nor .*images/val2014')])
def test_what_coco_root_lacks_is_named(missing, words, coco):
    (coco / missing).rename(coco / 'elsewhere')
    with pytest.raises(BadInput, match=words):
        run(coco)
    assert not (coco.parent / 'COCO').exists()


def test_folder_of_others_is_not_overwritten(coco):
    path = coco.parent / 'COCO' / 'ImageSets' / 'Segmentation' / 'train.txt'
    path.parent.mkdir(parents=True)
    path.write_text("VOC's own")
    with pytest.raises(BadInput, match='--out'):
        run(coco)
    assert path.read_text() == "VOC's own"


# ---------------------------------------------------------------- command line

def test_command_with_worker_processes_gives_the_same_masks(tmp_path):
    train = {f'train_{i:03d}': [(PERSON, [box(i % 20, i % 10, 5, 5)], 0)] for i in range(110)}
    coco = write_coco(tmp_path / 'coco', train=train)
    process = run_script(tmp_path, '--coco_root', 'coco', '--masks', '--num_workers', '2', '--out', 'by_two',
                         '--names', 'names.txt')
    assert process.returncode == 0, process.stderr
    run(coco)
    one, two = (masks_in(tmp_path / folder) for folder in ('COCO', 'by_two'))
    assert one == two and len(one) == 112
    assert (tmp_path / 'names.txt').read_text() == 'person\ntraffic light\ndog\n'
