"""The mean input gradient of a data set, pixel by pixel and class by class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.checks import check_classes, check_image_size
from lightning_robust.metrics.functional import pixel_gradient


class InputGradientMaps(NamedTuple):
    """What :class:`InputGradient` computes.

    Attributes:
        mean: ``(H, W)`` float64, mean over all images; NaN before any image.
        per_class: ``(K, H, W)`` float64, mean over the images of each class, NaN for a class without images; ``None``
            where the metric was made without ``num_classes``.
    """

    mean: Tensor
    per_class: Tensor | None


class InputGradient(Metric):
    """Mean |∇x| per pixel: how much the loss hangs on each pixel, over a data set and over each of its classes.

    G(i, j) = 1 / (|D| C) Σ_x Σ_c |∂L(f(x), y) / ∂x_cij|: the absolute value first, then the mean over channels and
    images (Hwang et al., "Where to be adversarial perturbations added?", ICLR 2019 Debugging ML workshop). A large
    value is a vulnerable pixel. Sums are kept in float64: the maps agree to 1e-10 for any number of ranks and any batch
    size.

    Args:
        image_size: (height, width) of the images.
        num_classes: also keep one map a class. The state then takes K·H·W·8 bytes (1000 classes at 224×224: 401 MB).

    Raises:
        UserError: for a size or a number of classes below 1; from ``update`` for gradients of another size, gradients
            that are not finite, and labels that are missing or out of range.

    Example:
        >>> metric = InputGradient(image_size=(1, 2), num_classes=2)
        >>> gradients = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).view(2, 1, 1, 2)
        >>> metric.update(gradients, torch.tensor([0, 0]))
        >>> maps = metric.compute()
        >>> maps.mean
        tensor([[2., 1.]], dtype=torch.float64)
        >>> maps.per_class[1]
        tensor([[nan, nan]], dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    gradient_sum: Tensor
    images: Tensor

    def __init__(self, image_size: tuple[int, int], num_classes: int | None = None) -> None:
        super().__init__()
        self.image_size = check_image_size(image_size, "InputGradient")
        if num_classes is not None and num_classes < 1:
            raise UserError(f"InputGradient: num_classes={num_classes}: at least one class is needed, or None")
        self.num_classes = num_classes
        rows = num_classes or 1
        self.add_state("gradient_sum", torch.zeros(rows, *self.image_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(rows, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradients: Tensor, labels: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            gradients: ``(N, C, H, W)``, each image's own (of a summed loss), as
                :func:`~lightning_robust.metrics.functional.input_gradient` gives them.
            labels: ``(N,)`` classes; needed with ``num_classes`` and not looked at without.
        """
        if gradients.shape[-2:] != self.image_size:
            raise UserError(
                f"InputGradient was made for images of {self.image_size[0]}×{self.image_size[1]} pixels and got "
                f"gradients of shape {tuple(gradients.shape)}: give it the data set's image_size"
            )
        pixels = pixel_gradient(gradients)
        if self.num_classes is None:
            rows = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        elif labels is None:
            raise UserError("InputGradient: give the labels too, or make the metric without num_classes")
        else:
            rows = check_classes(labels, len(pixels), self.num_classes, "labels")
        rows, pixels = rows.to(self.gradient_sum.device), pixels.to(self.gradient_sum.device)
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.gradient_sum = self.gradient_sum.index_add(0, rows, pixels)
        self.images = self.images + torch.bincount(rows, minlength=len(self.images))

    def compute(self) -> InputGradientMaps:
        """Means over all images counted, on every rank the same."""
        mean = self.gradient_sum.sum(0) / self.images.sum()
        if self.num_classes is None:
            return InputGradientMaps(mean, None)
        return InputGradientMaps(mean, self.gradient_sum / self.images[:, None, None])
