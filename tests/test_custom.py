"""voc12/make_custom.py: the data root that it writes, with split and masks."""
import os

import numpy as np
import pytest
from PIL import Image

from custom_runs import FILES, ONE_HOT, ROWS, content, images, labels_of, make, split_of, write_mask
from tool.cli import BadInput
from tool.image_files import read_image, read_label_map
from voc12 import check
from voc12.lists import check_images, get_img_path, load_class_names
from voc12.make_custom import MARKER, get_args_parser, main, split_names

NAMES = ['a', 'b', 'c', 'd', 'e_1', 'f', 'g', 'h', 'i', 'j']
CLASSES = ['cat', 'dog', 'red fox']


# ---------------------------------------------------------------- what is written

def test_the_readers_of_training_read_it_back(images):
    root = make(images, ROWS)
    assert load_class_names(str(root / 'class_names.txt')) == CLASSES
    assert labels_of(root) == {name: sorted(classes) for name, classes in zip(NAMES, FILES.values())}
    train, val = split_of(root, 'train'), split_of(root, 'val')
    assert sorted(train + val) == NAMES and train == sorted(train) and val == sorted(val) and len(val) == 2
    check_images(train + val, 'the lists', str(root))


def test_labels_are_float32(images):
    labels = np.load(make(images, ROWS) / 'cls_labels.npy', allow_pickle=True).item()
    assert type(labels) is dict
    np.testing.assert_array_equal(labels['b'], np.array([1, 1, 0], np.float32), strict=True)


def test_images_of_any_format_open_behind_their_jpg_names(images):
    root = make(images, ROWS)
    for name, path in zip(NAMES, FILES):
        link = get_img_path(name, str(root))
        assert os.path.islink(link) and os.readlink(link) == str(images / path)
        np.testing.assert_array_equal(read_image(link), read_image(images / path))


def test_links_hold_from_any_folder_when_the_paths_given_are_relative(images, tmp_path, monkeypatch):
    make(images, ROWS)
    monkeypatch.chdir(tmp_path)
    main(get_args_parser().parse_args(['--images', 'photos', '--labels', 'labels.csv', '--out', 'relative']))
    monkeypatch.chdir('/')
    assert read_image(get_img_path('a', str(tmp_path / 'relative'))).size == (12, 9)


def test_copies_do_not_need_the_originals(images):
    root = make(images, ROWS, '--copy')
    image = root / 'JPEGImages' / 'b.jpg'
    assert not image.is_symlink() and image.read_bytes() == (images / 'b.png').read_bytes()


def test_files_are_copied_where_links_are_not_possible(images, monkeypatch):
    def refuse(*_):
        raise OSError('no links here')
    monkeypatch.setattr(os, 'symlink', refuse)
    image = make(images, ROWS) / 'JPEGImages' / 'b.jpg'
    assert not image.is_symlink() and image.read_bytes() == (images / 'b.png').read_bytes()


def test_class_names_of_the_user_keep_their_order(images):
    names = images.parent / 'names.txt'
    names.write_text('zebra\nred  fox\ndog\ncat\n')
    root = make(images, ROWS, '--class_names', names)
    assert load_class_names(str(root / 'class_names.txt')) == ['zebra', 'red fox', 'dog', 'cat']
    assert labels_of(root)['b'] == ['dog', 'cat']


def test_flags_for_the_next_scripts_are_printed(images, capsys):
    root = make(images, ROWS, out='my root')
    flags = (f"'{root}/ImageSets/Segmentation/train.txt' --voc12_root '{root}' --cls_labels '{root}/cls_labels.npy' "
             f"--class_names '{root}/class_names.txt'")
    assert capsys.readouterr().out.splitlines()[-2:] == [f'to check it: python voc12/check.py --list {flags}',
                                                         f'to train on it: python train_SEAM.py --train_list {flags}']


def test_images_without_a_line_are_counted(images, capsys):
    (images / 'inner').mkdir()
    for name in ('unused.jpg', 'inner/UNUSED.PNG'):
        Image.new('RGB', (8, 8)).save(images / name)
    make(images, ROWS)
    assert '2 images of' in (text := capsys.readouterr().out) and 'inner/UNUSED.PNG, unused.jpg' in text


def test_masks_and_results_inside_the_folder_of_the_images_are_not_counted_as_unused(images, capsys):
    write_mask(images / 'masks' / 'a.png', [1])
    for _ in range(2):
        make(images, ROWS, '--masks', images / 'masks', out=f'{images.name}/root')
    assert 'not used' not in capsys.readouterr().out


def test_the_check_passes_what_is_written(images, capsys):
    root = make(images, ROWS)
    assert check.main(check.get_args_parser().parse_args([
        '--voc12_root', str(root), '--list', str(root / 'ImageSets' / 'Segmentation' / 'train.txt'),
        '--cls_labels', str(root / 'cls_labels.npy'), '--class_names', str(root / 'class_names.txt')])) == 0


def test_images_per_class_are_printed(images, capsys):
    root = make(images, ROWS)
    labels, rows = labels_of(root), capsys.readouterr().out.splitlines()
    for name in CLASSES:
        having = [[name in labels[image] for image in split_of(root, split)] for split in ('train', 'val')]
        counts = [count for split in having for count in (sum(split), len(split) - sum(split))]
        assert any(row.split() == [*name.split(), *map(str, counts)] for row in rows)
    assert any(row.split() == ['all', '8', '2'] for row in rows)


# ---------------------------------------------------------------- split

