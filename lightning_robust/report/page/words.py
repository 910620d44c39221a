"""Logged names as people read them, and numbers as they are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "number", "small", "decibel", "seconds", "count"]

STAGES = {"test": "test images", "val": "validation images", "train": "training images"}

# pattern below the stage, words, kind, and which way is better (+1 more, -1 less, 0 neither)
_MEASURES: tuple[tuple[str, str, Kind, int], ...] = (
    (r"acc", "clean accuracy", "share", 1),
    (r"audit(?:_(.+))?/robust_acc", "robust accuracy in the audit {0}", "share", 1),
    (r"audit(?:_(.+))?/clean_acc", "clean accuracy in the audit {0}", "share", 1),
    (r"audit(?:_(.+))?/trusted", "trusted by the audit (1: yes) {0}", "number", 1),
    (r"audit(?:_(.+))?/flagged", "checks that the audit flags {0}", "number", -1),
    (r"robust_acc/worst_case(?:_(.+))?", "robust accuracy, worst case of all attacks {0}", "share", 1),
    (r"robust_acc/(.+)", "robust accuracy, {0}", "share", 1),
    (r"success_rate/(.+)", "attack success, {0}", "share", -1),
    (r"success_rate_8bit/(.+)", "attack success after rounding to 8 bits, {0}", "share", -1),
    (r"mean_norm/(.+)", "mean norm of what fools, {0}", "number", 1),
    (r"robust_acc_curve/(.+)/eps=(.+)", "robust accuracy at ε = {1}, {0}", "share", 1),
    (r"lambda_sweep/acc/lam=(.+)", "clean accuracy at λ = {0}", "share", 1),
    (r"lambda_sweep/(?:iou)/lam=(.+)", "gradient IoU at λ = {0}", "number", 0),
    (r"lambda_sweep/psnr/lam=(.+)", "PSNR at λ = {0}", "decibel", 1),
    (r"input_gradient_mean", "mean |∇x|", "small", 0),
    (r"input_gradient_iou", "gradient IoU", "number", 0),
    (r"(.*iou)", "gradient IoU ({0})", "number", 0),
    (r"psnr", "PSNR of the reconstruction", "decibel", 1),
    (r"loss", "loss", "number", -1),
    (r"eps", "ε of the training attack", "number", 0),
)
_COMPILED = tuple((re.compile(pattern), words, kind, better) for pattern, words, kind, better in _MEASURES)


@dataclass(frozen=True)
class Measure:
    """What a logged name means.

    Args:
        name: as it is logged.
        label: in words, without the stage.
        stage: "test", "val", "train", or empty.
        kind: how its numbers are written.
        better: +1 where more is better, -1 where less is, 0 where neither.
    """

    name: str
    label: str
    stage: str
    kind: Kind
    better: int

    def text(self, value: float | None, deviation: float | None = None) -> str:
        """A value, with its deviation over seeds where there is one."""
        if value is None or math.isnan(value):
            return "–"
        if deviation is None or math.isnan(deviation):
            return self._written(value) + self._unit
        return f"{self._written(value)} ± {self._written(deviation)}{self._unit}"

    def difference(self, value: float | None, base: float | None) -> str:
        """By how much a value differs from another one, with its sign; empty where either is missing or they agree."""
        if value is None or base is None or not math.isfinite(value) or not math.isfinite(base):
            return ""
        written = self._written(abs(value - base))
        if float(written.replace(",", "")) == 0:
            return ""
        unit = " points" if self.kind == "share" else self._unit
        return f"{'+' if value > base else '−'}{written}{unit}"

    @property
    def _unit(self) -> str:
        return {"share": " %", "decibel": " dB", "seconds": " s"}.get(self.kind, "")

    def _written(self, value: float) -> str:
        match self.kind:
            case "share":
                return f"{100 * value:.2f}"
            case "decibel":
                return f"{value:.2f}"
            case "seconds":
                return f"{value:,.1f}"
            case "count":
                return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"
            case "small":
                return f"{value:.3e}"
            case _:
                return number(value)


def number(value: float) -> str:
    """A number with about five digits."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{4 - min(len(str(int(abs(value)))) - 1, 4)}f}"
    return f"{value:.3e}"


def measure(name: str) -> Measure:
    """The meaning of a logged name; of one that is not known, the name itself."""
    stage, slash, rest = name.partition("/")
    if not slash or stage not in STAGES:
        if stage == "time":
            return Measure(name, f"time of {rest.removesuffix('_seconds')}", "", "seconds", 0)
        return Measure(name, name, "", "count" if name == "epochs" else "number", 0)
    if name == "train/acc":  # of what the objective makes of the images
        return Measure(name, "accuracy on what it trains on", stage, "share", 1)
    for pattern, words, kind, better in _COMPILED:
        if found := pattern.fullmatch(rest):
            parts = [(group or "").replace("_", " ") for group in found.groups()]
            return Measure(name, words.format(*parts).strip(), stage, kind, better)
    return Measure(name, rest, stage, "number", 0)


def words_of(name: str) -> str:
    """A file's or a column's name in words."""
    return name.replace("_", " ").strip() or name
