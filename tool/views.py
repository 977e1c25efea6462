"""The second view of the images in a training step of SEAM, and of their maps."""
import functools
import math

import torch
import torch.nn.functional as F


def second_view(x, scale_factor=0.3, mirror=False, theta=None):
    """Transforms images or maps (N, K, H, W): rotates and shifts, mirrors, rescales them.

    theta: (N, 2, 3) affine transforms in grid coordinates, or None. Pixels from outside the image become 0.
    Returns (N, K, floor(scale_factor H), floor(scale_factor W)).
    """
    if theta is not None:
        x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=True), align_corners=True)
    if mirror:
        x = x.flip(-1)
    if scale_factor != 1:
        x = F.interpolate(x, scale_factor=scale_factor, mode='bilinear', align_corners=True)
    return x


def draw_theta(n, h, w, max_rotation, max_translation):
    """Draws a rotation around the centre (uniform within +-max_rotation degrees) and a shift (uniform within
    +-max_translation pixels on each axis) for each of n images of h x w. Returns the (n, 2, 3) theta of `second_view`.
    """
    angle = (2 * torch.rand(n) - 1) * math.radians(max_rotation)
    shift = (2 * torch.rand(n, 2) - 1) * max_translation * 2 / torch.tensor([w - 1, h - 1])     # grid: -1..1
    cos, sin, aspect = angle.cos(), angle.sin(), (h - 1) / (w - 1)
    return torch.stack([torch.stack([cos, -sin * aspect, shift[:, 0]], dim=1),
                        torch.stack([sin / aspect, cos, shift[:, 1]], dim=1)], dim=1)


def draw_view(img, transform=('rescale',), scale_factor=0.3, max_rotation=20., max_translation=15.):
    """Draws the transform of the second view for images (N, 3, H, W). Returns (view, inside) for `seam_loss`.
    transform: the choices of `--transform`; each other argument counts only for its own choice."""
    theta = inside = None
    if {'rotation', 'translation'} & set(transform):
        theta = draw_theta(len(img), *img.shape[2:], max_rotation if 'rotation' in transform else 0,
                           max_translation if 'translation' in transform else 0).to(img.device)
    view = functools.partial(second_view, scale_factor=scale_factor if 'rescale' in transform else 1,
                             mirror='flip' in transform, theta=theta)
    if theta is not None:
        inside = view(torch.ones_like(img[:, :1])) > 0.999
    return view, inside
