"""Fast gradient sign method (Goodfellow et al., arXiv 1412.6572), one step or iterated (arXiv 1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_robust.attacks.pgd import PGD


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """One step of length ε along the sign of the gradient at the clean image; or ``steps`` steps of ε / ``steps``.

    With ``norm="l2"`` or ``"l1"`` the step is the steepest one of that norm. With ``steps`` > 1 this is the basic
    iterative method (Kurakin et al., arXiv 1607.02533), with ``random_start`` the single step of fast adversarial
    training (Wong et al., arXiv 2001.03994).

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps.
        step_size: length of a step; default eps / steps.
        random_start: start at a random point of the ball.
        restarts: independent random starts.
        loss: "ce", "ce_scaled", "margin" or "dlr".
        stop_at_success: images that are misclassified to begin with are returned unchanged, fooled ones leave.
        seed: of the random start.
    """

    steps: int = 1
    random_start: bool = False

    @property
    def length(self) -> float:
        """The length of a step in pixel units."""
        return super().length if self.step_size is not None else self.threat_model.radius / self.steps
