"""What a distillation study found, as numbers, rows of its tables, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_robust.metrics.gradient_amplitude import RANGE_NAMES, RANGES
from lightning_robust.metrics.intervals import wilson_interval
from lightning_robust.report import print_table

MASKED = 0.2  # share by which an attack must gain from the rescaling for gradients to count as hidden
_SUFFIX = "_rescaled"


@dataclass(frozen=True)
class Findings:
    """The numbers of one study; of attacks by name, those on logits / T end in ``_rescaled``.

    Attributes:
        stage: "test" or "val".
        temperature: T.
        images: measured.
        rates: attack to success rate.
        tried: attack to the number of pairs or images that the rate is of.
        any_target: saliency attack to the share of images driven to at least one class.
        robustness: saliency attack to ρ.
        changed: saliency attack to the mean share of features over its successes.
        gradient_mean: mean amplitude.
        gradient_log10: mean decimal logarithm of the amplitude.
        ranges: ten numbers of images.
        logit_mean: mean |z|.
        logit_std: standard deviation of |z|.
        cw_norm: mean L2 norm of what CW found; NaN where it did not run or found nothing.
    """

    stage: str
    temperature: float
    images: int
    rates: Mapping[str, float]
    tried: Mapping[str, int]
    any_target: Mapping[str, float]
    robustness: Mapping[str, float]
    changed: Mapping[str, float]
    gradient_mean: float
    gradient_log10: float
    ranges: Sequence[int]
    logit_mean: float
    logit_std: float
    cw_norm: float

    @property
    def naive(self) -> dict[str, float]:
        """Success rates of the attacks on the model as it is."""
        return {name: rate for name, rate in self.rates.items() if not name.endswith(_SUFFIX)}

    @property
    def rescaled(self) -> dict[str, float]:
        """Those on logits / T, under the naive attack's name."""
        return {name.removesuffix(_SUFFIX): rate for name, rate in self.rates.items() if name.endswith(_SUFFIX)}

    def numbers(self) -> dict[str, float]:
        """What is logged."""
        values = {f"success_rate/{name}": rate for name, rate in self.rates.items()}
        for name, rate in self.any_target.items():
            values[f"success_rate/{name.replace('jsma', 'jsma_any_target')}"] = rate
        for name in self.robustness:
            ending = name.removeprefix("jsma")
            values[f"robustness{ending}"] = self.robustness[name]
            values[f"features_changed{ending}"] = self.changed[name]
        for number, count in enumerate(self.ranges):
            values[f"gradient_range/{number}"] = count / max(self.images, 1)
        return values | {
            "gradient_mean": self.gradient_mean,
            "gradient_log10": self.gradient_log10,
            "logit_mean": self.logit_mean,
            "logit_std": self.logit_std,
            "mean_norm/cw": self.cw_norm,
            "temperature": self.temperature,
            "images": float(self.images),
        }


def rows_of_attacks(found: Findings) -> list[dict[str, Any]]:
    """One row an attack, with the 95 % Wilson interval of its rate."""
    rows = []
    for name, rate in found.rates.items():
        tried = found.tried[name]
        low, high = wilson_interval(round(rate * tried) if tried else 0, tried)
        rows.append(
            {
                "attack": name.removesuffix(_SUFFIX),
                "logits": "as they are" if not name.endswith(_SUFFIX) else f"divided by {found.temperature:g}",
                "of": tried,
                "success_rate": rate,
                "success_rate_low": low,
                "success_rate_high": high,
                "any_target": found.any_target.get(name),
                "robustness": found.robustness.get(name),
                "features_changed": found.changed.get(name),
                "mean_norm_l2": found.cw_norm if name == "cw" else None,
            }
        )
    return rows


def rows_of_ranges(found: Findings) -> list[dict[str, Any]]:
    """One row for each of the ten ranges of gradient amplitudes."""
    return [
        {"range": name, "from": low, "images": count, "share": count / max(found.images, 1)}
        for name, low, count in zip(RANGE_NAMES, RANGES, found.ranges, strict=True)
    ]


def verdict(found: Findings) -> str:
    """Whether the model is robust or hides its gradients, in a sentence or two."""
    gains = {name: found.rescaled[name] - rate for name, rate in found.naive.items() if name in found.rescaled}
    # of the saliency attack the paper's claim is; another one speaks where that gains nothing
    most = "jsma" if gains.get("jsma", 0.0) >= MASKED else max(gains, key=lambda name: gains[name])
    cw = found.rates.get("cw")
    beyond = "" if cw is None else f"; CW-L2 on the logits fools {cw:.1%} at a mean L2 norm of {found.cw_norm:.2f}"
    if gains[most] >= MASKED:
        return (
            f"GRADIENT MASKING: {most.upper()} on the softmax succeeds {found.rates[most]:.1%} of the time, and "
            f"{found.rescaled[most]:.1%} once the logits are divided by T = {found.temperature:g}{beyond}. "
            "The training hid the gradients and made the model no more robust."
        )
    return (
        f"No gradient masking seen: dividing the logits by T = {found.temperature:g} gains no attack more than "
        f"{max(gains[most], 0):.1%}{beyond}."
    )


def print_study(found: Findings) -> None:
    """Print the attacks, the sizes and the verdict."""
    shown = []
    for name, rate in found.naive.items():
        rescaled = found.rescaled.get(name)
        shown.append(
            {
                "attack": name,
                "of": found.tried[name],
                "naive": f"{rate:.2%}",
                f"logits / {found.temperature:g}": None if rescaled is None else f"{rescaled:.2%}",
            }
        )
    title = f"Distillation at T = {found.temperature:g} ({found.stage}, {found.images} images): success rates"
    print_table(title, shown)
    print(
        f"robustness ρ {found.robustness['jsma']:.2%} of the features naive, {found.robustness['jsma_rescaled']:.2%} "
        f"rescaled; mean |∇F| {found.gradient_mean:.2e}, of a typical image 1e{found.gradient_log10:.1f}; mean |logit| "
        f"{found.logit_mean:.1f}"
    )
    print(verdict(found))
