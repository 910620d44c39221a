"""AutoAttack (Croce & Hein, arXiv 2003.01690): several attacks without step sizes to tune, each on what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.adaptive import EOT, Transfer
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.autoattack_checks import Watched, check_model, fit_to_classes, warn_if_square_wins
from lightning_robust.attacks.autoattack_targets import together
from lightning_robust.attacks.base import Attack, AttackResult, Outcome
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError

_SHARE = 100  # progress that one attack is worth


@dataclass(frozen=True)
class AutoAttackResult(AttackResult):
    """What AutoAttack found, image by image, and which of its attacks found it.

    Attributes:
        stages: "clean" and the names of the attacks, in their order.
        fooled_by: ``(N,)`` int64: place in ``stages`` of what fooled the model first (0: misclassified to begin with;
            targeted: at the target); -1 where the image withstood all of them.
    """

    stages: tuple[str, ...] = ()
    fooled_by: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def robust_accuracy(self) -> dict[str, float]:
        """Share of the images that withstood, after each of the stages: the last one is AutoAttack's."""
        return {
            stage: float(((self.fooled_by < 0) | (self.fooled_by > place)).double().mean())
            for place, stage in enumerate(self.stages)
        }


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack: the worst case, image by image, over attacks that fail in different ways.

    Each attack runs on the images that withstood those before it. The versions and their constants are the official
    ones:

    * "standard": ``apgd-ce``, ``apgd-t`` (targeted DLR loss, the 9 most likely classes), ``fab-t`` (9 classes) and
      ``square`` (5,000 queries). In L1 ``apgd-ce`` has 5 restarts, ``apgd-t`` 5 classes, and both spend their first
      steps in larger balls (``warm_up``).
    * "plus": ``apgd-ce``, ``apgd-dlr`` and ``fab`` with 5 restarts each, ``square``, ``apgd-t`` and ``fab-t``.
    * "rand", for models that are random: ``apgd-ce`` and ``apgd-dlr``, each step averaged over 20 draws
      (:class:`~lightning_robust.attacks.adaptive.EOT`).
    * "custom": those that ``attacks`` names (one restart, no ``warm_up``), or attacks of your own.

    A model that fools the evaluation is warned of, as the official code does: one whose answers differ from call to
    call, one whose outputs look like probabilities, one that computes gradients while it predicts, gradients that are
    zero where the DLR loss starts, and success of the black-box attack where gradients failed. The first three are
    looked for on a few images, whose extra passes are not counted as queries.

    A targeted run is one where each attack is targeted. A model with fewer classes than a DLR loss needs is attacked
    with the next simpler loss in its place, with a warning.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        version: see above.
        attacks: of version "custom": names ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square") or attacks with
            the same norm and budget.
        seed: of all random numbers.

    An image that withstands comes back unchanged.

    Raises:
        UserError: for settings that do not go together.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> result = AutoAttack(eps="32/255", version="custom", attacks=["apgd-ce", "square"]).run(
        ...     model, images, model(images).argmax(1)
        ... )
        >>> list(result.robust_accuracy)
        ['clean', 'apgd-ce', 'square']
    """

    stop_at_success = True

    eps: float | str = "8/255"
    norm: Norm = "linf"
    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    attacks: Sequence[str | Attack] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "AutoAttack")
        _ = self.threat_model  # refuses a bad ε
        if self.version not in ("standard", "plus", "rand", "custom"):
            raise UserError(
                f"AutoAttack: version={self.version!r} does not exist: choose standard, plus, rand or custom"
            )
        if self.version != "custom":
            if self.attacks is not None:
                raise UserError(
                    f"AutoAttack: attacks with version={self.version!r} would be ignored: set version='custom'"
                )
            return
        if isinstance(self.attacks, str) or not self.attacks:
            raise UserError("AutoAttack: version='custom' needs attacks, a list of names or of attacks")
        object.__setattr__(self, "attacks", tuple(self.attacks))
        for attack in self.attacks:
            if isinstance(attack, str):
                if attack not in _NAMED:
                    raise UserError(f"AutoAttack: attack {attack!r} does not exist: choose from {', '.join(_NAMED)}")
            elif attack.threat_model != self.threat_model:
                theirs = attack.threat_model
                raise UserError(
                    f"AutoAttack: {type(attack).__name__} has norm {theirs.norm} and eps {theirs.radius:g}, AutoAttack "
                    f"{self.norm} and {self.threat_model.radius:g}: give both the same"
                )

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    @property
    def members(self) -> dict[str, Attack]:
        """The attacks in their order, by name."""
        if self.version == "standard":
            more: dict[str, dict[str, Any]] = {}
            if self.norm == "l1":
                more = {"apgd-ce": {"restarts": 5, "warm_up": True}, "apgd-t": {"n_targets": 5, "warm_up": True}}
            return {
                name: _NAMED[name](eps=self.eps, norm=self.norm, **more.get(name, {}))
                for name in ("apgd-ce", "apgd-t", "fab-t", "square")
            }
        if self.version == "plus":
            return {
                name: _NAMED[name](eps=self.eps, norm=self.norm, **({"restarts": 5} if place < 3 else {}))
                for place, name in enumerate(("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"))
            }
        if self.version == "rand":
            return {
                name: EOT(attack=_NAMED[name](eps=self.eps, norm=self.norm), samples=20)
                for name in ("apgd-ce", "apgd-dlr")
            }
        members: dict[str, Attack] = {}
        for given in self.attacks or ():
            attack = _NAMED[given](eps=self.eps, norm=self.norm) if isinstance(given, str) else given
            name = given if isinstance(given, str) else type(given).__name__
            # the second of a name is "name-2"
            same = sum(other.rsplit("-", 1)[0] == name or other == name for other in members)
            members[f"{name}-{same + 1}" if name in members else name] = attack
        return members

    def replace(self, **changes: Any) -> Attack:
        """A copy with other settings; another norm or budget is passed on to attacks of your own."""
        passed = {name: changes[name] for name in ("eps", "norm") if name in changes}
        if passed and self.attacks and "attacks" not in changes:
            changes["attacks"] = [each if isinstance(each, str) else each.replace(**passed) for each in self.attacks]
        return super().replace(**changes)

    def run(self, *args: Any, **options: Any) -> AutoAttackResult:
        """As :meth:`Attack.run`; the result also says which attack fooled each image.

        With a ``stand_in`` each attack's successes are confirmed on the model before the next one starts.
        """
        noting = _Noting(self)
        result = noting.run(*args, **options)
        values = {field.name: getattr(result, field.name) for field in dataclasses.fields(AttackResult)}
        # a success that rounding took away between two passes is none
        fooled_by = torch.where(result.success, noting.fooled_by, -1)
        return AutoAttackResult(**values, stages=("clean", *self.members), fooled_by=fooled_by)

    def perturb(self, problem: Problem) -> Outcome:
        """Attack after attack, each on the images that are left."""
        return self.evaluate(problem)[0]

    def _perturb_by(self, stand_in: Model, problem: Problem) -> Outcome:
        return self.evaluate(problem, stand_in)[0]

    def evaluate(self, problem: Problem, stand_in: Model | None = None) -> tuple[Outcome, Tensor]:
        """The outcome, and ``fooled_by`` of :class:`AutoAttackResult`."""
        images = problem.images.clone()
        iterations = torch.zeros_like(problem.labels)
        queries = torch.zeros_like(iterations)
        logits = problem.clean_logits
        if logits is None:
            queries += 1
            with torch.no_grad():
                logits = problem.logits(images)
        problem = dataclasses.replace(problem, clean_logits=logits.detach())
        fooled_by = torch.where(problem.fooled(logits), 0, -1)
        if bool((fooled_by < 0).any()):
            check_model(problem, (fooled_by < 0).nonzero()[:, 0], random=self.version == "rand")
        members = self.members
        classes = logits.shape[1]
        for place, (name, attack) in enumerate(members.items()):
            rows = (fooled_by < 0).nonzero()[:, 0]
            if len(rows) == 0:
                break
            fitting = fit_to_classes(name, attack, classes)
            part = Watched.of(problem.subset(rows))
            # numbers of its own for each attack
            part.keys = part.keys + mix_seed(place, fitting.seed)
            part.progress = _share(problem.progress, place, len(members))
            attack = together(fitting, part)
            if stand_in is None or isinstance(attack, (EOT, Transfer)):
                outcome = attack.perturb(part)
            else:
                outcome = attack._perturb_by(stand_in, part)
            part.warn_of_zero_gradients(name, fitting)
            success = outcome.success
            if success is None:
                with torch.no_grad():
                    success = part.fooled(part.logits(outcome.images))
            images[rows[success]] = outcome.images[success]
            fooled_by[rows[success]] = place + 1
            iterations[rows] += outcome.iterations
            queries[rows] += outcome.queries
            if problem.progress is not None:
                problem.progress(_SHARE * (place + 1), _SHARE * len(members))
        warn_if_square_wins(fooled_by, list(members.values()))
        return Outcome(images, iterations, queries, fooled_by >= 0), fooled_by


class _Noting(Attack):
    """An AutoAttack that remembers what fooled each image; an :class:`Attack` itself holds no state."""

    stop_at_success = True

    def __init__(self, attack: AutoAttack) -> None:
        self.attack, self.seed = attack, attack.seed
        self.fooled_by = torch.empty(0, dtype=torch.int64)

    @property
    def threat_model(self) -> ThreatModel:
        return self.attack.threat_model

    def perturb(self, problem: Problem) -> Outcome:
        outcome, self.fooled_by = self.attack.evaluate(problem)
        return outcome

    def _perturb_by(self, stand_in: Model, problem: Problem) -> Outcome:
        outcome, self.fooled_by = self.attack.evaluate(problem, stand_in)
        return outcome


def _share(report: Callable[[int, int], None] | None, place: int, count: int) -> Callable[[int, int], None] | None:
    """Progress of one attack of several, as progress of all of them; it never goes back."""
    if report is None:
        return None
    highest = 0

    def told(done: int, total: int) -> None:
        nonlocal highest
        highest = max(highest, -(-_SHARE * done // total))
        report(_SHARE * place + highest, _SHARE * count)

    return told


# the official names and what they run, at one restart
_NAMED: dict[str, Callable[..., Attack]] = {
    "apgd-ce": lambda **settings: APGD(loss="ce", steps=100, **settings),
    "apgd-dlr": lambda **settings: APGD(loss="dlr", steps=100, **settings),
    "apgd-t": lambda **settings: APGD(loss="dlr_targeted", steps=100, **settings),
    "fab": lambda **settings: FAB(steps=100, **settings),
    "fab-t": lambda **settings: FAB(steps=100, targeted_classes=9, **settings),
    "square": lambda **settings: Square(queries=5000, rescale_schedule=False, look_ahead=True, **settings),
}
