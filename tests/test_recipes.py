"""What the READMEs say that can be run: the recipes do what they say; flags, files and links are there."""
import glob
import importlib
import os
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
import torchvision

from conftest import ROOT
from helpers import LIST, OURS, done, forget_modules, fresh_imports, run

EDITS = open(os.path.join(ROOT, 'network', 'README.md'), encoding='utf-8').read()
TRAIN = ['--train_list', LIST, '--batch_size', '2', '--max_epochs', '1', '--num_workers', '0', '--crop_size', '64',
         '--resize_long', '64', '80']


def blocks(text, language=''):
    """The fenced blocks of a README in one language."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def read_recipes():
    """dict title -> (file, list of (old lines, new lines)) of the block of edits in network/README.md."""
    block, = blocks(EDITS, 'diff')
    recipes = {}
    for file, title, body in re.findall(r'^--- (\S+): (.*)\n((?:[-+] .*\n)+)', block, re.MULTILINE):
        hunks = re.findall(r'((?:^- .*\n)+)((?:^\+ .*\n)+)', body, re.MULTILINE)
        recipes[title] = file, [[re.sub('^[-+]', '', lines, flags=re.MULTILINE) for lines in hunk] for hunk in hunks]
    assert sum(line[:1] in '-+' for line in block.splitlines()) == len(recipes) + sum(
        lines.count('\n') for _, hunks in recipes.values() for hunk in hunks for lines in hunk)      # none is left out
    return recipes


RECIPES = read_recipes()


@pytest.fixture(scope='module')
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawings')
    done(run(folder, 'voc12/make_toy', '--out', 'VOC2012', '--count', 4, '--size', 64, 72, '--classes', 3))
    return folder


@pytest.fixture
def copy(drawings, tmp_path, monkeypatch):
    """A folder with a copy of the code, from which our modules are imported."""
    for name in OURS[:3]:
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in OURS[3:]:
        shutil.copy(os.path.join(ROOT, name + '.py'), tmp_path)
    monkeypatch.chdir(drawings)
    monkeypatch.syspath_prepend(tmp_path)
    with fresh_imports():
        yield tmp_path


def apply_recipe(copy, title):
    file, hunks = RECIPES[title]
    text = (copy / file).read_text()
    for old, new in hunks:
        assert text.count('\n' + old) == 1, f'{title}: {file} has no such lines any more:\n{old}'
        text = text.replace('\n' + old, '\n' + new)
    (copy / file).write_text(text)
    forget_modules()


def train(copy, *flags):
    """One step of SEAM with the code of the copy. Returns the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train_SEAM.py', *TRAIN, '--session_name', str(copy / 'trained'), *flags])
        runpy.run_path(str(copy / 'train_SEAM.py'), run_name='__main__')
    assert sys.modules['network.seam'].__file__ == str(copy / 'network/seam.py')
    return torch.load(copy / 'trained.pth', weights_only=True)


# ----- what a recipe changes: numbers of the code as it is imported now -----

def losses():
    """The terms of the objective, on maps of two images of the classes 0 and 2."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 12, 12), torch.rand(2, 4, 12, 12), torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3)]
    return importlib.import_module('train_SEAM').seam_loss(*maps, torch.tensor([[1., 0., 1.]] * 2))


def refined_map():
    """Number of PCM's features, and the map that it makes of them."""
    net = importlib.import_module('network.slim_SEAM').Net(num_classes=3).eval()
    return net.f9.weight.shape[1], net(torch.rand(1, 3, 64, 64))[1]


def pair_count():
    """Number of offsets of AffinityNet's pairs, whose labels fit."""
    net = importlib.import_module('network.slim_aff').Net()
    aff = net(torch.rand(1, 3, 128, 128))
    labels = importlib.import_module('voc12.data').ExtractAffinityLabelInRadius(16, net.radius)(np.zeros((16, 16), int))
    assert all(label.shape == aff.shape[1:] for label in labels)
    return aff.shape[1]


def changes(copy, title, measure):
    """Returns the results of `measure` before and after the edit."""
    before = measure()
    apply_recipe(copy, title)
    return before, measure()


def test_equivariance_with_squared_differences(copy):
    before, after = changes(copy, 'ER with squared differences', losses)
    assert {name for name in before if before[name] != after[name]} == {'loss_er', 'loss'}
    assert before['loss_er'] ** 2 < after['loss_er'] < before['loss_er']


