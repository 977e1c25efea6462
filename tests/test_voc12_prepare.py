"""voc12/make_lists.py and voc12/make_cls_labels.py on a devkit of seven images."""
import hashlib
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tool.cli import BadInput
from voc12 import make_cls_labels, make_lists
from voc12.canonical import CANONICAL, compare_labels, compare_names, labels_digest, names_digest
from voc12.lists import (CAT_LIST, check_images, get_img_path, label_from_xml, load_class_names, load_img_name_list,
                         load_labels)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# name -> class indices 0..19 of its objects
OBJECTS = {'2007_000001': [0], '2007_000002': [14, 12], '2007_000003': [7], '2007_000004': [19],
           '2008_000005': [14, 14], '2008_000006': [2, 0], '2008_000007': [5]}
TRAIN, VAL, TEST = ['2007_000001', '2007_000003'], ['2007_000002', '2007_000004'], ['2008_000007']
SBD_TRAIN, SBD_VAL = ['2008_000005', '2007_000002'], ['2008_000006', '2007_000003']
TRAIN_AUG = ['2007_000001', '2007_000003', '2008_000005', '2008_000006']

XML = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = """<object><name>{category}</name><difficult>{difficult}</difficult>
<part><name>head</name></part><part><name>dog</name></part></object>"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def write_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8).reshape(1, -1)).save(path)


@pytest.fixture
def devkit(tmp_path):
    """VOC2012 with JPEG, XML, PNG and lists, SBD, and the labels as they should be."""
    root = tmp_path / 'VOC2012'
    for name, classes in OBJECTS.items():
        write(root / 'JPEGImages' / f'{name}.jpg', 'no script here opens an image')
        objects = ''.join(OBJECT.format(category=CAT_LIST[c], difficult=int(c == 12)) for c in classes)
        write(root / 'Annotations' / f'{name}.xml', XML.format(name=name, objects=objects))
        folder = 'SegmentationClass' if name in VAL else 'SegmentationClassAug'
        write_mask(root / folder / f'{name}.png', [0, 255] + [c + 1 for c in classes])
    (root / 'SegmentationClassAug' / '2008_000007.png').unlink()      # a test image has no mask
    split = root / 'ImageSets' / 'Segmentation'
    for key, names in (('train', TRAIN), ('val', VAL), ('test', TEST)):
        write(split / f'{key}.txt', '\n'.join(names) + '\n')
    dataset = tmp_path / 'benchmark_RELEASE' / 'dataset'
    write(dataset / 'train.txt', '\n'.join(SBD_TRAIN) + '\n')
    write(dataset / 'val.txt', '\n'.join(SBD_VAL) + '\n')
    for name in SBD_TRAIN + SBD_VAL:
        write(dataset / 'cls' / f'{name}.mat', '')
    return root


def expected_label(name):
    return np.isin(np.arange(20), OBJECTS[name]).astype(np.float32)


def run_lists(devkit, out_dir, *flags):
    """Runs make_lists in this process; returns the text of the files that it wrote."""
    args = ['--voc12_root', str(devkit), '--out_dir', str(out_dir), *flags]
    make_lists.main(make_lists.get_args_parser().parse_args(args))
    return {path.name: path.read_bytes().decode() for path in out_dir.iterdir()}


def run_labels(devkit, out, *flags, train=TRAIN_AUG, val=VAL):
    """Runs make_cls_labels in this process; returns the dict that it wrote."""
    folder = devkit.parent / 'lists'
    args = ['--train_list', str(write(folder / 'train_aug.txt', '\n'.join(train))),
            '--val_list', str(write(folder / 'val.txt', '\n'.join(val))),
            '--voc12_root', str(devkit), '--out', str(out), *flags]
    make_cls_labels.main(make_cls_labels.get_args_parser().parse_args(args))
    return np.load(out, allow_pickle=True).item()


@pytest.fixture
def repo(tmp_path):
    """A copy of what the scripts need, since their defaults write beside them."""
    folder = tmp_path / 'repo'
    for name in ('tool', 'voc12'):
        shutil.copytree(os.path.join(ROOT, name), folder / name, ignore=shutil.ignore_patterns('*.txt', '*.npy'))
    return folder


def run_script(cwd, *command):
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=60)


def check_one_line(process, *words):
    """The script ended with exit code 2 and one line on stderr that contains `words`."""
    assert process.returncode == 2
    assert process.stderr.count('\n') == 1, process.stderr
    for word in words:
        assert word in process.stderr


# ---------------------------------------------------------------- digests

def test_names_digest_is_of_the_sorted_joined_names():
    assert names_digest(['b', 'a']) == hashlib.sha256(b'a\nb').hexdigest()


def test_labels_digest_is_of_the_float32_rows_in_sorted_order():
    labels = {'b': np.eye(20)[3], 'a': np.eye(20)[0]}
    data = struct.pack('<40f', *([1.] + [0.] * 19 + [0.] * 3 + [1.] + [0.] * 16))
    assert labels_digest(['b', 'a'], labels) == hashlib.sha256(data).hexdigest()


def test_compare_names_knows_the_canonical_list(monkeypatch):
    monkeypatch.setitem(CANONICAL, 'train', (2, 'a', 'b', hashlib.sha256(b'a\nb').hexdigest(), None))
    assert compare_names(['b', 'a'], 'train') == 'identical to the list used by SEAM'


def test_compare_names_says_count_and_ends():
    text = compare_names(['2007_000032', '2011_003276'], 'train_aug')
    assert 'NOT' in text and '10580 fewer' in text and 'last' not in text
    assert 'the last name is 2011_003276, not 2011_003255' in compare_names(['2007_000032', '2011_003276'], 'train')


def test_compare_labels_tells_equal_from_changed_labels(monkeypatch):
    labels = {'a': np.eye(20)[0], 'b': np.eye(20)[1]}
    digest = hashlib.sha256(np.eye(20, dtype='<f4')[:2].tobytes()).hexdigest()
    monkeypatch.setitem(CANONICAL, 'train', (2, 'a', 'b', hashlib.sha256(b'a\nb').hexdigest(), digest))
    assert compare_labels(['a', 'b'], labels).endswith('labels: identical to those used by SEAM')
    labels['b'] = np.eye(20)[2]
    assert 'labels: NOT' in compare_labels(['a', 'b'], labels)


# ---------------------------------------------------------------- lists

def test_lists_have_two_columns_sorted(devkit, tmp_path):
    files = run_lists(devkit, tmp_path / 'out', '--seg_aug', 'SegmentationClassAug')
    assert files['train_aug.txt'] == ''.join(
        f'/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n' for name in TRAIN_AUG)


def test_lists_are_read_back(devkit, tmp_path):
    run_lists(devkit, tmp_path / 'out', '--seg_aug', 'SegmentationClassAug')
    for key, names in (('train', TRAIN), ('val', VAL), ('test', TEST), ('train_aug', TRAIN_AUG)):
        assert load_img_name_list(str(tmp_path / 'out' / f'{key}.txt')) == names


def test_test_list_has_one_column(devkit, tmp_path):
    assert run_lists(devkit, tmp_path / 'out')['test.txt'] == '/JPEGImages/2008_000007.jpg\n'


def test_devkit_without_test_list_writes_the_others(devkit, tmp_path):
    (devkit / 'ImageSets' / 'Segmentation' / 'test.txt').unlink()
    assert sorted(run_lists(devkit, tmp_path / 'out')) == ['train.txt', 'val.txt']


@pytest.mark.parametrize('folder', ['benchmark_RELEASE', 'benchmark_RELEASE/dataset'])
def test_sbd_and_masks_give_the_same_train_aug(folder, devkit, tmp_path):
    from_masks = run_lists(devkit, tmp_path / 'a', '--seg_aug', str(devkit / 'SegmentationClassAug'))
    from_sbd = run_lists(devkit, tmp_path / 'b', '--sbd_root', str(tmp_path / folder))
    assert from_masks == from_sbd


def test_masks_of_val_images_do_not_reach_train_aug(devkit, tmp_path):
    write_mask(devkit / 'SegmentationClassAug' / f'{VAL[0]}.png', [0])
    files = run_lists(devkit, tmp_path / 'out', '--seg_aug', 'SegmentationClassAug')
    assert VAL[0] not in files['train_aug.txt']


def test_hidden_files_beside_the_masks_are_no_images(devkit, tmp_path):
    write(devkit / 'SegmentationClassAug' / '._2007_000001.png', '')
    files = run_lists(devkit, tmp_path / 'out', '--seg_aug', 'SegmentationClassAug')
    assert '._' not in files['train_aug.txt']


def test_without_augmentation_says_what_is_missing(devkit, tmp_path, capsys):
    assert 'train_aug.txt' not in run_lists(devkit, tmp_path / 'out')
    assert 'needs --sbd_root' in capsys.readouterr().out


@pytest.mark.parametrize('text', [
    '\ufeff2007_000001\r\n2007_000003\r\n',
    '2007_000003\t1\n\n  \n2007_000001 -1',
    '/JPEGImages/2007_000001.jpg /SegmentationClass/2007_000001.png\n2007_000003\n',
])
def test_untidy_source_lists_give_the_same_lists(text, devkit, tmp_path):
    tidy = run_lists(devkit, tmp_path / 'a')
    write(devkit / 'ImageSets' / 'Segmentation' / 'train.txt', text)
    assert run_lists(devkit, tmp_path / 'b') == tidy


def test_names_twice_are_written_once_and_told(devkit, tmp_path, capsys):
    write(devkit / 'ImageSets' / 'Segmentation' / 'val.txt', '\n'.join(VAL + VAL[:1]))
    assert run_lists(devkit, tmp_path / 'out')['val.txt'].count('\n') == len(VAL)
    line, = [line for line in capsys.readouterr().out.splitlines() if 'more than once' in line]
    assert 'val.txt' in line and VAL[0] in line


def test_names_without_image_are_told(devkit, tmp_path, capsys):
    (devkit / 'JPEGImages' / f'{TEST[0]}.jpg').unlink()
    run_lists(devkit, tmp_path / 'out')
    assert f'1 names without an image in JPEGImages: {TEST[0]}' in capsys.readouterr().out


def test_sbd_names_without_mask_are_told(devkit, tmp_path, capsys):
    (tmp_path / 'benchmark_RELEASE' / 'dataset' / 'cls' / '2008_000005.mat').unlink()
    run_lists(devkit, tmp_path / 'out', '--sbd_root', str(tmp_path / 'benchmark_RELEASE'))
    assert '1 names of SBD without a mask' in capsys.readouterr().out


def test_all_annotated_leaves_out_val_test_and_names_without_image(devkit, tmp_path):
    (devkit / 'JPEGImages' / '2008_000005.jpg').unlink()
    files = run_lists(devkit, tmp_path / 'out', '--all_annotated')
    assert files['all_annotated.txt'] == ''.join(
        f'/JPEGImages/{name}.jpg\n' for name in ('2007_000001', '2007_000003', '2008_000006'))


def test_list_that_differs_from_seams_is_told(devkit, tmp_path, capsys):
    run_lists(devkit, tmp_path / 'out')
    assert 'train.txt: 2 names, NOT the list used by SEAM' in capsys.readouterr().out


def test_missing_sbd_list_leaves_the_old_lists(devkit, tmp_path):
    old = run_lists(devkit, tmp_path / 'out')
    (tmp_path / 'benchmark_RELEASE' / 'dataset' / 'val.txt').unlink()
    write(devkit / 'ImageSets' / 'Segmentation' / 'train.txt', '2007_000001\n')
    with pytest.raises(BadInput, match='val.txt'):
        run_lists(devkit, tmp_path / 'out', '--sbd_root', str(tmp_path / 'benchmark_RELEASE'))
    assert {path.name: path.read_text() for path in (tmp_path / 'out').iterdir()} == old


def test_lists_script_writes_beside_itself_from_any_folder(devkit, repo, tmp_path):
    process = run_script(tmp_path, repo / 'voc12' / 'make_lists.py', '--voc12_root', 'VOC2012')
    assert process.returncode == 0, process.stderr
    assert load_img_name_list(str(repo / 'voc12' / 'val.txt')) == VAL


@pytest.mark.parametrize('missing', ['.', 'JPEGImages', 'ImageSets', 'ImageSets/Segmentation/val.txt'])
def test_what_the_devkit_lacks_is_named(missing, devkit, tmp_path):
    path = devkit / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(BadInput, match=f'VOC2012/{missing}'.removesuffix('/.') + '.*--voc12_root'):
        run_lists(devkit, tmp_path / 'out')


# ---------------------------------------------------------------- labels

def test_labels_are_float32_multi_hot_of_both_lists(devkit, tmp_path):
    labels = run_labels(devkit, tmp_path / 'labels.npy')
    assert list(labels) == TRAIN_AUG + VAL
    for name, label in labels.items():
        np.testing.assert_array_equal(label, expected_label(name), strict=True)


def test_difficult_objects_count_and_parts_do_not(devkit, tmp_path):
    label = run_labels(devkit, tmp_path / 'labels.npy')['2007_000002']
    assert list(np.flatnonzero(label)) == [12, 14]      # the horse is difficult; every part is called head or dog


def test_masks_and_xml_give_the_same_labels(devkit, tmp_path):
    from_xml = run_labels(devkit, tmp_path / 'xml.npy')
    from_seg = run_labels(devkit, tmp_path / 'seg.npy', '--source', 'seg')
    assert list(from_xml) == list(from_seg)
    for name in from_xml:
        np.testing.assert_array_equal(from_xml[name], from_seg[name], strict=True)


def test_masks_of_the_augmented_set_go_before_the_official_ones(devkit, tmp_path):
    write_mask(devkit / 'SegmentationClassAug' / f'{VAL[0]}.png', [0, 9])
    labels = run_labels(devkit, tmp_path / 'labels.npy', '--source', 'seg')
    assert list(np.flatnonzero(labels[VAL[0]])) == [8]


def test_palette_masks_are_read_by_index(tmp_path):
    mask = Image.fromarray(np.array([[0, 3, 255]], np.uint8)).convert('P')
    mask.putpalette([7] * 768)
    mask.save(tmp_path / 'mask.png')
    assert list(np.flatnonzero(make_cls_labels.label_from_mask(tmp_path / 'mask.png', 20))) == [2]


def test_value_that_is_no_class_is_refused(tmp_path):
    write_mask(tmp_path / 'mask.png', [0, 21])
    with pytest.raises(BadInput, match='contains 21'):
        make_cls_labels.label_from_mask(tmp_path / 'mask.png', 20)


def test_colour_mask_is_refused(tmp_path):
    Image.new('RGB', (2, 2)).save(tmp_path / 'mask.png')
    with pytest.raises(BadInput, match='mode RGB'):
        make_cls_labels.label_from_mask(tmp_path / 'mask.png', 20)


def test_mask_cut_anywhere_is_refused(tmp_path):
    write_mask(tmp_path / 'mask.png', [0, 1, 2])
    data = (tmp_path / 'mask.png').read_bytes()
    for length in range(data.index(b'IDAT') + 8):
        (tmp_path / 'cut.png').write_bytes(data[:length])
        with pytest.raises(BadInput, match='cut.png'):
            make_cls_labels.label_from_mask(tmp_path / 'cut.png', 20)


def test_missing_mask_names_image_and_places(devkit, tmp_path):
    (devkit / 'SegmentationClass' / f'{VAL[0]}.png').unlink()
    with pytest.raises(BadInput, match=f'no mask of image {VAL[0]}.*SegmentationClassAug.*SegmentationClass'):
        run_labels(devkit, tmp_path / 'labels.npy', '--source', 'seg')


def test_image_without_class_is_kept_and_told(devkit, tmp_path, capsys):
    write(devkit / 'Annotations' / f'{VAL[1]}.xml', '<annotation/>')
    assert not run_labels(devkit, tmp_path / 'labels.npy')[VAL[1]].any()
    lines = capsys.readouterr().out.split('\n')
    assert any(line.startswith('warning: --val_list: 1 images') and line.endswith(VAL[1]) for line in lines)


def test_images_per_class_are_printed_for_each_list(devkit, tmp_path, capsys):
    run_labels(devkit, tmp_path / 'labels.npy')
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['aeroplane', '2', '0'] in rows and ['person', '1', '1'] in rows and ['images', '4', '2'] in rows


def test_out_without_extension_gets_the_one_of_numpy(devkit, tmp_path):
    folder = write(tmp_path / 'lists' / 'x.txt', TRAIN[0]).parent
    make_cls_labels.main(make_cls_labels.get_args_parser().parse_args(
        ['--train_list', str(folder / 'x.txt'), '--val_list', str(folder / 'x.txt'), '--voc12_root', str(devkit),
         '--out', str(tmp_path / 'labels')]))
    assert (tmp_path / 'labels.npy').is_file()


@pytest.mark.parametrize('cwd, script, root_beside', [
    ('.', 'voc12/make_cls_labels.py', '.'),
    ('voc12', 'make_cls_labels.py', 'voc12'),
    ('voc12', 'make_cls_labels.py', '.'),      # the README of the original: VOC2012 is a link at the root
])
def test_labels_script_runs_from_both_folders(cwd, script, root_beside, devkit, repo):
    devkit.rename(repo / root_beside / 'VOC2012')
    write(repo / 'voc12' / 'train_aug.txt', '\n'.join(TRAIN_AUG))
    write(repo / 'voc12' / 'val.txt', '\n'.join(VAL))
    process = run_script(repo / cwd, script, '--voc12_root', 'VOC2012')
    assert process.returncode == 0, process.stderr
    assert ('using ' in process.stdout) == (cwd != root_beside)
    labels = load_labels(TRAIN_AUG + VAL, str(repo / 'voc12' / 'cls_labels.npy'), 'no such root')
    assert set(labels) == set(TRAIN_AUG + VAL)


def test_lists_in_the_working_directory_go_before_those_beside_the_script(devkit, repo, tmp_path):
    write(repo / 'voc12' / 'train_aug.txt', TRAIN[0])
    write(tmp_path / 'train_aug.txt', TRAIN[1])
    write(tmp_path / 'val.txt', VAL[0])
    process = run_script(tmp_path, repo / 'voc12' / 'make_cls_labels.py', '--voc12_root', devkit, '--out', 'x.npy')
    assert process.returncode == 0, process.stderr
    assert list(np.load(tmp_path / 'x.npy', allow_pickle=True).item()) == [TRAIN[1], VAL[0]]


def test_malformed_xml_is_one_line_and_keeps_the_old_labels(devkit, repo, tmp_path):
    write(repo / 'voc12' / 'train_aug.txt', '\n'.join(TRAIN_AUG))
    write(repo / 'voc12' / 'val.txt', '\n'.join(VAL))
    write(repo / 'voc12' / 'cls_labels.npy', 'old')
    write(devkit / 'Annotations' / f'{VAL[1]}.xml', '<annotation><object>')
    before = sorted(os.listdir(repo / 'voc12'))
    process = run_script(tmp_path, '-B', repo / 'voc12' / 'make_cls_labels.py', '--voc12_root', 'VOC2012')
    check_one_line(process, f'{VAL[1]}.xml')
    assert (repo / 'voc12' / 'cls_labels.npy').read_text() == 'old'
    assert [name for name in sorted(os.listdir(repo / 'voc12')) if name != '__pycache__'] == before


@pytest.mark.parametrize('flag, value', [('--voc12_root', 'nowhere'), ('--out', 'none/x.npy'),
                                         ('--train_list', 'nowhere/x.txt')])
def test_what_labels_are_made_of_is_named_where_it_is_missing(flag, value, devkit, tmp_path):
    with pytest.raises(BadInput, match=f'(?s){value.split("/")[0]}.*{flag}'):
        run_labels(devkit, tmp_path / 'labels.npy', flag, value)


# ---------------------------------------------------------------- what training reads

@pytest.mark.parametrize('line, name', [
    ('my photo.jpg', 'my photo'), ('/JPEGImages/my photo.JPG /SegmentationClassAug/my photo.png', 'my photo'),
    ('my photo', None), ('photo 1', None), ('2007_000032  1', '2007_000032'), ('2007_000032 -1', '2007_000032')])
def test_name_with_a_blank_is_read_whole_or_refused(line, name, tmp_path):
    path = str(write(tmp_path / 'list.txt', f'first\n{line}\n'))
    if name:
        assert load_img_name_list(path) == ['first', name]
    else:
        with pytest.raises(BadInput, match=f'{line}.*extension to a name with blanks'):
            load_img_name_list(path)


@pytest.mark.parametrize('line, cause', [
    ('JPEGImages\\a.jpg SegmentationClass\\a.png', 'backslash'), ('JPEGImages\\a.jpg 4 0', 'backslash'),
    ('a 4 0', 'columns behind the name'), ('a 14', 'columns behind the name'), ('a SegmentationClass/a', 'columns')])
def test_line_of_another_tool_is_refused_with_its_cause(line, cause, tmp_path):
    path = str(write(tmp_path / 'list.txt', f'first\n{line}\n'))
    with pytest.raises(BadInput, match=cause) as error:
        load_img_name_list(path, '--list')
    assert path in str(error.value) and '--list' in str(error.value)


@pytest.mark.parametrize('line', ['2007_000032 4 0', 'JPEGImages/2007_000032.jpg 14', '2007_000032.png 0 1 2'])
def test_class_indices_behind_the_name_are_passed_over(line, tmp_path):
    assert load_img_name_list(str(write(tmp_path / 'list.txt', line))) == ['2007_000032']


def test_list_of_the_repository_is_named_from_another_working_directory(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[load_img_name_list.__module__], 'REPO_ROOT', str(repo))
    with pytest.raises(BadInput, match=f'--list.* in {repo} .*python voc12/make_lists.py'):
        load_img_name_list('voc12/train.txt', '--list')
    write(repo / 'voc12' / 'train.txt', 'a')
    with pytest.raises(BadInput, match=f'{tmp_path}; start the command in {repo}'):
        load_img_name_list('voc12/train.txt', '--list')
    monkeypatch.chdir(repo)
    assert load_img_name_list('voc12/train.txt', '--list') == ['a']
    with pytest.raises(BadInput) as error:
        load_img_name_list('voc12/val.txt', '--list')
    assert str(repo) not in str(error.value) and 'make_lists.py' in str(error.value)


@pytest.mark.parametrize('link', ['JPEGImages/a.jpg', 'JPEGImages'])
def test_image_behind_a_link_that_leads_nowhere_is_told_with_its_target(link, tmp_path):
    (tmp_path / 'root').mkdir()
    write(tmp_path / 'photos' / 'a.jpg', '')
    (tmp_path / 'root' / 'JPEGImages').mkdir() if link != 'JPEGImages' else None
    target = tmp_path / 'photos' / link.removeprefix('JPEGImages').lstrip('/')
    (tmp_path / 'root' / link).symlink_to(target)
    check_images(['a'], 'list.txt', str(tmp_path / 'root'))
    (tmp_path / 'photos').rename(tmp_path / 'moved')
    with pytest.raises(BadInput, match=f'{link} is a link to {str(target).rstrip("/")}, .*--voc12_root.*list.txt'):
        check_images(['a'], 'list.txt', str(tmp_path / 'root'))


@pytest.mark.parametrize('name', ['Background', '_background_', 'BG', 'void', '__ignore__', '0: background',
                                  'background:0,0,0::', '# label:color_rgb:parts:actions', 'dog:64,0,128::',
                                  'dog 64 0 128', 'dog #400080', 'background/other', 'void/unlabelled', 'bkgd', 'null',
                                  '["cat", "dog"]', 'item {', 'names:'])
def test_class_list_with_a_background_or_with_colours_is_refused(name, tmp_path):
    with pytest.raises(BadInput, match='names.txt .--class_names. has .*foreground classes'):
        load_class_names(str(write(tmp_path / 'names.txt', f'cat\n{name}\ndog\n')))


def test_class_list_on_one_line_is_refused(tmp_path):
    with pytest.raises(BadInput, match="names.txt .--class_names.*'cat, dog'"):
        load_class_names(str(write(tmp_path / 'names.txt', 'cat, dog\n')))


@pytest.mark.parametrize('text', ['0 cat\n1 dog\n', '1: dog\n2: cat\n3: cow\n', '2,bird\n1,cat\n'])
def test_label_map_of_another_tool_is_no_list_of_names(tmp_path, text):
    with pytest.raises(BadInput, match='names.txt.*--class_names'):
        load_class_names(str(write(tmp_path / 'names.txt', text)))


@pytest.mark.parametrize('names', [['1 euro', '2 euro'], ['10 cent', '20 euro'], ['3d printer', '4x4'],
                                   ['7 up', 'cola'], ['7 up']])
def test_names_may_begin_with_numbers(tmp_path, names):
    assert load_class_names(str(write(tmp_path / 'names.txt', '\n'.join(names)))) == names


def test_class_names_that_only_resemble_a_background_are_read(tmp_path):
    names = ['bag', 'avoided', 'boeing 737', 'route 66', 'ground']
    assert load_class_names(str(write(tmp_path / 'names.txt', '\n'.join(names)))) == names


def test_names_in_xml_that_are_no_class_are_told_with_their_counts(devkit, tmp_path, capsys):
    objects = ''.join(OBJECT.format(category=name, difficult=0) for name in ('car', 'Car', 'Car', 'lorry'))
    write(devkit / 'Annotations' / f'{VAL[1]}.xml', XML.format(name=VAL[1], objects=objects))
    warning = ('warning: 3 objects in Annotations are of no class of --class_names and do not count: Car (2), '
               'lorry (1)\n')
    load_labels(VAL, 'no such file', str(devkit))
    assert warning in capsys.readouterr().out
    run_labels(devkit, tmp_path / 'labels.npy')
    assert warning in capsys.readouterr().out
    load_labels(TRAIN_AUG, 'no such file', str(devkit))
    assert 'warning' not in capsys.readouterr().out      # parts are no objects


def test_blanks_in_the_name_of_an_object_are_those_of_a_class_name(tmp_path):
    path = write(tmp_path / 'a.xml', '<annotation><object><name> fork \n lift</name></object></annotation>')
    assert label_from_xml(path, ['fork lift']).tolist() == [1]


@pytest.mark.parametrize('key, name', [(2007000032, '2007_000032'), (139, '000000000139'), (7, '7')])
def test_whole_number_is_the_key_of_a_name_of_digits(key, name, tmp_path):
    np.save(tmp_path / 'labels.npy', {key: np.ones(20, np.float32)})
    assert list(load_labels([name], str(tmp_path / 'labels.npy'), 'no root')) == [name]


def test_name_without_a_label_is_told_with_one_that_the_file_has(tmp_path):
    np.save(tmp_path / 'labels.npy', {'a.jpg': np.ones(20, np.float32)})
    with pytest.raises(BadInput, match="image a is not usable: no entry; the first one in the file is 'a.jpg'"):
        load_labels(['a'], str(tmp_path / 'labels.npy'), 'no root')


@pytest.mark.parametrize('form', ['xml', 'npy'])
def test_labels_of_zeros_are_counted_and_missing_ones_refused(form, devkit, tmp_path, capsys):
    cls_labels = str(tmp_path / 'labels.npy')
    write(devkit / 'Annotations' / f'{VAL[1]}.xml', '<annotation/>')
    if form == 'npy':
        run_labels(devkit, cls_labels)
    capsys.readouterr()
    labels = load_labels(VAL, cls_labels, str(devkit))
    np.testing.assert_array_equal(labels[VAL[1]], np.zeros(20, np.float32), strict=True)
    assert f'1 of 2 images show none of the classes: {VAL[1]}\n' in capsys.readouterr().out
    load_labels(TRAIN_AUG, cls_labels, str(devkit))
    assert 'none of the classes' not in capsys.readouterr().out
    with pytest.raises(BadInput, match='gone'):             # a missing label is no label of zeros
        load_labels(['gone'], cls_labels, str(devkit))


def test_missing_annotation_is_told_with_the_label_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match='a.xml .*: No such file or directory; .*--cls_labels none.npy does not exist'):
        load_labels(['a'], 'none.npy', str(tmp_path))


def test_image_with_another_extension_is_found(tmp_path):
    path = write(tmp_path / 'JPEGImages' / 'a.JPG', '')
    assert get_img_path('a', str(tmp_path)) == str(path)
    check_images(['a'], 'list', str(tmp_path))
    assert get_img_path('b', str(tmp_path)) == str(tmp_path / 'JPEGImages' / 'b.jpg')
