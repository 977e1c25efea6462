"""Grad-CAM and Grad-CAM++ of a SEAM network, for the refinement table of the paper."""
import torch
import torch.nn.functional as F

from network.seam import class_scores


def grad_cam(net, x, plus):
    """Computes Grad-CAM (Selvaraju et al. 2017) or, with `plus`, Grad-CAM++ (Chattopadhay et al. 2018) at conv6 for the
    `class_scores` that the classification loss sees. x: (N, 3, H, W). Returns maps (N, 1+C, h, w), >= 0, and these
    scores (N, 1+C).

    The weight of a channel A is the sum over its pixels of the score's gradient g or, with `plus`, of
    relu(g) g^2 / (2 g^2 + g^3 sum(A)).
    """
    features = net.forward_as_dict(x)['conv6'].float()                             # (N, D, h, w)
    total = features.sum(dim=(2, 3), keepdim=True)
    maps = []
    with torch.inference_mode(False), torch.enable_grad():
        leaf = features.detach().clone().requires_grad_()
        scores = class_scores(net.classify(leaf))
        for score in scores.sum(dim=0):                                            # images do not mix
            gradient, = torch.autograd.grad(score, leaf, retain_graph=True)
            if plus:
                gradient = F.relu(gradient) / (2 + gradient * total)
            weight = gradient.sum(dim=(2, 3), keepdim=True)
            maps.append(F.relu((weight * features).sum(dim=1)))
    return torch.stack(maps, dim=1), scores.detach()
