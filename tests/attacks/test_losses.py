"""Attack losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_robust.attacks.losses import LOSSES, cross_entropy, dlr, dlr_targeted, kl_divergence, margin
from lightning_robust.errors import UserError

LOGITS = torch.tensor([[3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -2.0], [-5.0, -9.0, -7.0, -6.0]])
LABELS = torch.tensor([0, 2, 0])


def test_cross_entropy_by_hand() -> None:
    total = math.log(math.exp(3) + math.exp(1) + 1 + math.exp(-2))
    third = math.log(math.exp(-5) + math.exp(-9) + math.exp(-7) + math.exp(-6))
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS), torch.tensor([total - 3, total, third + 5]))


def test_margin_by_hand() -> None:
    torch.testing.assert_close(margin(LOGITS, LABELS), torch.tensor([-2.0, 3.0, -1.0]))


def test_dlr_by_hand() -> None:
    # -(z_y - max other) / (z_(1) - z_(3)): -(3-1)/(3-0), -(0-3)/(3-0), -(-5+6)/(-5+7)
    torch.testing.assert_close(dlr(LOGITS, LABELS), torch.tensor([-2 / 3, 1.0, -1 / 2]))


def test_dlr_targeted_by_hand() -> None:
    # -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): -(3-1)/(3+1), -(0+2)/(3+1), -(-5+7)/(-5+8)
    targets = torch.tensor([1, 3, 2])
    torch.testing.assert_close(dlr_targeted(LOGITS, LABELS, targets), torch.tensor([-1 / 2, -1 / 2, -2 / 3]))


def test_kl_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(kl_divergence(logits, probabilities), torch.tensor([0.0, expected]))


def test_dlr_needs_its_classes() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="at least 3 classes and the model has 2"):
        dlr(torch.zeros(1, 2), labels)
    with pytest.raises(UserError, match="at least 4 classes and the model has 3"):
        dlr_targeted(torch.zeros(1, 3), labels, labels)


@given(st.integers(0, 2**32), st.floats(-50, 50), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_margin_is_positive_exactly_on_success_and_dlr_ignores_shift_and_scale(
    seed: int, shift: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (16,), generator=generator)
    moved = logits * scale + shift
    assert torch.equal(margin(moved, labels) > 0, logits.argmax(1) != labels)
    torch.testing.assert_close(dlr(moved, labels), dlr(logits, labels), rtol=1e-6, atol=1e-8)
    targets = (labels + 1) % 6
    torch.testing.assert_close(
        dlr_targeted(moved, labels, targets), dlr_targeted(logits, labels, targets), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_each_image_s_own(name: str) -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    together = LOSSES[name](logits, labels)
    alone = torch.cat([LOSSES[name](logits[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
