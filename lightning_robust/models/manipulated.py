"""A classifier that sees its images through a Pixel Robustness Manipulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn

from lightning_robust.models.prm import PixelRobustnessManipulator


class ManipulatedNetwork(nn.Module):
    """A classifier behind a Pixel Robustness Manipulator; nothing is clamped between the two.

    Args:
        prm: the manipulator.
        classifier: from images to logits ``(N, K)``, its normalisation inside.

    Example:
        >>> import torch
        >>> net = ManipulatedNetwork(
        ...     PixelRobustnessManipulator(channels=1, width=4, depth=2, lam=1.0),
        ...     nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        ... )
        >>> images = torch.rand(2, 1, 8, 8)
        >>> with net.at(0.0):
        ...     bool((net(images) == net.classifier(images)).all())
        True
    """

    def __init__(self, prm: PixelRobustnessManipulator, classifier: nn.Module) -> None:
        super().__init__()
        self.prm = prm
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1], at the manipulator's present λ."""
        return self.classifier(self.prm(images))

    @contextmanager
    def at(self, lam: float) -> Iterator[Self]:
        """Another λ for a while."""
        before = self.prm.lam
        self.prm.lam = lam
        try:
            yield self
        finally:
            self.prm.lam = before
