"""What an audit promises beside its verdict: the file, the budget's meaning, the model left as it was, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from audit_cases import EPS, SHORT, TINY, Digit, NoGradient
from torch import Tensor, nn

from lightning_robust.attacks import PGD, ThreatModel
from lightning_robust.audit import BUDGETS, EXIT_STATUS, AuditResult, Estimate, audit
from lightning_robust.audit.checks import CHECKS
from lightning_robust.audit.subject import Subject
from lightning_robust.errors import UserError
from lightning_robust.report.page.audit import parse_audit

SCHEMA = {
    "version": int,
    "model": str,
    "data": str,
    "budget": str,
    "threat_model": dict,
    "images": int,
    "seed": int,
    "clean_accuracy": float,
    "robust_accuracy": float,
    "confidence_interval": list,
    "confidence": float,
    "verdict": str,
    "sentence": str,
    "checks": list,
    "attacks": list,
}
CHECK = {
    "name": str,
    "title": str,
    "outcome": str,
    "figure": (float, type(None)),
    "text": str,
    "rule": str,
    "source": str,
    "mend": str,
    "seconds": float,
}
ATTACK = {"name": str, "robust_accuracy": float, "seconds": float, "adaptive": bool}


def test_the_file_has_the_agreed_form(natural: nn.Module, digits: Digit, tmp_path: Path) -> None:
    result = audit(natural, *digits, eps="38/255", budget=TINY, model_name="net", data_name="digits", seed=3)
    file = result.write(tmp_path / "run")
    plain = json.loads(file.read_text(encoding="utf-8"))
    assert file == tmp_path / "run" / "audit.json"
    for expected, found in ((SCHEMA, [plain]), (CHECK, plain["checks"]), (ATTACK, plain["attacks"])):
        for entry in found:
            assert all(isinstance(entry[key], kind) for key, kind in expected.items()), entry
    assert plain["threat_model"] == {"norm": "linf", "eps": 38 / 255}
    assert (plain["version"], plain["model"], plain["data"], plain["seed"]) == (1, "net", "digits", 3)
    assert [check["name"] for check in plain["checks"]] == [*(check.name for check in CHECKS), "finite_gradients"]
    assert {check["outcome"] for check in plain["checks"]} <= {"pass", "flag", "unsure", "skipped"}
    assert len(plain["curve"]["eps"]) == len(plain["curve"]["accuracy"]) > 3
    assert plain["landscape"]["slices"]
    assert plain["verdict"] in EXIT_STATUS


def test_the_worst_case_is_that_of_every_attack(natural: nn.Module, digits: Digit) -> None:
    result = audit(natural, *digits, eps=EPS, budget=SHORT)
    of_all = [attack.robust_accuracy for attack in result.attacks if attack.images == result.images]
    assert result.robust_accuracy <= min(of_all)


def test_the_same_again_and_for_another_batch_size(natural: nn.Module, digits: Digit) -> None:
    one, other = (audit(natural, *digits, eps=EPS, budget=TINY, batch_size=size) for size in (128, 17))
    assert one.robust_accuracy == other.robust_accuracy
    assert [check.outcome for check in one.checks] == [check.outcome for check in other.checks]
    assert one.curve == other.curve


def test_the_model_and_the_random_state_are_left_as_they_were(natural: nn.Module, digits: Digit) -> None:
    model = nn.Sequential(nn.Sequential(*natural[:2]), nn.BatchNorm2d(16), *natural[2:]).eval()
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        audit(model, *digits, eps=EPS, budget=TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert model[1].training
    assert not model[0].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_it_tells_beforehand_what_it_will_take_and_then_how_far_it_is(natural: nn.Module, digits: Digit) -> None:
    told: list[tuple[str, float]] = []
    estimates: list[Estimate] = []
    checks: list[str] = []
    audit(
        natural,
        *digits,
        eps=EPS,
        budget=TINY,
        progress=lambda name, done: told.append((name, done)),
        on_estimate=lambda estimate: estimates.append(estimate) if not checks else pytest.fail("too late"),
        on_check=lambda check: checks.append(check.name),
    )
    (estimate,) = estimates
    assert estimate.total == sum(seconds for _, seconds in estimate.rows) > 0
    assert {name for name, _ in told} >= {"FGSM", "PGD-4", "Square, 10 queries"}
    assert all(0 <= done <= 1 for _, done in told)
    assert len(checks) == len(CHECKS) + 1


def test_larger_budgets_ask_for_more() -> None:
    quick, standard, full = (
        [(asked := check.cost(BUDGETS[name], 1000)).forward + 3 * asked.gradient for check in CHECKS]
        for name in ("quick", "standard", "full")
    )
    assert sum(quick) < sum(standard) < sum(full)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms(norm: str, natural: nn.Module, digits: Digit) -> None:
    eps = {"l2": 0.5, "l1": 2.0}[norm]
    result = audit(natural, *digits, eps=eps, norm=norm, budget=SHORT)
    assert result.flagged == []
    assert result.robust_accuracy < result.clean_accuracy


def test_two_classes(digits: Digit) -> None:
    class Even(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            light = images.flatten(1).sum(1, keepdim=True)
            return torch.cat([light - 19, 19 - light], 1)

    labels = Even()(digits.images).argmax(1)
    result = audit(Even(), digits.images, labels, eps=0.01, budget=SHORT)
    assert result.flagged == []


class Narrow(nn.Module):
    """Takes images of one size."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), 784)[:, :10]


