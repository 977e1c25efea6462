"""voc12/make_custom.py: a data root from a folder of images and a CSV file of image-level labels."""
import os

import numpy as np
import pytest
from PIL import Image

from tool.cli import BadInput
from tool.image_files import read_image, read_label_map, save_label_map
from voc12 import check
from voc12.lists import check_images, get_img_path, load_class_names, load_img_name_list, load_labels
from voc12.make_custom import MARKER, get_args_parser, main, split_names

# file -> its classes; every format that is common in a folder of photographs
FILES = {'a.jpg': ['cat'], 'b.png': ['dog', 'cat'], 'c.JPG': ['dog'], 'sub/d.webp': ['red fox'], 'e 1.bmp': ['cat'],
         'f.gif': ['dog'], 'g.jpeg': ['red fox', 'dog'], 'h.tif': ['cat'], 'i.jpg': ['dog'], 'j.jpg': ['red fox']}
NAMES = ['a', 'b', 'c', 'd', 'e_1', 'f', 'g', 'h', 'i', 'j']
CLASSES = ['cat', 'dog', 'red fox']
ROWS = [','.join([path, *classes]) for path, classes in FILES.items()]
ONE_HOT = ['image,dog,cat,red fox'] + [
    ','.join([path, *(str(int(name in classes)) for name in ('dog', 'cat', 'red fox'))])
    for path, classes in FILES.items()]


@pytest.fixture
def images(tmp_path):
    """Folder of ten images, 12 pixels wide and 9 high."""
    folder = tmp_path / 'photos'
    (folder / 'sub').mkdir(parents=True)
    for number, path in enumerate(FILES):
        Image.new('RGB', (12, 9), (20 * number, 100, 50)).save(folder / path)
    return folder


def arguments(images, text, *flags, out='root'):
    """Command line after writing the labels: `text` (str, bytes, or a list of lines)."""
    text = '\n'.join(text) if isinstance(text, list) else text
    labels = images.parent / 'labels.csv'
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ['--images', str(images), '--labels', str(labels), '--out', str(images.parent / out), *map(str, flags)]


def make(images, text, *flags, out='root'):
    """Runs the script in this process; returns the data root."""
    main(get_args_parser().parse_args(arguments(images, text, *flags, out=out)))
    return images.parent / out


def split_of(root, split):
    return load_img_name_list(str(root / 'ImageSets' / 'Segmentation' / f'{split}.txt'))


def labels_of(root):
    """dict name -> list of its class names, by the readers that training uses."""
    class_names = load_class_names(str(root / 'class_names.txt'))
    names = np.load(root / 'cls_labels.npy', allow_pickle=True).item()
    labels = load_labels(names, str(root / 'cls_labels.npy'), str(root), class_names)
    return {name: [class_names[i] for i in np.flatnonzero(label)] for name, label in labels.items()}


