"""What is made by hand must be flagged by the right check; what is sound must be trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import audit_cases as spoilt
import pytest
import torch
from audit_cases import EPS, SHORT, Digit
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.audit import AuditResult, CheckResult, audit
from lightning_robust.audit.checks import Findings
from lightning_robust.audit.checks.inputs import QUANTISED
from lightning_robust.audit.checks.outputs import MODE
from lightning_robust.audit.subject import Subject
from lightning_robust.audit.verdict import sentence_of
from lightning_robust.errors import UserError


def of(model: nn.Module, digits: Digit) -> AuditResult:
    result = audit(model, digits.images, digits.labels, eps=EPS, budget=SHORT)
    assert result.images == len(digits.images)
    low, high = result.confidence_interval
    assert 0 <= low <= result.robust_accuracy <= high <= 1
    assert result.robust_accuracy <= result.clean_accuracy
    return result


@pytest.fixture(scope="module")
def of_natural(natural: nn.Module, digits: Digit) -> AuditResult:
    return of(natural, digits)


@pytest.fixture(scope="module")
def of_robust(robust: nn.Module, digits: Digit) -> AuditResult:
    return of(robust, digits)


def test_an_adversarially_trained_network_is_trusted(of_robust: AuditResult, robust: nn.Module, digits: Digit) -> None:
    assert (of_robust.verdict, of_robust.flagged) == ("trusted", [])
    assert all(check.outcome == "pass" for check in of_robust.checks)
    assert of_robust.sentence.startswith("Trust it: ")
    assert 0.5 < of_robust.robust_accuracy < of_robust.clean_accuracy
    # a long attack of another kind finds next to nothing more
    fooled = PGD(eps=EPS, steps=100, restarts=3, loss="margin", seed=77).run(robust, *digits).success
    assert of_robust.robust_accuracy == pytest.approx(1 - float(fooled.double().mean()), abs=0.011)


def test_a_naturally_trained_network_has_gradients_to_trust_and_little_robustness(of_natural: AuditResult) -> None:
    assert (of_natural.verdict, of_natural.flagged) == ("trusted", [])
    assert of_natural.robust_accuracy < 0.25 < 0.9 < of_natural.clean_accuracy


Case = tuple[Callable[[nn.Module], nn.Module], set[str]]

CASES: dict[str, Case] = {
    "rounding": (spoilt.Rounding, {"zero_gradients", "differentiable", "quantised_input", "gradient_free"}),
    "dropout": (spoilt.Dropout, {"eval_mode", "randomness"}),
    "softmax": (spoilt.TinySoftmax, {"logits"}),
    "detach": (spoilt.HiddenDetach, {"differentiable"}),
    "nothing": (spoilt.NoGradient, {"zero_gradients", "differentiable", "uphill", "gradient_free", "unbounded"}),
    "loud": (spoilt.Loud, {"zero_gradients", "logit_scale"}),
    "clipped": (spoilt.Clipped, {"quantised_input"}),
    "numpy": (spoilt.ByNumPy, {"zero_gradients", "differentiable", "uphill", "gradient_free"}),
    "classes": (spoilt.OnlyClasses, {"logits", "zero_gradients", "quantised_input", "gradient_free"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_hides_its_gradients_is_flagged_by_the_right_check(
    name: str, natural: nn.Module, digits: Digit, of_natural: AuditResult
) -> None:
    spoil, expected = CASES[name]
    result = of(spoil(natural), digits)
    assert result.verdict == "masked"
    assert expected <= set(result.flagged)
    assert result.sentence.startswith("The gradients are masked because ")
    for check in expected:
        assert result.check(check).reason
        assert result.check(check).mend
    # what it seemed to have is gone after adaptive attacks; of a part that cannot be gone through, as far as black-box
    # attacks of this budget get, and of a clipped input up to the distance that the clipping really takes off
    seemed = next(attack.robust_accuracy for attack in result.attacks if attack.name == "PGD-10")
    far = name in ("clipped", "numpy", "classes")
    assert result.robust_accuracy < (seemed - 0.15 if far else of_natural.robust_accuracy + 0.1)
    if name not in ("softmax", "loud"):
        assert any(attack.adaptive for attack in result.attacks)


@pytest.mark.parametrize("name", ["softmax", "detach", "dropout"])
def test_no_other_check_speaks_up(name: str, natural: nn.Module, digits: Digit) -> None:
    spoil, expected = CASES[name]
    found = set(of(spoil(natural), digits).flagged)
    # a part of the gradient is worse than all of it: black-box attacks may notice
    assert found - expected <= {"gradient_free", "transfer"}


def test_a_rounding_whose_gradient_goes_straight_through_is_no_masking(natural: nn.Module, digits: Digit) -> None:
    result = of(spoilt.HonestRounding(natural, 64), digits)
    assert result.flagged == []
    assert "stand-in" in result.check("differentiable").text


def test_gradients_that_are_not_a_number_are_flagged_and_lose_nothing(natural: nn.Module, digits: Digit) -> None:
    result = of(spoilt.NotANumber(natural), digits)
    assert {"zero_gradients", "finite_gradients"} <= set(result.flagged)
    assert result.verdict == "masked"
    in_l2 = audit(spoilt.NotANumber(natural), *digits, eps=0.5, norm="l2", budget=spoilt.TINY)
    assert "finite_gradients" in in_l2.flagged


def test_answers_that_are_not_a_number_off_the_clean_images_are_never_trusted(
    natural: nn.Module, digits: Digit
) -> None:
    class OffTheGrid(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            off = (16 * images - (16 * images).round()).abs().amax((1, 2, 3)) > 1e-3
            return natural(images).masked_fill(off[:, None], torch.nan)

    result = audit(OffTheGrid().eval(), *digits, eps=EPS, budget=spoilt.TINY)
    assert result.check("finite_gradients").outcome == "flag"
    assert "answered a changed image with NaN" in result.check("finite_gradients").text


def test_a_model_handed_over_in_training_mode_is_flagged(natural: nn.Module, digits: Digit) -> None:
    model = nn.Sequential(*natural[:5], nn.Dropout(0.5), natural[5]).train()
    result = of(model, digits)
    assert result.flagged == ["eval_mode"]
    assert "handed over in training mode" in result.check("eval_mode").text
    assert model.training
    assert of(model.eval(), digits).flagged == []
    model[5].train()  # a part alone
    assert of(model, digits).flagged == ["eval_mode"]


def test_logits_that_hang_on_the_batch_are_flagged(natural: nn.Module, digits: Digit) -> None:
    class BatchMean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return natural(images - 0.2 * images.mean(0, keepdim=True))

    assert "eval_mode" in of(BatchMean(), digits).flagged


def test_a_clipping_that_cannot_be_reached_and_a_border_that_is_not_looked_at_are_no_masking(
    natural: nn.Module, digits: Digit
) -> None:
    class Inner(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return natural(F.pad(images[..., 1:-1], (1, 1)))

    def looked_at(model: nn.Module, eps: float) -> tuple[str, float | None]:
        subject = Subject(model.eval(), *digits, ThreatModel("linf", eps))
        seen = QUANTISED.look(subject, SHORT, Findings())
        return seen.outcome, seen.figure

    assert looked_at(spoilt.Clipped(natural), EPS) == ("flag", 1)
    assert looked_at(spoilt.Clipped(natural), 0.09) == ("pass", 0)
    assert looked_at(Inner(), EPS) == ("pass", 0)


@pytest.mark.parametrize("constant", [1e3, 1e4])
def test_logits_and_a_constant_are_no_probabilities(constant: float, natural: nn.Module, digits: Digit) -> None:
    class Above(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return natural(images) + constant

    result = of(Above().eval(), digits)
    assert (result.verdict, result.flagged) == ("trusted", [])


def test_flat_probabilities_are_probabilities(natural: nn.Module, digits: Digit) -> None:
    class Flat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (natural(images) / 1e5).softmax(1)

    assert audit(Flat().eval(), *digits, eps=EPS, budget=spoilt.TINY).check("logits").outcome == "flag"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_answers_in_half_precision_is_told_what_would_help(
    dtype: torch.dtype, natural: nn.Module, digits: Digit
) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(natural).to(dtype)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.to(dtype))

    result = audit(Half().eval(), *digits, eps=EPS, budget=spoilt.TINY)
    assert result.flagged == []
    check = result.check("differentiable")
    assert (check.outcome, check.figure) == ("unsure", None)
    assert "float16, in whose rounding they drown" in check.text
    assert "float32" in check.mend


def test_a_model_that_takes_no_image_alone_is_told_so(natural: nn.Module, digits: Digit) -> None:
    class Several(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == 1:
                raise RuntimeError("Expected more than 1 value per channel")
            return natural(images)

    of_the_batch = nn.Sequential(*natural, nn.BatchNorm1d(10, track_running_stats=False)).eval()
    for model in (Several().eval(), lambda images: of_the_batch(images)):
        subject = Subject(model, *digits, ThreatModel("linf", EPS))
        with pytest.raises(UserError, match=r"fails on an image alone.*statistics of the batch.*Expected more than 1"):
            MODE.look(subject, SHORT, Findings())


def test_a_model_that_has_learnt_nothing_is_not_trusted(digits: Digit) -> None:
    torch.manual_seed(1)
    result = of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)
    assert result.verdict != "trusted"
    assert result.check("clean_accuracy").outcome == "unsure"


def test_a_model_of_another_range_is_told_to_be_one(natural: nn.Module, digits: Digit) -> None:
    class Of255(nn.Module):
        """Sees pixels of [0, 1] as if they were all black."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return natural(images / 255)

    result = of(Of255().eval(), digits)
    assert (result.verdict, result.flagged) == ("not_enough_evidence", [])
    assert "it gives all of them class" in result.check("clean_accuracy").text
    assert "gives all images one class" in result.check("unbounded").text
    assert "pixels in [0, 1] (and not 0 to 255)" in result.sentence


