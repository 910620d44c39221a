"""Logged names in words, numbers as they are written, settings in one table, figures with captions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_robust.report.page.pictures import find_pictures
from lightning_robust.report.page.settings import flatten, repetitions, split
from lightning_robust.report.page.words import measure, number

from .conftest import picture


@pytest.mark.parametrize(
    ("name", "value", "label", "text"),
    [
        ("test/acc", 0.98765, "clean accuracy", "98.77 %"),
        ("val/robust_acc/pgd_20", 0.5, "robust accuracy, pgd 20", "50.00 %"),
        ("test/robust_acc/worst_case", 0.0, "robust accuracy, worst case of all attacks", "0.00 %"),
        ("test/robust_acc/worst_case_l2", 0.0, "robust accuracy, worst case of all attacks l2", "0.00 %"),
        ("test/success_rate_8bit/cw", 1.0, "attack success after rounding to 8 bits, cw", "100.00 %"),
        ("test/mean_norm/cw", 0.123456, "mean norm of what fools, cw", "0.1235"),
        ("test/robust_acc_curve/pgd/eps=0.1", 0.25, "robust accuracy at ε = 0.1, pgd", "25.00 %"),
        ("test/lambda_sweep/iou/lam=0.5", 0.25, "gradient IoU at λ = 0.5", "0.2500"),
        ("test/input_gradient_iou", 0.5, "gradient IoU", "0.5000"),
        ("test/my_iou", 0.5, "gradient IoU (my iou)", "0.5000"),
        ("test/input_gradient_mean", 0.00123, "mean |∇x|", "1.230e-03"),
        ("test/psnr", 25.123, "PSNR of the reconstruction", "25.12 dB"),
        ("train/acc", 0.5, "accuracy on what it trains on", "50.00 %"),
        ("time/test_seconds", 1234.5, "time of test", "1,234.5 s"),
        ("epochs", 30.0, "epochs", "30"),
        ("something/else", 2.0, "something/else", "2.0000"),
        ("test/of_the_users_own", math.nan, "of_the_users_own", "–"),
    ],
)
def test_names_and_numbers(name: str, value: float, label: str, text: str) -> None:
    what = measure(name)
    assert (what.label, what.text(value)) == (label, text)


def test_deviations_and_differences() -> None:
    acc, loss = measure("test/acc"), measure("test/loss")
    assert acc.text(0.5, 0.0123) == "50.00 ± 1.23 %"
    assert acc.text(0.5, math.nan) == "50.00 %"
    assert acc.difference(0.5, 0.75) == "−25.00 points"
    assert acc.difference(0.5, 0.500001) == ""
    assert acc.difference(None, 0.5) == acc.difference(math.inf, 0.5) == ""
    assert loss.difference(0.5, 0.25) == "+0.2500"


def test_numbers_have_about_five_digits() -> None:
    written = {0: "0.0000", 0.5: "0.5000", 45.724: "45.724", 123.456: "123.46", 12345.678: "12346", 1e-5: "1.000e-05"}
    assert {value: number(value) for value in written} == written
    assert [number(value) for value in (math.nan, math.inf, -math.inf, 1e6)] == ["–", "∞", "−∞", "1.000e+06"]


def test_settings_are_flat() -> None:
    config = {
        "trainer": {
            "callbacks": [{"class_path": "a.A", "init_args": {"x": 1}}, {"class_path": "b.A"}],
            "logger": False,
        },
        "model": {
            "class_path": "a.B",
            "init_args": {"shares": [0.5, None], "attacks": {"pgd": {"class_path": "c.PGD"}}},
        },
        "run": {},
    }
    assert flatten(config) == {
        "trainer.callbacks.A": "A", "trainer.callbacks.A.x": "1", "trainer.callbacks.A#2": "A",
        "trainer.logger": "false",
        "model": "B", "model.shares": "[0.5, null]", "model.attacks.pgd": "PGD", "run": "{}",
    }  # fmt: skip


def test_settings_that_differ() -> None:
    one, two = (
        {"model": "A", "seed_everything": "0", "run.version": "a"},
        {"model": "A", "seed_everything": "1", "x": ""},
    )
    assert split([one, two]) == (["seed_everything", "x"], ["model", "run.version"])
    assert not repetitions([one, two])
    del two["x"]
    assert repetitions([one, two])
    assert not repetitions([one, dict(one)])
    assert not repetitions([one, {}])
    assert not repetitions([one])


def test_figures_have_captions(tmp_path: Path) -> None:
    for name in (
        "input_gradient_val_epoch009", "input_gradient_val_epoch100", "input_gradient_val_epoch020",
        "input_gradient_test", "adversarial_examples_my_pgd_test", "one_pixel_pgd_examples_test", "lambda_sweep_test",
        "robust_accuracy_curve_pgd_val", "detection_ns_roc_test", "one_pixel_classes_reached_test", "mine_examples",
        "audit_attacks_shifted_test", "_examples",
        "gray_box_test", "by_hand",
    ):  # fmt: skip
        picture(tmp_path / "figures" / f"{name}.png")
    found = [(one.section, one.caption) for one in find_pictures(tmp_path)]
    assert found == [
        ("sweeps", "Accuracy and IoU against λ (test)"),
        ("heatmaps", "Mean input gradient |∇x| (test)"),
        ("heatmaps", "Mean input gradient |∇x| (validation, epoch 9)"),
        ("heatmaps", "Mean input gradient |∇x| (validation, epoch 20)"),
        ("heatmaps", "Mean input gradient |∇x| (validation, epoch 100)"),
        ("examples", "Examples"),
        ("examples", "Adversarial examples, my pgd: clean, adversarial, difference enlarged (test)"),
        ("examples", "Examples, mine"),
        ("examples", "Examples, one pixel pgd (test)"),
        ("curves", "Robust accuracy against ε, pgd (validation)"),
        ("verdicts", "What each attack of the audit leaves, shifted (test)"),
        ("figures", "by hand"),
        ("figures", "True against false alarms, detection ns (test)"),
        ("figures", "Accuracy by defense and attack (test)"),
        ("figures", "To how many classes an image was driven, one pixel (test)"),
    ]
    assert all(one.alt.endswith(one.caption) and one.alt != one.caption for one in find_pictures(tmp_path))
