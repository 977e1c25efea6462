"""AffinityNet's head (Ahn and Kwak, CVPR 2018), on any backbone of network/base.py: it predicts whether two nearby
pixels show the same class."""
import torch
import torch.nn.functional as F
from torch import nn

from network.base import Network
from tool.affinity_pairs import STRIDE, fit_radius, pair_indices, pair_offsets


def pairwise_affinity(x, radius):
    """Computes the affinities of pairs of pixels, exp(-mean |difference of their embeddings|) in (0, 1].
    x: embeddings (N, C, h, w). Returns (N, offsets, from).

    Offsets are those of `pair_offsets(radius)`. "From" pixels, in row-major order, are those whose neighbours all lie
    inside the map: without the radius-1 columns at the left and right border and the last radius-1 rows.
    """
    n, _, h, w = x.shape
    reach = radius - 1
    rows, columns = h - reach, w - 2 * reach
    start = x[:, :, :rows, reach:reach + columns]
    affinities = [torch.exp(-(x[:, :, dy:dy + rows, reach + dx:reach + dx + columns] - start).abs().mean(dim=1))
                  for dy, dx in pair_offsets(radius)]                       # each (N, rows, columns)
    if not affinities:      # radius 1: no pixel has a neighbour
        return x.new_zeros(n, 0, rows * columns)
    return torch.stack(affinities, dim=1).flatten(2)


def to_dense_matrix(aff, h, w, radius):
    """Returns the affinities of one image, aff (1, offsets, from) of an h x w map, as a symmetric matrix (hw, hw): 1 on
    the diagonal, 0 for pixels that form no pair."""
    if len(aff) != 1:
        raise ValueError(f'the dense matrix is for one image at a time; the batch has {len(aff)}')
    ind_from, ind_to = (torch.from_numpy(index).to(aff.device) for index in pair_indices(h, w, radius))
    matrix = torch.eye(h * w, dtype=aff.dtype, device=aff.device)
    ind_from = ind_from.expand_as(ind_to)                                  # both (offsets, from)
    matrix[ind_from, ind_to] = aff[0]
    matrix[ind_to, ind_from] = aff[0]
    return matrix


class AffinityHead(Network):
    """Computes affinities of pixels of the feature map less than `radius` apart. `Network` describes the options."""
    kind = 'affinity'
    radius = 5

    def __init__(self, train_bn=False, checkpointing=False, dropout=1.0, backbone=None):
        """backbone: name of the backbone, for networks that `--backbone` selects one for."""
        super().__init__(*([backbone] if backbone else []))     # only some backbones have names
        conv4, conv5, conv6 = (self.channels[name] for name in ('conv4', 'conv5', 'conv6'))
        narrow4, narrow5, narrow6 = self.width, 2 * self.width, 4 * self.width      # 64, 128, 256 in the paper
        embedded = narrow4 + narrow5 + narrow6
        self.f8_3 = nn.Conv2d(conv4, narrow4, 1, bias=False)
        self.f8_4 = nn.Conv2d(conv5, narrow5, 1, bias=False)
        self.f8_5 = nn.Conv2d(conv6, narrow6, 1, bias=False)
        self.f9 = nn.Conv2d(embedded, embedded, 1, bias=False)
        self.from_scratch_layers = [self.f8_3, self.f8_4, self.f8_5, self.f9]
        for layer in (self.f8_3, self.f8_4, self.f8_5):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)
        self.set_options(train_bn, checkpointing, dropout)

    def forward(self, x, to_dense=False):
        """Computes the affinities of images. x: normalised images (N, 3, H, W). The pixels of a pair are those of an
        h x w map, h = ceil(H/8), w = ceil(W/8).

        Returns affinities (N, offsets, from) like `pairwise_affinity`, or with to_dense (N = 1 only) the (hw, hw)
        matrix. On small maps the radius is smaller: see `fit_radius`.
        """
        features = self.forward_as_dict(x)
        f = torch.cat([F.elu(self.f8_3(features['conv4'])),
                       F.elu(self.f8_4(features['conv5'])),
                       F.elu(self.f8_5(features['conv6']))], dim=1)        # (N, 7 * 64, ...) on ResNet38
        f = F.elu(self.f9(f))
        h, w = (-(-side // STRIDE) for side in x.shape[2:])
        if f.shape[2:] != (h, w):       # of a backbone with another stride
            f = F.interpolate(f, (h, w), mode='bilinear', align_corners=False)
        radius = fit_radius(h, w, self.radius)
        aff = pairwise_affinity(f, radius)
        return to_dense_matrix(aff, h, w, radius) if to_dense else aff
