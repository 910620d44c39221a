"""Images made black and white at test time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_robust.attacks.adaptive import BPDA
from lightning_robust.defenses.base import Defense
from lightning_robust.errors import UserError


class Binarization(Defense):
    """Sets each pixel value above a threshold to 1 and all others to 0, and asks the classifier.

    The observation that Vaishnavi et al. (arXiv 1911.11946) start from: nearly all of a handwritten digit's pixels are
    black or white, and a small perturbation does not carry them over the threshold. A step function has no gradient,
    which stops every attack that goes by it: that is shattered gradients, no robustness (Athalye et al., arXiv
    1802.00420). So the gradient here is a stand-in's, and any attack is an adaptive one. What an attacker in an L∞ ball
    cannot do is reach pixels further than ε from the threshold; what is left of the accuracy is due to that, and to how
    few pixels of the data lie in between. The plain attack on the classifier alone, whose images are then judged by the
    defense, is a :class:`~lightning_robust.attacks.Transfer` from it.

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`.
        threshold: in [0, 1).
        temperature: the stand-in: ``None`` for the identity (BPDA), a positive number for the sigmoid of the distance
            from the threshold over it, whose gradient prefers the pixels near the threshold. Signed steps (L∞) do not
            tell the two apart.
        seed: takes no part; nothing is drawn.

    Raises:
        UserError: for a threshold or temperature out of range.

    Example:
        >>> defense = Binarization(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> images = torch.tensor([[[[0.2, 0.7], [0.5, 1.0]]]])
        >>> defense.transform(images).tolist()
        [[[[0.0, 1.0], [0.0, 1.0]]]]
        >>> torch.equal(defense(images), defense(images.round()))
        True
    """

    random = False

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        threshold: float = 0.5,
        temperature: float | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise UserError(f"Binarization: threshold={threshold!r}: give a pixel value from 0 to below 1")
        if temperature is not None and (
            isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0
        ):
            raise UserError(f"Binarization: temperature={temperature!r}: give a positive number, or None")
        self.threshold, self.temperature = float(threshold), temperature
        self._step = BPDA(self._above, None if temperature is None else self._near)

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits of the black and white images."""
        return self.single(images, keys)

    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """As :meth:`decide`: nothing is drawn."""
        return self.protected()(self.transform(images))

    def transform(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1], black and white; backward, the stand-in's gradient."""
        out: Tensor = self._step(images)
        return out

    def draws(self, samples: int) -> Sequence[nn.Module]:
        """The defense itself: there is nothing to average over."""
        return super().draws(min(samples, 1)) and [self]

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        return f"threshold={self.threshold}, temperature={self.temperature}"

    def _above(self, images: Tensor) -> Tensor:
        return (images > self.threshold).to(images.dtype)

    def _near(self, images: Tensor) -> Tensor:
        assert self.temperature is not None
        return torch.sigmoid((images - self.threshold) / self.temperature)