def test_few_images_are_not_enough_evidence(robust: nn.Module, digits: Digit) -> None:
    result = audit(robust, digits.images[:40], digits.labels[:40], eps=EPS, budget=SHORT)
    assert result.verdict == "not_enough_evidence"
    assert "run --budget standard" in result.sentence
    assert "too few" in result.check("differentiable").text
    # of what decides all the same that is not said
    flagged = audit(spoilt.NoGradient(robust), digits.images[:40], digits.labels[:40], eps=EPS, budget=spoilt.TINY)
    assert flagged.check("zero_gradients").outcome == "flag"
    assert "too few" not in flagged.check("zero_gradients").text


def test_what_was_not_made_is_named() -> None:
    made, skipped = (
        CheckResult(
            name="x", title=title, outcome=outcome, figure=None, text="", rule="", source="", mend="", seconds=0
        )  # type: ignore[arg-type]
        for title, outcome in (("One thing", "pass"), ("Attacks on another model fail", "skipped"))
    )
    said: dict[str, Any] = {
        "threat_model": ThreatModel("linf", 0.1),
        "robust_accuracy": 0.5,
        "interval": (0.4, 0.6),
        "images": 100,
    }
    both = sentence_of("trusted", [made, skipped], budget="quick", **said)
    assert "; 1 checks found no sign of masked gradients (not made: attacks on another model fail)." in both
    assert "not made" not in sentence_of("trusted", [made], budget="quick", **said)


def test_a_model_that_answers_in_float64_is_audited(natural: nn.Module, digits: Digit) -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(natural).double()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.double())

    result = of(Exact().eval(), digits)
    assert (result.verdict, result.flagged) == ("trusted", [])


def test_what_no_larger_budget_would_settle_is_not_answered_by_one() -> None:
    unsure = CheckResult(
        name="x", title="X", outcome="unsure", figure=None, text="", rule="", source="", mend="mend it", seconds=0
    )
    said: dict[str, Any] = {
        "threat_model": ThreatModel("linf", 0.1),
        "robust_accuracy": 0.5,
        "interval": (0.4, 0.6),
        "images": 100,
    }
    sentence = sentence_of("not_enough_evidence", [unsure], budget="quick", **said)
    assert "): mend it." in sentence
