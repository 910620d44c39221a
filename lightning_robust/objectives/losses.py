"""Losses that training minimises, each a mean over the batch.

All take logits ``(N, K)`` and count in float32 at least, so that autocast costs no precision where it matters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(logits: Tensor) -> Tensor:
    """The logits in float32, or float64 where they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels ``(N,)``, smoothed by the share ``label_smoothing`` over all classes."""
    return F.cross_entropy(full_precision(logits), labels, label_smoothing=label_smoothing)


def kl_divergences(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(softmax(clean_logits) ‖ softmax(logits)) of each image, ``(N,)``, differentiable in both."""
    # both as logarithms: the gradient with respect to a probability that underflows to zero would be NaN
    ours, clean = full_precision(logits).log_softmax(1), full_precision(clean_logits).log_softmax(1)
    return F.kl_div(ours, clean, reduction="none", log_target=True).sum(1)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """MART's BCE: -log p_y - log(1 - max_{k≠y} p_k), which also pushes the most likely wrong class down.

    Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020, equation 6;
    the 1.0001 that keeps the second logarithm finite is of the authors' code.
    """
    logits = full_precision(logits)
    probabilities = logits.softmax(1)
    wrong = probabilities.scatter(1, labels[:, None], -1.0).amax(1)
    return F.cross_entropy(logits, labels) - (1.0001 - wrong).log().mean()
