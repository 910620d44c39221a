"""What attacks will cost at most, before they start: passes through a model, counted; and their time, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    CW,
    EOT,
    FAB,
    JSMA,
    PGD,
    Attack,
    AutoAttack,
    DeepFool,
    OnePixel,
    OptMargin,
    RandomNoise,
    Square,
    Transfer,
    attacking,
    parse_number,
)

DAY = 24 * 3600.0
_QUICK = 0.1  # seconds: a model that is quicker with one image is timed with several
_TIMED = 16  # images at most
_TIMES = 3  # timings, of which the fastest counts: another process may have the machine for a moment
_ENOUGH = 1.0  # seconds of them


@dataclass(frozen=True)
class Passes:
    """Passes through a model, for one image.

    Attributes:
        forward: forward passes.
        backward: backward passes, each of which goes with one of the forward passes.
    """

    forward: float
    backward: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times)


def most_passes(attack: Attack, features: int, classes: int) -> Passes | None:
    """An upper bound of what an attack asks of the model for one image; attacks usually end long before it.

    Args:
        attack: its settings.
        features: values of an image, C · H · W.
        classes: of the model.

    Returns:
        The bound, that of an attack by EOT with all its draws; ``None`` for an attack of a kind that is not known here.

    Example:
        >>> most_passes(OnePixel(population=400, generations=100), features=3072, classes=10)
        Passes(forward=40401, backward=0.0)
    """
    if isinstance(attack, EOT | Transfer):
        inner = most_passes(attack.attack, features, classes)
        return inner * attack.samples if inner is not None and isinstance(attack, EOT) else inner
    if isinstance(attack, AutoAttack):
        members = [most_passes(member, features, classes) for member in attack.members.values()]
        known = [member for member in members if member is not None]
        return sum(known, Passes(1)) if len(known) == len(members) else None
    if isinstance(attack, OnePixel):
        return Passes(attack.population * (attack.generations + 1) + 1)
    if isinstance(attack, Square):
        return Passes(attack.queries * attack.restarts + 1)
    if isinstance(attack, RandomNoise):
        return Passes(attack.draws + 1)
    steps = _steps(attack, features, classes)
    return None if steps is None else steps + Passes(2)  # the clean image, and the verdict


def _steps(attack: Attack, features: int, classes: int) -> Passes | None:
    """Of the attacks that go by gradients."""
    others = max(classes - 1, 1)
    if isinstance(attack, PGD):
        return Passes(attack.steps + 1, attack.steps) * attack.restarts
    if isinstance(attack, APGD):
        runs = attack.restarts * (min(attack.n_targets, others) if attack.loss == "dlr_targeted" else 1)
        return Passes(1, 1) * ((attack.steps + 1) * runs)
    if isinstance(attack, OptMargin):
        # and the way back to the clean image at the end
        return Passes(1, 1) * (attack.surrogates * (attack.steps * attack.binary_search_steps + 7))
    if isinstance(attack, CW):
        # in L∞ and L0 a round follows each that succeeds: their number is what is usual
        rounds = {"l2": attack.binary_search_steps, "linf": 10, "l0": 5}[attack.norm]
        return Passes(1, 1) * (attack.steps * rounds + 7)
    if isinstance(attack, DeepFool):
        candidates = min(attack.candidates or classes, classes) - 1
        return Passes(3, max(candidates, 1)) * attack.steps
    if isinstance(attack, FAB):
        aims = min(attack.targeted_classes, others) if attack.targeted_classes else 1
        backward = 1 if attack.targeted_classes else others
        return Passes(2, backward) * (attack.steps * attack.restarts * aims)
    if isinstance(attack, JSMA):
        attempts = others if attack.target == "all" else 1
        visits = math.ceil(1 / abs(parse_number(attack.theta, "theta")))
        return Passes(1, 2) * (math.ceil(attack.budget(features) / 2) * visits * attempts)
    return None


def knobs(attack: Attack) -> str:
    """The settings that make an attack long."""
    if isinstance(attack, EOT | Transfer):
        return knobs(attack.attack) + (" and eot_samples" if isinstance(attack, EOT) else "")
    names: dict[type, str] = {
        OnePixel: "population and generations",
        JSMA: "gamma",
        OptMargin: "steps, binary_search_steps and surrogates",
        CW: "steps and binary_search_steps",
        Square: "queries",
        RandomNoise: "draws",
    }
    return next((text for kind, text in names.items() if isinstance(attack, kind)), "steps")


@dataclass(frozen=True)
class Speed:
    """What one image costs a model.

    Attributes:
        forward: seconds of a forward pass.
        backward: seconds that a backward pass adds to it.
        votes: images that a network inside was asked about for one image.
    """

    forward: float
    backward: float
    votes: float

    def seconds(self, passes: Passes) -> float:
        """How long so many passes take for one image."""
        return passes.forward * self.forward + passes.backward * self.backward


def measured_speed(model: nn.Module, inside: nn.Module, images: Tensor) -> Speed:
    """Time one forward and backward pass.

    Args:
        model: what is attacked.
        inside: the network in it whose calls are counted; may be ``model`` itself.
        images: ``(N, C, H, W)`` some images; the first is enough for a slow model.
    """
    asked = 0

    def count(_: Any, inputs: Any) -> None:
        nonlocal asked
        asked += len(inputs[0])

    with attacking(model) as lent:
        one = images[:1].detach().clone()
        forward = _timed(lent, one, gradient=False)  # and the warm-up
        several = images[:_TIMED].detach().clone() if forward < _QUICK else one
        hook = inside.register_forward_pre_hook(count)
        try:
            _timed(lent, several, gradient=False)
        finally:
            hook.remove()
        forward = _fastest(lent, several, gradient=False)
        both = _fastest(lent, several, gradient=True)
    return Speed(forward / len(several), max(both - forward, 0.0) / len(several), asked / len(several))


def _fastest(model: Any, images: Tensor, gradient: bool) -> float:
    times = [_timed(model, images, gradient)]
    while len(times) < _TIMES and sum(times) < _ENOUGH:
        times.append(_timed(model, images, gradient))
    return min(times)


def _timed(model: Any, images: Tensor, gradient: bool) -> float:
    device = images.device
    started = time.perf_counter()
    if gradient:
        images = images.requires_grad_()
        logits = model(images)
        torch.autograd.grad(logits.logsumexp(1).sum(), images, allow_unused=True)
        images.requires_grad_(False)
    else:
        with torch.no_grad():
            model(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attack on one model.

    Attributes:
        what: for the table.
        attack: as it will run; ``None`` for the verdicts of a defense.
        passes: upper bound for one image; ``None`` where it is not known.
        speed: of the model.
        defense: name of the defense whose votes make it long, where it has any.
    """

    what: str
    attack: Attack | None
    passes: Passes | None
    speed: Speed
    defense: str = ""

    @property
    def seconds(self) -> float:
        """For one image, at most; 0 where it is not known."""
        return 0.0 if self.passes is None else self.speed.seconds(self.passes)


