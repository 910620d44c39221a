"""What AutoAttack warns of (arXiv 2003.01690 and the official code): models that mislead an evaluation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_robust.attacks.adaptive import EOT
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.square import Square

_IMAGES = 16  # that the model is looked at with
_PASSES = 5
_LARGEST_DIFFERENCE = 1e-4  # of logits of length one
_SQUARE = 0.002  # share of the images that Square may fool alone


def check_model(problem: Problem, rows: Tensor, random: bool) -> None:
    """Warn of a model that answers differently each time, and of one that computes gradients as it predicts.

    Args:
        problem: the batch.
        rows: images to look with; a few of them are taken.
        random: the model is known to be random.
    """
    if problem.draws is not None:  # an average is taken already
        return
    rows = rows[:_IMAGES]
    images = problem.images[rows]
    backward = False

    def unpack(kept: Tensor) -> Tensor:
        nonlocal backward
        backward = True
        return kept

    with torch.no_grad():
        # what a graph has kept is only asked for by a backward pass
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            answers = [problem.logits(images)]
        if backward:
            _warn(
                "the model computes gradients while it predicts (a dynamic defense, which optimises its input or "
                "itself): AutoAttack alone does not judge it; attack what it does with an adaptive attack"
            )
        if random:
            return
        answers += [problem.logits(images) for _ in range(_PASSES - 1)]
    right = {int((answer.argmax(1) == problem.labels[rows]).sum()) for answer in answers}
    units = torch.stack([answer / (answer.norm(dim=1, keepdim=True) + 1e-10) for answer in answers])
    largest = max(float((units[0] - other).norm(dim=1).max()) for other in units[1:])
    if len(right) > 1 or largest > _LARGEST_DIFFERENCE:
        _warn(
            "the model's answers to the same images differ from call to call (a randomised defense), which misleads "
            "attacks that take one answer for the truth: use version='rand'"
        )


@dataclass
class Watched(Problem):
    """A problem that looks at the first gradient it is asked for, and costs nothing.

    Attributes:
        flat: how many images had a zero gradient there without being fooled, of how many; empty before.
    """

    flat: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, problem: Problem) -> Watched:
        """The same problem, watched."""
        return cls(**{each.name: getattr(problem, each.name) for each in dataclasses.fields(Problem) if each.init})

    def loss_and_gradient(
        self,
        images: Tensor,
        rows: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        fooled_leave: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Problem.loss_and_gradient`."""
        values, gradient, logits = super().loss_and_gradient(images, rows, loss, fooled_leave=fooled_leave)
        if not self.flat:
            zero = gradient.flatten(1).eq(0).all(1) & ~self.fooled(logits, rows)
            self.flat.append((int(zero.sum()), len(rows)))
        return values, gradient, logits

    def warn_of_zero_gradients(self, name: str, attack: Attack) -> None:
        """Warn where an attack that raised a DLR loss saw no gradient at its start."""
        inner = attack.attack if isinstance(attack, EOT) else attack
        if isinstance(inner, APGD) and inner.loss in ("dlr", "dlr_targeted") and self.flat and self.flat[0][0] > 0:
            _warn(
                f"{self.flat[0][0]} of {self.flat[0][1]} images have a gradient of zero where {name} starts: gradient "
                "attacks do not see their way from there (gradient masking), and the model may be less robust than "
                "it seems"
            )


def warn_if_square_wins(fooled_by: Tensor, attacks: Sequence[Attack]) -> None:
    """Warn where the black-box attack fools images that attacks on gradients before it could not.

    Args:
        fooled_by: ``(N,)`` as in :class:`~lightning_robust.attacks.autoattack.AutoAttackResult`.
        attacks: in their order.
    """
    alone = sum(
        int((fooled_by == place + 1).sum())
        for place, attack in enumerate(attacks)
        if isinstance(attack, Square) and not all(isinstance(other, Square) for other in attacks[:place])
    )
    # of a single image nothing is said: in a batch of a few hundred it is more than that share
    if alone > max(1, _SQUARE * len(fooled_by)):
        _warn(
            f"Square, which sees no gradient, fooled {alone} of {len(fooled_by)} images after the other attacks had "
            "failed: that hints at masked gradients; run Square with more queries and restarts, or an adaptive attack"
        )


def fit_to_classes(name: str, attack: Attack, classes: int) -> Attack:
    """The attack itself, or where its loss needs more classes than there are, one with the next simpler loss."""
    inner = attack.attack if isinstance(attack, EOT) else attack
    if not isinstance(inner, APGD):
        return attack
    needed = {"dlr": 3, "dlr_targeted": 4}.get(inner.loss, 0)
    if classes >= needed:
        return attack
    loss = "dlr" if classes >= 3 else "margin"
    words = {"dlr": "DLR loss", "dlr_targeted": "targeted DLR loss", "margin": "margin"}
    _warn(
        f"the model has {classes} classes, and the {words[inner.loss]} needs at least {needed}: {name} raises the "
        f"{words[loss]} in its place"
    )
    return attack.replace(loss=loss)


def _warn(message: str) -> None:
    warnings.warn(f"AutoAttack: {message}", stacklevel=3)
