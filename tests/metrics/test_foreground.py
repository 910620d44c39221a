"""Gradients on and beside the foreground: equal to a count by hand, in any batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.metrics import ForegroundGradient


def test_equals_by_hand_in_any_batches() -> None:
    torch.manual_seed(0)
    gradients, masks = torch.randn(7, 3, 6, 5), torch.rand(7, 1, 6, 5) < 0.4
    masks[0], masks[1] = True, False
    inside, outside, iou, chance = [], [], [], []
    for gradient, mask in zip(gradients, masks, strict=True):
        pixels, chosen = gradient.abs().mean(0).double().numpy().ravel(), mask.numpy().ravel()
        if chosen.any():
            inside.append(pixels[chosen].mean())
        if not chosen.all():
            outside.append(pixels[~chosen].mean())
        top = set(np.argsort(-pixels)[: chosen.sum()].tolist())
        own = set(np.flatnonzero(chosen).tolist())
        iou.append(len(top & own) / max(len(top | own), 1))
        share = chosen.mean()
        chance.append(share / (2 - share))
    for size in (1, 3, 7):
        metric = ForegroundGradient()
        for part, held in zip(gradients.split(size), masks.split(size), strict=True):
            metric.update(part, held)
        found = metric.compute()
        wanted = [np.mean(inside), np.mean(outside), np.mean(iou), np.mean(chance), 7]
        assert [float(value) for value in found] == pytest.approx(wanted, rel=1e-6)


def test_a_foreground_of_the_weakest_pixels() -> None:
    gradients = torch.zeros(1, 1, 4, 4)
    gradients[..., :2] = 1
    metric = ForegroundGradient()
    metric.update(gradients, gradients > 0)
    found = metric.compute()
    assert (float(found.inside), float(found.outside), float(found.iou)) == (1, 0, 1)


def test_bad_input() -> None:
    metric = ForegroundGradient()
    with pytest.raises(UserError, match=r"they are \(N, 1, H, W\) bool"):
        metric.update(torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="hold NaN"):
        metric.update(torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 1, 2, 2, dtype=torch.bool))
