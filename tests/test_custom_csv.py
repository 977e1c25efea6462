"""voc12/make_custom.py: the forms of a CSV file of image-level labels that it reads, and what it refuses."""
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from custom_runs import FILES, ONE_HOT, ROWS, content, images, labels_of, make, split_of, write_mask
from tool.cli import BadInput
from voc12.lists import check_images, load_class_names


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


@pytest.mark.parametrize('rows', [['image,label', 'a.jpg,cat', 'b.png,dog'],
                                  ['image,cat,dog', 'a.jpg,1,0', 'b.png,0,1']])
def test_header_is_one_although_an_image_is_called_like_it(rows, images):
    Image.new('RGB', (12, 9)).save(images / 'image.jpg')
    assert labels_of(make(images, rows)) == {'a': ['cat'], 'b': ['dog']}
    assert 'image' in labels_of(make(images, ['image,cat', 'b,dog']))           # no line has an extension


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


def test_folder_in_the_images_may_be_a_link_to_elsewhere(images, capsys):
    (images.parent / 'elsewhere').mkdir()
    Image.new('RGB', (12, 9)).save(images.parent / 'elsewhere' / 'z.png')
    (images / 'linked').symlink_to(images.parent / 'elsewhere')
    (images / 'again').symlink_to(images.parent / 'elsewhere')
    assert labels_of(make(images, ['linked/z.png,cat', 'a.jpg,dog']))['z'] == ['cat']
    assert 'z.png' not in capsys.readouterr().out               # it is used


@pytest.mark.parametrize('row', ['c.jpg', 'c', '.\\c.JPG'])
def test_extension_in_other_capitals_is_found(row, images):
    assert 'c' in labels_of(make(images, ['a.jpg,dog', f'{row},cat']))


@pytest.mark.parametrize('in_csv, on_disk', ['CD', 'DC'])
@pytest.mark.parametrize('ending', ['.jpg', '.JPG', ''])
def test_accents_may_be_composed_or_not_in_the_csv_and_on_disk(in_csv, on_disk, ending, images):
    (images / 'a.jpg').rename(images / (unicodedata.normalize('NF' + on_disk, 'über') + '.jpg'))
    write_mask(images.parent / 'masks' / (unicodedata.normalize('NF' + in_csv, 'über') + '.png'), [1])
    root = make(images, ['b.png,dog', unicodedata.normalize('NF' + in_csv, 'über') + ending + ',cat'],
                '--masks', images.parent / 'masks')
    assert labels_of(root)['über'] == ['cat'] and os.path.isfile(root / 'SegmentationClass' / 'über.png')


def test_class_with_accents_is_one_class_in_every_form(images):
    forms = [unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD')]
    names = images.parent / 'names.txt'
    names.write_text(f'{forms[1]}\ndog\n')
    for rows, flags in (([f'a.jpg,{forms[0]}', f'b.png,{forms[1]}', 'c.JPG,dog'], []),
                        ([f'a.jpg,{forms[0]}', f'b.png,{forms[0]}', 'c.JPG,dog'], ['--class_names', names]),
                        ([f'image,split,{forms[0]},dog', 'a.jpg,val,1,0', 'b.png,val,1,0', 'c.JPG,val,0,1'],
                         ['--label_columns', forms[1], 'dog'])):
        assert labels_of(make(images, rows, *flags)) == {'a': ['café'], 'b': ['café'], 'c': ['dog']}


@pytest.mark.parametrize('rows', [['a.jpg,cat', 'b.png,c\u200bat'], ['image,cat,do\xadg', 'a.jpg,1,0', 'b.png,0,1']])
def test_class_with_an_invisible_character_is_refused(rows, images):
    with pytest.raises(BadInput, match='--labels.*U.(200B|00AD)'):
        make(images, rows)


def test_stem_of_two_images_is_refused_without_its_extension(images):
    Image.new('RGB', (12, 9)).save(images / 'a.png')
    with pytest.raises(BadInput, match='"a" .--labels.*a.jpg, a.png'):
        make(images, ['b.png,dog', 'a,cat'])
    assert labels_of(make(images, ['b.png,dog', 'a.png,cat']))['a'] == ['cat']


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('text, words', [
    (['image,cat,dog', 'a.jpg,oui,non', 'b.png,non,oui'], '"non"'),
    (['image,cat,dog', 'a.jpg,+,', 'b.png,,+'], 'values'),
    (['image,cat,dog', 'a.jpg,0.9,0.1', 'b.png,0.2,0.7'], '"0.1".*--label_columns'),
    (['a.jpg,12,13,40,39,cat', 'b.png,15,16,40,38,dog'], r'\b12\b'),          # boxes
    (['a.jpg,Cat', 'b.png,dog', 'h.tif,cat'], '"Cat".*"cat"'),
    (['image,label', 'a.jpg,cat', 'b.png,-'], '"-"'),
    (['A.jpg,cat', 'b.png,dog'], '"A.jpg".*line 1'),         # no header
    ([',image,cat,dog', '0,a.jpg,True,False', '1,b.png,False,True'], '"0".*line 2'),
    (['image,cat,dog', 'a.jpg,1,-1', 'b.png,-1,1'], '"-1"'),
    (['image,split,cat', 'a.jpg,train,x', 'b.png,val,x'], '"train".*--label_columns'),
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
    *((['image,cat,dog,' + name, 'a.jpg,1,0,1', 'b.png,0,1,0'], f'"{name}".*--label_columns') for name in (
        'difficult', 'Occluded', 'truncated', 'crowd', 'is_crowd', 'iscrowd', 'any', 'all', 'total', 'count')),
    (['image,label,split', 'a.jpg,cat,train', 'b.png,-,val'], '"-"'),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,1'], 'line 3.*1 .*2 '),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,1,0,1'], 'line 3.*3 '),
    (['image,cat,dog', 'a.jpg,1,0', 'b.png,2,0'], '"2"'),
    (['a.jpg,1,0', 'b.png,0,1'], 'header'),
    (['image,cat,cat', 'a.jpg,1,0'], 'column'),
    (['image,,cat', 'a.jpg,1,0'], 'header'),
    (['a.jpg,cat', 'b.png,"dog', 'c.JPG,cat'], 'unexpected end of data'),
    (['a.jpg,background'], 'background'),
    (['image,cat,_Background_', 'a.jpg,1,0', 'b.png,0,1'], '_Background_'),
    (['a.jpg,1', 'b.png,dog'], '"1"'),
    (['image,label', 'a.jpg,cat', 'b.png,yes'], '"yes"'),
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
