"""Which pixels of a feature map form a pair: shared by the affinity network, its labels and the random walk."""
import functools

import numpy as np

STRIDE = 8      # pixels per cell of the map


def fit_radius(h, w, radius=5):
    """Returns the radius for an h x w map: `radius`, or (edge - 1) // 2 if the smaller edge is below 2 radius + 1. At
    least 1, with which no pixels form a pair (the reference crashes there)."""
    edge = min(h, w)
    return radius if edge >= 2 * radius + 1 else max((edge - 1) // 2, 1)


def pair_offsets(radius):
    """List of the offsets (dy, dx) from a pixel to its partners: half of the disc of that radius, first to the right,
    then row by row below. 34 offsets for radius 5; the order is that of AffinityNet's output channels."""
    offsets = [(0, dx) for dx in range(1, radius)]
    return offsets + [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius)
                      if dx * dx + dy * dy < radius * radius]


@functools.lru_cache(maxsize=8)
def pair_indices(h, w, radius):
    """Returns the pairs of pixels as flat indices into an h x w map: (ind_from (from,), ind_to (offsets, from)), int64.

    "From" pixels are all but the last radius-1 rows and the radius-1 columns at each side.
    """
    reach = radius - 1
    index = np.arange(h * w).reshape(h, w)
    ind_from = index[:h - reach, reach:w - reach].reshape(-1)
    steps = np.array([dy * w + dx for dy, dx in pair_offsets(radius)], dtype=np.int64)
    return ind_from, ind_from + steps[:, None]
