"""voc12/export_coco.py: what it writes, and that make_coco.py and pycocotools read the same pixels back."""
import json
import os

import numpy as np
import pytest
from PIL import Image

from tool.cli import BadInput
from tool.image_files import read_label_map, save_label_map
from voc12 import export_coco, make_coco

CLASSES = ['cat', 'traffic light']
H, W = 9, 14
LABELS = {'a': np.zeros((H, W)), 'b': np.zeros((H, W)), 'c': np.zeros((H, W))}
LABELS['a'][1:4, 2:7], LABELS['a'][3:8, 10:], LABELS['a'][8, 0] = 1, 1, 2
LABELS['b'][::2, ::2], LABELS['b'][4:, 9:] = 2, 1           # pixels that touch nothing, not even at a corner


@pytest.fixture
def root(tmp_path):
    """A data root with label maps in labels/; c has no object. b's image is a PNG."""
    (tmp_path / 'JPEGImages').mkdir()
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'names.txt').write_text('\n'.join(CLASSES))
    for name, labels in LABELS.items():
        save_label_map(str(tmp_path / f'labels/{name}.png'), labels)
        Image.new('RGB', (W, H)).save(tmp_path / f'JPEGImages/{name}.{"png" if name == "b" else "jpg"}')
    return tmp_path


def export(root, *flags):
    """Runs the command in this process; returns what it has written."""
    pytest.importorskip('pycocotools')
    out = root / 'coco/annotations/instances_train2014.json'
    export_coco.main(export_coco.get_args_parser().parse_args([
        '--label_dir', str(root / 'labels'), '--voc12_root', str(root), '--class_names', str(root / 'names.txt'),
        '--out', str(out), '--num_workers', '0', *flags]))
    return json.loads(out.read_text())


def import_back(root):
    """Label maps that make_coco.py makes of the file: dict name -> uint8 (H, W)."""
    os.symlink(root / 'JPEGImages', root / 'coco/train2014')
    make_coco.main(make_coco.get_args_parser().parse_args([
        '--coco_root', str(root / 'coco'), '--out', str(root / 'back'), '--names', str(root / 'back.txt'), '--masks',
        '--negatives', '--num_workers', '0']))
    return {path.stem: read_label_map(str(path), '') for path in (root / 'back/SegmentationClass').glob('*.png')}


@pytest.mark.parametrize('flags', [[], ['--parts']])
def test_pixels_and_class_names_are_the_same_after_the_way_back(flags, root):
    export(root, *flags)
    back = import_back(root)
    assert set(back) == set(LABELS)
    for name, labels in back.items():
        assert (labels == LABELS[name]).all(), name
    assert (root / 'back.txt').read_text().splitlines() == CLASSES


def test_an_image_without_objects_is_in_the_file(root):
    data = export(root)
    assert [image['file_name'] for image in data['images']] == ['a.jpg', 'b.png', 'c.jpg']
    assert [entry['image_id'] for entry in data['annotations']] == [1, 1, 2, 2]
    assert all((image['height'], image['width']) == (H, W) for image in data['images'])


def test_boxes_and_areas_of_classes_and_of_parts(root):
    entry = next(entry for entry in export(root)['annotations'] if entry['category_id'] == 1)
    assert entry['bbox'] == [2, 1, 12, 7] and entry['area'] == 35 and entry['iscrowd'] == 0
    parts = [entry for entry in export(root, '--parts')['annotations'] if entry['image_id'] == 1]
    assert [(part['category_id'], part['bbox'], part['area']) for part in parts] == [
        (1, [2, 1, 5, 3], 15), (1, [10, 3, 4, 5], 20), (2, [0, 8, 1, 1], 1)]


def test_pycocotools_reads_the_same_pixels(root):
    export(root)
    from pycocotools.coco import COCO
    coco = COCO(str(root / 'coco/annotations/instances_train2014.json'))
    for image_id, name in enumerate(LABELS, 1):
        labels = np.zeros((H, W))
        for entry in coco.loadAnns(coco.getAnnIds(image_id)):
            labels[coco.annToMask(entry) > 0] = entry['category_id']
        assert (labels == LABELS[name]).all(), name


def test_pixels_of_255_are_left_out_and_counted(root, capsys):
    before = export(root)
    save_label_map(str(root / 'labels/a.png'), np.where(LABELS['b'] == 2, 255, LABELS['a']))
    save_label_map(str(root / 'labels/c.png'), np.where(LABELS['b'] == 1, 255, 0))
    capsys.readouterr()
    data = export(root)
    count = sum((read_label_map(str(root / f'labels/{name}.png'), '') == 255).sum() for name in 'ac')
    assert f'\n{count} pixels of 255' in capsys.readouterr().out
    assert len(data['annotations']) < len(before['annotations'])            # a's one pixel of class 2 is 255 now


def test_the_list_chooses_the_images(root):
    (root / 'list.txt').write_text('b\n')
    assert [image['file_name'] for image in export(root, '--list', str(root / 'list.txt'))['images']] == ['b.png']
    (root / 'list.txt').write_text('d\n')
    with pytest.raises(BadInput, match='d.jpg.*list.txt'):
        export(root, '--list', str(root / 'list.txt'))


def test_a_name_that_the_list_has_twice_is_written_once(root):
    (root / 'list.txt').write_text('a\nc\na\n')
    data = export(root, '--list', str(root / 'list.txt'))
    assert [image['file_name'] for image in data['images']] == ['a.jpg', 'c.jpg']


@pytest.mark.parametrize('labels, words', [(np.full((H, W), 3), 'value 3.*--class_names'),
                                           (np.zeros((W, H)), f'{W}x{H}.*--voc12_root')])
def test_a_label_map_that_does_not_fit_is_named_and_nothing_is_written(labels, words, root):
    save_label_map(str(root / 'labels/b.png'), labels)
    with pytest.raises(BadInput, match=f'b.png .--label_dir.*{words}'):
        export(root)
    assert not os.listdir(root / 'coco/annotations')


def test_label_maps_of_another_class_list_are_refused_and_nothing_is_written(root):
    (root / 'labels/settings.json').write_text(json.dumps({'cam_dir class_names': ['dog', 'cat']}))
    with pytest.raises(BadInput) as error:
        export(root)
    assert all(word in str(error.value) for word in ('--label_dir', '--class_names', 'dog, cat', ', '.join(CLASSES)))
    assert not (root / 'coco').exists()


def test_without_pycocotools_one_line_says_how_to_get_it(root, monkeypatch):
    monkeypatch.setattr(export_coco, 'coco_mask', None)
    with pytest.raises(BadInput, match='pip install pycocotools'):
        export_coco.main(export_coco.get_args_parser().parse_args(
            ['--label_dir', str(root / 'labels'), '--voc12_root', str(root), '--out', str(root / 'x.json')]))