@pytest.mark.parametrize(
    ("model", "images", "labels", "settings", "told"),
    [
        (Narrow(), None, None, {}, "cannot take these images of 1×8×8"),
        (nn.Flatten(0), None, None, {}, "an audit needs logits"),
        (None, lambda images: 2 * images - 1, None, {}, r"outside \[0, 1\]"),
        (None, None, lambda labels: labels + 5, {}, "labels go up to 14 but the model has 10 classes"),
        (None, None, lambda labels: labels[:5], {}, "one integer an image"),
        (None, None, None, {"budget": "large"}, "choose one of quick, standard, full"),
        (None, None, None, {"eps": 8}, "did you mean 8/255"),
        (None, None, None, {"eps": 0}, "nothing to audit"),
        (None, None, None, {"norm": "l0"}, "choose one of linf, l2, l1"),
        (lambda images: images.flatten(1)[:, :10] * float("nan"), None, None, {}, "gave NaN for clean images"),
        (lambda images: images.flatten(1)[:, :1], None, lambda labels: 0 * labels, {}, "a single output"),
    ],
)
def test_bad_input(model, images, labels, settings, told, natural: nn.Module, digits: Digit) -> None:
    images = digits.images if images is None else images(digits.images)
    labels = digits.labels if labels is None else labels(digits.labels)
    with pytest.raises(UserError, match=told):
        audit(natural if model is None else model, images, labels, **{"eps": EPS, "budget": TINY, **settings})


def test_a_plain_function_can_be_audited(natural: nn.Module, digits: Digit) -> None:
    result = audit(lambda images: natural(images), *digits, eps=EPS, budget=SHORT)
    assert result.verdict == "trusted"
    assert "does not run in float64" in result.check("zero_gradients").text


class Breaks(nn.Module):
    """Answers so many times, and then no more."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__()
        self.network, self.left = network, calls

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.network(images)


def test_what_ends_an_audit_early_loses_nothing(natural: nn.Module, digits: Digit, tmp_path: Path) -> None:
    kept: list[AuditResult] = []
    with pytest.raises(KeyboardInterrupt):
        audit(Breaks(natural, 120), *digits, eps=EPS, budget=TINY, fast=False, on_stop=kept.append)
    (result,) = kept
    assert 5 < len(result.checks) < len(CHECKS)
    assert result.check("finished").outcome == "unsure"
    assert "KeyboardInterrupt" in result.check("finished").text
    assert result.verdict == "not_enough_evidence"
    assert "run it again to its end" in result.sentence
    assert parse_audit(result.write(tmp_path).read_text(encoding="utf-8")).verdict == "not_enough_evidence"
    # nor is a model that was found to hide its gradients said to have withstood what did not run
    kept.clear()
    with pytest.raises(KeyboardInterrupt):
        audit(Breaks(NoGradient(natural), 80), *digits, eps=EPS, budget=TINY, fast=False, on_stop=kept.append)
    assert kept[0].verdict == "masked"
    assert "until the audit ended early" in kept[0].sentence


def test_random_models_leave_the_random_state_and_repeat(natural: nn.Module, digits: Digit) -> None:
    class Noise(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return natural(images + 0.1 * torch.randn_like(images))

    some = Digit(digits.images[:40], digits.labels[:40])
    found = []
    for state in range(2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        result = audit(Noise(), *some, eps=EPS, budget=TINY)
        assert torch.equal(before, torch.get_rng_state())
        # the wrapper was never put into eval mode, but it is the dice that change its answers
        assert "randomness" in result.flagged
        assert "eval_mode" not in result.flagged
        found.append([(check.name, check.outcome, check.figure) for check in result.checks])
    assert found[0] == found[1]


def test_images_all_wrong_one_image_and_one_class(natural: nn.Module, digits: Digit) -> None:
    class Positive(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return natural(images).relu() + 1

    wrong = (natural(digits.images).argmax(1) + 1) % 10
    result = audit(natural, digits.images, wrong, eps=EPS, budget=TINY)
    assert (result.clean_accuracy, result.robust_accuracy, result.verdict) == (0, 0, "not_enough_evidence")
    # the sums of a single image are always alike, which makes no probabilities
    result = audit(Positive().eval(), digits.images[:1], digits.labels[:1], eps=EPS, budget=TINY)
    assert (result.flagged, result.verdict) == ([], "not_enough_evidence")
    of_one = digits.labels == 3
    result = audit(natural, digits.images[of_one], digits.labels[of_one], eps=EPS, budget=TINY)
    assert result.check("clean_accuracy").outcome == "unsure"


def test_an_image_that_falls_within_less_than_the_stated_eps_has_fallen(natural: nn.Module, digits: Digit) -> None:
    subject = Subject(natural, *digits, ThreatModel("linf", EPS))
    larger = subject.attack("larger", PGD(eps=2 * EPS, steps=3), subject.right)
    assert bool(larger.any())
    assert torch.equal(subject.withstood, subject.right)
    smaller = subject.attack("smaller", PGD(eps=EPS / 2, steps=3), subject.right)
    assert bool(smaller.any())
    assert torch.equal(subject.withstood, subject.right & ~smaller)
    assert subject.rows == []
