from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lightning_robust.objectives.losses import boosted_cross_entropy, cross_entropy, kl_divergences

LOGITS = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]).log()
LABELS = torch.tensor([0, 1])


def test_cross_entropy_by_hand():
    assert math.isclose(cross_entropy(LOGITS, LABELS), -(math.log(0.7) + math.log(0.25)) / 2, rel_tol=1e-6)
    smooth = cross_entropy(LOGITS[:1], LABELS[:1], 0.3)
    assert math.isclose(smooth, -0.8 * math.log(0.7) - 0.1 * math.log(0.2) - 0.1 * math.log(0.1), rel_tol=1e-6)


def test_kl_by_hand():
    found = kl_divergences(LOGITS.flip(0), LOGITS)
    expected = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    assert math.isclose(found[0], expected, rel_tol=1e-6)
    assert torch.allclose(kl_divergences(LOGITS, LOGITS), torch.zeros(2), atol=1e-7)


def test_kl_gradients_of_both_sides():
    ours, clean = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()
    found = torch.autograd.grad(kl_divergences(ours, clean).sum(), (ours, clean))
    expected = torch.autograd.grad(F.kl_div(ours.log_softmax(1), clean.softmax(1), reduction="sum"), (ours, clean))
    torch.testing.assert_close(found, expected)


def test_kl_of_a_saturated_prediction_is_finite():
    ours, clean = torch.zeros(1, 3).requires_grad_(), torch.tensor([[500.0, 0.0, -500.0]]).requires_grad_()
    value = kl_divergences(ours, clean).sum()
    gradients = torch.autograd.grad(value, (ours, clean))
    assert math.isclose(value.detach(), math.log(3), rel_tol=1e-6)
    assert all(g.isfinite().all() for g in gradients)


def test_boosted_cross_entropy_by_hand():
    first = -math.log(0.7) - math.log(1.0001 - 0.2)
    second = -math.log(0.25) - math.log(1.0001 - 0.5)
    assert math.isclose(boosted_cross_entropy(LOGITS, LABELS), (first + second) / 2, rel_tol=1e-6)


def test_boosted_cross_entropy_of_a_certain_error_is_finite():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    value = boosted_cross_entropy(logits, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_low_precision_logits_count_in_float32():
    low = LOGITS.bfloat16()
    for value in (cross_entropy(low, LABELS), kl_divergences(low, low), boosted_cross_entropy(low, LABELS)):
        assert value.dtype == torch.float32
