"""A new classifier layer on a pretrained backbone, fitted before the first step of the training."""
import torch
import torch.nn.functional as F

from network import seam
from tool.cli import BadInput


@torch.no_grad()
def check_mean_pooling(net):
    """Raises BadInput unless the network's class scores are fc8 applied to the mean features, as `fit_classifier`
    assumes. Leaves the network in evaluation mode."""
    features = torch.linspace(0, 1, 9).view(3, 3).expand(1, net.channels['conv6'], 3, 3)
    expected = features.mean(dim=(2, 3)) @ net.fc8.weight.flatten(1).T
    if not torch.allclose(seam.class_scores(net.eval().classify(features)), expected, rtol=1e-3, atol=1e-4):
        raise BadInput('--fit_classifier fits fc8 to mean features, but class_scores or classify in network/seam.py '
                       'computes the scores in another way: leave the flag out')


@torch.no_grad()
def fit_classifier(net, batches, decay=1e-2):
    """Sets fc8 to a logistic regression on the mean features of images. A random classifier would need hundreds of
    training steps to get there, and would harm the pretrained backbone meanwhile.

    batches: (images (N, 3, H, W), labels (N, C)) on the network's device. decay: weight of the squared weights.
    """
    net.eval()
    pairs = [(net.forward_as_dict(img)['conv6'].mean(dim=(2, 3)), label) for img, label in batches]
    features, labels = (torch.cat(parts) for parts in zip(*pairs))                    # (images, D), (images, C)
    weight = features.new_zeros(labels.shape[1], features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.multilabel_soft_margin_loss(features @ weight.T, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    net.fc8.weight[1:] = weight.detach()[:, :, None, None]
