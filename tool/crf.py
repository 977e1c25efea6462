"""The dense CRF of one image, in pydensecrf or in PyTorch."""
import numpy as np

from tool.cli import BadInput


def choose_crf_backend(backend):
    """What `--crf_backend` stands for: pydensecrf or torch; None: pydensecrf where it is installed. Raises BadInput."""
    if backend == 'torch':
        return backend
    try:
        import pydensecrf.densecrf      # noqa: F401
    except ImportError as error:
        if backend is None:
            print('pydensecrf is not installed: the CRF runs in PyTorch (--crf_backend torch)')
            return 'torch'
        raise BadInput('--crf_backend pydensecrf: pip install pydensecrf2 (a C++ compiler, Python 3.11 or 3.12), or '
                       'take --crf_backend torch') from error
    return 'pydensecrf'


def crf_inference(img, probs, t=10, scale_factor=1, labels=None, backend='pydensecrf', device='cpu'):
    """The dense CRF of one set of scores, float32 (labels, H, W), whose number may be left out: see `crf_inferences`.
    Returns float32 (labels, H, W)."""
    if labels is not None and len(probs) != labels:
        raise ValueError(f'probs have {len(probs)} labels, not {labels}')
    return crf_inferences(img, [probs], t, scale_factor, backend, device)[0]


def crf_inferences(img, several_probs, t=10, scale_factor=1, backend='pydensecrf', device='cpu'):
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) with the kernels of AffinityNet, for several sets of scores of
    one image: its filters are set up once.

    img: uint8 (H, W, 3) RGB. several_probs: list of float32 (labels, H, W); clipped to [1e-5, 1], columns need not sum
    to 1. t: mean-field iterations. scale_factor divides the spatial extents (pixels). backend: pydensecrf, or torch on
    `device`, the same up to rounding.
    Returns a list of float32 (labels, H, W), posteriors that sum to 1 per pixel.
    """
    shape = (len(several_probs[0]), *img.shape[:2])
    if any(probs.shape != shape for probs in several_probs):
        raise ValueError(f'probs have the shapes {[probs.shape for probs in several_probs]}, not all {shape}')
    if backend == 'torch':
        from tool.densecrf import DenseCRF, unary_energy
        energies = unary_energy(np.stack(several_probs))
        return list(DenseCRF(img, scale_factor, device=device).inference(energies, t).cpu().numpy())

    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax
    labels, h, w = shape
    crf = dcrf.DenseCRF2D(w, h, labels)
    crf.addPairwiseGaussian(sxy=3 / scale_factor, compat=3)
    crf.addPairwiseBilateral(sxy=80 / scale_factor, srgb=13, rgbim=np.array(img, order='C'), compat=10)
    posteriors = []
    for probs in several_probs:
        crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs, clip=1e-5)))
        posteriors.append(np.array(crf.inference(t), np.float32).reshape(shape))
    return posteriors
