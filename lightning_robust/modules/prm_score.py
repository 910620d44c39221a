"""How well an autoencoder gives images back, counted exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ReconstructionScore(Metric):
    """Peak signal-to-noise ratio of reconstructed images in [0, 1], in dB; the same for any batches and ranks.

    -10·log10 of the squared error's mean over all values of all images, of the reconstruction clamped to [0, 1].
    ``compute()`` gives ``{"psnr", "loss"}`` as float64 scalars, ``loss`` the mean over images of what ``update`` was
    given; NaN before any image.

    Example:
        >>> score = ReconstructionScore()
        >>> score.update(torch.full((2, 1, 2, 2), 0.6), torch.full((2, 1, 2, 2), 0.5), torch.tensor(0.01))
        >>> {name: round(float(value), 4) for name, value in score.compute().items()}
        {'psnr': 20.0, 'loss': 0.01}
    """

    full_state_update = False
    squared_sum: Tensor
    values: Tensor
    loss_sum: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squared_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("values", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, images: Tensor, loss: Tensor) -> None:
        """Count a batch.

        Args:
            reconstruction: ``(N, C, H, W)``.
            images: ``(N, C, H, W)`` in [0, 1].
            loss: scalar, mean over the batch.
        """
        error = reconstruction.detach().double().clamp(0, 1) - images.double()
        self.squared_sum = self.squared_sum + error.square().sum()
        self.values = self.values + error.numel()
        self.loss_sum = self.loss_sum + loss.detach().double() * len(images)
        self.images = self.images + len(images)

    def compute(self) -> dict[str, Tensor]:
        """Over all images counted."""
        return {
            "psnr": -10 * torch.log10(self.squared_sum / self.values),
            "loss": self.loss_sum / self.images,
        }
