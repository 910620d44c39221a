from __future__ import annotations

import math

import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.metrics import RobustAccuracy


def test_counts_equal_a_naive_loop() -> None:
    labels, clean, adversarial = (torch.randint(3, (200,)) for _ in range(3))
    clean[::2], adversarial[::3] = labels[::2], labels[::3]
    rounded = torch.rand(200) < 0.7
    metric = RobustAccuracy(num_classes=3)
    metric.update(labels, clean, adversarial, rounded)

    right = robust = fooled = fooled_8bit = 0
    table = [[0, 0, 0] for _ in range(3)]
    for y, before, after, still in zip(*(v.tolist() for v in (labels, clean, adversarial, rounded)), strict=True):
        right += before == y
        robust += before == y and after == y
        fooled += before == y and after != y
        fooled_8bit += before == y and after != y and still
        table[y] = [table[y][0] + 1, table[y][1] + (before == y), table[y][2] + (before == y and after == y)]
    scores = {name: float(value) for name, value in metric.compute().items()}
    assert scores == pytest.approx(
        {
            "acc": right / 200,
            "robust_acc": robust / 200,
            "success_rate": fooled / right,
            "success_rate_8bit": fooled_8bit / right,
        },
        rel=1e-15,
    )
    assert scores["robust_acc"] == pytest.approx(scores["acc"] * (1 - scores["success_rate"]), rel=1e-12)
    rows = metric.per_class(["a", "b", "c"])
    assert [[row["images"], row["clean_correct"], row["robust_correct"]] for row in rows] == table
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert sum(row["fooled_8bit"] for row in rows) == fooled_8bit


def test_an_image_that_the_attack_mends_is_not_robust() -> None:
    metric = RobustAccuracy(num_classes=2)
    metric.update(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "acc": 0.5,
        "robust_acc": 0.5,
        "success_rate": 0.0,
    }


def test_bool_stands_for_right_or_wrong() -> None:
    labels, clean, adversarial = (torch.randint(4, (50,)) for _ in range(3))
    clean[::2] = labels[::2]
    classes, flags = RobustAccuracy(4), RobustAccuracy(4)
    classes.update(labels, clean, adversarial)
    flags.update(labels, clean == labels, adversarial == labels)
    assert classes.per_class() == flags.per_class()


def test_nothing_right_gives_zero_and_no_image_gives_nan() -> None:
    metric = RobustAccuracy(num_classes=2)
    metric.update(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([True, True]))
    scores = {name: float(value) for name, value in metric.compute().items()}
    assert scores == {"acc": 0.0, "robust_acc": 0.0, "success_rate": 0.0, "success_rate_8bit": 0.0}
    seen, unseen = metric.per_class()
    assert (seen["acc"], seen["success_rate"]) == (0.0, 0.0)
    assert unseen["images"] == 0
    assert all(math.isnan(float(unseen[name])) for name in ("acc", "robust_acc", "success_rate", "success_rate_8bit"))


def test_rounding_is_told_always_or_never() -> None:
    labels, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    metric = RobustAccuracy(2)
    metric.update(labels, labels, wrong)
    assert "success_rate_8bit" not in metric.compute()
    assert "fooled_8bit" not in metric.per_class()[0]
    metric.update(labels, labels, wrong, torch.tensor([True, False]))
    with pytest.raises(UserError, match="for 2 of 4 images"):
        metric.compute()
    with pytest.raises(UserError, match="for 2 of 4 images"):
        metric.per_class()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (([0, 3], [0, 1], [0, 1]), "labels reach from 0 to 3 where 3 classes are 0 to 2"),
        (([0, -1], [0, 1], [0, 1]), "labels reach from -1"),
        (([0, 1], [0], [0, 1]), "clean_predictions of shape"),
        (([0, 1], [0, 1], [[0, 1]]), "adversarial_predictions of shape"),
        (([0, 1], [0.5, 1.0], [0, 1]), r"clean_predictions of shape \(2,\) and type torch\.float32"),
        (([0, 1], [0, 1], [0, 1], [1, 0]), r"fooled_8bit of shape \(2,\) and type torch\.int64"),
    ],
)
def test_wrong_batches_are_refused_and_not_counted(batch: tuple[list, ...], message: str) -> None:
    metric = RobustAccuracy(3)
    with pytest.raises(UserError, match=message):
        metric.update(*(torch.tensor(values) for values in batch))
    assert int(metric.total.sum()) == 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="at least one class"):
        RobustAccuracy(0)
    with pytest.raises(UserError, match="1 class names for 2 classes"):
        RobustAccuracy(2).per_class(["only one"])