def many(count):
    """Labels of `count` images with one or two of four classes."""
    eye = np.eye(4, dtype=np.float32)
    return {f'n{i:03d}': np.maximum(eye[i % 4], eye[i // 4 % 4]) for i in range(count)}


@pytest.mark.parametrize('count, share', [(40, .2), (41, .5), (100, 0), (7, .3)])
def test_split_has_the_share_and_leaves_nothing_out(count, share):
    labels = many(count)
    train, val = split_names(labels, share, 0)
    assert len(val) == round(share * count) and sorted(train + val) == sorted(labels)


def test_split_goes_by_seed_and_not_by_row_order(images):
    lists = [split_of(make(images, rows, '--val_share', .4, out=str(number)), 'val')
             for number, rows in enumerate((ROWS, ROWS[::-1], ONE_HOT[:1] + ONE_HOT[:4:-1] + ONE_HOT[1:5]))]
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == 4
    splits = [split_names(many(40), .2, seed)[1] for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1] and splits[0] != splits[2] != splits[3]


@pytest.mark.parametrize('seed', range(8))
def test_every_class_is_in_train(seed):
    labels = {f'n{i}': np.eye(5, dtype=np.float32)[i // 2] for i in range(9)}      # the last class has one image
    train, val = split_names(labels, .9, seed)
    assert np.sum([labels[name] for name in train], axis=0).tolist() == [1, 1, 1, 1, 1] and len(val) == 4


def test_no_val_list_without_a_share_not_even_an_old_one(images):
    make(images, ROWS)
    root = make(images, ROWS, '--val_share', 0)
    assert os.listdir(root / 'ImageSets' / 'Segmentation') == ['train.txt'] and split_of(root, 'train') == NAMES


# ---------------------------------------------------------------- masks

def test_masks_are_linked_from_the_paths_of_the_images_and_counted(images, capsys):
    masks = images.parent / 'masks'
    for path in ('a.png', 'e 1.png', 'sub/d.png', 'unknown.png'):
        write_mask(masks / path, [0, 1, 3, 255])
    root = make(images, ROWS, '--masks', masks)
    folder = root / 'SegmentationClass'
    assert sorted(os.listdir(folder)) == ['a.png', 'd.png', 'e_1.png'] and (folder / 'a.png').is_symlink()
    assert set(read_label_map(str(folder / 'a.png'), '--gt_dir').flat) == {0, 1, 3, 255}
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith('with a mask'))
    assert sum(map(int, row.split()[3:])) == 3


def test_image_is_not_its_own_mask(images):
    with pytest.raises(BadInput, match='b.png .--masks'):
        make(images, ROWS, '--masks', images)


def test_masks_of_images_in_sub_folders_may_lie_in_one_folder_and_links_of_earlier_runs_go(images):
    write_mask(images.parent / 'masks' / 'd.png', [1])
    write_mask(images.parent / 'first' / 'a.png', [1])
    make(images, ROWS, '--masks', images.parent / 'first')
    assert os.listdir(make(images, ROWS, '--masks', images.parent / 'masks') / 'SegmentationClass') == ['d.png']


def test_masks_of_other_images_alone_are_refused(images):
    write_mask(images.parent / 'masks' / 'a_mask.png', [1])
    with pytest.raises(BadInput, match='masks .--masks'):
        make(images, ROWS, '--masks', images.parent / 'masks')


# ---------------------------------------------------------------- a root that exists

def test_folder_of_somebody_else_is_refused(images):
    other = images.parent / 'root'
    other.mkdir()
    make(images, ROWS, out='root')                          # an empty folder will do
    (other / MARKER).unlink()
    with pytest.raises(BadInput, match='--out'):
        make(images, ROWS)


def test_images_inside_the_root_are_refused(images):
    root = make(images, ROWS)
    with pytest.raises(BadInput, match='--images'):
        main(get_args_parser().parse_args(['--images', str(root / 'JPEGImages'), '--labels',
                                           str(images.parent / 'labels.csv'), '--out', str(root)]))
    assert read_image(get_img_path('a', str(root))).size == (12, 9)


def test_second_run_gives_what_a_first_one_gives_and_keeps_what_is_not_its_own(images):
    root = make(images, ROWS)
    (root / 'cam').mkdir()
    write_mask(root / 'SegmentationClass' / 'b.png', [2])
    before = content(make(images, ROWS[:5]))
    fresh = content(make(images, ROWS[:5], out='fresh'))
    assert fresh.items() <= before.items() and (root / 'cam').is_dir() and 'SegmentationClass/b.png' in before


@pytest.mark.parametrize('flags', [[], ['--copy']])
def test_files_of_the_user_are_not_overwritten(flags, images):
    root = make(images, ROWS[:2], *flags)
    (root / 'JPEGImages' / 'c.jpg').write_bytes(b'mine')
    with pytest.raises(BadInput, match='c.jpg .--out'):
        make(images, ROWS, *flags)
    assert (root / 'JPEGImages' / 'c.jpg').read_bytes() == b'mine' and set(labels_of(root)) == {'a', 'b'}


def test_bad_input_leaves_the_earlier_root_as_it_was(images):
    before = content(make(images, ROWS))
    with pytest.raises(BadInput):
        make(images, ROWS + ['x.jpg,cat'])
    assert content(images.parent / 'root') == before


def test_stopped_run_leaves_the_earlier_lists_and_is_made_good_by_the_next(images, monkeypatch):
    root = make(images, ROWS[5:])

    def stop(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, 'save', stop)
        make(images, ROWS[:5])
    assert sorted(split_of(root, 'train') + split_of(root, 'val')) == NAMES[5:] == sorted(labels_of(root))
    assert content(make(images, ROWS)) == content(make(images, ROWS, out='fresh'))
