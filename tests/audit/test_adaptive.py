"""What the flagged checks ask for."""

from __future__ import annotations

import pytest
from audit_cases import SHORT, Digit
from torch import nn

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.audit.adaptive import attack_adaptively, plan
from lightning_robust.audit.checks import Findings
from lightning_robust.audit.subject import Subject
from lightning_robust.defenses import Binarization

WIDE = 0.2  # of sixteenths, the pixels of 5 to 11 can cross a half


@pytest.fixture
def thresholded(natural: nn.Module, digits: Digit) -> Subject:
    """A step with a stand-in of its own, past whose edges its gradient says nothing."""
    return Subject(Binarization(natural).eval(), digits.images, digits.labels, ThreatModel("linf", WIDE))


def test_where_no_gradient_points_uphill_an_attack_without_one_goes_on(thresholded: Subject) -> None:
    thresholded.attack("PGD-10", PGD(eps=WIDE, steps=10), thresholded.right)
    left = int(thresholded.withstood.sum())
    attack_adaptively(thresholded, SHORT, Findings(), [])
    assert int(thresholded.withstood.sum()) == left
    attack_adaptively(thresholded, SHORT, Findings(), ["uphill"])
    assert int(thresholded.withstood.sum()) < 0.9 * left
    assert [row.name for row in thresholded.rows] == ["PGD-10", "Square, 1000 queries"]


def test_a_random_model_is_averaged_over_instead(thresholded: Subject) -> None:
    thresholded.random = True
    names = [planned.name for planned in plan(thresholded, SHORT, Findings(), ["randomness", "uphill"])]
    assert names == ["PGD-20, EOT", "APGD-20, EOT"]
