"""Attacks of AutoAttack that run towards several classes: as many of the runs in one batch as there is room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.autoattack_checks import Watched
from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.attacks.threat_model import ThreatModel

# Values of the images in one pass: about what keeps one core, or a GPU, busy.
_ROOM = {"cpu": 2**18}
_ROOM_ELSEWHERE = 2**20


@dataclass(frozen=True, kw_only=True)
class Together(Attack):
    """The runs of an attack towards several classes, side by side where the batch is small.

    What is left for AutoAttack's later attacks is often a handful of images, whose passes leave a GPU idle. The runs
    do not know of each other, each has a random start of its own, and the outcome is that of the most likely class
    which succeeds. Classes that would have come after it are asked about for nothing, where they share its batch.

    Args:
        attack: APGD with loss "dlr_targeted", or FAB with ``targeted_classes``.
        seed: takes no part.
    """

    stop_at_success = True

    attack: APGD | FAB
    seed: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat_model

    def perturb(self, problem: Problem) -> Outcome:
        """Run towards as many classes at a time as there is room for; fooled images leave in between."""
        assert isinstance(problem, Watched)
        logits = problem.clean_logits
        assert logits is not None
        attack = self.attack
        wanted = attack.n_targets if isinstance(attack, APGD) else attack.targeted_classes
        assert wanted is not None
        others = logits.scatter(1, problem.labels[:, None], -torch.inf).argsort(1, descending=True)
        others = others[:, : min(wanted, logits.shape[1] - 1)]
        count = others.shape[1]
        images = problem.images.clone()
        success = problem.fooled(logits)
        iterations = torch.zeros_like(problem.labels)
        queries = torch.zeros_like(iterations)
        room = _ROOM.get(images.device.type, _ROOM_ELSEWHERE) // images[0].numel()
        done = 0
        while done < count:
            rows = (~success).nonzero()[:, 0]
            if len(rows) == 0:
                break
            now = min(max(room // len(rows), 1), count - done)
            ranks = torch.arange(done, done + now, device=rows.device)
            everywhere = rows.repeat_interleave(now)
            part = Watched.of(problem.subset(everywhere))
            part.aims, part.flat = others[rows][:, ranks].flatten(), problem.flat
            seeds = torch.tensor([mix_seed(rank) for rank in range(done, done + now)], device=rows.device)
            part.keys = part.keys + seeds.repeat(len(rows))
            part.progress = _share(problem.progress, done, now, count)
            outcome = attack.perturb(part)
            assert outcome.success is not None
            hit = outcome.success.view(-1, now)
            found, first = hit.any(1), hit.int().argmax(1)  # argmax: the first of equals
            chosen = (torch.arange(len(rows), device=rows.device) * now + first)[found]
            images[rows[found]] = outcome.images[chosen]
            success[rows] = found
            iterations[rows] += outcome.iterations.view(-1, now).sum(1)
            queries[rows] += outcome.queries.view(-1, now).sum(1)
            done += now
        return Outcome(images, iterations, queries, success)


def together(attack: Attack, problem: Problem) -> Attack:
    """The attack itself, or its runs side by side where it has several for each image."""
    if problem.targets is None and problem.draws is None:
        if isinstance(attack, APGD) and attack.loss == "dlr_targeted" and attack.stop_at_success:
            return Together(attack=attack, seed=attack.seed)
        if isinstance(attack, FAB) and attack.targeted_classes is not None:
            return Together(attack=attack, seed=attack.seed)
    return attack


def _share(
    report: Callable[[int, int], None] | None, before: int, now: int, count: int
) -> Callable[[int, int], None] | None:
    """Progress of some of the classes as progress of all."""
    if report is None:
        return None
    return lambda done, total: report(100 * before - (-100 * now * done // total), 100 * count)
