"""How well the vulnerable pixels of each image agree with the pixels that were designated for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.pixels import check_share, intersection_over_union, top_pixels


class PixelIoU(Metric):
    """Mean over images of |T ∩ S| / |T ∪ S|: T the image's own top pixels, S the pixels designated for it.

    The measure of Hwang et al. (ICLR 2019 Debugging ML workshop), taken image by image. Of a map of the whole data set
    it is ``intersection_over_union(top_pixels(map, share), designated)``.

    Args:
        share: share of each image's pixels that T holds, above 0 and at most 1; exactly round(share · H · W) pixels.

    ``compute()`` gives a float64 scalar in [0, 1], NaN before any image. An image whose mask is empty counts as 0.

    Raises:
        UserError: for a share out of range; from ``update`` for maps and masks that do not fit each other, and NaN.

    Example:
        >>> metric = PixelIoU(share=0.5)
        >>> metric.update(torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([[[True, False, True, False]]]))
        >>> round(float(metric.compute()), 4)
        0.3333
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    iou_sum: Tensor
    images: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = check_share(share)
        self.add_state("iou_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Count a batch.

        Args:
            maps: ``(N, H, W)`` one value a pixel, as :func:`~lightning_robust.metrics.functional.pixel_gradient` gives.
            masks: ``(N, H, W)`` bool, the designated pixels of each image, or ``(H, W)`` for all.
        """
        fits = maps.dim() == 3 and masks.shape in (maps.shape, maps.shape[1:])
        if not fits:
            raise UserError(
                f"PixelIoU: maps of shape {tuple(maps.shape)} and masks of shape {tuple(masks.shape)}: maps are "
                "(N, H, W), masks (N, H, W) or (H, W)"
            )
        values = intersection_over_union(top_pixels(maps, self.share), masks.to(maps.device))
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.iou_sum = self.iou_sum + values.sum().to(self.iou_sum.device)
        self.images = self.images + len(maps)

    def compute(self) -> Tensor:
        """The mean over all images counted, on every rank the same."""
        return self.iou_sum / self.images
