"""The audit's checks, one file a family."""

from lightning_robust.audit.checks.base import Check, Findings, Passes
from lightning_robust.audit.checks.black_box import GRADIENT_FREE, RANDOM_NOISE, TRANSFER
from lightning_robust.audit.checks.gradients import DIFFERENTIABLE, ZERO_GRADIENTS
from lightning_robust.audit.checks.growth import MONOTONE, UNBOUNDED
from lightning_robust.audit.checks.inputs import QUANTISED
from lightning_robust.audit.checks.landscape import UPHILL
from lightning_robust.audit.checks.outputs import CLEAN, MODE, OUTPUTS
from lightning_robust.audit.checks.randomness import RANDOMNESS
from lightning_robust.audit.checks.strength import LOGIT_SCALE, MORE_STEPS, RESTARTS, SINGLE_STEP

CHECKS: tuple[Check, ...] = (
    CLEAN,
    OUTPUTS,
    MODE,
    RANDOMNESS,
    ZERO_GRADIENTS,
    DIFFERENTIABLE,
    QUANTISED,
    UPHILL,
    SINGLE_STEP,
    LOGIT_SCALE,
    RESTARTS,
    MORE_STEPS,
    MONOTONE,
    UNBOUNDED,
    RANDOM_NOISE,
    GRADIENT_FREE,
    TRANSFER,
)
"""In the order in which they are made: the later ones use what the earlier ones found."""

__all__ = ["CHECKS", "Check", "Findings", "Passes"]
