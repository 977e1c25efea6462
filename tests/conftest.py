import os
import pickle
import resource
import signal
import sys

os.environ['OMP_NUM_THREADS'] = '1'     # also for processes that tests start, because sums depend on it
# these processes find --network tiny_SEAM here
os.environ['PYTHONPATH'] = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)),
                                            *filter(None, [os.environ.get('PYTHONPATH')])])
os.environ['CUDA_VISIBLE_DEVICES'] = ''     # many tests compare bits, which a GPU does not promise
if hasattr(signal, 'SIGHUP'):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # under nohup it is ignored, also by the processes of tests

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tests', 'by_hand')]


def golden(name):
    """The arrays of one golden file as a dict."""
    with np.load(os.path.join(GOLDEN, name + '.npz')) as file:
        return {key: file[key] for key in file.files}


def close(actual, expected, limit):
    """Asserts max |actual - expected| <= limit * max |expected|, with a message that states the difference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    worst = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert worst <= limit, f'{worst:.2e} of the largest value, limit {limit:.0e}'


def filled(net, salt='dev'):
    """Fills the network with the weights of the golden runs, which depend only on names and shapes. Sets two threads
    until the test ends, because it has the full width."""
    from fill_weights import fill
    torch.set_num_threads(2)
    fill(net.state_dict(), salt)
    return net


@pytest.fixture(scope='session')
def seam_net():
    from network.resnet38_SEAM import Net
    return filled(Net()).eval()


@pytest.fixture(scope='session')
def aff_net():
    from network.resnet38_aff import Net
    return filled(Net()).eval()


@pytest.fixture(autouse=True)
def _threads(request):
    """Sets the number of threads: one is quicker for small networks, two for those of full width."""
    torch.set_num_threads(2 if {'seam_net', 'aff_net'} & set(request.fixturenames) else 1)
    yield
    torch.set_num_threads(1)        # for the fixtures of the next module, which come before its first test


@pytest.fixture
def pickled(monkeypatch):
    """A list of the pickles that loader processes would get where they are spawned, as on Windows and macOS. No such
    process is started, because importing torch takes seconds."""
    content, init = [], torch.utils.data.DataLoader.__init__

    def pickling(self, dataset, **options):
        content.append(pickle.dumps((dataset, options.get('collate_fn'), options.get('worker_init_fn'))))
        init(self, dataset, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, '__init__', pickling)
    return content


@pytest.fixture
def small_files():
    """Imitates a disk that is nearly full: no file can have 20000 bytes, which the scores of two classes need."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
