"""What the attacker may do: a norm and a budget ε, both in pixel space [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_robust.errors import UserError

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = get_args(Norm)


def parse_number(value: float | str, name: str = "eps") -> float:
    """Read a number that may be written as a fraction, as the field writes budgets.

    Args:
        value: a number, or a string such as ``"8/255"`` or ``"0.03"``.
        name: what the number is, for the error message.

    Raises:
        UserError: if it is not a finite number.

    Example:
        >>> parse_number("8/255") == 8 / 255
        True
    """
    try:
        if isinstance(value, str):
            numerator, slash, denominator = value.partition("/")
            number = float(numerator) / float(denominator) if slash else float(numerator)
        else:
            number = float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError(f"{name}={value!r} is not a number: write it as 0.03 or as 8/255") from None
    if not math.isfinite(number):
        raise UserError(f"{name}={value!r} is not finite: write it as 0.03 or as 8/255")
    return number


@dataclass(frozen=True)
class ThreatModel:
    """The set of images that the attacker may choose from: an ε-ball around the clean image, cut with [0, 1].

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, over all channels and pixels of one image.
        eps: radius of the ball in pixel units of [0, 1]; a number or a fraction such as ``"8/255"``.

    Raises:
        UserError: for a norm that does not exist and for an ε that [0, 1] does not allow.

    Example:
        >>> ThreatModel("linf", "8/255").eps == 8 / 255
        True
        >>> ThreatModel("linf", 8)
        Traceback (most recent call last):
        ...
        lightning_robust.errors.UserError: eps=8 is larger than the pixel range [0, 1]: did you mean 8/255?
    """

    norm: Norm = "linf"
    eps: float | str = "8/255"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"norm={self.norm!r} does not exist here: choose one of {', '.join(NORMS)}")
        eps = parse_number(self.eps)
        if eps < 0:
            raise UserError(f"eps={self.eps} is negative: a budget is 0 or more, for example 8/255")
        if self.norm == "linf" and eps > 1:
            mend = f": did you mean {eps:g}/255?" if eps <= 255 else ", for example 8/255"
            raise UserError(f"eps={self.eps} is larger than the pixel range [0, 1]{mend}")
        object.__setattr__(self, "eps", eps)

    @property
    def radius(self) -> float:
        """The budget ε as a float in pixel units."""
        return float(self.eps)

    def check_images(self, images: Tensor) -> None:
        """Refuse a budget that covers the whole pixel cube of images of this size.

        Args:
            images: a batch ``(N, C, H, W)``.

        Raises:
            UserError: if ε exceeds the norm of the difference of a black and a white image.
        """
        values = images[0].numel()
        limit = {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}[self.norm]
        if self.radius > limit:
            raise UserError(
                f"eps={self.radius:g} in {self.norm} is more than any two images of {values} values in [0, 1] can "
                f"differ ({limit:g}): budgets are in [0, 1] pixel units, not in 0..255"
            )
