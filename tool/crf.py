"""The dense CRF of one image, in pydensecrf or in PyTorch."""
import importlib.util
from typing import NamedTuple

import numpy as np

from tool.cli import BadInput
from tool.workers import available_cores


class Kernels(NamedTuple):
    """Gaussian kernels of the CRF. The defaults are AffinityNet's, with which the published numbers were made."""
    sxy_gauss: float = 3            # pixels
    compat_gauss: float = 3         # weight
    sxy_bilateral: float = 80       # pixels
    srgb: float = 13                # grey levels
    compat_bilateral: float = 10    # weight


class CRF(NamedTuple):
    """Settings of one use of the CRF."""
    iterations: int                 # of mean field
    kernels: Kernels = Kernels()


# as published
CAM_CRF = CRF(iterations=10)                                                # infer_SEAM.py
WALK_CRF = CRF(iterations=1)                                                # infer_aff.py
SEGMENTATION_CRF = CRF(iterations=1, kernels=Kernels(sxy_bilateral=32))     # infer_seg.py


def describe_crf(numbers=CAM_CRF):
    """Returns the settings of a CRF as a dict, for settings.json of a result folder."""
    return {'iterations': numbers.iterations, **numbers.kernels._asdict()}


def choose_crf_backend(backend):
    """Returns the backend for the `--crf_backend` flag, 'pydensecrf' or 'torch'. None chooses pydensecrf if it is
    installed and works, else torch, and a line says why. Raises BadInput if pydensecrf is demanded but does not work.
    """
    if backend == 'torch':
        return backend
    try:
        crf_inference(np.zeros((1, 1, 3), np.uint8), np.full((2, 1, 1), 0.5, np.float32), t=1)
    except Exception as error:          # a broken build raises ImportError, ValueError, AttributeError, ...
        cause = 'is not installed'
        if importlib.util.find_spec('pydensecrf'):
            cause = f'is installed, but broken: {" ".join(str(error).split())[:300]}'
        if backend is None:
            print(f'pydensecrf {cause}; the CRF runs in PyTorch (--crf_backend torch)')
            return 'torch'
        raise BadInput(f'--crf_backend pydensecrf: it {cause}; pip install pydensecrf2 (with a C++ compiler and Python '
                       '3.11 or 3.12), or use --crf_backend torch') from error
    return 'pydensecrf'


def choose_crf_workers(workers, backend, device):
    """Returns the number of CRF processes for the `--crf_workers` flag. None means all cores if a GPU runs the network,
    else none. backend: of the CRF, None without a CRF; only pydensecrf uses processes."""
    if backend != 'pydensecrf':
        return 0
    if workers is None:
        return available_cores() if device.type == 'cuda' else 0
    return workers


def crf_inference(img, probs, t=CAM_CRF.iterations, scale_factor=1, labels=None, kernels=CAM_CRF.kernels,
                  backend='pydensecrf', device='cpu'):
    """Runs the dense CRF on one set of scores, float32 (labels, H, W). Returns float32 (labels, H, W).
    labels: the number of labels, which may be left out; the other arguments as for `crf_inferences`."""
    if labels is not None and len(probs) != labels:
        raise ValueError(f'probs has {len(probs)} labels, not {labels}')
    return crf_inferences(img, [probs], t, scale_factor, kernels, backend, device)[0]


def crf_inferences(img, several_probs, t=CAM_CRF.iterations, scale_factor=1, kernels=CAM_CRF.kernels,
                   backend='pydensecrf', device='cpu'):
    """Runs the fully connected CRF (Kraehenbuehl and Koltun 2011) on several sets of scores of one image, for which it
    sets up the filters only once.

    img: uint8 (H, W, 3) RGB. several_probs: list of float32 (labels, H, W); they are clipped to [1e-5, 1], and need not
    sum to 1. t: number of mean-field iterations. scale_factor divides the spatial extents of the kernels. backend:
    pydensecrf, or torch on `device`; both agree up to rounding.
    Returns a list of float32 (labels, H, W), posteriors that sum to 1 at each pixel.
    """
    shape = (len(several_probs[0]), *img.shape[:2])
    if any(probs.shape != shape for probs in several_probs):
        raise ValueError(f'probs have the shapes {[probs.shape for probs in several_probs]}, not all {shape}')
    kernels = kernels._replace(sxy_gauss=kernels.sxy_gauss / scale_factor,
                               sxy_bilateral=kernels.sxy_bilateral / scale_factor)
    if backend == 'torch':
        from tool.densecrf import DenseCRF, unary_energy
        energies = unary_energy(np.stack(several_probs))
        return list(DenseCRF(img, kernels, device).inference(energies, t).cpu().numpy())

    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax
    labels, h, w = shape
    crf = DenseCRF2D(w, h, labels)
    crf.addPairwiseGaussian(sxy=kernels.sxy_gauss, compat=kernels.compat_gauss)
    crf.addPairwiseBilateral(sxy=kernels.sxy_bilateral, srgb=kernels.srgb, rgbim=np.array(img, order='C'),
                             compat=kernels.compat_bilateral)
    posteriors = []
    for probs in several_probs:
        crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs, clip=1e-5)))
        posteriors.append(np.array(crf.inference(t), np.float32).reshape(shape))
    return posteriors
