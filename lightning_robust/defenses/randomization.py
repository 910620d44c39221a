"""Random resizing and padding (Xie et al., ICLR 2018, arXiv 1711.01991)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks.randomness import uniform
from lightning_robust.defenses.base import Defense, integers, positive_integer
from lightning_robust.defenses.pixels import take
from lightning_robust.defenses.votes import mean_log_probabilities
from lightning_robust.errors import UserError

SETTINGS: dict[str, tuple[int, int, int]] = {
    "cifar": (32, 35, 35),
    "imagenet": (299, 331, 331),
    "imagenet224": (224, 248, 248),
}
"""Of each setting the smallest size, the size that sizes stay below, and the size padded to."""

Setting = Literal["cifar", "imagenet", "imagenet224"]


class Randomization(Defense):
    """Enlarges the image to a random size and pads it with zeros at random, so that no pixel stays where it was.

    "Mitigating adversarial effects through randomization" (Xie et al., ICLR 2018, arXiv 1711.01991). On ImageNet an
    image of 299 becomes one of a size drawn from [299, 331), by nearest neighbour, and is padded to 331: 12,528
    patterns. For CIFAR there is no official setting: "cifar", 32 to 35, is that of a public port (liuaishan/LAT), which
    averages 10 passes. "imagenet224" keeps the proportion for networks of 224 pixels. Every image draws its own size
    and place. Only enlarging is the paper's: the variant that shrinks and pads back is another defense.

    It is broken: an average over 30 draws in each of up to 1,000 steps (:class:`~lightning_robust.attacks.EOT`) leaves
    0 % at ε = 0.031 (Athalye et al., arXiv 1802.00420).

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`; it is given images of the size padded to, which most
            convolutional networks take, and others only with ``resize_back``.
        setting: "cifar", "imagenet" or "imagenet224".
        sizes: the smallest size and the size that sizes stay below, in place of the setting's.
        pad_to: the size padded to, in place of the setting's.
        passes: draws whose probabilities are averaged; 1 in the paper, 30 in its entry to the NIPS 2017 contest, which
            drew from [310, 331), 10 in the port for CIFAR.
        resize_back: bring the padded image back to the size it came in (bilinear, smoothed), for networks of one size.
        fill: value of the padding, in pixel units. 0 is black; the contest's networks took pixels in [-1, 1], where
            its zeros were a middle gray: 0.5.
        seed: of the draws; ``None`` for fresh ones.

    Raises:
        UserError: for settings outside these ranges; when called, for images that are not square or are larger than
            the smallest size, and for a model that does not take the larger size.

    Example:
        >>> defense = Randomization(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3)))
        >>> defense.transform(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 35, 35])
        >>> Randomization(setting="imagenet").patterns
        12528
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        setting: Setting = "cifar",
        sizes: tuple[int, int] | None = None,
        pad_to: int | None = None,
        passes: int = 1,
        resize_back: bool = False,
        fill: float = 0.0,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        if setting not in SETTINGS:
            raise UserError(f"Randomization: setting={setting!r}: choose one of {', '.join(SETTINGS)}")
        low, high, canvas = SETTINGS[setting]
        if sizes is not None:
            if not isinstance(sizes, list | tuple) or len(sizes) != 2:
                raise UserError(f"Randomization: sizes={sizes!r}: give the smallest size and the one they stay below")
            low, high = sizes
        self.low = positive_integer(self, "sizes", low)
        self.high = positive_integer(self, "sizes", high, least=self.low + 1)
        self.pad_to = positive_integer(self, "pad_to", canvas if pad_to is None else pad_to, least=self.high - 1)
        self.passes = positive_integer(self, "passes", passes)
        if not 0 <= fill <= 1:
            raise UserError(f"Randomization: fill={fill}: give a pixel value in [0, 1]")
        self.resize_back, self.fill = resize_back, fill

    @property
    def patterns(self) -> int:
        """How many different draws there are."""
        return sum((self.pad_to - size + 1) ** 2 for size in range(self.low, self.high))

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """One draw's logits, or the logarithm of the mean probabilities over several."""
        if self.passes == 1:
            return self.single(images, keys)
        return mean_log_probabilities([self._ask(self.transform(images, keys, turn)) for turn in range(self.passes)])

    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits of the images, each resized and padded in its own way."""
        return self._ask(self.transform(images, keys))

    def transform(self, images: Tensor, keys: Tensor | None = None, turn: int = 0) -> Tensor:
        """What the classifier is given: ``(N, C, P, P)`` of the size padded to, or ``(N, C, S, S)`` brought back.

        Args:
            images: ``(N, C, S, S)``.
            keys: ``(N,)`` to draw with; by default those of the verdict.
            turn: number of the pass.
        """
        count, _, height, width = images.shape
        if height != width or height > self.low:
            raise UserError(
                f"Randomization: images of {height}×{width}: it enlarges square images to {self.low} and up to "
                f"{self.high - 1}: choose another setting ({', '.join(SETTINGS)}), or sizes and pad_to of your own"
            )
        keys = self.keys(images) if keys is None else keys
        drawn = uniform(keys, (count, 3), torch.float64, stream=turn)
        size = self.low + integers(drawn[:, :1], self.high - self.low)
        top = integers(drawn[:, 1:2], self.pad_to - size + 1)
        left = integers(drawn[:, 2:], self.pad_to - size + 1)
        place = torch.arange(self.pad_to, device=images.device)
        # nearest neighbour: pixel i of the enlarged image is pixel ⌊i · S / size⌋; what lies beyond is outside, too
        rows = torch.div((place - top) * height, size, rounding_mode="floor")
        columns = torch.div((place - left) * width, size, rounding_mode="floor")
        padded = take(images, rows, columns, self.fill)
        if not self.resize_back:
            return padded
        return F.interpolate(padded, size=(height, width), mode="bilinear", antialias=True)

    def _ask(self, images: Tensor) -> Tensor:
        model = self.protected()
        try:
            return model(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, UserError | torch.OutOfMemoryError) or self.resize_back:
                raise
            raise UserError(
                f"Randomization: the classifier failed on the {images.shape[2]}×{images.shape[3]} images that it was "
                f"given ({str(error).splitlines()[0] if str(error) else type(error).__name__}); a network of one size "
                "needs resize_back=True"
            ) from error

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        back = ", resize_back=True" if self.resize_back else ""
        return f"sizes=({self.low}, {self.high}), pad_to={self.pad_to}, passes={self.passes}{back}, seed={self.seed}"