def content(root):
    """dict relative path -> bytes of every file."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def write_mask(path, values, size=(9, 12)):
    """A label map of (h, w) whose first pixels have `values`."""
    mask = np.zeros(size, np.uint8)
    mask.flat[:len(values)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    save_label_map(str(path), mask)


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
    assert capsys.readouterr().out.splitlines()[-2:] == [f'next: python voc12/check.py --list {flags}',
                                                         f'then: python train_SEAM.py --train_list {flags}']


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


# ---------------------------------------------------------------- CSV forms

def spelled(yes, no):
    """The one-hot form with other words for 1 and 0."""
    return [ONE_HOT[0]] + [','.join([path, *(yes if bit == '1' else no for bit in bits)])
                           for path, *bits in (row.split(',') for row in ONE_HOT[1:])]


@pytest.mark.parametrize('text', [
    ONE_HOT,
    *(spelled(*pair.split('/', 1)) for pair in ('True/False', 'TRUE/FALSE', 'yes/no', 'Y/N', 't/F', 'x/', 'X/', '1/',
                                             '1.00/0.00', 'on/off', '✓/', '✓/✗', 'x/-', '1/NaN', 'yes/n/a')),
    [*spelled('TRUE', '0')[:4], *spelled('1.00', 'f')[4:7], *spelled('x', '')[7:]],     # a mixture
    [row.replace(',', ';') for row in ONE_HOT[:1]] + [row.replace(',', ';').replace('1', '1,0')
                                                      if not row.startswith('e') else row.replace(',', ';')
                                                      for row in ONE_HOT[1:]],
    [row.replace('1', '1.0') if row.startswith('j') else row for row in ONE_HOT],
    [row.replace(',0', ',') for row in ONE_HOT],                                       # empty for 0
    ['file name,classes', *ROWS],
    [f'{path},{"; ".join(classes)}' for path, classes in FILES.items()],
    [f'{path},{"|".join(classes)},,' for path, classes in FILES.items()],
    [f'{path};{"|".join(classes)}' for path, classes in FILES.items()],
    [row.replace(',', ';') for row in ROWS],
    [row.replace(',', ';') for row in ONE_HOT],
    ['\t'.join([path, ';'.join(classes)]) for path, classes in FILES.items()],
    [f' "{path}", ' + ' , '.join(classes) + ' ' for path, classes in FILES.items()],
    [f'{path},{name}' for path, classes in FILES.items() for name in classes],         # rows add up
    [os.path.splitext(path)[0] + ',' + '|'.join(classes) for path, classes in FILES.items()],
    [f'./{row}' for row in ROWS],
    ('\ufeff' + '\r\n'.join(ROWS) + '\r\n\r\n').encode(),
    ('\ufeff' + '\r\n'.join(ONE_HOT)).encode(),
])
def test_every_form_of_the_same_labels_gives_the_same_files(text, images):
    assert content(make(images, text, out='other')) == content(make(images, ROWS))


def test_header_is_told(images, capsys):
    make(images, ONE_HOT)
    assert capsys.readouterr().out.count('first line is a header') == 1
    make(images, ROWS)
    assert 'is a header' not in capsys.readouterr().out


def test_one_hot_class_without_images_stays_a_class(images):
    root = make(images, ['image,yak,cat', 'a.jpg,0,1', 'h.tif,0,1'])
    assert load_class_names(str(root / 'class_names.txt')) == ['cat', 'yak']


def test_name_with_a_delimiter_in_quotes_is_a_class_where_it_is_listed(images):
    (images.parent / 'names.txt').write_text('light, red\ndog\n')
    flags = '--class_names', images.parent / 'names.txt'
    assert labels_of(make(images, ['a.jpg,"light, red"', 'b.png,dog'], *flags))['a'] == ['light, red']


# ---------------------------------------------------------------- columns that are no labels

@pytest.mark.parametrize('rows', [
    ['image,label,split', 'a.jpg,cat,train', 'b.png,dog,val', 'c.JPG,cat,test'],
    ['image,set,Labels', 'a.jpg,train,cat', 'b.png,train,dog', 'c.JPG,val,cat'],
    ['file_path,class_name,source', 'a.jpg,cat,human', 'b.png,dog,model', 'c.JPG,cat,'],
    ['image,choice,annotator', 'a.jpg,cat,ann@x.org', 'b.png,dog,bob@x.org', 'c.JPG,cat,bob@x.org'],
    ['image;class;remark', 'a.jpg;cat;two, blurred', 'b.png;dog', 'c.JPG;cat;'],
    ['image,category,verified', 'a.jpg,cat,1', 'b.png,dog,0', 'c.JPG,cat,1'],
    ['image,label_1,label_2,score', 'a.jpg,cat,,0.9', 'b.png,,dog,0.8', 'c.JPG,cat,,0.7'],
    ['image,split,labels', 'a.jpg,train,cat', 'b.png,val,dog', 'c.JPG,val,cat,cat'],          # more below the last
])
def test_columns_beside_the_labels_are_told_and_not_read(rows, images, capsys):
    assert labels_of(make(images, rows)) == {'a': ['cat'], 'b': ['dog'], 'c': ['cat']}
    unread = set(rows[0].replace(';', ',').split(',')[1:]) & {'split', 'set', 'source', 'annotator', 'remark',
                                                             'verified', 'score'}
    assert f'not read: {unread.pop()}\n' in capsys.readouterr().out


@pytest.mark.parametrize('rows, columns', [
    (['image,split,cat,dog', 'a.jpg,train,1,0', 'b.png,val,0,1'], ['cat', 'dog']),
    (['image,verified,cat,dog', 'a.jpg,1,1,0', 'b.png,0,0,1'], ['dog', 'cat']),
    (['image,split,what', 'a.jpg,train,cat', 'b.png,val,dog'], ['what']),
    (['image,label,tag', 'a.jpg,cat,blurred', 'b.png,dog,dark'], ['label']),
])
def test_label_columns_names_the_columns_that_hold_classes(rows, columns, images):
    assert labels_of(make(images, rows, '--label_columns', *columns)) == {'a': ['cat'], 'b': ['dog']}
    with pytest.raises(BadInput, match='--label_columns'):
        make(images, rows)
    with pytest.raises(BadInput, match='"zebra" .--label_columns.'):
        make(images, rows, '--label_columns', 'zebra')


# ---------------------------------------------------------------- images without objects

@pytest.mark.parametrize('rows', [
    ['a.jpg,cat', 'b.png,', 'c.JPG,dog,', 'f.gif,;'],
    ['image,label', 'a.jpg,cat', 'b.png,', 'c.JPG,dog', 'f.gif,""'],
    ['image,cat,dog', 'a.jpg,1,0', 'b.png,0,0', 'c.JPG,0,1', 'f.gif,0,0'],
])
def test_image_without_objects_has_a_label_of_zeros_and_is_counted(rows, images, capsys):
    root = make(images, rows, '--val_share', 0)
    labels = np.load(root / 'cls_labels.npy', allow_pickle=True).item()
    assert {name: label.tolist() for name, label in labels.items()} == {'a': [1, 0], 'b': [0, 0], 'c': [0, 1],
                                                                        'f': [0, 0]}
    out = capsys.readouterr().out
    assert split_of(root, 'train') == ['a', 'b', 'c', 'f'] and '2 of 4 images show none of the classes: b, f' in out
    assert 'warning' not in out


def test_class_that_every_image_shows_is_warned_of(images, capsys):
    make(images, ['a.jpg,cat', 'b.png,cat|dog', 'c.JPG,cat'], '--val_share', 0)
    warning, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning')]
    assert 'cat' in warning and 'dog' not in warning and 'without it' in warning


def test_class_names_beyond_ascii(images):
    assert labels_of(make(images, ['a.jpg,Füchsin', 'b.png,猫']))['a'] == ['Füchsin']


@pytest.mark.parametrize('file', ['a.jpg.png', 'a b.png', 'a  b.png', 'a.b.png'])
def test_names_survive_the_readers_of_lists(file, images):
    (images / 'a.jpg').rename(images / file)
    root = make(images, [f'{file},cat', 'b.png,dog'])
    check_images(split_of(root, 'train'), 'the list', str(root))
    assert set(labels_of(root)) == set(split_of(root, 'train')) and len(labels_of(root)) == 2


def test_image_without_a_class_in_one_row_has_those_of_its_others(images):
    assert labels_of(make(images, ['image,cat,dog', 'a.jpg,0,0', 'a.jpg,1,0', 'b.png,0,1']))['a'] == ['cat']


def test_line_break_in_a_field_is_a_blank(images):
    assert labels_of(make(images, ['a.jpg,"red', 'fox"', 'b.png,dog']))['a'] == ['red fox']


def test_numbers_and_capitals_are_class_names_where_they_are_listed(images):
    (images.parent / 'names.txt').write_text('7\ncat\nCat\n')
    assert labels_of(make(images, ['a.jpg,7|Cat', 'b.png,cat'], '--class_names', images.parent / 'names.txt')) == {
        'a': ['7', 'Cat'], 'b': ['cat']}


def test_two_classes_in_a_wide_table_are_read_without_the_header(images):
    assert labels_of(make(images, ['a.jpg,cat,dog', 'b.png,dog,']))['a'] == ['cat', 'dog']


# ---------------------------------------------------------------- paths in the CSV

@pytest.mark.parametrize('prefix', ['', './', '../photos/', 'sub/../', '{images}/', '{link}/'])
def test_paths_of_one_image_in_any_spelling_are_that_image_and_its_mask(prefix, images):
    (images.parent / 'link').symlink_to(images)
    prefix = prefix.format(images=images, link=images.parent / 'link')
    write_mask(images.parent / 'masks' / 'b.png', [1])
    root = make(images, [f'{prefix}b.png,cat', 'b.png,dog', 'a.jpg,cat'], '--masks', images.parent / 'masks')
    assert labels_of(root) == {'a': ['cat'], 'b': ['cat', 'dog']}
    assert os.readlink(root / 'SegmentationClass' / 'b.png') == str(images.parent / 'masks' / 'b.png')


@pytest.mark.parametrize('field', ['../other.png', '{parent}/other.png'])
def test_image_outside_of_the_folder_is_refused(field, images):
    Image.new('RGB', (12, 9)).save(images.parent / 'other.png')
    with pytest.raises(BadInput, match='other.png" .--labels.*--images'):
        make(images, ['a.jpg,cat', field.format(parent=images.parent) + ',dog'])


def test_folder_in_the_images_may_be_a_link_to_elsewhere(images):
    (images.parent / 'elsewhere').mkdir()
    Image.new('RGB', (12, 9)).save(images.parent / 'elsewhere' / 'z.png')
    (images / 'linked').symlink_to(images.parent / 'elsewhere')
    assert labels_of(make(images, ['linked/z.png,cat', 'a.jpg,dog']))['z'] == ['cat']


@pytest.mark.parametrize('row', ['c.jpg', 'c', '.\\c.JPG'])
def test_extension_in_other_capitals_is_found(row, images):
    assert 'c' in labels_of(make(images, [f'{row},cat', 'a.jpg,dog']))


def test_stem_of_two_images_is_refused_without_its_extension(images):
    Image.new('RGB', (12, 9)).save(images / 'a.png')
    with pytest.raises(BadInput, match='"a" .--labels.*a.jpg, a.png'):
        make(images, ['b.png,dog', 'a,cat'])
    assert labels_of(make(images, ['b.png,dog', 'a.png,cat']))['a'] == ['cat']


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


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('text, words', [
    (['image,cat,dog', 'a.jpg,oui,non', 'b.png,non,oui'], '"non"'),
    (['image,cat,dog', 'a.jpg,+,', 'b.png,,+'], 'values'),
    (['image,cat,dog', 'a.jpg,0.9,0.1', 'b.png,0.2,0.7'], '"0.1".*--label_columns'),
    (['a.jpg,12,13,40,39,cat', 'b.png,15,16,40,38,dog'], r'\b12\b'),          # boxes
    (['a.jpg,Cat', 'b.png,dog', 'h.tif,cat'], '"Cat".*"cat"'),
    (['image,label', 'a.jpg,cat', 'b.png,-'], '"cat".*"-"'),
    (['A.jpg,cat', 'b.png,dog'], '"A.jpg".*line 1'),         # no header
    ([',image,cat,dog', '0,a.jpg,True,False', '1,b.png,False,True'], '"0".*line 2'),
    (['image,cat,dog', 'a.jpg,1,-1', 'b.png,-1,1'], '"-1".*"1"'),
    (['image,split,cat', 'a.jpg,train,x', 'b.png,val,x'], '"train".*"x"'),
    (['image,cat,dog', 'a.jpg,x,y', 'b.png,y,x'], 'x, y'),
    (['a.jpg,True,False', 'b.png,False,True'], 'header'),
    (['a.jpg,cat', '/etc/hostname,dog'], '/etc/hostname'),
    ('', 'rows'),
    ('image,classes', 'rows'),
    (['a.jpg,cat', 'x.jpg,dog', 'y,dog', ',dog'], '3 .*"x.jpg".*line 2'),
    (['a.jpg', 'b.png'], '"a.jpg"'),
    (['a.jpg,cat', 'b.png'], 'line 2.*"b.png"'),
    (['image,split,label', 'a.jpg,train,cat', 'b.png,val'], 'line 3.*"b.png"'),
    (['image,label,split', 'a.jpg,cat,dog,train'], 'line 2.*4 '),
    (['a.jpg,', 'b.png,'], 'no image'),
    (['image,cat,dog', 'a.jpg,0,0', 'b.png,0,0'], 'no image'),
    (['image,label', 'a.jpg,cat', 'b.png,negative'], 'negative'),
    (['image,label', 'a.jpg,1', 'b.png,0'], '"0".*"label"'),
    (['image,fold,cat', 'a.jpg,1,0', 'b.png,0,1'], '"0".*"fold"'),
    (['image,label,split', 'a.jpg,cat,train', 'b.png,-,val'], '"cat".*"-"'),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,1'], 'line 3.*1 .*2 '),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,1,0,1'], 'line 3.*3 '),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,2,0'], '"2".*"0"'),
    (['a.jpg,1,0', 'b.png,0,1'], 'header'),
    (['image,cat,cat', 'a.jpg,1,0'], 'column'),
    (['image,,cat', 'a.jpg,1,0'], 'header'),
    (['a.jpg,cat', 'b.png,"dog', 'c.JPG,cat'], 'unexpected end of data'),
    (['a.jpg,background'], 'background'),
    (['image,cat,_Background_', 'a.jpg,1,0', 'b.png,0,1'], '_Background_'),
    (['a.jpg,1', 'b.png,dog'], '"dog"'),
    ([f'a.jpg,{"|".join(f"c{i}" for i in range(255))}'], '255'),
    ('a.jpg,F\xfcchsin'.encode('latin-1'), 'text'),
])
def test_bad_labels_are_named_and_nothing_is_written(text, words, images):
    with pytest.raises(BadInput, match=words) as error:
        make(images, text)
    assert '\n' not in str(error.value) and 'labels' in str(error.value)
    assert sorted(os.listdir(images.parent)) == ['labels.csv', 'photos']


@pytest.mark.parametrize('field', [
    '"cat, dog"', '"cat,dog"', 'cat+dog', 'cat/dog', 'cat & dog', 'cat&dog', 'cat and dog', '"[\'cat\', \'dog\']"',
    '"[""cat"", ""dog""]"', '"{""label"": ""cat""}"', '"(\'cat\', \'dog\')"', 'cat:1', 'cat=1', 'cat\\dog',
    'cat、dog', 'cat，dog', 'cat > dog', 'cat_bird', 'bird.cat', 'ann@x.org', '0 14', '2024-01-01', '#1',
    'dog bird', 'val', '1e5'])
@pytest.mark.parametrize('header', [[], ['image,label']])
def test_several_classes_in_one_field_never_become_one_of_a_longer_name(header, field, images):
    rows = [*header, f'a.jpg,{field}', 'b.png,cat', 'c.JPG,bird dog']
    with pytest.raises(BadInput, match='labels.csv .--labels') as error:
        make(images, rows)
    assert any(part.strip('\'\\') in str(error.value) for part in field.split('"')) and '\n' not in str(error.value)
    assert not (images.parent / 'root').exists()


def test_names_that_share_a_word_are_refused_until_they_are_listed(images):
    rows = ['a.jpg,polar bear', 'b.png,cat dog', 'c.JPG,cat bird']
    with pytest.raises(BadInput, match='"cat dog" and "cat bird".*--class_names'):
        make(images, rows)
    (images.parent / 'names.txt').write_text('polar bear\ncat dog\ncat bird\n')
    assert labels_of(make(images, rows, '--class_names', images.parent / 'names.txt'))['b'] == ['cat dog']


def test_names_with_blanks_are_told(images, capsys):
    make(images, ROWS)
    assert '1 classes have a blank in their name: red fox' in capsys.readouterr().out


@pytest.mark.parametrize('name', ["St. Bernard's dog (old)", 'x-ray', 'traffic_light', 'बिल्ली', 'L’Oréal',
                                  'boeing 737'])
def test_names_of_any_language_are_classes(name, images):
    assert labels_of(make(images, [f'a.jpg,{name}', 'b.png,cat']))['a'] == [name]


def test_class_that_is_not_among_the_given_names_is_refused(images):
    (images.parent / 'names.txt').write_text('cat\ndog\n')
    with pytest.raises(BadInput, match='names.txt .--class_names.*"red fox"'):
        make(images, ROWS, '--class_names', images.parent / 'names.txt')
    assert not (images.parent / 'root').exists()


@pytest.mark.parametrize('twin', ['sub/a.jpg', 'a.png', 'sub/e_1.jpg'])
def test_two_images_of_one_name_are_both_named(twin, images):
    first = 'e 1.bmp' if '1' in twin else 'a.jpg'
    Image.new('RGB', (12, 9)).save(images / twin)
    with pytest.raises(BadInput) as error:
        make(images, [f'{first},cat', f'{twin},dog'])
    assert first in str(error.value) and twin in str(error.value)


def test_share_beyond_its_range_is_refused(images):
    with pytest.raises(BadInput, match='--val_share.*0.9'):
        make(images, ROWS, '--val_share', 1)


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
