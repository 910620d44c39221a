"""What a model answers: logits or a clear mistake, how far two answers lie apart, and who votes on a random one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.errors import UserError

VOTES = 5
"""Calls of a random model that say by majority whether an image fools it."""


@runtime_checkable
class Seeded(Protocol):
    """A random model whose draws hang on the image and a seed; a copy with another seed draws others."""

    seed: int | None

    def with_seed(self, seed: int | None) -> nn.Module:
        """A copy around the same model."""
        ...


def judges(model: Model, seed: int) -> list[Model]:
    """The model so many times, each with draws of its own where those hang on a seed."""
    if isinstance(model, Seeded) and model.seed is not None:
        return [model.with_seed(mix_seed(seed, number, VOTES)) for number in range(VOTES)]
    return [model] * VOTES


def asked(model: Model, images: Tensor) -> Tensor:
    """Logits ``(n, K)`` of one batch.

    Raises:
        UserError: if the model cannot take the images, or gives something else.
    """
    try:
        logits = model(images)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        size = "×".join(map(str, images.shape[1:]))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the model cannot take these images of {size} (channels, height, width): {reason}; give it the data "
            "that it was made for, or resize with --data.image_size"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model gave {got} for {len(images)} images: an audit needs logits (N, classes) alone")
    return logits


def unit(logits: Tensor) -> Tensor:
    """Logits brought to length one, as AutoAttack compares them."""
    logits = logits.double()
    return logits / (logits.norm(dim=1, keepdim=True) + 1e-10)


def share_that_differs(answers: Sequence[Tensor], largest: float) -> Tensor:
    """Whether each image's logits, brought to length one, differ by more than ``largest`` from the first answer.

    Args:
        answers: two or more of ``(n, K)``.
        largest: difference that is let pass.
    """
    first = unit(answers[0])
    away = torch.stack([(first - unit(other)).norm(dim=1) for other in answers[1:]]).amax(0)
    return away > largest
