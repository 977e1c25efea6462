"""Other classes than VOC's, through all stages."""
import pytest
import torch

from helpers import AFF, LIST, SEAM, done, names_of, refused, run
from script_runs import pipeline, set_list, train, voc


@pytest.mark.parametrize('count', [3, 80])
def test_every_stage_runs_with_other_classes(tmp_path, count):
    names = tmp_path / 'names.txt'
    names.write_bytes(b'\xef\xbb\xbf' + ''.join(f'traffic light {i}\r\n' for i in range(count)).encode())
    classes = '--class_names', names, '--num_workers', 0
    lists = LIST
    done(run(tmp_path, 'voc12/make_toy', '--out', 'VOC2012', '--count', 12, '--size', 64, 64, '--class_names', names))
    train = ('--train_list', lists, '--batch_size', 4, '--max_epochs', 1, *classes)
    done(run(tmp_path, 'train_SEAM', *train, '--network', SEAM, '--crop_size', 48, '--resize_long', 48, 64,
             '--session_name', 'seam'))
    assert torch.load(tmp_path / 'seam.pth', weights_only=True)['fc8.weight'].shape[0] == 1 + count
    done(run(tmp_path, 'infer_SEAM', '--network', SEAM, '--weights', 'seam.pth', '--infer_list', lists, '--scales', 1,
             '--out_cam', 'cam', '--out_crf', 'crf', *classes))
    done(run(tmp_path, 'train_aff', *train, '--network', AFF, '--crop_size', 48, '--la_crf_dir', 'crf_4.0',
             '--ha_crf_dir', 'crf_24.0', '--session_name', 'aff'))
    done(run(tmp_path, 'infer_aff', '--network', AFF, '--weights', 'aff.pth', '--infer_list', lists, '--cam_dir', 'cam',
             '--crf', *classes))
    for folder, kind in (('cam', ('npy', '--curve')), ('crf_4.0', ('crf',)), ('out_rw', ('png',))):
        out = done(run(tmp_path, 'evaluation', '--list', lists, '--predict_dir', folder, '--comment', folder,
                       '--type', *kind, *classes))
        if folder != 'cam':
            assert out.count('traffic light') == count
            rows = (tmp_path / f'{folder}_confusion.csv').read_text().splitlines()
            assert len(rows) == count + 3 and all(row.count(',') == count + 2 for row in rows)


def test_weights_of_other_classes_need_reset_head(pipeline, tmp_path):
    root, _ = pipeline
    (tmp_path / 'names.txt').write_text('aeroplane\nbicycle\nbird\n')
    flags = ('--train_list', LIST, '--crop_size', 48, '--resize_long', 48, 64,
             '--batch_size', 8, '--num_workers', 0, '--max_epochs', 1, '--network', SEAM, '--weights', 'runs/seam.pth',
             '--class_names', tmp_path / 'names.txt', '--session_name', tmp_path / 'new')
    refused(run(root, 'train_SEAM', *flags), 'runs/seam.pth', '21 outputs', '3 classes (--class_names)', '--reset_head')
    assert 'randomly initialised: fc8.weight' in done(run(root, 'train_SEAM', *flags, '--reset_head'))
    old, new = (torch.load(path, weights_only=True) for path in (root / 'runs/seam.pth', tmp_path / 'new.pth'))
    assert new['fc8.weight'].shape[0] == 4 and torch.equal(new['bn7.weight'], old['bn7.weight'])


@pytest.mark.parametrize('text, words', [
    ('cat\ndog\ncat\n', ('cat twice',)), ('\n \n', ('0 classes',)), ('background\ncat', ('background',)),
    ('\n'.join(map(str, range(255))), ('255 classes', '254'))])
def test_names_file_that_cannot_be(voc, text, words):
    set_list(voc, names_of(voc))
    (voc / 'names.txt').write_text(text)
    refused(train(voc, '--class_names', 'names.txt'), 'names.txt', '--class_names', *words)


def test_class_that_no_image_has_is_named(voc):
    set_list(voc, names_of(voc))
    (voc / 'names.txt').write_text('aeroplane\nbicycle\nbird\nunicorn\n')
    out = done(train(voc, '--class_names', 'names.txt', '--lr', 0, '--batch_size', 8))
    line, = [line for line in out.splitlines() if 'unicorn' in line]
    assert 'warning' in line and '--class_names' in line and 'bird' not in line
    assert out.index('unicorn') < out.index('Iter:')


def test_names_file_that_is_no_text(voc):
    set_list(voc, names_of(voc))
    refused(train(voc, '--class_names', voc / 'VOC2012/JPEGImages' / (names_of(voc)[0] + '.jpg')), '--class_names')


def test_crf_files_of_more_classes_than_named(voc, pipeline):
    (voc / 'names.txt').write_text('aeroplane\n')
    set_list(voc, names_of(voc))
    result = run(voc, 'train_aff', '--network', AFF, '--train_list', 'list.txt', '--crop_size', 64, '--batch_size', 4,
                 '--num_workers', 0, '--la_crf_dir', pipeline[0] / 'out/crf_4.0', '--class_names', 'names.txt',
                 '--ha_crf_dir', pipeline[0] / 'out/crf_24.0', '--weights', pipeline[0] / 'runs/pre_backbone.pth')
    refused(result, '.npy', '--la_crf_dir', '1 classes of --class_names')
