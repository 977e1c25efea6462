"""AffinityNet's labels, loss, training gradients and the random walk against the reference's outputs."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infer_aff
import train_aff
from conftest import GOLDEN, close, filled, golden
from network.resnet38_aff import Net
from tool import image_files, imutils
from tool.affinity_pairs import fit_radius
from tool.outputs import ResultFolder
from voc12.data import ExtractAffinityLabelInRadius, VOC12AffDataset, fuse_crf_labels
from voc12.masks import find_labels

WALKED = ('2007_000003', '2007_000002')


@pytest.mark.parametrize('case', ['56', 'small', 'small_r3'])
def test_pair_labels(case):
    g = golden('g06_affinity_labels')
    label = g[f'ext_{case}_label']
    labels = ExtractAffinityLabelInRadius(len(label), radius=int(g[f'ext_{case}_radius']))(label)
    for kind, pairs in zip(('bg', 'fg', 'neg'), labels):
        assert pairs.dtype == torch.float32 and pairs.shape == g[f'ext_{case}_{kind}'].shape
        assert (pairs.numpy() == g[f'ext_{case}_{kind}']).all()


@pytest.mark.parametrize('case', ['avgpool', 'avgpool_exact'])
def test_mean_pooling(case):
    g = golden('g06_affinity_labels')
    close(imutils.AvgPool2d(8)(g[case + '_in']), g[case + '_out'], 1e-6)


def test_fusion_rule():
    g = golden('g06_affinity_labels')
    assert (fuse_crf_labels(g['fuse_rnd_pooled']) == g['fuse_rnd_label']).all()
    assert (fuse_crf_labels(g['fuse_pooled']) == g['fuse_label']).all()


def test_dataset_from_crf_files(tmp_path):
    g = golden('g06_affinity_labels')
    for folder in ('JPEGImages', 'la', 'ha'):
        (tmp_path / folder).mkdir()
    Image.new('RGB', (96, 96)).save(tmp_path / 'JPEGImages' / '2007_000001.jpg')
    (tmp_path / 'list.txt').write_text('2007_000001\n')
    for kind in ('la', 'ha'):
        np.save(tmp_path / kind / '2007_000001.npy', dict(zip(g['fuse_keys'].tolist(), g['fuse_' + kind])))
    pooled = []
    dataset = VOC12AffDataset(
        str(tmp_path / 'list.txt'), str(tmp_path / 'la'), str(tmp_path / 'ha'), cropsize=96, voc12_root=str(tmp_path),
        transforms=[imutils.OnImage(np.asarray), imutils.OnLabel(imutils.AvgPool2d(8)),
                    imutils.OnLabel(lambda scores: pooled.append(scores) or scores)])
    _, _, labels = dataset[0]
    close(pooled[0], g['fuse_pooled'], 1e-6)
    for kind, pairs in zip(('bg', 'fg', 'neg'), labels):
        assert (pairs.numpy() == g['fuse_' + kind]).all()


def test_crf_labels_without_an_object_are_noticed(tmp_path):
    (tmp_path / 'JPEGImages').mkdir()
    Image.new('RGB', (24, 16)).save(tmp_path / 'JPEGImages' / 'a.jpg')
    (tmp_path / 'list.txt').write_text('a\n')
    for share, found in ((.9, {0}), (.4, {0, 1})):          # of the background, in the left half
        scores = np.full((16, 24), .9, np.float32)
        scores[:, :12] = share
        np.save(tmp_path / 'a.npy', {0: scores, 1: 1 - scores})
        dataset = VOC12AffDataset(str(tmp_path / 'list.txt'), str(tmp_path), str(tmp_path), 16, str(tmp_path))
        assert find_labels(dataset.sample_labels()) == found


def check_terms(aff, labels, g, prefix):
    """Returns the terms of the loss."""
    terms, counts = train_aff.affinity_loss(aff, *labels), train_aff.pair_counts(labels)
    for kind, count in zip(('bg', 'fg', 'neg'), counts):
        assert terms[kind + '_loss'].item() == pytest.approx(g[f'{prefix}_{kind}_loss'], rel=1e-4, abs=1e-9)
        if f'{prefix}_{kind}_count' in g:
            assert count.item() == pytest.approx(g[f'{prefix}_{kind}_count'], abs=1e-4)
    assert terms['loss'].item() == pytest.approx(g[prefix + '_loss'], rel=1e-4)
    return terms


def test_loss_of_given_affinities():
    g = golden('g07_aff_forward')
    aff = torch.from_numpy(g['lossA_aff']).requires_grad_()
    labels = [torch.from_numpy(g['lossA_' + kind]).float() for kind in ('bg', 'fg', 'neg')]
    check_terms(aff, labels, g, 'lossA')['loss'].backward()
    close(aff.grad, g['lossA_grad'], 1e-4)
    extract = ExtractAffinityLabelInRadius(12)
    for i, label in enumerate(g['lossA_labelmaps']):
        assert all((pairs == labels[k][i]).all() for k, pairs in enumerate(extract(label)))


def test_loss_of_missing_kinds_is_0():
    g = golden('g07_aff_forward')
    aff, fg = torch.from_numpy(g['lossA_aff']), torch.from_numpy(g['lossA_fg']).float()
    check_terms(aff, [torch.zeros_like(fg), fg, torch.zeros_like(fg)], g, 'lossEmpty')


def test_loss_of_a_batch_is_the_mean_over_its_parts():
    """However the pairs are spread over the parts, since each part divides by its share of the batch."""
    torch.manual_seed(0)
    aff, labels = torch.rand(4, 3, 5), [(torch.rand(4, 3, 5) < 0.4).float() for _ in range(3)]
    labels[0][2:] = 0           # all background pairs are in the first part
    whole, counts = train_aff.affinity_loss(aff, *labels), train_aff.pair_counts(labels)
    parts = [train_aff.affinity_loss(*part, counts / 2) for part in zip(*(t.chunk(2) for t in (aff, *labels)))]
    for name, value in whole.items():
        assert ((parts[0][name] + parts[1][name]) / 2).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize('case', ['trainB', 'trainC'])
def test_training_gradients(case):
    g = golden('g07_aff_forward')
    net = filled(Net()).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.
    aff = net(torch.from_numpy(g[case + '_x']))
    close(aff.detach(), g[case + '_aff'], 1e-4)
    radius = int(g[case + '_radius'])
    extract = ExtractAffinityLabelInRadius(len(g[case + '_labelmaps'][0]), radius)
    labels = [torch.stack(kind) for kind in zip(*(extract(label) for label in g[case + '_labelmaps']))]
    check_terms(aff, labels, g, case)['loss'].backward()
    parameters = dict(net.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is None} == set(g[case + '_nograd_names'])
    for name, norm in zip(g[case + '_grad_names'], g[case + '_grad_l2']):
        assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-3), name
    for key in [key for key in g if key.startswith(case + '_grad64:')]:
        close(parameters[key.split(':')[1]].grad.flatten()[:64], g[key], 2e-3)


# ----- random walk -----

def walk_inputs(name):
    """Padded normalised image (1, 3, H, W), its CAM dict, its size."""
    g = golden('g08_random_walk')
    img = imutils.to_network_input(image_files.read_image(os.path.join(GOLDEN, 'images', name + '.jpg')))
    h, w = img.shape[1:]
    cams = {int(key.rsplit('_', 1)[1]): value for key, value in g.items() if key.startswith(f'{name}:cam_in_')}
    return F.pad(torch.from_numpy(img)[None], (0, -w % 8, 0, -h % 8)), cams, (h, w)


@pytest.fixture(scope='module')
def walk_net(aff_net):
    """The network of the walk. It runs only once on an image, and then remembers the affinities."""
    known = {}

    def net(img):
        key = img.numpy().tobytes()
        if key not in known:
            known[key] = aff_net(img)
        return known[key]

    net.radius = aff_net.radius
    return net


@torch.no_grad()
@pytest.mark.parametrize('setting', [0, 1])
@pytest.mark.parametrize('name', WALKED)
def test_random_walk(walk_net, name, setting):
    g, key = golden('g08_random_walk'), f'{name}:s{setting}:'
    alpha, beta, logt = g['settings_alpha_beta_logt'][setting]
    img, cams, (h, w) = walk_inputs(name)
    size = img.shape[2:]
    assert tuple(size) == tuple(g[name + ':padded_size'])
    present = g[name + ':present_channels']
    seeds = F.avg_pool2d(torch.from_numpy(infer_aff.walk_seeds(cams, alpha, size)), 8)
    close(seeds, g[key + 'pooled_cam'], 1e-5)
    walked = infer_aff.random_walk(seeds, walk_net(img), fit_radius(*seeds.shape[1:]), int(beta), int(logt))
    close(walked, g[key + 'rw_lowres'], 1e-4)
    scores = infer_aff.walk_image(walk_net, img[0], cams, alpha, int(beta), int(logt))
    close(scores, g[key + 'scores'], 1e-4)
    assert g[key + 'absent_absmax'] == 0       # why the absent classes need not walk
    assert (present[scores.argmax(axis=0)[:h, :w]] == g[key + 'pred']).all()


@torch.no_grad()
@pytest.mark.parametrize('name', WALKED)
def test_sparse_walk_is_the_dense_power(aff_net, walk_net, name):
    g = golden('g08_random_walk')
    img, _, _ = walk_inputs(name)
    h, w = (side // 8 for side in img.shape[2:])
    alpha, beta, logt = g['settings_alpha_beta_logt'][0]
    dense = aff_net(img, to_dense=True) ** beta
    close(dense[::7, ::7], g[name + ':aff_pow_beta_sub_s0'], 1e-4)
    trans = dense.double() / dense.double().sum(dim=0)
    for _ in range(int(logt)):
        trans = trans @ trans
    close(trans[::7, ::7], g[f'{name}:s0:trans_sub'], 1e-4)
    close([trans.sum(0).min(), trans.sum(0).max()], g[f'{name}:s0:trans_colsum_range'], 1e-4)
    scores = torch.rand(3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    walked = infer_aff.random_walk(scores, walk_net(img).double(), fit_radius(h, w), int(beta), int(logt))
    close(walked.flatten(1), scores.flatten(1) @ trans, 1e-6)


@pytest.mark.parametrize('name', WALKED)
def test_crf_after_the_walk(name):
    pytest.importorskip('pydensecrf.densecrf')
    g = golden('g08_random_walk')
    img, _, (h, w) = walk_inputs(name)
    scores = infer_aff.refine_walk(g[name + ':s0:scores'], list(g[name + ':present_channels']), img[0].numpy(), 20,
                                   'pydensecrf', 'cpu')
    assert np.abs(scores - g[name + ':crf:scores']).max() < 1e-5
    assert (g[name + ':present_channels'][scores.argmax(axis=0)[:h, :w]] == g[name + ':crf:pred']).all()


@pytest.mark.parametrize('with_crf', [False, True])
def test_walk_by_the_script(walk_net, monkeypatch, tmp_path, with_crf):
    """With the default flags. The sides of 2007_000002, 75 x 101, are no multiples of 8."""
    g, kind = golden('g08_random_walk'), 'crf' if with_crf else 's0'
    os.symlink(os.path.join(GOLDEN, 'images'), tmp_path / 'JPEGImages')
    (tmp_path / 'cam').mkdir()
    for name in WALKED:
        np.save(tmp_path / f'cam/{name}.npy', walk_inputs(name)[1])
    (tmp_path / 'list.txt').write_text('\n'.join(WALKED))
    (tmp_path / 'aff.pth').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_aff, 'import_network', lambda *_: lambda: walk_net)
    monkeypatch.setattr(infer_aff, 'load_trained', lambda net, *_: net)
    with pytest.raises(SystemExit) as end:
        infer_aff.main(infer_aff.get_args_parser().parse_args([
            '--weights', 'aff.pth', '--voc12_root', '.', '--infer_list', 'list.txt', '--cam_dir', 'cam',
            '--out_prob', 'prob', '--num_workers', '0', '--crf', str(with_crf)]))
    assert end.value.code == 0
    for name in WALKED:
        expected, labels = g[f'{name}:{kind}:scores'], g[f'{name}:{kind}:pred']
        scores = np.load(f'prob/{name}.npy', allow_pickle=True).item()
        assert list(scores) == list(g[name + ':present_channels'])
        expected = (expected / expected.sum(axis=0))[:, :labels.shape[0], :labels.shape[1]]
        close(np.stack(list(scores.values())), expected, 2e-3 if with_crf else 1e-4)
        assert (image_files.read_label_map(f'out_rw/{name}.png', '') == labels).all()


@pytest.mark.parametrize('backend', ['pydensecrf', 'torch'])
def test_crf_gets_the_scores_of_the_walk_as_they_are(tmp_path, backend):
    """The CRF raises scores to 1e-5. It sees no difference between lower ones, unless they are scaled to sum to 1."""
    if backend == 'pydensecrf':
        pytest.importorskip('pydensecrf.densecrf')
    scores = np.float32([4e-6, 8e-6])[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    label_folder, score_folder = (ResultFolder(str(tmp_path), '', extension, {}) for extension in ('.png', '.npy'))
    infer_aff.write_results('a', scores, [0, 3], np.zeros((3, 8, 8), np.float32), np.zeros((8, 8), bool), 20,
                            label_folder, score_folder, True, 0., backend, 'cpu')
    saved = np.load(tmp_path / 'a.npy', allow_pickle=True).item()
    close(saved[3], np.full((8, 8), .5), 1e-3)


def test_walk_without_pairs_returns_the_seeds():
    scores = torch.rand(2, 1, 5)
    assert torch.equal(infer_aff.random_walk(scores, torch.zeros(1, 0, 5), 1, 8, 6), scores)
