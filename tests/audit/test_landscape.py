"""Which gradients are said to point uphill."""

from __future__ import annotations

import torch
from audit_cases import SHORT
from torch import nn

from lightning_robust.attacks import ThreatModel
from lightning_robust.audit.checks import Findings
from lightning_robust.audit.checks.landscape import UPHILL
from lightning_robust.audit.subject import Subject


def looked_at(model: nn.Module, images: torch.Tensor) -> tuple[str, float | None]:
    subject = Subject(model, images, model(images).argmax(1), ThreatModel("linf", 0.1))
    seen = UPHILL.look(subject, SHORT, Findings())
    return seen.outcome, seen.figure


def test_a_gradient_shared_by_classes_that_are_near_each_other_points_uphill() -> None:
    """That of the cross-entropy is no classes' own, and a random direction may do better for the nearest one's."""
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(6, 10)).eval()
    assert looked_at(flat, torch.rand(200, 1, 2, 3)) == ("pass", 0)


def test_saturated_and_reversed_gradients_do_not() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)

    class Loud(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1e4 * linear(images.flatten(1))

    class Reversed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return linear((2 * images.detach() - images).flatten(1))

    images = torch.rand(200, 3, 2, 2)
    for model in (Loud(), Reversed()):
        outcome, figure = looked_at(model.eval(), images)
        assert outcome == "flag"
        assert figure is not None
        assert figure > 0.5
