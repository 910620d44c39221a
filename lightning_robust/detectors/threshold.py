"""From κ of normal images to the shares that the test compares."""

from __future__ import annotations

from typing import Literal

from lightning_robust.detectors.calibration import Calibration
from lightning_robust.detectors.mutation import Mutation
from lightning_robust.errors import UserError

Rule = Literal["auto", "times", "interval"]


def threshold(
    found: Calibration, mutation: Mutation, rule: Rule, mu: float, half_width: float | None
) -> tuple[float, float]:
    """The threshold t and the half-width σ of the test.

    Args:
        found: what the calibration has found.
        mutation: whose mutants they are.
        rule: "times": t = μ · κ_nor, "interval": t = κ_nor + half-width of its confidence interval, "auto": the first
            for mutants of images, the second for mutants of the model.
        mu: μ.
        half_width: σ as a share of t; by default (μ - 1) / μ with "times", 0.1 with "interval".

    Raises:
        UserError: for a κ_nor of 0, or one so high that t + σ is no share below 1.
    """
    kappa, title = found.kappa_nor, mutation.title
    times = rule == "times" or (rule == "auto" and mutation.of == "images")
    if not kappa > 0:
        raise UserError(
            f"{title}: κ_nor is {kappa:g}: no mutant of {found.mutants} changed the label of any of {found.images} "
            "clean images, so there is no threshold; make the mutants stronger (strength or rate), or give more images"
        )
    if times and kappa >= 1 / mu:
        raise UserError(
            f"{title}: κ_nor is {kappa:.3g}, and μ · κ_nor = {mu * kappa:.3g} is no share below 1: make the mutants "
            "weaker (strength or rate), or lower mu"
        )
    middle = mu * kappa if times else kappa + found.interval
    share = half_width if half_width is not None else (mu - 1) / mu if times else 0.1
    if middle * (1 + share) >= 1:
        raise UserError(
            f"{title}: κ_nor is {kappa:.3g}, and the test would compare with the share {middle * (1 + share):.3g}, "
            "which is no share below 1: make the mutants weaker (strength or rate)"
        )
    return middle, share * middle
