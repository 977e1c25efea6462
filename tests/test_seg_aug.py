"""voc12/make_seg_aug.py on a devkit and an SBD release of a few small masks."""
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix

from tool import workers
from tool.cli import BadInput, exit_on_bad_input
from tool.image_files import read_label_map, voc_palette
from voc12 import make_lists, make_seg_aug
from voc12.canonical import CANONICAL, names_digest
from voc12.lists import load_img_name_list

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'voc12', 'make_seg_aug.py')
SIZE = (6, 9)                      # height, width
TRAIN, VAL = ['2007_000001', '2007_000003'], ['2007_000002', '2007_000004']
SBD_TRAIN, SBD_VAL = ['2008_000005', '2007_000002', '2008_000008'], ['2008_000006', '2007_000003']
SBD_ONLY = ['2008_000005', '2008_000006', '2008_000008']
UNION = sorted(TRAIN + VAL + SBD_ONLY)


def mask_of(name, official=False):
    """Returns a label map, uint8 (6, 9), that differs by image; the official one has other classes and a border."""
    rng = np.random.default_rng(int(name[-6:]) + 1000 * official)
    labels = rng.choice(np.array([0, 1, 7, 20], np.uint8), SIZE)
    labels[0] = 255 if official else labels[0]
    return labels


def mat_bytes(struct, compress=True, variable='GTcls'):
    file = io.BytesIO()
    savemat(file, {variable: struct}, do_compression=compress)
    return file.getvalue()


