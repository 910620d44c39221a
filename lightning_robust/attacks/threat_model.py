"""What the attacker may do: a norm and a budget ε, both in pixel space [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import Tensor

from lightning_robust.errors import UserError

Norm = Literal["linf", "l2", "l1"]
"""The norms whose balls a gradient step can be projected onto."""
AnyNorm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[str, ...] = get_args(AnyNorm)


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
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, over all channels and pixels of one image; or ``"l0"``, the number of
            pixels of which any channel changes.
        eps: radius of the ball in pixel units of [0, 1]; a number or a fraction such as ``"8/255"``; of ``"l0"`` a
            number of pixels.

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

    norm: AnyNorm = "linf"
    eps: float | str = "8/255"

    @classmethod
    def unbounded(cls, norm: AnyNorm) -> ThreatModel:
        """No budget: that of an attack which looks for the smallest perturbation in a norm.

        Example:
            >>> ThreatModel.unbounded("l2").bounded
            False
        """
        model = cls(norm, 0)
        object.__setattr__(model, "eps", math.inf)
        return model

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
    def bounded(self) -> bool:
        """Whether there is a budget at all."""
        return math.isfinite(self.radius)

    @property
    def ball(self) -> Norm:
        """The norm, where its ball is one that a step can be projected onto.

        Raises:
            UserError: for ``"l0"``.
        """
        check_ball_norm(self.norm, "this attack")
        return cast(Norm, self.norm)

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
        if not self.bounded:
            return
        values, pixels = images[0].numel(), images[0, 0].numel()
        if self.norm == "l0" and self.radius > pixels:
            raise UserError(
                f"{self.radius:g} pixels are to change, but images of shape {tuple(images.shape[1:])} have {pixels}: "
                "choose fewer"
            )
        limit = {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values), "l0": float(pixels)}[self.norm]
        if self.radius > limit:
            raise UserError(
                f"eps={self.radius:g} in {self.norm} is more than any two images of {values} values in [0, 1] can "
                f"differ ({limit:g}): budgets are in [0, 1] pixel units, not in 0..255"
            )


def check_ball_norm(norm: str, attack: str) -> None:
    """Refuse a norm whose ball a gradient step cannot be projected onto.

    Raises:
        UserError: for ``"l0"`` and for norms that do not exist.
    """
    balls = get_args(Norm)
    if norm not in balls:
        mend = "; attacks on few pixels are JSMA, OnePixel and CW with norm='l0'" if norm == "l0" else ""
        raise UserError(f"{attack}: norm={norm!r} does not exist here: choose one of {', '.join(balls)}{mend}")
