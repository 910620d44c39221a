from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.metrics import InputGradient


def test_maps_equal_naive_numpy() -> None:
    gradients, labels = torch.randn(12, 3, 4, 7), torch.randint(3, (12,))
    metric = InputGradient((4, 7), num_classes=4)
    metric.update(gradients, labels)
    maps = metric.compute()

    values, classes = gradients.numpy().astype(np.float64), labels.numpy()
    expected = np.zeros((4, 7))
    for image in values:
        for channel in image:
            expected += np.abs(channel) / (12 * 3)
    np.testing.assert_allclose(maps.mean.numpy(), expected, rtol=1e-12)
    assert maps.per_class is not None
    for k in range(3):
        np.testing.assert_allclose(maps.per_class[k].numpy(), np.abs(values[classes == k]).mean((0, 1)), rtol=1e-12)
    assert torch.isnan(maps.per_class[3]).all(), "a class without images has no map"


def test_absolute_value_comes_first() -> None:
    metric = InputGradient((1, 1))
    metric.update(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
    metric.update(torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1))
    assert float(metric.compute().mean) == 1.0
    assert metric.compute().per_class is None


def test_labels_of_any_integer_type() -> None:
    metric = InputGradient((2, 2), num_classes=300)
    metric.update(torch.ones(2, 1, 2, 2), torch.tensor([7, 200], dtype=torch.uint8))
    assert metric.images.nonzero()[:, 0].tolist() == [7, 200]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    gradients = torch.ones(3, 1, 2, 2)
    gradients[1, 0, 1, 1] = value
    metric = InputGradient((2, 2))
    with pytest.raises(UserError, match="1 of 3 images hold NaN or infinity"):
        metric.update(gradients)
    assert int(metric.images) == 0, "a refused batch is not counted"


@pytest.mark.parametrize(
    ("gradients", "labels", "message"),
    [
        (torch.ones(2, 3, 4, 4), torch.tensor([0, 1]), "5×4 pixels and got gradients of shape"),
        (torch.ones(3, 5, 4), torch.tensor([0, 1, 1]), r"they are \(N, C, H, W\)"),
        (torch.ones(2, 3, 5, 4), None, "give the labels too"),
        (torch.ones(2, 3, 5, 4), torch.tensor([0]), r"here \(2,\)"),
        (torch.ones(2, 3, 5, 4), torch.tensor([0.0, 1.0]), "one integer class"),
        (torch.ones(2, 3, 5, 4), torch.tensor([0, 2]), "reach from 0 to 2 where 2 classes are 0 to 1"),
        (torch.ones(2, 3, 5, 4), torch.tensor([-1, 0]), "reach from -1 to 0"),
    ],
)
def test_wrong_batches_are_refused(gradients: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputGradient((5, 4), num_classes=2).update(gradients, labels)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="two positive integers"):
        InputGradient((0, 4))
    with pytest.raises(UserError, match="at least one class"):
        InputGradient((4, 4), num_classes=0)