def test_confidence_mask_leaves_something_out_and_something_in(copy):
    before, after = changes(copy, 'ECR where the other view is sure', losses)
    assert {name for name in before if before[name] != after[name]} == {'loss_ecr1', 'loss_ecr2', 'loss_ecr', 'loss'}
    for name in ('loss_ecr1', 'loss_ecr2'):
        assert 0 < after[name] < before[name]


def test_other_features_of_pcm(copy):
    (before, _), (after, refined) = changes(copy, 'PCM without the colours of the image', refined_map)
    assert after == before - 3 and refined.shape == (1, 4, 64, 64) and refined.isfinite().all()


def test_other_normalisation_of_the_cam(copy):
    cam = np.random.default_rng(0).random((2, 5, 5), np.float32) + 1
    before, after = changes(copy, 'CAMs divided by their maximum alone',
                            lambda: importlib.import_module('infer_SEAM').normalize_cam(cam.copy()))
    assert before.min() < 0 and np.sort(after, axis=None)[2] > .3 and after.max() > .999


def test_other_kernels_of_the_crf_act_and_are_written_down(copy):
    img = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    probs = np.random.default_rng(1).random((2, 40, 40), np.float32)

    def measure():
        crf = importlib.import_module('tool.crf')
        return crf.describe_crf(), crf.crf_inference(img, probs, t=1, backend='torch')
    before, after = changes(copy, 'a CRF that looks less far', measure)
    assert before[0] != after[0] and np.abs(before[1] - after[1]).max() > 1e-3


def test_other_radius_reaches_network_and_labels(copy):
    assert changes(copy, 'pairs and walk of a larger radius', pair_count) == (34, 72)


def test_training_runs_with_all_recipes_at_once(copy):
    for title in RECIPES:
        apply_recipe(copy, title)
    assert train(copy, '--network', 'network.slim_SEAM')['f9.weight'].shape == (48, 48, 1, 1)


def test_another_backbone_loads_its_weights_and_trains(copy):
    before = torchvision.models.resnet50().state_dict()
    torch.save({name: tensor for name, tensor in before.items() if not name.startswith('fc.')}, copy / 'resnet50.pth')
    after = train(copy, '--network', 'network.resnet50_SEAM', '--weights', str(copy / 'resnet50.pth'))
    moved = {name.split('.')[0] for name in after if name in before and not torch.equal(before[name], after[name])}
    assert moved == {'layer2', 'layer3', 'layer4'}


# ----- commands, files and links of all READMEs -----

PAGES = sorted(glob.glob(os.path.join(ROOT, 'README.md')) + glob.glob(os.path.join(ROOT, '*', 'README.md')))


def flags_of(script):
    """All flags of a script, those of its subcommands included."""
    folder, name = os.path.split(script[:-3])
    parsers = [importlib.import_module(f'{folder}.{name}' if folder else name).get_args_parser()]
    flags = set()
    for parser in parsers:
        for action in parser._actions:
            flags.update(action.option_strings)
            if isinstance(action.choices, dict):        # subcommands
                parsers += action.choices.values()
    return flags


@pytest.mark.parametrize('page', PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_commands_have_flags_that_exist(page):
    text = open(page, encoding='utf-8').read().replace('\\\n', ' ')
    for script, rest in re.findall(r'python ((?:\w+/)*\w+\.py)([^`\n#]*)', text):
        assert os.path.isfile(os.path.join(ROOT, script)), script
        if not script.startswith('tests/'):
            rest = re.sub('"[^"]*"', '', rest)
            assert set(re.findall(r'(?<=\s)--\w+', rest)) <= flags_of(script), f'python {script}{rest}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_files_and_functions_that_it_names_are_there(page):
    text = open(page, encoding='utf-8').read()
    for link in re.findall(r'\]\((?!http)([^)#]+)', text):
        assert os.path.exists(os.path.join(os.path.dirname(page), link)), link
    for file in re.findall(r'`((?:tool|voc12|network|tests)/[\w/]+\.(?:py|sh|csv|md))', text):
        assert os.path.isfile(os.path.join(ROOT, file)), file
    for file, name in re.findall(r'`([\w/]+\.py)`: `(\w+)`', text):
        assert re.search(rf'(def|class) {name}\b|^\s*{name} = ', open(os.path.join(ROOT, file)).read(), re.M), name
