"""AffinityNet's head (Ahn and Kwak, CVPR 2018), on any backbone of network/base.py: how alike are two near pixels?"""
import torch
import torch.nn.functional as F
from torch import nn

from network.base import Network
from tool.affinity_pairs import STRIDE, fit_radius, pair_indices, pair_offsets


def pairwise_affinity(x, radius):
    """x: embeddings (N, C, h, w) -> affinities (N, offsets, from), each exp(-mean |difference|) in (0, 1].

    Offsets are those of `pair_offsets(radius)`. "From" pixels, in row-major order, are all that have every
    neighbour inside the map: no columns within radius-1 of the left and right border, no last radius-1 rows.
    """
    n, _, h, w = x.shape
    reach = radius - 1
    rows, columns = h - reach, w - 2 * reach
    start = x[:, :, :rows, reach:reach + columns]
    affinities = [torch.exp(-(x[:, :, dy:dy + rows, reach + dx:reach + dx + columns] - start).abs().mean(dim=1))
                  for dy, dx in pair_offsets(radius)]                       # each (N, rows, columns)
    if not affinities:      # radius 1: every pixel is alone
        return x.new_zeros(n, 0, rows * columns)
    return torch.stack(affinities, dim=1).flatten(2)


def to_dense_matrix(aff, h, w, radius):
    """aff: (1, offsets, from) of an h x w map -> symmetric (hw, hw), unit diagonal, 0 for pixels that form no pair."""
    if len(aff) != 1:
        raise ValueError(f'a dense matrix is made for one image at a time, not {len(aff)}')
    ind_from, ind_to = (torch.from_numpy(index).to(aff.device) for index in pair_indices(h, w, radius))
    matrix = torch.eye(h * w, dtype=aff.dtype, device=aff.device)
    ind_from = ind_from.expand_as(ind_to)                                  # both (offsets, from)
    matrix[ind_from, ind_to] = aff[0]
    matrix[ind_to, ind_from] = aff[0]
    return matrix


class AffinityHead(Network):
    """Pairs are pixels of the feature map less than `radius` apart. The options: see `Network`."""
    kind = 'affinity'
    radius = 5

    def __init__(self, train_bn=False, checkpointing=False, dropout=1.0, backbone=None):
        """backbone: a name, for backbones that are chosen by one (`--backbone`)."""
        super().__init__(*([backbone] if backbone else []))
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
        """x: normalised images (N, 3, H, W); pairs are of pixels of an h x w map, h = ceil(H/8), w = ceil(W/8).

        Returns affinities (N, offsets, from) as `pairwise_affinity`, or with to_dense (N = 1 only) the
        (hw, hw) matrix. The radius shrinks where the map is small: see `fit_radius`.
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
