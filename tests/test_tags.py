"""Images and tags as people have them: --images, tags from the classifier, tiles of large images."""
import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer_SEAM
import infer_seg
import tiny_deeplab
import tiny_SEAM
from helpers import LIST, done, names_of, refused, run
from network import seam
from network.seam import class_scores
from tool import score_files, torchutils, training
from tool.cli import BadInput
from tool.metrics import best_tag_threshold
from tool.outputs import ResultFolder
from voc12.data_root import find_images
from voc12.lists import CAT_LIST
from voc12.tags import load_tag_thresholds


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A toy set, random networks, and CAMs of its list with known tags: cam, and their probabilities: known."""
    root = tmp_path_factory.mktemp('tags')
    done(run(root, 'voc12/make_toy', '--out', 'VOC2012', '--count', 8, '--size', 48, 48, '--classes', 3))
    torch.manual_seed(0)
    for module, name in ((tiny_SEAM, 'seam'), (tiny_deeplab, 'seg')):
        net = module.Net()
        torchutils.calibrate_batch_norm(net, [torch.randn(8, 3, 48, 48)])
        training.save_weights(net, str(root / f'{name}.pth'))
    (root / 'out').write_text(done(cams(root, '--infer_list', LIST, '--out_cam', 'cam', '--out_tags', 'known')))
    return root


def cams(root, *more):
    return run(root, 'infer_SEAM', '--network', 'tiny_SEAM', '--weights', 'seam.pth', '--scales', 1,
               '--num_workers', 0, *more)


def segments(root, *more):
    return run(root, 'infer_seg', '--network', 'tiny_deeplab', '--weights', 'seg.pth', '--scales', 1, '--flip',
               0, '--num_workers', 0, '--crf', 'off', *more)


def contents(folder, ending):
    return {path.name: path.read_bytes() for path in folder.glob('*' + ending)}


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))


# ----- --images -----

def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (12, 9)).save(path)
    return str(path)


def test_files_and_folders_become_names(tmp_path):
    one, two, three = (photo(tmp_path / name) for name in ('a b.JPG', 'inner/c.png', 'alone.jpg'))
    photo(tmp_path / '.hidden.jpg')
    (tmp_path / 'notes.txt').write_text('no image')
    found, folder = find_images([str(tmp_path), one])
    assert found == {'a_b': one, 'alone': three, 'c': two} and folder == str(tmp_path)
    assert find_images([two]) == ({'c': two}, str(tmp_path / 'inner'))
    assert find_images([two, three]) == ({'alone': three, 'c': two}, str(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    photo(tmp_path / 'photos/a.jpg'), photo(tmp_path / 'elsewhere/inner/b.png')
    for link in ('photos/other', 'photos/once_more', 'elsewhere/inner/cycle'):
        (tmp_path / link).symlink_to(tmp_path / 'elsewhere')
    assert list(find_images([str(tmp_path / 'photos')])[0]) == ['a', 'b']


@pytest.mark.parametrize('ending', ['jfif', 'JFIF', 'ppm'])
def test_every_format_that_is_read_is_found(tmp_path, ending):
    Path(photo(tmp_path / 'a.jpg')).rename(tmp_path / f'a.{ending}')
    assert list(find_images([str(tmp_path)])[0]) == ['a']


def test_hidden_folders_and_folders_of_results_are_not_read(tmp_path):
    for path in ('a.jpg', '.thumbnails/a.jpg', 'inner/.ipynb_checkpoints/a.jpg', 'seg/a.png'):
        photo(tmp_path / path)
    ResultFolder(str(tmp_path / 'seg'), '--out_seg', '.png', {}).open(['a'], resume=False)
    assert find_images([str(tmp_path)])[0] == {'a': str(tmp_path / 'a.jpg')}


def test_files_that_are_not_read_are_counted(tmp_path, capsys):
    photo(tmp_path / 'a.jpg')
    for name in ('b.heic', 'inner/c.heic', 'd.mov', '.hidden'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    find_images([str(tmp_path)])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith('3 ') and str(tmp_path) in line and '.heic (2)' in line and '.mov (1)' in line


def test_what_images_cannot_be_is_refused(tmp_path):
    first, second = photo(tmp_path / 'x/a.jpg'), photo(tmp_path / 'y/a.png')
    (tmp_path / 'empty').mkdir()
    for paths, words in (([first, second], (first, second)), ([str(tmp_path / 'no')], (str(tmp_path / 'no'),)),
                         ([str(tmp_path / 'empty')], (str(tmp_path / 'empty'),))):
        with pytest.raises(BadInput) as error:
            find_images(paths)
        assert all(word in str(error.value) for word in ('--images', *words))


def test_images_give_the_results_of_list_and_data_root(data, tmp_path):
    files = [f'VOC2012/JPEGImages/{name}.jpg' for name in names_of(data)]
    done(cams(data, '--images', *files, '--cls_labels', labels_file(data, tmp_path), '--out_cam', tmp_path / 'cam'))
    assert contents(tmp_path / 'cam', 'npy') == contents(data / 'cam', 'npy')
    done(segments(data, '--infer_list', LIST, '--out_seg', tmp_path / 'by_list'))
    done(segments(data, '--images', *files, '--out_seg', tmp_path / 'seg', '--vis_dir', tmp_path / 'vis', '--vis_count',
                  2))
    assert contents(tmp_path / 'seg', 'png') == contents(tmp_path / 'by_list', 'png')
    assert sorted(path.stem for path in (tmp_path / 'vis').iterdir()) == sorted(names_of(data))[:2]
    assert Image.open(next((tmp_path / 'vis').iterdir())).size[0] > 2 * 48


def labels_file(data, folder):
    """The known tags of the toy set as a cls_labels file."""
    labels = {}
    for name in names_of(data):
        scores = score_files.load_scores(str(data / 'cam' / f'{name}.npy'), '', 'cam')
        labels[name] = np.isin(np.arange(20), list(scores)).astype(np.float32)
    np.save(folder / 'labels.npy', labels)
    return folder / 'labels.npy'


@pytest.mark.parametrize('script', [cams, segments])
def test_images_and_list_together_are_refused(data, script):
    refused(script(data, '--images', 'VOC2012/JPEGImages', '--infer_list', LIST), '--images', '--infer_list')


def test_damaged_image_is_refused_under_the_flag_that_named_it(data, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    refused(segments(data, '--images', tmp_path, '--out_seg', tmp_path / 'seg'), 'broken.jpg', '--images')


def test_images_without_tags_are_refused_with_the_flag_that_predicts_them(data, tmp_path):
    refused(cams(data, '--images', 'VOC2012/JPEGImages', '--out_cam', tmp_path / 'cam', '--cls_labels', 'none.npy'),
            'none.npy', '--tag_threshold')


# ----- tags from the classifier -----

@pytest.fixture(scope='module')
def net(data):
    net = tiny_SEAM.Net()
    net.load_state_dict(torch.load(data / 'seam.pth', weights_only=True))
    return net.eval()


@torch.no_grad()
def test_probability_is_the_largest_over_scales_and_mirrors_of_what_the_classification_loss_sees(net):
    views = [torch.randn(3, 48, 56), torch.randn(3, 24, 28)]
    scores = [class_scores(net.class_maps(x[None])[0][:, 1:])[0] for view in views for x in (view, view.flip(-1))]
    expected = torch.sigmoid(torch.stack(scores)).amax(dim=0)
    for kind in 'cam_rv', 'gradcam':
        assert np.allclose(infer_SEAM.run_views(net, views, kind)[1], expected, atol=1e-5)


def test_predicted_tags_decide_the_classes_and_leave_the_maps_alone(data, tmp_path):
    probability = {name: np.load(data / 'known' / f'{name}.npy') for name in names_of(data)}
    highest = sorted(row.max() for row in probability.values())
    threshold = float(highest[0] + highest[1]) / 2                  # one image has no class
    out = done(cams(data, '--infer_list', LIST, '--tag_threshold', threshold, '--out_cam', tmp_path / 'cam',
                    '--out_tags', tmp_path / 'tags'))
    taken = {name: np.flatnonzero(row > threshold).tolist() for name, row in probability.items()}
    empty = [name for name, classes in taken.items() if not classes]
    assert len(empty) == 1 and f'in 1 of {len(taken)} images' in out and f'empty: {empty[0]}\n' in out
    assert score_files.load_scores(str(tmp_path / f'cam/{empty[0]}.npy'), '', 'cam') == {}
    (tmp_path / 'list.txt').write_text('\n'.join(set(taken) - set(empty)))
    np.save(tmp_path / 'labels.npy', {name: np.isin(np.arange(20), classes) for name, classes in taken.items()})
    done(cams(data, '--infer_list', tmp_path / 'list.txt', '--cls_labels', tmp_path / 'labels.npy', '--out_cam',
              tmp_path / 'known'))
    found = contents(tmp_path / 'cam', 'npy')
    assert found.pop(f'{empty[0]}.npy') and found == contents(tmp_path / 'known', 'npy')
    rows = rows_of(tmp_path / 'tags' / 'tags.csv')
    assert rows[1:] == [[name + '.jpg', ';'.join(CAT_LIST[key] for key in taken[name])] for name in names_of(data)]
    table = rows_of(tmp_path / 'tags' / 'probabilities.csv')
    assert table[0] == ['image', *CAT_LIST]
    assert np.allclose(np.float64([row[1:] for row in table[1:]]), list(probability.values()), atol=1e-4)


def test_table_of_tags_makes_a_data_root(data, tmp_path):
    photos = tmp_path / 'photos'
    for number, name in enumerate(names_of(data)[:3]):
        path = photos / f'in {number}' / f'{name}.jpg'
        path.parent.mkdir(parents=True)
        shutil.copy(data / 'VOC2012/JPEGImages' / f'{name}.jpg', path)
    (tmp_path / 'names.txt').write_text('\n'.join(CAT_LIST))
    done(cams(data, '--images', photos, '--tag_threshold', .5, '--out_tags', tmp_path / 'tags', '--out_cam',
              tmp_path / 'cam'))
    done(run(tmp_path, 'voc12/make_custom', '--images', 'photos', '--labels', 'tags/tags.csv', '--class_names',
             'names.txt', '--out', 'root', '--val_share', 0))
    labels = np.load(tmp_path / 'root/cls_labels.npy', allow_pickle=True).item()
    assert len(labels) == 3
    for name, label in labels.items():
        assert np.flatnonzero(label).tolist() == list(np.load(tmp_path / f'cam/{name}.npy', allow_pickle=True).item())


def test_threshold_for_each_class_scales_of_the_tags_and_resume(data, tmp_path):
    thresholds = np.linspace(.1, .9, 20).round(3)
    (tmp_path / 'thresholds.csv').write_text('\n'.join(map('{},{}'.format, CAT_LIST, thresholds)))
    flags = ('--infer_list', LIST, '--tag_threshold', tmp_path / 'thresholds.csv', '--out_tags', tmp_path / 'tags',
             '--tag_scales', .5)
    done(cams(data, *flags))
    done(cams(data, '--infer_list', LIST, '--scales', .5, '--out_tags', tmp_path / 'half'))
    assert contents(tmp_path / 'tags', 'npy') == contents(tmp_path / 'half', 'npy') != contents(data / 'known', 'npy')
    before = (tmp_path / 'tags/tags.csv').read_text()
    for name, row in zip(names_of(data), rows_of(tmp_path / 'tags/tags.csv')[1:]):
        probability = np.load(tmp_path / 'tags' / f'{name}.npy')
        assert row[1] == ';'.join(np.array(CAT_LIST)[probability > thresholds])
    (tmp_path / 'tags' / f'{names_of(data)[0]}.npy').unlink()
    assert f'{len(names_of(data)) - 1} of {len(names_of(data))} images are finished' in done(
        cams(data, *flags, '--resume'))
    assert (tmp_path / 'tags/tags.csv').read_text() == before
    refused(cams(data, *flags[:-1], 1, '--resume'), 'tag_scales')


@pytest.mark.parametrize('flags', [(), ('--tag_threshold', .5)])
def test_probability_that_is_no_number_is_refused(data, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(seam, 'class_scores', lambda cam: cam.mean(dim=(2, 3)) * float('nan'))
    refused(cams(data, '--infer_list', LIST, '--out_tags', tmp_path / 'tags', *flags), names_of(data)[0], '--amp')
    assert not list((tmp_path / 'tags').glob('*.npy'))


def test_known_tags_suggest_a_threshold(data):
    labels = [np.isin(np.arange(20), list(np.load(data / f'cam/{name}.npy', allow_pickle=True).item()))
              for name in names_of(data)]
    best, *_ = best_tag_threshold(np.stack([np.load(data / f'known/{name}.npy') for name in names_of(data)]),
                                  np.array(labels))
    assert f'--tag_threshold {best} ' in (data / 'out').read_text() and not (data / 'known/tags.csv').exists()


def test_best_threshold_of_all_classes_together():
    probability = np.float32([[.9, .2], [.6, .45], [.305, .1]])
    labels = np.array([[1, 0], [1, 1], [0, 0]])
    assert best_tag_threshold(probability, labels) == (.31, 100, 100, 100)
    assert best_tag_threshold(probability, 1 - labels)[1:] == pytest.approx((50, 100, 200 / 3))
    assert best_tag_threshold(probability, 0 * labels)[1:] == (0, 0, 0)


@pytest.mark.parametrize('text, words', [
    ('1.5', ['1.5']), ('nan', ['nan']), ('nowhere.csv', ['nowhere.csv']), ('cat,0.5', ['dog']),
    ('cat,0.5\ndog,0.5\nfox,0.5', ['fox']), ('cat,0.5\ndog,0.5\ndog,0.6', ['dog']),
    ('cat,0.5\ndog,high', ['dog', 'high']), ('cat,0.5\ndog,2', ['dog', '2'])])
def test_wrong_thresholds_are_refused(tmp_path, text, words):
    path = tmp_path / 'thresholds.csv'
    if ',' in text:
        path.write_text(text)
    with pytest.raises(BadInput) as error:
        load_tag_thresholds(str(path) if ',' in text else text, ['cat', 'dog'])
    assert all(word in str(error.value) for word in ('--tag_threshold', *words))


def test_order_of_the_thresholds_is_that_of_the_classes(tmp_path):
    (tmp_path / 'a.csv').write_text(' red  fox , .3\ncat,.2\n\n')
    assert load_tag_thresholds(str(tmp_path / 'a.csv'), ['cat', 'red fox']) == [.2, .3]


@pytest.mark.parametrize('flags, words', [
    (['--out_cam', 'x', '--tag_threshold', '.5'], ['--tag_threshold', '--out_tags']),
    (['--out_cam', 'x', '--tag_scales', '.5'], ['--tag_scales', '--out_tags']),
    (['--out_tags', 'x', '--tag_scales', '0'], ['--tag_scales'])])
def test_flags_of_tags_that_miss_something_are_refused(data, flags, words):
    refused(cams(data, *flags), *words)


@pytest.mark.parametrize('flag', ['--tag_threshold', '--out_tags'])
def test_finished_cams_have_their_tags(data, flag):
    refused(run(data, 'infer_SEAM', '--cam_dir', 'cam', '--out_crf', 'x', flag, '0.5'), '--cam_dir', flag)


# ----- tiles -----

@pytest.mark.parametrize('side, tile', [(100, 100), (100, 500), (101, 100), (1000, 64), (999, 333), (129, 32)])
def test_tiles_cover_a_side_and_overlap_by_a_quarter_at_least(side, tile):
    starts = infer_seg.tile_starts(side, tile)
    assert starts[0] == 0 and starts[-1] == max(side - tile, 0)
    assert len(starts) == 1 or max(np.diff(starts)) <= tile * 3 / 4 and min(np.diff(starts)) > 0


def test_tile_that_holds_the_image_changes_no_bit(data, tmp_path):
    name = names_of(data)[0]
    image = f'VOC2012/JPEGImages/{name}.jpg'
    done(segments(data, '--images', image, '--out_prob', tmp_path / 'whole'))
    largest = max(Image.open(data / image).size)
    done(segments(data, '--images', image, '--out_prob', tmp_path / 'tile', '--tile', largest))
    done(segments(data, '--images', image, '--out_prob', tmp_path / 'small', '--tile', 32))
    whole, tile, small = (contents(tmp_path / folder, 'npy') for folder in ('whole', 'tile', 'small'))
    assert whole == tile != small and list(whole) == [name + '.npy']
    refused(segments(data, '--images', image, '--out_prob', tmp_path / 'x', '--tile', 0), '--tile')


def test_probabilities_are_averaged_where_tiles_overlap():
    def net(x):         # a tile that begins with a 1 is all of class 1, the others are all of class 0
        logits = torch.zeros(1, 2, *x.shape[2:])
        logits[:, int(x[0, 0, 0, 0])] = 100
        return logits
    img = np.zeros((4, 7, 3), np.float32)
    img[0, 3] = 1
    prob = infer_seg.tiled_probability(net, img, 4, [1], flip=False)
    assert prob.dtype == np.float32 and np.allclose(prob.sum(axis=0), 1)
    assert np.allclose(prob[1], [0, 0, 0, .5, 1, 1, 1])
