"""The dense CRF of one image, in pydensecrf or in PyTorch."""
import importlib.util
from typing import NamedTuple

import numpy as np

from tool.cli import BadInput
from tool.workers import available_cores


class Kernels(NamedTuple):
    """The Gaussian kernels of the CRF: those of AffinityNet, which the published numbers are of."""
    sxy_gauss: float = 3            # pixels
    compat_gauss: float = 3         # weight
    sxy_bilateral: float = 80       # pixels
    srgb: float = 13                # grey levels
    compat_bilateral: float = 10    # weight


class CRF(NamedTuple):
    """The numbers of one use of the CRF."""
    iterations: int                 # of mean field
    kernels: Kernels = Kernels()


# as published
CAM_CRF = CRF(iterations=10)                                                # infer_SEAM.py
WALK_CRF = CRF(iterations=1)                                                # infer_aff.py
SEGMENTATION_CRF = CRF(iterations=1, kernels=Kernels(sxy_bilateral=32))     # infer_seg.py


def describe_crf(numbers=CAM_CRF):
    """The numbers of a CRF as a dict, for the settings of a result folder."""
    return {'iterations': numbers.iterations, **numbers.kernels._asdict()}


def choose_crf_backend(backend):
    """What `--crf_backend` stands for: pydensecrf or torch; None: pydensecrf where it is installed and works, else
    torch with a line that says why. Raises BadInput."""
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
        raise BadInput(f'--crf_backend pydensecrf: it {cause}; pip install pydensecrf2 (a C++ compiler, Python 3.11 or '
                       '3.12), or take --crf_backend torch') from error
    return 'pydensecrf'


def choose_crf_workers(workers, backend, device):
    """What `--crf_workers` stands for; None: all cores where a GPU runs the network, else none. backend: of the CRF,
    None where there is no CRF. PyTorch's needs no processes."""
    if backend != 'pydensecrf':
        return 0
    if workers is None:
        return available_cores() if device.type == 'cuda' else 0
    return workers


def crf_inference(img, probs, t=CAM_CRF.iterations, scale_factor=1, labels=None, kernels=CAM_CRF.kernels,
                  backend='pydensecrf', device='cpu'):
    """The dense CRF of one set of scores, float32 (labels, H, W), whose number may be left out: see `crf_inferences`.
    Returns float32 (labels, H, W)."""
    if labels is not None and len(probs) != labels:
        raise ValueError(f'probs have {len(probs)} labels, not {labels}')
    return crf_inferences(img, [probs], t, scale_factor, kernels, backend, device)[0]


def crf_inferences(img, several_probs, t=CAM_CRF.iterations, scale_factor=1, kernels=CAM_CRF.kernels,
                   backend='pydensecrf', device='cpu'):
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) for several sets of scores of one image: its filters are set
    up once.

    img: uint8 (H, W, 3) RGB. several_probs: list of float32 (labels, H, W); clipped to [1e-5, 1], columns need not sum
    to 1. t: mean-field iterations. scale_factor divides the spatial extents of the kernels. backend: pydensecrf, or
    torch on `device`, the same up to rounding.
    Returns a list of float32 (labels, H, W), posteriors that sum to 1 per pixel.
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
