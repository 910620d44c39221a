"""Budgets as they are written, and those that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_robust.attacks import ThreatModel, parse_number
from lightning_robust.errors import UserError


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_itself_written_or_not(value: float) -> None:
    assert parse_number(value) == value
    assert parse_number(repr(value)) == value


@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_a_fraction_is_its_quotient(numerator: int, denominator: int) -> None:
    assert parse_number(f"{numerator}/{denominator}") == numerator / denominator
    assert parse_number(f" {numerator} / {denominator} ") == numerator / denominator


@given(st.text(alphabet="0123456789/.eE+-infa ", max_size=8))
def test_any_text_is_a_finite_number_or_a_user_error(text: str) -> None:
    try:
        number = parse_number(text)
    except UserError as error:
        message = str(error)
    else:
        message = repr(text) if math.isfinite(number) else "not finite"
    assert repr(text) in message


@pytest.mark.parametrize("value", ["", "eps", "8/0", "1/2/3", "nan", "inf", float("nan"), float("inf"), None, "8//255"])
def test_what_is_no_number_is_named(value: object) -> None:
    with pytest.raises(UserError, match=r"radius=.*8/255"):
        parse_number(value, "radius")  # type: ignore[arg-type]


@given(st.sampled_from(["linf", "l2", "l1"]), st.floats(0, 1))
def test_a_budget_is_kept(norm: str, eps: float) -> None:
    threat_model = ThreatModel(norm, eps)
    assert threat_model.radius == threat_model.eps == eps
    threat_model.check_images(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", 8, r"eps=8 is larger than the pixel range \[0, 1\]: did you mean 8/255"),
        ("linf", "8", "did you mean 8/255"),
        ("linf", 1000, "for example 8/255"),
        ("linf", -0.1, "negative"),
        ("l2", "-1/2", "negative"),
        ("l3", 0.1, "norm='l3' does not exist here: choose one of linf, l2, l1"),
        ("Linf", 0.1, "norm='Linf' does not exist"),
        ("linf", "eight", "not a number"),
    ],
)
def test_bad_budgets(norm: str, eps: float | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ThreatModel(norm, eps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("norm", "limit"), [("l2", 12**0.5), ("l1", 12.0)])
def test_a_budget_larger_than_the_pixel_cube_is_refused(norm: str, limit: float) -> None:
    images = torch.rand(2, 3, 2, 2)
    ThreatModel(norm, limit).check_images(images)
    with pytest.raises(UserError, match=r"not in 0\.\.255"):
        ThreatModel(norm, limit * 1.01).check_images(images)
