"""Regions cut from maps: by hand, and against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from lightning_robust.errors import UserError
from lightning_robust.regions import Threshold, check_region, pixel_change, unit_scale


def test_otsu_is_that_of_scikit_image() -> None:
    # of few integers a histogram loses nothing
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (20, 9, 11)))
    maps[10:, :4] += 60
    cuts = Threshold("otsu").cut(maps.double())
    for cut, values in zip(cuts.tolist(), maps.numpy(), strict=True):
        reference = threshold_otsu(values)  # the region is above it, ours at or above
        assert ((values >= cut) == (values > reference)).all()


def test_otsu_divides_two_groups_and_knows_when_there_is_one() -> None:
    values = torch.tensor([[0.1, 0.11, 0.9], [0.12, 0.95, 0.1]])
    assert Threshold("otsu").region(values).tolist() == [[False, False, True], [False, True, False]]
    assert not Threshold("otsu").region(torch.full((3, 3), 0.7)).any()
    assert Threshold("otsu").region(values.expand(4, 2, 2, 3)).shape == (4, 2, 2, 3)


def test_the_kinds() -> None:
    values = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 2.0]])
    assert Threshold("absolute", 0.6).region(values).sum() == 3
    assert Threshold("relative", 0.4).region(values).sum() == 2
    assert Threshold("quantile", 0.8).region(values).sum() == 2
    assert Threshold("quantile", 0.5).region(torch.ones(2, 2)).all()  # equal values go together
    assert [str(t) for t in (Threshold(), Threshold("quantile", 0.8))] == ["otsu", "quantile 0.8"]


@pytest.mark.parametrize(
    "threshold", [Threshold("absolute", 0.1), Threshold("relative", 0.5), Threshold("quantile", 0.5)]
)
def test_what_is_not_there_is_in_no_region(threshold: Threshold) -> None:
    assert not threshold.region(torch.zeros(3, 4, 4)).any()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("median", 0.5, "kind='median': choose absolute"),
        ("otsu", 0.5, "otsu finds its value itself"),
        ("absolute", None, "needs a value"),
        ("absolute", 0, "0 takes every pixel"),
        ("quantile", 1.0, "between 0 and 1"),
        ("relative", 80, "between 0 and 1"),
        ("absolute", float("nan"), "above 0"),
    ],
)
def test_bad_thresholds(kind: str, value: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Threshold(kind, value)  # type: ignore[arg-type]


def test_empty_and_full_regions_are_refused() -> None:
    values = torch.rand(4, 4)
    with pytest.raises(UserError, match=r"the blob at θ = 0.9 is empty \(the map's values lie between .*lower"):
        check_region(values > 2, "the blob at θ = 0.9", values)
    with pytest.raises(UserError, match="is the whole image: raise the threshold"):
        check_region(values >= 0, "it")
    assert check_region(values > values.median(), "it").any()


def test_maps_that_are_none() -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        Threshold().region(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(UserError, match=r"down to -1: regions are cut from maps of 0 or more"):
        Threshold().region(torch.tensor([[0.0, -1.0]]))
    with pytest.raises(UserError, match=r"maps of shape \(3,\)"):
        unit_scale(torch.rand(3))


def test_scale_and_change() -> None:
    scaled = unit_scale(torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]]))
    assert scaled.tolist() == [[[0.0, 1.0]], [[0.0, 0.0]]]
    clean = torch.rand(3, 3, 5, 5)
    moved = clean.clone()
    moved[1, :, 2, 3] += torch.tensor([0.2, -0.1, 0.2])
    change = pixel_change(clean, moved)
    assert change.shape == (3, 5, 5)
    assert change.nonzero().tolist() == [[1, 2, 3]]
    assert float(change.max()) == pytest.approx(0.3, abs=1e-6)
    with pytest.raises(UserError, match="both are"):
        pixel_change(clean, moved[:2])