def sbd_struct(labels):
    """Returns the fields of GTcls in the release: 20 x 1 sparse boundaries, the mask, a column of its classes."""
    boundaries = np.empty((20, 1), object)
    for c in range(20):
        boundaries[c, 0] = csc_matrix(labels == c + 1)
    classes = np.unique(labels[labels > 0])
    return {'Boundaries': boundaries, 'Segmentation': labels, 'CategoriesPresent': classes[:, None]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_palette_png(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    img = Image.fromarray(labels)
    img.putpalette(voc_palette().tobytes())
    img.save(path, optimize=True)


def write_jpeg(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size[::-1]).save(path)


@pytest.fixture
def data(tmp_path):
    """Folder with VOC2012 and benchmark_RELEASE/dataset."""
    voc, sbd = tmp_path / 'VOC2012', tmp_path / 'benchmark_RELEASE' / 'dataset'
    for name in UNION:
        write_jpeg(voc / 'JPEGImages' / f'{name}.jpg')
    for key, names in (('train', TRAIN), ('val', VAL)):
        write(voc / 'ImageSets' / 'Segmentation' / f'{key}.txt', '\n'.join(names) + '\n')
        for name in names:
            write_palette_png(voc / 'SegmentationClass' / f'{name}.png', mask_of(name, official=True))
    for key, names in (('train', SBD_TRAIN), ('val', SBD_VAL)):
        write(sbd / f'{key}.txt', '\n'.join(names) + '\n')
        for name in names:
            write(sbd / 'cls' / f'{name}.mat', mat_bytes(sbd_struct(mask_of(name))))
            write_jpeg(sbd / 'img' / f'{name}.jpg')
    return tmp_path


def out_dir(data):
    return data / 'VOC2012' / 'SegmentationClassAug'


def mat_path(data, name):
    return data / 'benchmark_RELEASE' / 'dataset' / 'cls' / f'{name}.mat'


def run(data, *flags, sbd='benchmark_RELEASE'):
    """Runs the script in this process; returns dict name -> label map of what is in the default --out."""
    make_seg_aug.main(make_seg_aug.get_args_parser().parse_args(
        ['--voc12_root', str(data / 'VOC2012'), '--sbd_root', str(data / sbd), '--num_workers', '0', *flags]))
    return {path.stem: read_label_map(path, '') for path in out_dir(data).iterdir()}


def add_many(data, count):
    """Adds `count` images that only SBD has, enough for worker processes; returns their names."""
    names = [f'2010_{i:06d}' for i in range(count)]
    with open(data / 'benchmark_RELEASE' / 'dataset' / 'train.txt', 'a') as file:
        file.write('\n'.join(names) + '\n')
    for name in names:
        write(mat_path(data, name), mat_bytes({'Segmentation': mask_of(name)}))
    return names


def one_line(data, capsys, *flags):
    """The line with which the script ends on bad input, exit code 2."""
    with pytest.raises(SystemExit) as ended, exit_on_bad_input():
        run(data, *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count('\n') == 1, error
    return error


# ---------------------------------------------------------------- masks

@pytest.mark.parametrize('sbd', ['benchmark_RELEASE', 'benchmark_RELEASE/dataset'])
def test_folder_has_sbds_masks_and_the_official_ones_where_they_exist(sbd, data):
    masks = run(data, sbd=sbd)
    assert sorted(masks) == UNION
    for name, labels in masks.items():
        np.testing.assert_array_equal(labels, mask_of(name, official=name not in SBD_ONLY), strict=True)


def test_torchvision_reads_the_same_masks_from_sbd(data):
    from torchvision.datasets import SBDataset

    masks = run(data)
    for key, names in (('train', SBD_TRAIN), ('val', SBD_VAL)):
        dataset = SBDataset(data / 'benchmark_RELEASE' / 'dataset', key, mode='segmentation')
        for name, (_, target) in zip(names, dataset, strict=True):
            np.testing.assert_array_equal(make_seg_aug.read_sbd_mask(str(mat_path(data, name))), np.array(target))
            if name in SBD_ONLY:
                np.testing.assert_array_equal(masks[name], np.array(target), strict=True)


def test_mat_of_another_integer_type_is_read(data):
    labels = mask_of('2008_000005').astype(np.int32)
    write(mat_path(data, '2008_000005'), mat_bytes(sbd_struct(labels), compress=False))
    assert loadmat(mat_path(data, '2008_000005'))['GTcls'][0]['Segmentation'][0].dtype == np.int32
    np.testing.assert_array_equal(run(data)['2008_000005'], labels.astype(np.uint8), strict=True)


def test_masks_have_the_palette_of_voc(data):
    run(data)
    for name in UNION:
        with Image.open(out_dir(data) / f'{name}.png') as img:
            assert img.mode == 'P'
            np.testing.assert_array_equal(np.array(img.convert('RGB')), voc_palette()[np.array(img)])


def test_official_masks_are_copied_byte_for_byte(data):
    run(data)
    for name in TRAIN + VAL:
        official = data / 'VOC2012' / 'SegmentationClass' / f'{name}.png'
        assert (out_dir(data) / f'{name}.png').read_bytes() == official.read_bytes()


def test_official_mask_of_an_image_on_no_list_of_voc_wins_too(data):
    write_palette_png(data / 'VOC2012' / 'SegmentationClass' / '2008_000005.png', mask_of('2008_000005', official=True))
    np.testing.assert_array_equal(run(data)['2008_000005'], mask_of('2008_000005', official=True))


def test_mask_of_sbd_is_not_needed_where_the_official_one_exists(data):
    mat_path(data, '2007_000003').unlink()
    assert sorted(run(data)) == UNION


# ---------------------------------------------------------------- the list that the folder gives

def train_aug_list(data, *flags):
    make_lists.main(make_lists.get_args_parser().parse_args(
        ['--voc12_root', str(data / 'VOC2012'), '--out_dir', str(data / 'lists'), *flags]))
    return load_img_name_list(str(data / 'lists' / 'train_aug.txt'))


def test_make_lists_gets_the_union_minus_val_from_the_folder(data):
    run(data)
    names = train_aug_list(data, '--seg_aug', 'SegmentationClassAug')
    assert names == sorted(set(UNION) - set(VAL))
    assert names == train_aug_list(data, '--sbd_root', str(data / 'benchmark_RELEASE'))


def test_summary_counts_sources_and_knows_the_list_of_seam(data, monkeypatch, capsys):
    train_aug = sorted(set(UNION) - set(VAL))
    monkeypatch.setitem(CANONICAL, 'train_aug', (len(train_aug), train_aug[0], train_aug[-1], names_digest(train_aug),
                                                 None))
    run(data)
    text = capsys.readouterr().out
    assert '3 masks converted from SBD, 4 copied from VOC, 0 already there' in text
    assert '5 names, identical to the list used by SEAM' in text
    write_palette_png(out_dir(data) / '2012_000001.png', mask_of('2012_000001'))        # a foreign mask
    run(data)
    assert 'NOT the list used by SEAM: the names digest differs; 1 more' in capsys.readouterr().out


# ---------------------------------------------------------------- again, and interrupted

def test_finished_masks_are_kept_with_resume_alone(data, capsys):
    run(data)
    for name in ('2008_000005', '2007_000001'):
        write_palette_png(out_dir(data) / f'{name}.png', np.full(SIZE, 3, np.uint8))
    (out_dir(data) / '2008_000006.png').unlink()
    capsys.readouterr()
    masks = run(data, '--resume')
    assert (masks['2008_000005'] == 3).all() and (masks['2007_000001'] == 3).all()
    np.testing.assert_array_equal(masks['2008_000006'], mask_of('2008_000006'))
    assert '1 masks converted from SBD, 0 copied from VOC, 6 already there' in capsys.readouterr().out
    masks = run(data)
    np.testing.assert_array_equal(masks['2008_000005'], mask_of('2008_000005'))
    np.testing.assert_array_equal(masks['2007_000001'], mask_of('2007_000001', official=True))
    assert '3 masks converted from SBD, 4 copied from VOC, 0 already there' in capsys.readouterr().out


def test_interrupted_run_leaves_nothing_half_written_and_goes_on(data, monkeypatch):
    save, saved = Image.Image.save, []

    def save_and_stop(img, file, **options):
        if len(saved) == 1:
            file.write(b'\x89PNG half')
            raise KeyboardInterrupt
        saved.append(save(img, file, **options))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, 'save', save_and_stop)
        run(data)
    finished = TRAIN + VAL + ['2008_000005']
    assert sorted(os.listdir(out_dir(data))) == sorted(f'{name}.png' for name in finished)
    before = {name: (out_dir(data) / f'{name}.png').stat().st_mtime_ns for name in finished}
    masks = run(data, '--resume')
    assert sorted(masks) == UNION
    np.testing.assert_array_equal(masks['2008_000006'], mask_of('2008_000006'))
    assert before == {name: (out_dir(data) / f'{name}.png').stat().st_mtime_ns for name in finished}


# ---------------------------------------------------------------- processes

def test_bad_mask_in_a_worker_is_one_line_on_the_command_line(data):
    names = add_many(data, 120)
    write(mat_path(data, names[60]), b'no MATLAB file')
    done = subprocess.run([sys.executable, SCRIPT, '--voc12_root', 'VOC2012', '--sbd_root', 'benchmark_RELEASE',
                           '--num_workers', '2'],
                          cwd=data, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert f'{names[60]}.mat' in done.stderr and '--sbd_root' in done.stderr
    left = os.listdir(out_dir(data))
    assert f'{names[0]}.png' in left and not any(name.startswith('.') for name in left)
    for name in left:
        read_label_map(out_dir(data) / name, '')


def test_killed_worker_is_bad_input(monkeypatch):
    monkeypatch.setattr(workers.multiprocessing, 'cpu_count', lambda: 2)
    with pytest.raises(BadInput, match='work: .*--num_workers'):
        list(workers.parallel_map(os._exit, range(100), 2, 'work'))


def test_results_come_in_order_and_the_consumer_may_stop_early(monkeypatch):
    monkeypatch.setattr(workers.multiprocessing, 'cpu_count', lambda: 2)
    results = workers.parallel_map(abs, range(-120, 0), 2, 'work')
    assert [next(results) for _ in range(20)] == list(range(120, 100, -1))
    results.close()


# ---------------------------------------------------------------- bad input

LABELS = mask_of('2008_000006')
HDF5 = mat_bytes({})[:124] + b'\x00\x02IM' + bytes(384) + b'\x89HDF\r\n\x1a\n' + bytes(100)     # MATLAB's 7.3
MALFORMED = {
    'garbage': (b'garbage ' * 100, 'cannot read'),
    'empty': (b'', 'cannot read'),
    'truncated': (mat_bytes(sbd_struct(LABELS))[:-40], 'cannot read'),
    'hdf5': (HDF5, 'HDF reader for matlab v7.3'),
    'inst_file': (mat_bytes({'Segmentation': LABELS}, variable='GTinst'), 'no struct GTcls'),
    'gtcls_is_an_array': (mat_bytes(LABELS), 'no struct GTcls'),
    'gtcls_of_none': (mat_bytes(np.zeros((0, 0), [('Segmentation', object)])), 'no struct GTcls'),
    'without_segmentation': (mat_bytes({'CategoriesPresent': LABELS}), 'no struct GTcls with a field Segmentation'),
    'float': (mat_bytes(sbd_struct(LABELS.astype(np.float64))), 'float64'),
    'no_class': (mat_bytes({'Segmentation': np.where(LABELS == 7, np.uint8(21), LABELS)}), 'contains 21;'),
    'negative': (mat_bytes({'Segmentation': np.full(SIZE, -1, np.int16)}), 'contains -1;'),
    'wraps_round': (mat_bytes({'Segmentation': np.full(SIZE, 257, np.int16)}), 'contains 257;'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed_mat_is_one_line_and_the_finished_masks_stay(case, data, capsys):
    content, words = MALFORMED[case]
    write(mat_path(data, '2008_000006'), content)
    line = one_line(data, capsys)
    assert words in line and '2008_000006.mat' in line and '--sbd_root' in line
    assert sorted(os.listdir(out_dir(data))) == sorted(f'{name}.png' for name in TRAIN + VAL + ['2008_000005'])


def test_cut_mat_is_refused(tmp_path):
    content = mat_bytes({'Segmentation': LABELS, 'CategoriesPresent': np.arange(8, dtype=np.uint8)})
    for length in range(0, len(content), 7):
        write(tmp_path / 'cut.mat', content[:length])
        with pytest.raises(BadInput, match='cut.mat'):
            make_seg_aug.read_sbd_mask(str(tmp_path / 'cut.mat'))


def test_missing_masks_are_counted_before_anything_is_written(data, capsys):
    for path in (mat_path(data, '2008_000006'), data / 'VOC2012' / 'SegmentationClass' / f'{VAL[1]}.png'):
        path.unlink()
    line = one_line(data, capsys)
    assert f'2 of the listed masks are missing, the first of image {VAL[1]}' in line and not out_dir(data).exists()


@pytest.mark.parametrize('labels, words', [(np.full(SIZE, 21, np.uint8), 'contains 21'),
                                           (np.zeros((*SIZE, 3), np.uint8), 'mode RGB')])
def test_wrong_official_mask_is_refused(labels, words, data, capsys):
    Image.fromarray(labels).save(data / 'VOC2012' / 'SegmentationClass' / f'{TRAIN[1]}.png')
    line = one_line(data, capsys)
    assert words in line and f'{TRAIN[1]}.png' in line and '--voc12_root' in line


def test_folder_of_the_official_masks_is_no_out(data, capsys):
    os.symlink(data / 'VOC2012' / 'SegmentationClass', data / 'link')
    assert '--out' in one_line(data, capsys, '--out', str(data / 'link'))
    assert len(os.listdir(data / 'link')) == len(TRAIN + VAL)


@pytest.mark.parametrize('missing, flag', [('cls', '--sbd_root'), ('train.txt', '--sbd_root'),
                                           ('SegmentationClass', '--voc12_root'), ('ImageSets', '--voc12_root')])
def test_missing_parts_are_named(missing, flag, data, capsys):
    folder = data / ('VOC2012' if flag == '--voc12_root' else 'benchmark_RELEASE/dataset')
    (folder / missing).rename(folder / 'gone')
    line = one_line(data, capsys)
    assert missing in line and flag in line
