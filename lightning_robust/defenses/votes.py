"""Logits of a majority vote."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def count_votes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Votes ``(N, K)`` int64 and summed probabilities ``(N, K)`` float64 of the logits ``(N, V, K)`` of V voters."""
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(1)
    return votes, logits.double().softmax(2).sum(1)


def vote_logits(votes: Tensor, probabilities: Tensor) -> Tensor:
    """Logits whose argmax is the class with most votes, and the most probable of those that tie.

    The softmax of the logits is about the share of votes: log((votes + p/2) / (V + 1/2)), less their largest, so that
    a difference as small as that between two tied classes survives in float32.

    Args:
        votes: ``(N, K)`` votes of each class.
        probabilities: ``(N, K)`` float64, mean probability p of each class.

    Returns:
        ``(N, K)`` float64, finite.

    Example:
        >>> logits = vote_logits(torch.tensor([[2, 2, 1]]), torch.tensor([[0.3, 0.5, 0.2]]).double())
        >>> logits.argmax().item()
        1
    """
    logs = (votes + probabilities / 2).clamp_min(torch.finfo(torch.float32).tiny).log()
    return logs - logs.amax(1, keepdim=True)


def mean_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm ``(N, K)`` of the mean probabilities of some logits ``(N, K)``, finite also for zero."""
    logs = torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))
    return logs.clamp_min(torch.finfo(logs.dtype).min)