def cost_rows(tasks: Sequence[Task], images: int) -> list[dict[str, Any]]:
    """The estimate as a table.

    Args:
        tasks: what will run.
        images: that each of them attacks.
    """
    rows = [
        {
            "attack": task.what,
            "passes an image, at most": "not known" if task.passes is None else f"{task.passes.forward:,.0f}",
            "× images in a pass": f"{task.speed.votes:,.0f}",
            "a pass (ms)": f"{1000 * task.speed.forward:.2f}",
            "and back (ms)": f"{1000 * task.speed.backward:.2f}",
            "time, at most": "not known" if task.passes is None else duration(task.seconds * images),
        }
        for task in tasks
    ]
    total = sum(task.seconds for task in tasks) * images
    return [*rows, {"attack": f"all, {images} images", "time, at most": duration(total)}]


def warning(tasks: Sequence[Task], images: int) -> str | None:
    """What to lower where the estimate is beyond a day; else ``None``."""
    total = sum(task.seconds for task in tasks) * images
    if total <= DAY:
        return None
    worst = max(tasks, key=lambda task: task.seconds)
    share = worst.seconds * images / total
    lower = ["limit_images"]
    if worst.attack is not None:
        lower.append(f"its {knobs(worst.attack)}")
    if worst.defense and worst.speed.votes > 1:
        lower.append(f"the votes of {worst.defense}")
    return (
        f"this may take up to {duration(total)}, of which {share:.0%} is {worst.what}: lower {' or '.join(lower)}, or "
        "leave it out; attacks usually end before their upper bound"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    Example:
        >>> duration(0.5), duration(100), duration(7200), duration(200000)
        ('under a minute', '2 minutes', '2.0 hours', '2.3 days')
    """
    if seconds < 90:
        return "a minute" if seconds >= 30 else "under a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 2 * DAY:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / DAY:.1f} days"
