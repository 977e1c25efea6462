"""Dense CRF in plain PyTorch, on CPU or GPU. It computes the same as pydensecrf (its x86 build) without a compiler.

The model and its mean-field inference are Kraehenbuehl and Koltun's, "Efficient Inference in Fully Connected CRFs
with Gaussian Edge Potentials", NIPS 2011. Their message passing is Gaussian filtering of all pixels by all pixels,
which the permutohedral lattice of Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral
Lattice", Eurographics 2010, approximates in time and memory linear in the pixels.

A lattice point has d + 1 integer coordinates, which sum to 0 and have the same remainder modulo d + 1. Names of sizes:
n pixels, d features, m lattice points (vertices), s stacked problems, k labels.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


# ----- the lattice -----

def enclosing_simplex(features):
    """Finds the simplex of the lattice around each point (Adams et al., pages 5, 6 and 10).

    features: float32 (d, n), in units of the Gaussian's standard deviation. Returns
    corner: float32 (d + 1, n), whole numbers: the simplex's vertex of remainder 0;
    rank: int64 (d + 1, n): the place of each coordinate in the falling order of (point - corner), 0 the largest;
    weight: float32 (d + 1, n): barycentric weights of the vertices of remainder 0..d, which sum to 1.
    Each step is one float32 operation in pydensecrf's order: another rounding can choose another simplex.
    """
    d, n = features.shape
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))       # of splat, blur and slice together
    total = features.new_zeros(n)
    position = features.new_empty(d + 1, n)                         # on the hyperplane where coordinates sum to 0
    for axis in range(d, 0, -1):
        step = features[axis - 1] * float(np.float32(1 / math.sqrt(axis * (axis + 1)) * deviation))
        position[axis] = total - step * axis
        total += step
    position[0] = total

    cell = (position * (1 / (d + 1))).round()                       # half to even
    corner = cell * (d + 1)
    offset = position - corner
    rank = torch.zeros_like(position)
    for i in range(d):
        behind = (offset[i] < offset[i + 1:]).to(rank.dtype)        # of equals, the first has the lower rank
        rank[i] += behind.sum(0)
        rank[i + 1:] += 1 - behind
    rank += cell.sum(0)                                             # corner left the hyperplane: bring it back
    wrapped = rank.remainder(d + 1)
    corner += wrapped - rank
    rank = wrapped.long()

    offset = (position - corner) * (1 / (d + 1))
    falling = torch.empty_like(offset).scatter_(0, rank, offset).flip(0)    # row r: the coordinate of rank d - r
    weight = falling.clone()
    weight[1:] -= falling[:-1]
    weight[0] += 1 - falling[d]
    return corner, rank, weight


class PermutohedralLattice:
    """Gaussian filter over arbitrary points, which is built once and then filters any values. features: float32 (d, n).

    Splat, blur and slice are sums of table rows, so each is one `embedding_bag`. The table of lattice values has
    m + 1 rows; the last row stays 0 and stands for neighbours that do not exist.
    """

    def __init__(self, features):
        d, n = features.shape
        device = features.device
        # pydensecrf works on four points at a time and fills up the last four with zeros. The vertices around
        # zero then exist, carry no pixel, and pass values on between their neighbours.
        corner, rank, weight = enclosing_simplex(F.pad(features, (0, -n % 4)))
        corner = corner[:d].long()

        # A point is coded as one integer, linear in its first d coordinates, so that a step along the lattice is the
        # addition of a constant. The margin keeps all vertices, and one step beyond them, apart.
        lowest = corner.amin(1) - 2 * (d + 1)
        span = (corner.amax(1) + 3 * (d + 1) - lowest).tolist()     # multiples of d + 1, as all of corner
        if math.prod(span) >= 2 ** 63:
            raise ValueError(f'the features span {span} lattice steps, too many for 64 bits: use larger deviations')
        stride = torch.tensor([math.prod(span[i + 1:]) for i in range(d)] + [0], device=device)
        axis_step = stride.sum() - (d + 1) * stride                 # along axis j: +1 everywhere, -d at j

        # Many pixels share a simplex: list the simplices first, as corner + rank, then their vertices.
        code = sum((corner[i] + rank[i] - lowest[i]) * stride[i] for i in range(d))
        simplex, simplex_of = code.unique(return_inverse=True)
        rank = simplex // stride[:d, None] % (d + 1)
        rank = torch.cat([rank, d * (d + 1) // 2 - rank.sum(0, keepdim=True)])
        walk = torch.empty_like(rank).scatter_(0, rank, axis_step[:, None].expand_as(rank)).flip(0).roll(1, 0)
        walk[0] = simplex - (rank * stride[:, None]).sum(0)         # the vertex of remainder 0; that of r is r steps on
        codes, vertex = walk.cumsum(0).unique(return_inverse=True)
        m = len(codes)

        self.slice_index = vertex.T.contiguous().index_select(0, simplex_of[:n])       # (n, d + 1)
        self.slice_weight = weight.T[:n].contiguous()
        gathered, order = self.slice_index.flatten().int().sort(stable=True)        # int32 sorts twice as fast
        self.splat_index = order // (d + 1)                         # pixels, grouped by their vertices
        self.splat_weight = self.slice_weight.flatten().index_select(0, order)
        every = torch.arange(m + 1, device=device)
        self.splat_start = torch.searchsorted(gathered, every.int())

        wanted = codes + axis_step[:, None]                         # (d + 1, m), one step up along each axis
        found = torch.searchsorted(codes, wanted).clamp_(max=m - 1)
        up = F.pad(torch.where(codes[found] == wanted, found, m), (0, 1), value=m)
        down = torch.full_like(up, m).scatter_(1, up, every.expand_as(up))
        down[:, m] = m                                              # hit by every missing neighbour
        self.blur_index = torch.stack([every.expand_as(up), down, up], 2)       # (d + 1, m + 1, 3)
        self.blur_weight = features.new_tensor([1, 0.5, 0.5]).repeat(m + 1, 1)
        # The CRF's normalisation takes this constant out again. Without it all pixels would be rounded otherwise than
        # in pydensecrf, which ten iterations can amplify from 1e-7 to 1e-3.
        self.slice_weight *= 1 / (1 + 2 ** -d)

    def scale(self, before, after):
        """Makes `filter(x)` return after * filter(before * x). before, after: float32 (n,)."""
        self.splat_weight *= before.index_select(0, self.splat_index)
        self.slice_weight *= after[:, None]

    def filter(self, values):
        """values: float32 (n, channels). Returns float32 (n, channels), their Gaussian-weighted sums."""
        values = F.embedding_bag(self.splat_index, values, self.splat_start, mode='sum',
                                 per_sample_weights=self.splat_weight)
        for neighbours in self.blur_index:
            values = F.embedding_bag(neighbours, values, mode='sum', per_sample_weights=self.blur_weight)
        return F.embedding_bag(self.slice_index, values, mode='sum', per_sample_weights=self.slice_weight)


# ----- the CRF -----

def softmax_(logits):
    """Softmax in place over the last dimension of (n, s, k); on a CPU twice as fast as torch.softmax for few labels."""
    logits -= logits.amax(-1, keepdim=True)
    logits.exp_()
    logits /= logits.sum(-1, keepdim=True)
    return logits


def to_tensor(values, dtype=None, device=None):
    """Converts an array or tensor to a tensor. Arrays are copied, since torch accepts no read-only or mirrored ones."""
    values = values if torch.is_tensor(values) else np.array(values, order='C')
    return torch.as_tensor(values, dtype=dtype, device=device)


def unary_energy(probs, clip=1e-5):
    """Returns the energies -log(p), float32, of probabilities p of any shape (array or tensor), which are clipped to
    [clip, 1] and need not sum to 1. Stack several for `DenseCRF.inference`."""
    return -to_tensor(probs, torch.float32).clamp(clip, 1).log()


class DenseCRF:
    """Fully connected CRF of one image. Its lattices are built once, for any number of `inference` calls.

    img: uint8 (H, W, 3) RGB, array or tensor. kernels: tool.crf.Kernels. The pairwise energy of two pixels with
    different labels (Kraehenbuehl and Koltun, eq. 3) is compat_gauss times a Gaussian of their distance (sxy_gauss
    pixels) plus compat_bilateral times one of distance (sxy_bilateral pixels) and colour (srgb grey levels). Each
    kernel is normalised symmetrically: k(i, j) / sqrt(sum_l k(i, l) * sum_l k(j, l)).
    Raises ValueError for another img, and for extents so small that the lattice cannot be numbered.
    """

    @torch.no_grad()
    def __init__(self, img, kernels, device='cpu'):
        img = to_tensor(img, device=device)
        if img.dtype != torch.uint8 or img.ndim != 3 or img.shape[2] != 3 or not img.numel():
            raise ValueError(f'the image is {img.dtype} {tuple(img.shape)}, not uint8 (H, W, 3)')
        self.h, self.w = img.shape[:2]
        self.device = img.device
        row, column = torch.meshgrid(torch.arange(self.h), torch.arange(self.w), indexing='ij')
        place = torch.stack([column, row]).view(2, -1).to(self.device)
        colour = img.reshape(-1, 3).T

        def in_units(values, unit):     # the unit as a tensor: by a plain number a GPU would multiply by 1 / unit
            return values.float() / torch.full((1, 1), unit, dtype=torch.float32, device=self.device)

        self.lattices = []
        for features, compat in (
                (in_units(place, kernels.sxy_gauss), kernels.compat_gauss),
                (torch.cat([in_units(place, kernels.sxy_bilateral), in_units(colour, kernels.srgb)]),
                 kernels.compat_bilateral)):
            lattice = PermutohedralLattice(features)
            norm = (lattice.filter(features.new_ones(features.shape[1], 1))[:, 0] + 1e-20).rsqrt()
            lattice.scale(norm, norm * compat)
            self.lattices.append(lattice)

    @torch.no_grad()
    def inference(self, unary_stack, t=10):
        """Runs t mean-field iterations (Kraehenbuehl and Koltun, algorithm 1) of s independent problems on the image.

        unary_stack: energies (s, k, H, W), array or tensor. Returns float32 (s, k, H, W) posteriors on the CRF's
        device; those of a pixel sum to 1.
        """
        unary = to_tensor(unary_stack, torch.float32, self.device)
        if unary.ndim != 4 or unary.shape[2:] != (self.h, self.w):
            raise ValueError(f'the energies have shape {tuple(unary.shape)}, not (s, k, {self.h}, {self.w})')
        s, k = unary.shape[:2]
        unary = unary.reshape(s * k, -1).T.contiguous()             # (n, s * k): a pixel's channels side by side
        posterior = softmax_((-unary).view(-1, s, k))
        for _ in range(t):
            logits = -unary
            for lattice in self.lattices:
                logits += lattice.filter(posterior.view(-1, s * k))
            posterior = softmax_(logits.view(-1, s, k))
        return posterior.view(-1, s * k).T.reshape(s, k, self.h, self.w)
