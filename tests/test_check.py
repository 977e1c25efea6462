"""voc12/check.py on a devkit of six images that is clean, and with one damage at a time."""
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImagePalette

from conftest import ROOT
from tool.cli import BadInput
from tool.image_files import save_label_map, voc_palette
from voc12 import check, masks
from voc12.canonical import CANONICAL, describe_list, labels_digest, names_digest
from voc12.lists import CAT_LIST

# name -> classes from 0 of its objects
OBJECTS = {'2007_000001': [0], '2007_000002': [14, 12], '2007_000003': [7], '2007_000004': [19],
           '2007_000005': [14], '2007_000006': [2, 0]}
NAMES = list(OBJECTS)
FIRST = NAMES[0]
LABELS = {name: np.isin(np.arange(20), classes).astype(np.float32) for name, classes in OBJECTS.items()}
OWN_CLASSES = [f'kind {c}' for c in range(20)]
NOT_RGB = 'images that are not RGB of 8 bits: '
FORM = "masks that are not indexed images in VOC's colours: "


def make_mask(classes, border=255):
    """uint8 (8, 8): background, a stripe for each class, and a border."""
    mask = np.zeros((8, 8), np.uint8)
    for row, c in enumerate(classes, 1):
        mask[row] = c + 1
    mask[:, 0] = border
    return mask


