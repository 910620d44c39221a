"""The distillation study's saliency attack on one batch: every image to every other class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.attacks import Attack


@dataclass(frozen=True)
class PairRuns:
    """One run for each of M pairs of image and target.

    Attributes:
        image: ``(M,)`` which of the batch's images.
        target: ``(M,)`` the class that it was driven to.
        predicted: ``(M,)`` the class that the model takes the result for.
        confidence: ``(M,)`` probability of the target at the result.
        share: ``(M,)`` float64 share of the features that were changed.
    """

    image: Tensor
    target: Tensor
    predicted: Tensor
    confidence: Tensor
    share: Tensor


def saliency_runs(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    progress: Callable[[int, int], None] | None = None,
    mask: Tensor | None = None,
) -> PairRuns:
    """Drive every image to every other class.

    Args:
        attack: a targeted run of it.
        model: from images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` their classes.
        progress: told (steps done, steps in all) of each part of the batch.
        mask: ``(N, 1, H, W)`` where pixels may change; ``None``: everywhere.
    """
    if not len(images):
        nothing = labels.new_zeros(0)
        return PairRuns(nothing, nothing, nothing, images.new_zeros(0), images.new_zeros(0).double())
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    targets = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    image, target = (targets != labels[:, None]).nonzero(as_tuple=True)
    found = []
    # as many pairs at a time as the batch has images, or those of one image: memory stays that of a batch
    for rows in torch.arange(len(image), device=labels.device).split(max(len(images), classes - 1)):
        clean = images[image[rows]]
        result = attack.run(
            model,
            clean,
            labels[image[rows]],
            targets=target[rows],
            mask=None if mask is None else mask[image[rows]],
            rounding=False,
            progress=progress,
        )
        with torch.no_grad():
            probabilities = model(result.images).softmax(1)
        changed = (result.images != clean).flatten(1).double().mean(1)
        found.append((probabilities.argmax(1), probabilities.gather(1, target[rows, None])[:, 0], changed))
    return PairRuns(image, target, *(torch.cat(parts) for parts in zip(*found, strict=True)))
