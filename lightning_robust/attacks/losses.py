"""Losses that an attacker maximises, one value an image.

All take logits ``(N, K)`` and labels ``(N,)`` and give ``(N,)``; none depends on the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_robust.errors import UserError

AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the true label."""
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit minus the true one (Carlini & Wagner, arXiv 1608.04644): positive exactly on success."""
    true = logits.gather(1, labels[:, None])[:, 0]
    # -inf and not a large number: a masked maximum must not depend on the sign or size of the logits
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return other - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, arXiv 2003.01690), invariant to shift and scale of the logits.

    -(z_y - max_{i≠y} z_i) / (z_(1) - z_(3)); needs three classes.
    """
    if logits.shape[1] < 3:
        raise UserError(f"the DLR loss needs at least 3 classes and the model has {logits.shape[1]}: use loss='ce'")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2); needs four classes (arXiv 2003.01690)."""
    if logits.shape[1] < 4:
        raise UserError(
            f"the targeted DLR loss needs at least 4 classes and the model has {logits.shape[1]}: use loss='ce'"
        )
    top = logits.topk(4, dim=1).values
    true, target = logits.gather(1, labels[:, None])[:, 0], logits.gather(1, targets[:, None])[:, 0]
    return (target - true) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits brought to a spread of ten, whatever their own (the scale itself is not differentiated).

    Large logits saturate the softmax, and the gradient of the cross-entropy underflows to zero: that is how defensive
    distillation seems to work (arXiv 1607.04311). A spread of ten leaves the softmax its gradient.
    """
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    return cross_entropy(logits * (10 / spread.clamp_min(1e-12)), labels)


def kl_divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(p ‖ softmax(logits)) against fixed probabilities ``(N, K)``: the inner loss of TRADES (arXiv 1901.08573)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)


LOSSES: dict[str, AttackLoss] = {
    "ce": cross_entropy,
    "ce_scaled": scaled_cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
