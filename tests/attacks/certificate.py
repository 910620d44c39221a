"""A lower bound on what any attack leaves: the certificate of Wong and Kolter (arXiv 1711.00851), image by image.

ReLUs whose sign the ball does not decide are enclosed between two parallel lines; what is linear then is bounded
exactly over the ball, cut with [0, 1]. The bounds of each layer's inputs are found in the same way, layer by layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def margins(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The least that the label's logit is above any other one's, anywhere in the L∞ ball.

    Args:
        model: convolutions and linear layers with a ReLU after each but the last, in the order of ``model.modules()``.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)``.
        eps: radius of the ball.

    Returns:
        ``(N,)``; where it is above zero no perturbation in the ball fools the model.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    shapes: list[torch.Size] = []  # of each layer's output
    values = images[:1]
    with torch.no_grad():
        for layer in layers:
            values = values.relu() if shapes else values
            values = layer(values.flatten(1) if isinstance(layer, nn.Linear) else values)
            shapes.append(values.shape[1:])
        torch.testing.assert_close(values, model(images[:1]))  # there is nothing else in the model
        found = [_least_margin(layers, shapes, *pair, eps) for pair in zip(images, labels.tolist(), strict=True)]
    return torch.tensor(found)


def _least_margin(layers: list[nn.Module], shapes: list[torch.Size], image: Tensor, label: int, eps: float) -> float:
    low, high = (image - eps).clamp(0, 1), (image + eps).clamp(0, 1)
    bounds: list[tuple[Tensor, Tensor]] = []  # of each hidden layer's outputs
    for depth in range(1, len(layers)):
        size = shapes[depth - 1].numel()
        bounds.append(_bounds(layers[:depth], shapes, bounds, torch.eye(size), low, high))
    classes = shapes[-1].numel()
    others = [other for other in range(classes) if other != label]
    differences = torch.eye(classes)[label] - torch.eye(classes)[others]
    return float(_bounds(layers, shapes, bounds, differences, low, high)[0].min())


def _bounds(
    layers: list[nn.Module],
    shapes: list[torch.Size],
    bounds: list[tuple[Tensor, Tensor]],
    rows: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, Tensor]:
    """Bounds of linear functions, the ``rows`` ``(m, outputs)``, of the last layer's outputs: two of ``(m,)``."""
    lower, upper = torch.zeros(len(rows)), torch.zeros(len(rows))
    for depth in range(len(layers) - 1, -1, -1):
        layer = layers[depth]
        rows = rows.view(len(rows), *shapes[depth])
        if isinstance(layer, nn.Linear):
            constant, rows = rows @ layer.bias, rows @ layer.weight
        else:
            constant = rows.sum((2, 3)) @ layer.bias
            rows = F.conv_transpose2d(rows, layer.weight, None, layer.stride, layer.padding)
        lower, upper, rows = lower + constant, upper + constant, rows.flatten(1)
        if depth > 0:
            least, most = bounds[depth - 1]
            slope = torch.where(least >= 0, 1.0, torch.where(most <= 0, 0.0, most / (most - least)))
            gap = torch.where((least < 0) & (most > 0), -slope * least, 0.0)  # between the two lines
            lower, upper = lower + rows.clamp_max(0) @ gap, upper + rows.clamp_min(0) @ gap
            rows = rows * slope
    up, down = rows.clamp_min(0), rows.clamp_max(0)
    low, high = low.flatten(), high.flatten()
    return lower + up @ low + down @ high, upper + up @ high + down @ low
