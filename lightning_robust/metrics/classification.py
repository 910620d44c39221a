"""Loss and accuracy, counted exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassificationScore(Metric):
    """Mean loss and top-1 accuracy over images; the same on any number of ranks and with any batch size.

    ``compute()`` gives ``{"loss", "acc"}`` as float64 scalars, accuracy in [0, 1]; NaN before any image.

    Example:
        >>> score = ClassificationScore()
        >>> score.update(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 0]), torch.tensor([0.5, 1.5]))
        >>> {name: float(value) for name, value in score.compute().items()}
        {'loss': 1.0, 'acc': 0.5}
    """

    full_state_update = False
    loss_sum: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Count a batch.

        Args:
            logits: ``(N, K)``.
            labels: ``(N,)`` classes.
            losses: ``(N,)`` each image's loss.
        """
        self.loss_sum = self.loss_sum + losses.double().sum()
        self.correct = self.correct + (logits.argmax(1) == labels).sum()
        self.total = self.total + len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Means over all images counted."""
        return {"loss": self.loss_sum / self.total, "acc": self.correct.double() / self.total}
