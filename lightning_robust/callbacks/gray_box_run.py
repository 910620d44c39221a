"""The attacks of a gray-box table: who makes the images, and who is shown them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lightning_robust.attacks import Attack, OptMargin
from lightning_robust.attacks.base import AttackResult
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.gray_box_report import ADAPTIVE, KNOWN, NONE, PRM, TRANSFER, WHITE, WORST, Plan
from lightning_robust.callbacks.gray_box_settings import adapted
from lightning_robust.defenses import Defense
from lightning_robust.metrics import CellAccuracy
from lightning_robust.models import ManipulatedNetwork


class GrayBoxRun:
    """The networks of one evaluation, the defenses around them, and what is counted of them.

    Args:
        plan: which cells there are.
        defenses: all of them by name, without a model.
        base: the classifier that the ``transfer-from-base`` attacker knows, in eval mode.
        manipulated: the classifier behind its manipulator; ``None``: there is none.
        eot_samples: draws that an adaptive attack averages over at each step.
        acceleration: of the gray-box attacks.
        device: where everything is.
        progress: the bar that is told what runs.

    Attributes:
        sources: the networks without a defense, by name.
        inside: the network in each defense.
        protected: the defenses around their networks, as an attacker meets them.
        judges: the same with other draws, which decide.
        metric: the counts of each cell.
    """

    def __init__(
        self,
        plan: Plan,
        defenses: Mapping[str, Defense],
        base: nn.Module,
        manipulated: ManipulatedNetwork | None,
        *,
        eot_samples: int,
        acceleration: Acceleration,
        device: torch.device,
        progress: AttackProgress | None,
    ) -> None:
        self.plan, self.eot_samples, self.progress = plan, eot_samples, progress
        self.sources: dict[str, nn.Module] = {NONE: base}
        if manipulated is not None:
            self.sources[PRM] = manipulated
        self.inside = dict.fromkeys(plan.defenses, base)
        self.inside |= dict.fromkeys(plan.prm_defenses, cast(nn.Module, manipulated))
        self.protected = {
            label: defenses[label].around(inside).to(device).eval() for label, inside in self.inside.items()
        }
        # the attack must not choose the draws by which it is judged
        self.judges: dict[str, nn.Module] = {
            label: defense.with_seed(mix_seed(cast(int, defense.seed), 1)) if defense.random else defense
            for label, defense in self.protected.items()
        }
        self.metric = CellAccuracy(plan.cells()).to(device)
        self._searches = {label: Search(acceleration) for label in self.sources}
        self._worst: dict[tuple[str, str], Tensor] = {}
        self._mask: Tensor | None = None

    def measure(self, images: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """All cells of a batch: first what a defense shows, then what is left of it.

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            labels: ``(N,)``.
            mask: where attacks may change them, as of :meth:`~lightning_robust.attacks.Attack.run`.
        """
        self._worst, self._mask = {}, mask
        for judge, model in {**self.sources, **self.judges}.items():
            self.metric.update(f"clean/{judge}", _right(model, images, labels))
        for name in self.plan.attacks:
            self._gray_box(name, images, labels)
        for label in self.protected:
            self._white_box(label, images, labels)
        for (reading, judge), right in self._worst.items():
            self.metric.update(f"{reading}/{judge}/{WORST}", right)

    def _gray_box(self, name: str, images: Tensor, labels: Tensor) -> None:
        """Images made on the networks without a defense, shown to the defenses."""
        for source, network in self.sources.items():
            reading = TRANSFER if source == NONE else KNOWN
            stand_in = self._searches[source].model(network)
            attack = self.plan.attacks[name].to_the_end()  # at one model's boundary an image fools no other
            result = self._run(attack, network, images, labels, f"{name} on {source}", stand_in)
            self._count(reading, source, name, ~result.success)
            shown = self.judges if source == NONE else {label: self.judges[label] for label in self.plan.prm_defenses}
            if source == NONE and PRM in self.sources:
                shown = {PRM: self.sources[PRM], **shown}
            for judge, model in shown.items():
                self._count(reading, judge, name, _right(model, result.images, labels))

    def _white_box(self, label: str, images: Tensor, labels: Tensor) -> None:
        """Images made on a defense, as it is and adapted to it."""
        defense, judge, plan = self.protected[label], self.judges[label], self.plan
        known: dict[str, Tensor] = {}
        for name in plan.white_box:
            attack = plan.attacks[name].to_the_end() if defense.random else plan.attacks[name]
            result = self._run(attack, defense, images, labels, f"{name} on {label}")
            known[name] = _right(judge, result.images, labels)
            self._count(WHITE, label, name, known[name])
        for name in plan.adaptive:
            right = known.get(name, torch.ones_like(labels, dtype=torch.bool))
            if defense.random or name not in known:  # else there is nothing to average over: it is the same attack
                attack = adapted(plan.attacks[name], defense, self.eot_samples)
                result = self._run(attack, defense, images, labels, f"adaptive {name} on {label}")
                right = right & _right(judge, result.images, labels)
            self._count(ADAPTIVE, label, name, right)
        for name, attack in plan.further.get(label, {}).items():
            model = self.inside[label] if isinstance(attack, OptMargin) else defense
            result = self._run(attack, model, images, labels, f"{name} on {label}")
            self._count(ADAPTIVE, label, name, _right(judge, result.images, labels))

    def _run(
        self,
        attack: Attack,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        what: str,
        stand_in: nn.Module | None = None,
    ) -> AttackResult:
        progress = self.progress.reporter(what) if self.progress else None
        return attack.run(model, images, labels, mask=self._mask, stand_in=stand_in, rounding=False, progress=progress)

    def _count(self, reading: str, judge: str, name: str, right: Tensor) -> None:
        self.metric.update(f"{reading}/{judge}/{name}", right)
        if name in self.plan.counts_to_worst(reading, judge):
            before = self._worst.get((reading, judge))
            self._worst[reading, judge] = right if before is None else before & right


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == labels
    return right
