"""The synthetic VOC that demos and tests train on: layout, labels, determinism, refusals."""
import filecmp
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation

from tool.cli import BadInput
from voc12.lists import CAT_LIST, label_from_xml, load_img_name_list
from voc12.make_toy import get_args_parser, main, make_image, make_mask, split_indices

COUNT, CLASSES = 32, 6


def make_toy(root, **flags):
    flags = {'count': COUNT, 'classes': CLASSES, 'seed': 0, **flags}
    main(get_args_parser().parse_args(['--out', str(root), '--size', '64', '80']
                                      + [f'--{flag}={value}' for flag, value in flags.items()]))
    return str(root)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp('toy') / 'VOCdevkit' / 'VOC2012')


def names_of(root, split='trainval'):
    return load_img_name_list(os.path.join(root, 'ImageSets', 'Segmentation', split + '.txt'))


def load_mask(root, name):
    return np.asarray(Image.open(os.path.join(root, 'SegmentationClass', name + '.png')))


def list_files(root):
    return sorted(os.path.relpath(os.path.join(folder, file), root)
                  for folder, _, files in os.walk(root) for file in files)


def test_every_name_has_image_mask_and_annotation_and_nothing_else_is_there(toy):
    names = names_of(toy)
    lists = [os.path.join('ImageSets', 'Segmentation', split + '.txt') for split in ('train', 'val', 'trainval')]
    expected = lists + ['TOY.txt'] + [os.path.join(folder, name + extension) for name in names for folder, extension in
                                      (('JPEGImages', '.jpg'), ('SegmentationClass', '.png'), ('Annotations', '.xml'))]
    assert len(names) == COUNT and list_files(toy) == sorted(expected)


def test_names_look_like_vocs(toy):
    assert all(re.fullmatch(r'2007_\d{6}', name) for name in names_of(toy))


def test_image_mask_and_annotation_agree_on_the_size(toy):
    for name in names_of(toy):
        size = ElementTree.parse(os.path.join(toy, 'Annotations', name + '.xml')).find('size')
        w, h = Image.open(os.path.join(toy, 'JPEGImages', name + '.jpg')).size
        assert load_mask(toy, name).shape == (h, w) == (int(size.findtext('height')), int(size.findtext('width')))


def test_images_are_rgb_of_varied_sizes_around_the_flag(toy):
    imgs = [Image.open(os.path.join(toy, 'JPEGImages', name + '.jpg')) for name in names_of(toy)]
    assert {img.mode for img in imgs} == {'RGB'} and len({img.size for img in imgs}) > COUNT // 2
    assert all(54 <= img.height <= 74 and 68 <= img.width <= 92 for img in imgs)


def test_masks_hold_background_objects_and_borders_only(toy):
    for name in names_of(toy):
        values = set(np.unique(load_mask(toy, name)))
        assert {0, 255} <= values <= {0, *range(1, CLASSES + 1), 255} and len(values) >= 3


def test_masks_carry_vocs_palette(toy):
    mask = Image.open(os.path.join(toy, 'SegmentationClass', names_of(toy)[0] + '.png'))
    palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert mask.mode == 'P'
    assert palette[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]


def test_the_border_is_about_two_pixels_wide():
    instances = np.zeros((20, 20), np.int32)
    instances[5:15, 5:15] = 1
    assert make_mask(instances, [3])[10].tolist() == [0] * 4 + [255] * 2 + [4] * 8 + [255] * 2 + [0] * 4


def test_xml_labels_are_the_classes_of_the_mask(toy):
    for name in names_of(toy):
        label = label_from_xml(os.path.join(toy, 'Annotations', name + '.xml'), CAT_LIST)
        assert set(np.flatnonzero(label) + 1) == set(np.unique(load_mask(toy, name))) - {0, 255}


def test_no_object_vanishes_at_the_smallest_size():
    for index in range(60):
        _, instances, classes = make_image(1, index, (48, 48), 20)
        assert set(np.unique(make_mask(instances, classes))) - {0, 255} == {k + 1 for k in classes} != set()


def test_boxes_enclose_their_objects(toy):
    for name in names_of(toy):
        mask, covered = load_mask(toy, name), np.zeros_like(load_mask(toy, name), bool)
        for element in ElementTree.parse(os.path.join(toy, 'Annotations', name + '.xml')).findall('object'):
            x0, y0, x1, y1 = (int(element.findtext('bndbox/' + tag)) for tag in ('xmin', 'ymin', 'xmax', 'ymax'))
            window = np.s_[y0 - 1:y1, x0 - 1:x1]
            assert CAT_LIST.index(element.findtext('name')) + 1 in mask[window]
            covered[window] = True
        assert not ((mask > 0) & (mask < 255) & ~covered).any()


def test_same_seed_same_files(toy, tmp_path):
    again = make_toy(tmp_path / 'again')
    assert filecmp.cmpfiles(toy, again, list_files(toy), shallow=False)[0] == list_files(toy)


def test_another_seed_makes_other_images(toy, tmp_path):
    other = make_toy(tmp_path / 'other', seed=1)
    images = [file for file in list_files(toy) if file.endswith('.jpg')]
    assert filecmp.cmpfiles(toy, other, images, shallow=False)[0] == []


def test_an_image_does_not_depend_on_how_many_are_made(toy, tmp_path):
    few = make_toy(tmp_path / 'few', count=5)
    images = [file for file in list_files(few) if file.endswith(('.jpg', '.png', '.xml'))]
    assert filecmp.cmpfiles(toy, few, images, shallow=False)[0] == images


def test_torchvision_reads_it_as_voc2012(toy):
    data = VOCSegmentation(os.path.dirname(os.path.dirname(toy)), year='2012', image_set='val', download=False)
    sizes = [(img.size, mask.size) for img, mask in (data[index] for index in range(len(data)))]
    assert len(sizes) == COUNT // 4 and all(img == mask for img, mask in sizes)


def test_train_and_val_are_disjoint_and_make_up_trainval(toy):
    train, val = names_of(toy, 'train'), names_of(toy, 'val')
    assert sorted(train + val) == names_of(toy) and not set(train) & set(val)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_every_class_is_in_both_lists(toy, split):
    labels = [label_from_xml(os.path.join(toy, 'Annotations', name + '.xml'), CAT_LIST)
              for name in names_of(toy, split)]
    assert np.flatnonzero(np.sum(labels, axis=0)).tolist() == list(range(CLASSES))


@pytest.mark.parametrize('count, classes', [(2, 1), (2, 20), (3, 6), (7, 2)])
def test_neither_list_is_empty_for_few_images(count, classes):
    train, val = split_indices(count, classes)
    assert train and val


@pytest.mark.parametrize('flags', [('--classes', '0'), ('--classes', '21'), ('--count', '1'), ('--size', '128', '40'),
                                   ('--seed', '-1')])
def test_a_bad_value_names_the_flag(tmp_path, flags):
    with pytest.raises(BadInput, match=flags[0]):
        main(get_args_parser().parse_args(['--out', str(tmp_path / 'toy'), *flags]))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / 'JPEGImages').mkdir()
    with pytest.raises(BadInput, match='--out'):
        make_toy(tmp_path)
    assert os.listdir(tmp_path) == ['JPEGImages']


def test_a_toy_set_may_be_written_again(tmp_path):
    make_toy(tmp_path / 'toy', count=4)
    make_toy(tmp_path / 'toy', count=3)
    assert len(names_of(str(tmp_path / 'toy'))) == 3


def test_every_flag_has_help():
    assert all(action.help for action in get_args_parser()._actions)
