"""How much an audit does: what ``quick``, ``standard`` and ``full`` mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_robust.errors import UserError

BudgetName = Literal["quick", "standard", "full"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The numbers of an audit.

    Attributes:
        name: what it is called.
        images: that are attacked, unless the user says otherwise.
        probes: images that a model's answers and gradients are looked at with.
        sample: images that attacks run on whose result is a check and not the number (more steps, black-box, …).
        steps: of PGD, that every image is attacked with.
        apgd_steps: of APGD, on what is left.
        targets: classes that APGD aims for one after the other; 0: it aims for none.
        restarts: of the check of restarts.
        more_steps: of the check of steps.
        eps_steps: of PGD at each ε of the curve.
        directions: random directions of the finite differences.
        noise: draws of random noise.
        queries: of the Square attack.
        eot_samples: draws that an adaptive attack averages over.
        adaptive_steps: of adaptive attacks.
        autoattack: whether AutoAttack runs on what is left.
    """

    name: BudgetName
    images: int
    probes: int
    sample: int
    steps: int
    apgd_steps: int
    targets: int
    restarts: int
    more_steps: int
    eps_steps: int
    directions: int
    noise: int
    queries: int
    eot_samples: int
    adaptive_steps: int
    autoattack: bool = False


BUDGETS: dict[str, Budget] = {
    "quick": Budget(
        name="quick",
        images=500,
        probes=150,
        sample=200,
        steps=20,
        apgd_steps=30,
        targets=0,
        restarts=3,
        more_steps=100,
        eps_steps=10,
        directions=4,
        noise=100,
        queries=300,
        eot_samples=10,
        adaptive_steps=40,
    ),
    "standard": Budget(
        name="standard",
        images=1000,
        probes=200,
        sample=500,
        steps=50,
        apgd_steps=50,
        targets=9,
        restarts=5,
        more_steps=250,
        eps_steps=20,
        directions=8,
        noise=1000,
        queries=1000,
        eot_samples=20,
        adaptive_steps=100,
    ),
    "full": Budget(
        name="full",
        images=1000,
        probes=500,
        sample=1000,
        steps=100,
        apgd_steps=100,
        targets=9,
        restarts=10,
        more_steps=1000,
        eps_steps=40,
        directions=16,
        noise=10_000,
        queries=5000,
        eot_samples=30,
        adaptive_steps=200,
        autoattack=True,
    ),
}


def budget_of(name: str | Budget) -> Budget:
    """A budget by its name.

    Raises:
        UserError: for another name.
    """
    if isinstance(name, Budget):
        return name
    if name not in BUDGETS:
        raise UserError(f"budget={name!r} does not exist: choose one of {', '.join(get_args(BudgetName))}")
    return BUDGETS[name]


def next_budget(name: str) -> str | None:
    """The name of the next larger one; ``None`` after the largest."""
    names = list(BUDGETS)
    place = names.index(name) + 1
    return names[place] if place < len(names) else None