def write_xml(root, name, classes, class_names=CAT_LIST):
    objects = ''.join(f'<object><name>{class_names[c]}</name></object>' for c in classes)
    (root / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{objects}</annotation>')


def write_lines(path, lines):
    path.write_text(''.join(line + '\n' for line in lines))
    return path


def jpg(root, name=FIRST):
    return root / 'JPEGImages' / f'{name}.jpg'


def png(root, name=FIRST, folder='SegmentationClass'):
    return root / folder / f'{name}.png'


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / 'VOC2012'
    for folder in ('JPEGImages', 'Annotations', 'SegmentationClass', 'SegmentationClassAug'):
        (root / folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for name, classes in OBJECTS.items():
        Image.fromarray(pixels).save(jpg(root, name))
        save_label_map(png(root, name), make_mask(classes))
        write_xml(root, name, classes)
    write_lines(root / 'list.txt', NAMES)
    return root


@pytest.fixture
def canonical(monkeypatch):
    """The devkit's list is VOC's train."""
    monkeypatch.setitem(CANONICAL, 'train', (6, NAMES[0], NAMES[-1], names_digest(NAMES), labels_digest(NAMES, LABELS)))


def run(root, *flags):
    """Runs the check in this process; returns its exit code."""
    args = ['--voc12_root', str(root), '--list', str(root / 'list.txt'), '--cls_labels', str(root / 'none.npy'),
            '--num_workers', '0', *map(str, flags)]
    return check.main(check.get_args_parser().parse_args(args))


def expect(capsys, root, level, start, *flags):
    """Asserts that the check prints a line of this level that starts with `start`, and no other PROBLEM."""
    assert run(root, *flags) == (level == 'PROBLEM')
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert any(line[0] == level and line[1].startswith(start) for line in lines), lines
    assert [line[0] for line in lines].count('PROBLEM') == (level == 'PROBLEM'), lines


# ---------------------------------------------------------------- one damage at a time

def edit_jpg(root, change):
    jpg(root).write_bytes(change(jpg(root).read_bytes()))


def convert(path, mode, form):
    with Image.open(path) as img:
        img.convert(mode).save(path, format=form)


def cut_mask(root):
    """Cuts a mask off after its palette."""
    data = png(root).read_bytes()
    png(root).write_bytes(data[:data.index(b'IDAT') + 6])


def other_palette(root):
    img = Image.fromarray(make_mask([0]))
    img.putpalette([7] * 768)
    img.save(png(root))


def adapt_palette(path):
    """Saves a mask as programs do that choose a palette by the colours of each picture."""
    with Image.open(path) as img:
        colours = img.convert('RGB')
    colours.convert('P', palette=Image.Palette.ADAPTIVE, colors=8).save(path)


def no_borders(root, folder='SegmentationClass', save=save_label_map):
    for name, classes in OBJECTS.items():
        save(png(root, name, folder), make_mask(classes, border=0))


def save_mask_as_jpeg(root):
    Image.fromarray(make_mask([0])).save(png(root), format='JPEG')


def save_grey(path, labels):
    Image.fromarray(labels).save(path)


def save_foreign(root, form, array):
    """Writes an image of another format and mode under the name of a .jpg."""
    Image.fromarray(array).save(jpg(root), format=form)


def save_turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (8, 8)).save(jpg(root), exif=exif)


def write_own_xml(root):
    for name, other in zip(NAMES, ('Dog', 'dogs', 'hot dog', 'Dog')):
        write_xml(root, name, [*OBJECTS[name], 20], [*CAT_LIST, other])


DAMAGES = {
    'float_image': (lambda root: save_foreign(root, 'TIFF', np.zeros((8, 8), np.float32)), 'PROBLEM',
                    f'images that cannot be read: 1: {FIRST} (its pixels are 32-bit numbers (mode F)'),
    'image_of_16_bits': (lambda root: save_foreign(root, 'PNG', np.zeros((8, 8), np.uint16)), 'note',
                         f'{NOT_RGB}1: {FIRST} (I;16'),
    'postscript': (lambda root: edit_jpg(root, lambda data: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n'),
                   'PROBLEM', f'images that cannot be read: 1: {FIRST} (cannot identify'),
    'format_that_training_refuses': (lambda root: save_foreign(root, 'TGA', np.zeros((8, 8, 3), np.uint8)), 'PROBLEM',
                                     f'images that cannot be read: 1: {FIRST} (cannot identify'),
    'too_many_pixels': (lambda root: save_foreign(root, 'PNG', np.zeros((9000, 10000), bool)), 'PROBLEM',
                        f'images that cannot be read: 1: {FIRST} (Image size (90000000 pixels) exceeds'),
    'extension_in_capitals': (lambda root: jpg(root).rename(root / 'JPEGImages' / f'{FIRST}.JPG'), 'ok',
                              'missing images: none'),
    'jpeg_mask': (save_mask_as_jpeg, 'PROBLEM',
                  f'masks that cannot be read: 1: {FIRST} (cannot identify'),
    'names_that_are_no_class': (write_own_xml, 'PROBLEM', '4 objects in Annotations are of no class of --class_names '
                                                          'and do not count: Dog (2), dogs (1), hot dog (1)'),
    'truncated_jpeg': (lambda root: edit_jpg(root, lambda data: data[:-30]), 'PROBLEM',
                       f'images that cannot be read: 1: {FIRST} (image file is truncated'),
    'no_image': (lambda root: edit_jpg(root, lambda data: b'<html>not found</html>'), 'PROBLEM',
                 f'images that cannot be read: 1: {FIRST} (cannot identify'),
    'missing_image': (lambda root: jpg(root).unlink(), 'PROBLEM', f'missing images: 1: {FIRST}'),
    'missing_images': (lambda root: [jpg(root, name).unlink() for name in NAMES], 'PROBLEM',
                       f'missing images: 6: {", ".join(NAMES[:5])}, ...'),
    'grey_image': (lambda root: convert(jpg(root), 'L', 'JPEG'), 'note', f'{NOT_RGB}1: {FIRST} (L)'),
    'cmyk_image': (lambda root: convert(jpg(root), 'CMYK', 'JPEG'), 'note', f'{NOT_RGB}1: {FIRST}'),
    'palette_image': (lambda root: convert(jpg(root), 'P', 'PNG'), 'note', f'{NOT_RGB}1: {FIRST} (P)'),
    'mask_of_another_size': (lambda root: save_label_map(png(root), make_mask([0])[:6]), 'PROBLEM',
                             'masks of another size than their image (width x height): 1: '
                             f'{FIRST} (mask 8x6, image 8x8)'),
    'rgb_mask': (lambda root: convert(png(root), 'RGB', 'PNG'), 'PROBLEM',
                 f'masks that cannot be read: 1: {FIRST} (a picture of mode RGB'),
    'truncated_mask': (cut_mask, 'PROBLEM',
                       f'masks that cannot be read: 1: {FIRST} ('),
    'value_that_is_no_class': (lambda root: save_label_map(png(root), make_mask([0, 76])), 'PROBLEM',
                               f'masks with values other than 0..20 and 255: 1: {FIRST} (77); pixels of each value: '
                               '77: 7'),
    'overwritten_by_a_prediction': (lambda root: save_grey(png(root), make_mask([0], border=0)), 'PROBLEM',
                                    f'{FORM}1: {FIRST} (mode L); not the official SegmentationClass files'),
    'other_palette': (other_palette, 'PROBLEM', f'{FORM}1: {FIRST} (mode P)'),
    'no_255_anywhere': (no_borders, 'PROBLEM', 'no mask has a pixel of 255'),
    'one_mask_without_255': (lambda root: save_label_map(png(root), make_mask([0], border=0)), 'note',
                             f'masks without a pixel of 255, the border of VOC: 1: {FIRST}; 5 have it'),
    'image_without_mask': (lambda root: png(root).unlink(), 'note', 'images without a mask in '),
    'label_without_mask_class': (lambda root: write_xml(root, FIRST, [0, 11]), 'PROBLEM',
                                 f'labels with a class that the mask lacks: 1: {FIRST} (dog)'),
    'mask_class_without_label': (lambda root: save_label_map(png(root), make_mask([0, 11])), 'PROBLEM',
                                 f'masks with a class that the label lacks: 1: {FIRST} (dog)'),
    'image_without_class': (lambda root: [write_xml(root, FIRST, []), save_label_map(png(root), make_mask([]))],
                            'note', f'images without any class: 1: {FIRST}; '),
    'turned_by_exif': (save_turned, 'note', f'images whose EXIF orientation is not normal: 1: {FIRST} (orientation 6)'),
    'missing_annotation': (lambda root: (root / 'Annotations' / f'{FIRST}.xml').unlink(), 'PROBLEM',
                           'images without a usable label in '),
    'malformed_annotation': (lambda root: (root / 'Annotations' / f'{FIRST}.xml').write_text('<annotation><object>'),
                             'PROBLEM', 'images without a usable label in '),
    'name_twice': (lambda root: write_lines(root / 'list.txt', NAMES + [FIRST]), 'PROBLEM',
                   f'names more than once in the list: 1: {FIRST}'),
}


@pytest.mark.parametrize('case', DAMAGES)
def test_damage_is_told(case, devkit, capsys):
    damage, level, start = DAMAGES[case]
    damage(devkit)
    expect(capsys, devkit, level, start)


def test_truncated_jpeg_is_found_wherever_it_is_cut(devkit):
    data = jpg(devkit).read_bytes()
    for length in range(0, len(data) - 8, 17):
        jpg(devkit).write_bytes(data[:length])
        assert list(check.look_at(FIRST, devkit, devkit / 'SegmentationClass', 20)[0]) == ['damaged image'], length


# ---------------------------------------------------------------- what is right, or depends

def test_clean_set_is_ok_and_recognised(devkit, canonical, capsys):
    assert run(devkit) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert all(line.startswith('ok ') for line in lines), lines
    assert verdict == f'verdict: ok (PROBLEM: 0, note: 0, ok: {len(lines)})'
    assert "ok       the list: VOC 2012 train, 6 images: the split of the paper's CAM tables" in lines
    assert ('ok       digests of list and labels: names: identical to the train list used by SEAM; '
            'labels: identical to those used by SEAM') in lines


def test_masks_of_0_and_255_alone_are_a_problem(devkit, capsys):
    for name in NAMES:
        save_label_map(png(devkit, name), make_mask([]))
    assert run(devkit) == 1
    assert f"PROBLEM  no mask in {devkit / 'SegmentationClass'} has a class" in capsys.readouterr().out


def test_image_without_class_is_a_problem_in_vocs_own_list(devkit, canonical, capsys):
    write_xml(devkit, FIRST, [])
    run(devkit)
    assert f'PROBLEM  images without any class: 1: {FIRST}' in capsys.readouterr().out


def test_classes_that_no_image_or_every_image_has_are_a_note(devkit, capsys):
    names = write_lines(devkit / 'names.txt', ['aeroplane', 'bird', 'zebra'])
    run(devkit, '--class_names', names)
    out = capsys.readouterr().out
    assert 'note     classes of --class_names that no image of the list has: 1: zebra' in out
    assert 'ok       classes that every image of the list has: none' in out
    labels = devkit / 'labels.npy'
    np.save(labels, {name: np.float32([1, name == FIRST, 0]) for name in NAMES}, allow_pickle=True)
    run(devkit, '--class_names', names, '--cls_labels', labels)
    assert 'note     classes that every image of the list has: 1: aeroplane' in capsys.readouterr().out


@pytest.mark.parametrize('path', [jpg, png])
def test_link_that_leads_nowhere_is_a_problem_of_its_own(path, devkit, capsys):
    path(devkit).rename(devkit / 'original')
    path(devkit).symlink_to(devkit / 'original')
    run(devkit)
    assert 'ok       images and masks that are links to missing files' in capsys.readouterr().out
    (devkit / 'original').rename(devkit / 'moved')
    run(devkit)
    assert ('PROBLEM  images and masks that are links to missing files: 1: '
            f'{FIRST} ({path(devkit).name})') in capsys.readouterr().out


def test_damaged_exif_does_not_make_a_damaged_image(devkit, capsys):
    Image.new('RGB', (8, 8)).save(jpg(devkit), exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12')
    run(devkit)
    out = capsys.readouterr().out
    assert 'images that cannot be read: none' in out and 'EXIF orientation is not normal: none' in out


def test_other_labels_than_seams_are_a_note(devkit, canonical, capsys, monkeypatch):
    monkeypatch.setitem(CANONICAL, 'train', (*CANONICAL['train'][:4], 'another digest'))
    expect(capsys, devkit, 'note', 'digests of list and labels: names: identical to the train list used by SEAM; '
                                   'labels: NOT those used by SEAM')


def test_unknown_list_is_a_note(devkit, capsys):
    expect(capsys, devkit, 'note', 'the list: a list of 6 images that is none of the lists SEAM used')


def test_mask_values_are_measured_by_the_class_names(devkit, capsys):
    names = write_lines(devkit / 'names.txt', CAT_LIST[:19])
    run(devkit, '--class_names', names)
    assert 'masks with values other than 0..19 and 255: 1: 2007_000004 (20)' in capsys.readouterr().out


def test_grey_masks_without_border_are_normal_in_the_augmented_set(devkit, capsys):
    no_borders(devkit, 'SegmentationClassAug', save_grey)
    for start in (f'{FORM}6: ', 'no mask has a pixel of 255'):
        expect(capsys, devkit, 'note', start, '--gt_dir', devkit / 'SegmentationClassAug')


def test_grey_masks_without_border_are_fine_in_other_data_sets(devkit, capsys):
    no_borders(devkit, save=save_grey)
    for name, classes in OBJECTS.items():
        write_xml(devkit, name, classes, OWN_CLASSES)
    expect(capsys, devkit, 'ok', 'the list: 6 images', '--class_names',
           write_lines(devkit / 'names.txt', OWN_CLASSES))


@pytest.mark.parametrize('class_names', [CAT_LIST, OWN_CLASSES])
def test_vocs_colours_at_other_indices_are_told_with_any_classes(class_names, devkit, capsys):
    adapt_palette(png(devkit))
    names = write_lines(devkit / 'names.txt', class_names)
    run(devkit, '--class_names', names)
    out = capsys.readouterr().out
    line, = [line for line in out.splitlines() if "VOC's colours at other indices" in line]
    assert line.startswith('PROBLEM' if class_names == CAT_LIST else 'note')
    assert f'1: {FIRST} (' in line and 'has the colour of 255' in line
    folder = str(devkit / 'SegmentationClass')
    warnings = masks.ground_truth_warnings(folder, NAMES, class_names)
    assert "VOC's colours at other indices" in warnings[0]
    assert warnings[0].startswith(f'1 of 6 masks looked at in {folder} (--gt_dir)')
    assert f'{FORM}none' in out and len(warnings) == (2 if class_names == CAT_LIST else 1)


def test_other_palettes_are_no_moved_colours(devkit):
    for palette in ([7] * 768, [0] * 768, [value // 3 for value in range(768)], voc_palette()[:22].ravel().tolist()):
        img = Image.fromarray(make_mask([0, 14]))
        img.putpalette(palette)
        img.save(png(devkit))
        assert masks.moved_colours(str(png(devkit)), make_mask([0, 14]), 20) == {}


@pytest.mark.parametrize('flags', [[], ['--gt_dir']])
def test_missing_mask_is_a_problem_in_vocs_train_and_in_a_folder_that_was_named(flags, devkit, request, capsys):
    if not flags:
        request.getfixturevalue('canonical')
    png(devkit).unlink()
    flags = [*flags, *[devkit / 'SegmentationClass' for _ in flags]]
    expect(capsys, devkit, 'PROBLEM', f'images without a mask in {devkit}/SegmentationClass: 1: {FIRST}', *flags)


def test_few_labels_without_mask_class_are_a_note():
    names = [f'{i}' for i in range(10)]
    results = {name: ({}, {0} if i else set()) for i, name in enumerate(names)}
    lines = check.agreement_lines(results, {name: np.eye(20)[0] for name in names}, CAT_LIST)
    assert [level for level, _ in lines] == ['ok', 'note'] and '1: 0 (aeroplane); of 10 compared' in lines[1][1]


@pytest.mark.parametrize('label, why', [(None, 'no entry'), (np.zeros(3), 'shape (3,), not (20,)'),
                                        ('cat', 'could not'), (np.full(20, 2), 'other values than 0 and 1')])
def test_label_file_with_one_bad_entry(label, why, devkit, capsys):
    labels = {**LABELS, FIRST: label}
    if label is None:
        del labels[FIRST]
    path = devkit / 'labels.npy'
    np.save(path, labels, allow_pickle=True)
    expect(capsys, devkit, 'PROBLEM', f'images without a usable label in {path} (--cls_labels): 1: {FIRST} ({why}',
           '--cls_labels', path)


def test_label_file_of_irn_with_whole_numbers_as_keys(devkit, capsys):
    np.save(devkit / 'labels.npy', {int(name.replace('_', '')): label for name, label in LABELS.items()})
    expect(capsys, devkit, 'ok', 'images without a usable label in ', '--cls_labels', devkit / 'labels.npy')


def test_missing_labels_of_vocs_test_are_a_note(devkit, capsys, monkeypatch):
    monkeypatch.setitem(CANONICAL, 'test', (6, NAMES[0], NAMES[-1], names_digest(NAMES), None))
    np.save(devkit / 'labels.npy', {'other': np.ones(20)}, allow_pickle=True)
    expect(capsys, devkit, 'note', 'images without a usable label in ', '--cls_labels', devkit / 'labels.npy')


# ---------------------------------------------------------------- command line

def shell(cwd, *args):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'voc12', 'check.py'), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, timeout=60)


def test_command_line_from_another_folder_ends_with_the_verdict(devkit, tmp_path):
    before = sorted(devkit.rglob('*'))
    jpg(devkit).unlink()
    process = shell(tmp_path, '--list', 'VOC2012/list.txt')
    assert process.returncode == 1, process.stderr
    assert process.stdout.splitlines()[-1].startswith('verdict: PROBLEM (PROBLEM: 1, note: 2, ok: ')
    assert sorted(devkit.rglob('*')) == [path for path in before if path != jpg(devkit)]      # nothing is written


@pytest.mark.parametrize('flag, value', [('--gt_dir', 'nowhere'), ('--voc12_root', 'nowhere'), ('--num_workers', '-1'),
                                         ('--class_names', 'nowhere.txt')])
def test_bad_flag_is_named(flag, value, devkit):
    with pytest.raises(BadInput, match=flag):
        run(devkit, flag, value)


def test_label_file_that_is_no_dict_is_named(devkit):
    np.save(devkit / 'labels.npy', np.zeros(3))
    with pytest.raises(BadInput, match='labels.npy.*--cls_labels'):
        run(devkit, '--cls_labels', devkit / 'labels.npy')


# ---------------------------------------------------------------- for the other scripts

@pytest.mark.parametrize('key, remark', [('train', ": the split of the paper's CAM tables"), ('val', ''),
                                         ('train_aug', ': the training set of the paper'),
                                         ('test', ': ground truth is not public')])
def test_describe_list_knows_vocs_lists(key, remark, monkeypatch):
    names = [f'{i}' for i in range(1464)]
    monkeypatch.setitem(CANONICAL, key, (1464, '0', '999', names_digest(names), None))
    assert describe_list(names[::-1], CAT_LIST) == f'VOC 2012 {key}, 1,464 images{remark}'


def test_describe_list_of_others():
    assert describe_list(NAMES, CAT_LIST) == 'a list of 6 images that is none of the lists SEAM used'
    assert describe_list(NAMES, OWN_CLASSES) == '6 images' and describe_list(NAMES[:1], OWN_CLASSES) == '1 image'


def test_ground_truth_warnings_are_silent_for_official_masks_which_they_do_not_decode(devkit):
    cut_mask(devkit)
    png(devkit, NAMES[1]).unlink()
    assert masks.ground_truth_warnings(str(devkit / 'SegmentationClass'), NAMES, CAT_LIST) == []


def test_palette_of_a_header_is_read_with_every_pillow(monkeypatch):
    header = Image.new('P', (1, 1))
    header.palette = ImagePalette.raw('RGB', masks.VOC_COLOURS)
    header.palette.rawmode = 'RGB'          # as Pillow before 13 opens a mask
    monkeypatch.setattr(masks, 'decode_image', lambda path, what, look, formats: look(header))
    assert masks.mask_form('a.png') == ('P', True)


def test_ground_truth_warnings_tell_grey_masks_and_other_palettes(devkit):
    other_palette(devkit)
    save_grey(png(devkit, NAMES[1]), make_mask([0]))
    folder = str(devkit / 'SegmentationClass')
    warning, = masks.ground_truth_warnings(folder, NAMES, CAT_LIST)
    assert warning.startswith(f"2 of 6 masks looked at in {folder} (--gt_dir) are not indexed images in VOC's colours")
    assert masks.ground_truth_warnings(folder, NAMES, OWN_CLASSES) == []


def test_ground_truth_warnings_open_few_masks_spread_over_the_list(monkeypatch):
    opened = []

    def remember(path):
        opened.append(int(os.path.basename(path)[:-4]))
        return 'L', False
    monkeypatch.setattr(masks, 'mask_form', remember)
    masks.ground_truth_warnings('gt', [str(i) for i in range(10582)], CAT_LIST)
    assert len(opened) == masks.SAMPLE and opened[0] == 0 and opened[-1] == 10581 and max(np.diff(opened)) < 600


