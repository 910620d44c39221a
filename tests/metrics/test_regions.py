"""Sums of maps and regions, group by group: by hand, exact on any ranks and batch sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from lightning_robust.errors import UserError
from lightning_robust.metrics import GroupMeans, MapMeans, RegionCounts, RegionSimilarity, map_similarity
from lightning_robust.regions import Region, isolate, unit_scale

COUNT, GROUPS, SIZE = 23, 3, (12, 14)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    maps = torch.rand(COUNT, *SIZE, generator=generator) * 10 ** torch.randn(COUNT, 1, 1, generator=generator).mul(3)
    return {
        "maps": maps,
        "unit": unit_scale(maps),
        "other": torch.rand(COUNT, *SIZE, generator=generator),
        "regions": torch.randint(0, 4, (COUNT, *SIZE), generator=generator),
        "values": torch.where(torch.arange(COUNT) == 4, torch.nan, torch.randn(COUNT, generator=generator)),
        "groups": torch.randint(-1, GROUPS - 1, (COUNT,), generator=generator),  # the last group has no image
    }


def metrics() -> dict[str, Any]:
    return {
        "means": MapMeans(GROUPS, SIZE),
        "counts": RegionCounts(GROUPS, SIZE),
        "values": GroupMeans(GROUPS),
        "ssim": RegionSimilarity(GROUPS),
    }


def feed(found: dict[str, Any], given: dict[str, Tensor], rows: Tensor) -> None:
    batch = {name: values[rows] for name, values in given.items()}
    found["means"].update(batch["maps"], batch["groups"])
    found["counts"].update(batch["regions"], batch["groups"])
    found["values"].update(batch["values"], batch["groups"])
    found["ssim"].update(batch["unit"], batch["other"], batch["groups"])


def results(found: dict[str, Any]) -> dict[str, Tensor]:
    means, counts = found["means"].compute(), found["counts"].compute()
    values, ssim = found["values"].compute(), found["ssim"].compute()
    return {
        "mean": means.mean,
        "images": means.images,
        "frequency": counts.frequency,
        "union": counts.union,
        "value": values.mean,
        "error": values.error,
        "count": values.count,
        "ssim": ssim.mean,
    }


def whole() -> dict[str, Tensor]:
    found = metrics()
    feed(found, data(), torch.arange(COUNT))
    return results(found)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 23])
def test_the_same_on_any_ranks_and_batch_sizes(ranks: int, size: int) -> None:
    """States of ranks are summed, as torchmetrics does between processes (tests/callbacks has real ones)."""
    expected, given = whole(), data()
    each = []
    for rank in range(ranks):
        found = metrics()
        for rows in torch.arange(rank, COUNT, ranks).split(size):
            feed(found, given, rows)
        each.append(found)
    for name, metric in each[0].items():
        for state, reduce in metric._reductions.items():
            total = reduce(torch.stack([getattr(other[name], state) for other in each]))
            setattr(metric, state, total)
    for name, value in results(each[0]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, equal_nan=True)


def test_by_hand() -> None:
    given, found = data(), whole()
    for group in range(GROUPS):
        rows = given["groups"] == group
        assert int(found["images"][group]) == int(rows.sum())
        if not rows.any():
            assert found["mean"][group].isnan().all()
            assert found["frequency"][group].isnan().all()
            continue
        torch.testing.assert_close(found["mean"][group], given["maps"][rows].double().mean(0))
        for region in Region:
            torch.testing.assert_close(
                found["frequency"][group, region], (given["regions"][rows] == region).double().mean(0)
            )
        values = given["values"][rows]
        values = values[~values.isnan()].double()
        assert float(found["value"][group]) == pytest.approx(float(values.mean()))
        assert float(found["error"][group]) == pytest.approx(float(values.std() / len(values) ** 0.5))
        important = (given["regions"][rows] <= Region.U_ONLY).any(0)
        attacked = ((given["regions"][rows] == Region.UV) | (given["regions"][rows] == Region.V_ONLY)).any(0)
        assert torch.equal(found["union"][group], isolate(important, attacked))


def test_similarity_is_that_of_torchmetrics() -> None:
    first, second = torch.rand(5, 20, 17), torch.rand(5, 20, 17)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    expected = metric(first[:, None], second[:, None]).double()
    torch.testing.assert_close(map_similarity(first, second), expected, rtol=0, atol=1e-5)
    assert map_similarity(first[:1], first[:1]).tolist() == [1.0]
    assert map_similarity(first[:0], first[:0]).shape == (0,)


@pytest.mark.parametrize("side", [3, 4, 5, 8, 10, 11, 12])
def test_similarity_of_small_maps(side: int) -> None:
    maps = torch.rand(2, side, side)
    assert map_similarity(maps, maps).tolist() == pytest.approx([1, 1])
    assert (map_similarity(maps, 1 - maps) < 0.9).all()


def test_one_group_keeps_its_shape() -> None:
    """Torchmetrics makes scalars of tensors with one value."""
    means, values, counts = MapMeans(1, (2, 2)), GroupMeans(1), RegionCounts(1, (2, 2))
    means.update(torch.ones(3, 2, 2), torch.zeros(3).long())
    values.update(torch.ones(3), torch.zeros(3).long())
    counts.update(torch.ones(3, 2, 2).long(), torch.zeros(3).long())
    assert means.compute().images.shape == values.compute().mean.shape == counts.compute().images.shape == (1,)
    assert values.compute().interval(0) == (1.0, 1.0)
    assert counts.compute().shares.tolist() == [[0, 1, 0, 0]]


def test_bad_input() -> None:
    for make, message in (
        (lambda: MapMeans(0, (2, 2)), "groups=0"),
        (lambda: RegionCounts(2, (0, 2)), "image_size"),
        (lambda: GroupMeans(0), "groups=0"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    rows = torch.zeros(2).long()
    for update, message in (
        (lambda: MapMeans(2, (2, 2)).update(torch.rand(2, 3, 3), rows), "maps of 2×2 pixels and got shape"),
        (lambda: MapMeans(2, (2, 2)).update(torch.rand(2, 2, 2), rows.float()), "one integer an image"),
        (lambda: MapMeans(2, (2, 2)).update(torch.rand(2, 2, 2), rows + 2), "groups are 0 to 1, or -1"),
        (lambda: MapMeans(2, (2, 2)).update(torch.full((2, 2, 2), torch.nan), rows), "NaN or infinity"),
        (lambda: RegionCounts(2, (2, 2)).update(torch.full((2, 2, 2), 4), rows), "from 0 to 3"),
        (lambda: GroupMeans(2).update(torch.rand(2, 2), rows), "one of each an image"),
        (lambda: map_similarity(torch.rand(1, 2, 2), torch.rand(1, 2, 2)), "maps of 2 pixels have none"),
        (lambda: map_similarity(torch.rand(1, 8, 8), torch.rand(2, 8, 8)), "both are"),
    ):
        with pytest.raises(UserError, match=message):
            update()
