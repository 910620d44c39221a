"""The audit's tables and figures, from what the file holds."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_robust.report import to_uint8_image
from lightning_robust.report.audit import attack_bars, attack_rows, audit_figures, check_rows, print_audit, stated


@pytest.fixture
def plain() -> dict[str, Any]:
    check = {
        "name": "randomness",
        "title": "The same image gets the same answer",
        "outcome": "flag",
        "figure": 0.5,
        "text": "it does not",
        "rule": "a rule",
        "source": "a source",
        "mend": "average",
        "seconds": 1.0,
    }
    attack = {"name": "FGSM", "robust_accuracy": 0.5, "seconds": 1.0, "adaptive": False, "images": 200}
    return {
        "model": "a $net{$",  # no formula
        "data": "digits",
        "budget": "quick",
        "threat_model": {"norm": "linf", "eps": 8 / 255},
        "images": 200,
        "clean_accuracy": 0.9,
        "robust_accuracy": 0.1,
        "confidence_interval": [0.06, 0.15],
        "verdict": "masked",
        "sentence": "The gradients are masked because …",
        "checks": [check, {**check, "outcome": "pass", "mend": ""}],
        "attacks": [
            {**attack, "left_over": False},
            {**attack, "name": "EOT", "adaptive": True, "left_over": True, "images": 100},
        ],
        "curve": {"eps": [0.0, 0.1], "accuracy": [0.9, 0.1], "images": 100},
        "landscape": {"step": [-1, 0, 1], "slices": [{"image": 3, "loss": [[0.0, 1, 2], [1, 2, 3], [2, 3, 4]]}]},
    }


def test_every_bar_is_an_attack_in_its_order(plain: dict[str, Any]) -> None:
    figure = attack_bars(plain)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "clean",
        "FGSM",
        "+ EOT (100 images)",
        "everything together",
    ]
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.5, 0.5, 0.1]
    assert axes.patches[2].get_hatch()
    assert to_uint8_image(figure).std() > 0


def test_figures_are_those_that_there_are_numbers_for(plain: dict[str, Any]) -> None:
    assert list(audit_figures(plain)) == ["audit_attacks", "audit_eps", "audit_landscape"]
    assert list(audit_figures({**plain, "curve": {}, "landscape": {}})) == ["audit_attacks"]
    for figure in audit_figures(plain).values():
        assert to_uint8_image(figure).std() > 0


def test_the_terminal_says_everything_and_mends_what_is_wrong(
    plain: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_audit(plain)
    out = capsys.readouterr().out
    assert "MASKED GRADIENTS: The gradients are masked" in out
    assert out.count("The same image gets the same answer: FLAG: average.") == 1
    assert "adaptive on what was left" in out
    assert "linf ε = 8/255" in out
    assert attack_rows(plain)[1]["robust accuracy"] == "50.0 %"
    assert check_rows(plain)[0]["rule"] == "a rule"


def test_a_budget_in_words() -> None:
    assert stated({"threat_model": {"norm": "linf", "eps": 0.1}}) == "linf ε = 0.1"
    assert stated({"threat_model": {"norm": "l2", "eps": 1.0}}) == "l2 ε = 1"
