"""The scores of arXiv 2011.10794 on a batch of test images, and of who knows of the blob."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD, Attack
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.callbacks.regions_scores import CASES, READINGS
from lightning_robust.defenses.neutralizer import Neutralizer, attack_readings
from lightning_robust.metrics import CellAccuracy


@dataclass(frozen=True)
class Scorer:
    """Scores one direction's images under every attack and with every blob.

    Attributes:
        attacks: name to attack.
        defenses: name to the neutralizer that was tuned against it.
        adaptive_steps: of PGD in the adaptive reading; 0: without.
        tell: called with a text before what takes long.
    """

    attacks: Mapping[str, Attack]
    defenses: Mapping[str, Neutralizer]
    adaptive_steps: int
    tell: Callable[[str], None]

    def cells(self, directions: Sequence[Direction]) -> list[str]:
        """Names of all scores."""
        found = [f"clean/{direction.key}" for direction in directions]
        for name in self.attacks:
            for direction in directions:
                found += [f"{name}/{direction.key}/adv", f"{name}/{direction.key}/leak"]
                found += [f"{name}/{direction.key}/{case}/{what}" for case in CASES for what in ("mod", *READINGS)]
        return found

    def direction(
        self,
        metric: CellAccuracy,
        module: nn.Module,
        direction: Direction,
        images: Tensor,
        labels: Tensor,
        others: Tensor,
    ) -> None:
        """Count a batch of one direction.

        Args:
            metric: of :meth:`cells`.
            module: the classifier.
            direction: which.
            images: ``(N, C, H, W)`` of its source class; there may be none.
            labels: ``(N,)``.
            others: ``(M, C, H, W)`` of the other classes, for the leak; there may be none.
        """
        if len(images):
            with torch.no_grad():
                metric.update(f"clean/{direction.key}", module(images).argmax(1) == labels)
        for name, attack in self.attacks.items():
            if len(others):
                with torch.no_grad():
                    taken = self._case(name, "known", direction.source)(others).argmax(1) == direction.source
                metric.update(f"{name}/{direction.key}/leak", taken)
            if len(images):
                self.tell(f"{name} on {direction.label}")
                self._attacked(metric, module, name, attack, direction, images, labels)

    def _attacked(
        self,
        metric: CellAccuracy,
        module: nn.Module,
        name: str,
        attack: Attack,
        direction: Direction,
        images: Tensor,
        labels: Tensor,
    ) -> None:
        start = f"{name}/{direction.key}"
        plain = attack.run(module, images, labels, rounding=False)
        metric.update(f"{start}/adv", ~plain.success)
        threat, strong = attack.threat_model, None
        if self.adaptive_steps:
            strong = PGD(eps=threat.radius, norm=threat.ball, steps=self.adaptive_steps)
            strong_plain = strong.run(module, images, labels, rounding=False).images
        for case in CASES:
            defense = self._case(name, case, direction.source)
            with torch.no_grad():
                metric.update(f"{start}/{case}/mod", defense(images).argmax(1) == labels)
            found = attack_readings(defense, attack, images, labels, READINGS, bare=plain.images)
            right = {reading: each[1] for reading, each in found.items()}
            # who knows of the blob has what others do, too
            right["adaptive"] &= right["held"]
            if strong is not None:
                knows = attack_readings(defense, strong, images, labels, ("adaptive",), bare=strong_plain)
                right["adaptive"] &= knows["adaptive"][1]
            for reading, each in right.items():
                metric.update(f"{start}/{case}/{reading}", each)

    def _case(self, name: str, case: str, source: int) -> Neutralizer:
        defense = self.defenses[name]
        if case == "known":
            return defense.of_class(source)
        found = defense.with_seed(defense.seed)  # a copy around the same model
        found.blob_of = case  # type: ignore[assignment]
        return found
