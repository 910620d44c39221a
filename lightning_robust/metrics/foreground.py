"""Where an image's gradient lies: on its foreground, or outside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.functional import pixel_gradient
from lightning_robust.metrics.pixels import intersection_over_union


class ForegroundGradientScores(NamedTuple):
    """What :class:`ForegroundGradient` computes, float64; NaN where nothing was counted.

    Attributes:
        inside: mean |∇x| of a pixel of the foreground, averaged over the images that have one.
        outside: the same of the background.
        iou: mean over images of |T ∩ S| / |T ∪ S|, T as many of the image's pixels of largest |∇x| as its foreground S
            has.
        iou_by_chance: about what pixels drawn at random would have for T: a / (2 - a), a the share of foreground.
        images: int64, how many.
    """

    inside: Tensor
    outside: Tensor
    iou: Tensor
    iou_by_chance: Tensor
    images: Tensor


class ForegroundGradient(Metric):
    """Mean |∇x| inside and outside the foreground, and the IoU of each image's weakest pixels with its foreground.

    Sums in float64, the same on any number of ranks and with any batch size. Equal values are ordered by their index.

    Example:
        >>> metric = ForegroundGradient()
        >>> gradients = torch.tensor([3.0, -2.0, 1.0, 0.0]).view(1, 1, 2, 2)
        >>> metric.update(gradients, torch.tensor([[True, False], [True, False]]).view(1, 1, 2, 2))
        >>> found = metric.compute()
        >>> float(found.inside), float(found.outside), round(float(found.iou), 4)
        (2.0, 1.0, 0.3333)
    """

    full_state_update = False
    is_differentiable = False
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradients: Tensor, masks: Tensor) -> None:
        """Count a batch.

        Args:
            gradients: ``(N, C, H, W)``, each image's own.
            masks: ``(N, 1, H, W)`` bool.

        Raises:
            UserError: for masks of another size or type, and gradients that are not finite.
        """
        pixels = pixel_gradient(gradients)
        if masks.dtype != torch.bool or masks.shape != (len(pixels), 1, *pixels.shape[1:]):
            raise UserError(
                f"ForegroundGradient: masks of shape {tuple(masks.shape)} and type {masks.dtype} for gradients of "
                f"shape {tuple(gradients.shape)}: they are (N, 1, H, W) bool"
            )
        flat, inside = pixels.flatten(1), masks.to(pixels.device).flatten(1)
        size = inside.sum(1)
        means = [
            (flat * part).sum(1) / part.sum(1).clamp_min(1)  # 0 where there is no such pixel
            for part in (inside, ~inside)
        ]
        # the place of each pixel in the order of its image, largest first
        order = flat.sort(dim=1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        )
        top = place < size[:, None]
        iou = intersection_over_union(top.view_as(pixels), inside.view_as(pixels))
        share = size.double() / flat.shape[1]
        found = torch.stack([*means, iou, share / (2 - share)]).sum(1)
        have = torch.stack(
            [(size > 0).sum(), (size < flat.shape[1]).sum(), torch.tensor(len(flat), device=flat.device)]
        )
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.sums = self.sums + found.to(self.sums)
        self.counts = self.counts + have.to(self.counts)

    def compute(self) -> ForegroundGradientScores:
        """Over all images counted, on every rank the same."""
        inside, outside, iou, chance = self.sums.unbind()
        with_inside, with_outside, images = self.counts.unbind()
        return ForegroundGradientScores(
            inside / with_inside, outside / with_outside, iou / images, chance / images, images
        )
