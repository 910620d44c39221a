"""Per-channel normalisation that lives inside the model, so that attacks and users see pixels in [0,1] only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_robust.errors import UserError


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, for pixels in [0,1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


#: Pixel statistics of the training sets that the field normalises with; ``none`` leaves pixels alone.
NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization((0.0,), (1.0,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion_mnist": Normalization((0.2860,), (0.3530,)),
}


def normalization_of(name: str) -> Normalization:
    """Mean and standard deviation by the name of a data set.

    Args:
        name: ``imagenet``, ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist`` or ``none``.

    Returns:
        One value per channel, for pixels in [0,1].

    Raises:
        UserError: for another name.

    Example:
        >>> normalization_of("mnist")
        Normalization(mean=(0.1307,), std=(0.3081,))
    """
    try:
        return NORMALIZATIONS[name]
    except KeyError:
        raise UserError(
            f"there is no normalization named {name!r}: choose one of {', '.join(NORMALIZATIONS)}, "
            "or give mean and std as numbers per channel."
        ) from None


class Normalized(nn.Module):
    """A network behind ``(pixels - mean) / std``.

    Mean and std are buffers that no checkpoint stores: a weights file holds the network alone, and what the
    settings say always holds. They follow ``.to()``; after ``.double()`` they are the doubles that were given, not
    widened floats. Mean 0 with std 1 costs nothing.

    Args:
        network: takes normalised images of shape (N,C,H,W), returns logits.
        mean: one number per channel or one for all, in pixel units of [0,1]; None with ``std`` None for no change.
        std: likewise, positive.

    Raises:
        UserError: when only one of the two is given, their lengths differ, or a std is not positive.

    Example:
        >>> import torch
        >>> model = Normalized(torch.nn.Identity(), mean=[0.5], std=[0.25])
        >>> model(torch.full((1, 1, 1, 1), 0.75)).item()
        1.0
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, network: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise UserError("mean and std belong together: give both as numbers per channel, or neither.")
        self.network = network
        self.normalization = NORMALIZATIONS["none"]
        if mean is not None and std is not None:
            self.normalization = Normalization(tuple(map(float, mean)), tuple(map(float, std)))
        means, stds = self.normalization
        if len(means) != len(stds) or not means:
            raise UserError(f"mean has {len(means)} and std {len(stds)} numbers: give one per channel, or one for all.")
        if min(stds) <= 0:
            raise UserError(f"std must be positive, not {list(stds)}.")
        identity = set(means) == {0.0} and set(stds) == {1.0}
        for name, values in (("mean", means), ("std", stds)):
            buffer = None if identity else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: (N,C,H,W), pixels in [0,1].

        Returns:
            What the network returns for the normalised images; logits of shape (N, classes) for a classifier.
        """
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        return self.network(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # Values anew from the Python floats: a trip through half precision, or a model made on the meta device and
        # given storage with to_empty(), would leave them rounded or undefined, and no checkpoint would mend that.
        for buffer, values in ((self.mean, self.normalization.mean), (self.std, self.normalization.std)):
            if buffer is not None and not buffer.is_meta:
                with torch.no_grad():
                    buffer.copy_(torch.tensor(values, dtype=buffer.dtype, device="cpu").view(-1, 1, 1))
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` says of the normalisation."""
        return (
            "no normalization" if self.mean is None else f"mean={self.normalization.mean}, std={self.normalization.std}"
        )
