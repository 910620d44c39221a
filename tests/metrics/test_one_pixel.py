"""The one-pixel study's statistics: by hand, and the same on any number of ranks and with any batch size."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed

from lightning_robust.errors import UserError
from lightning_robust.metrics.one_pixel import AllTargetsSuccess, NonTargetedSuccess

COUNT, CLASSES = 19, 4


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_all_targets_by_hand() -> None:
    """Three images of three classes: one reaches both others, one a third class by mistake, one resists."""
    metric = AllTargetsSuccess(3)
    metric.update(
        labels=torch.tensor([0, 1, 2]),
        image=torch.tensor([0, 0, 1, 1, 2, 2]),
        target=torch.tensor([1, 2, 0, 2, 0, 1]),
        #                       both    2 instead of 0, 1 stays   stays
        predicted=torch.tensor([1, 2, 2, 1, 2, 2]),
        confidence=torch.tensor([0.5, 0.75, 0.2, 0.3, 0.0, 0.1]),
    )
    scores = metric.compute()
    assert float(scores.success_rate_targeted) == pytest.approx(2 / 6)
    assert float(scores.success_rate_nontargeted) == pytest.approx(1 / 3)
    assert float(scores.success_rate_any_change) == pytest.approx(2 / 3)
    assert float(scores.confidence) == pytest.approx((0.5 + 0.75) / 2)
    assert float(scores.mean_classes_reached) == pytest.approx(2 / 3)
    assert (int(scores.images), int(scores.runs)) == (3, 6)
    assert scores.classes_reached.tolist() == [2, 0, 1]
    assert scores.pair_successes.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert scores.pair_attempts.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_confidence_is_the_mean_over_successes_and_not_over_batches() -> None:
    metric = AllTargetsSuccess(2)
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    metric.update(zero, zero, one, one, torch.tensor([0.6]))
    three = torch.arange(3)
    metric.update(torch.zeros(3).long(), three, torch.ones(3).long(), torch.tensor([1, 1, 0]), torch.tensor([0.9] * 3))
    assert float(metric.compute().confidence) == pytest.approx((0.6 + 0.9 + 0.9) / 3)


def test_runs_may_come_in_any_order_and_images_without_all_runs() -> None:
    metric = AllTargetsSuccess(3)
    metric.update(
        labels=torch.tensor([0, 0]),
        image=torch.tensor([1, 0, 1]),
        target=torch.tensor([2, 1, 1]),
        predicted=torch.tensor([2, 0, 1]),
        confidence=torch.tensor([0.9, 0.1, 0.7]),
    )
    scores = metric.compute()
    assert scores.classes_reached.tolist() == [1, 0, 1]
    assert scores.pair_attempts.tolist() == [[0, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert float(scores.success_rate_targeted) == pytest.approx(2 / 3)


def test_nontargeted_by_hand() -> None:
    metric = NonTargetedSuccess(3)
    metric.update(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor([0.4, 0.9, 0.6]))
    metric.update(torch.tensor([2]), torch.tensor([2]), torch.tensor([1.0]))
    scores = metric.compute()
    assert float(scores.success_rate_nontargeted) == 0.5
    assert float(scores.confidence) == pytest.approx(0.5)
    assert scores.pair_successes.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert scores.attempts.tolist() == [2, 1, 1]


def test_nothing_counted_is_nan_and_no_success_has_no_confidence() -> None:
    empty = AllTargetsSuccess(3).compute()
    assert all(math.isnan(float(value)) for value in empty[:5])
    metric = AllTargetsSuccess(3)
    metric.update(*(torch.tensor(values) for values in ([0], [0, 0], [1, 2], [0, 0])), torch.tensor([0.1, 0.2]))
    scores = metric.compute()
    assert float(scores.success_rate_targeted) == float(scores.success_rate_any_change) == 0
    assert math.isnan(float(scores.confidence))
    assert math.isnan(float(NonTargetedSuccess(3).compute().success_rate_nontargeted))


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes=1: at least two"):
        AllTargetsSuccess(1)
    with pytest.raises(UserError, match="num_classes=0: at least two"):
        NonTargetedSuccess(0)
    metric = AllTargetsSuccess(3)
    labels, image, target = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1, 2])
    sure = torch.tensor([0.5, 0.5])
    for match, arguments in {
        "labels reach from 0 to 5": (torch.tensor([0, 5]), image, target, target, sure),
        "image reach from 0 to 2": (labels, torch.tensor([0, 2]), target, target, sure),
        "target is the image's own class": (labels, image, torch.tensor([1, 1]), target, sure),
        "is given twice": (labels, torch.tensor([0, 0]), torch.tensor([1, 1]), target, sure),
        r"predicted of shape \(1,\)": (labels, image, target, target[:1], sure),
        "one probability a run is needed": (labels, image, target, target, sure[:1]),
        r"outside \[0, 1\]": (labels, image, target, target, sure * 3),
    }.items():
        with pytest.raises(UserError, match=match):
            metric.update(*arguments)
    assert metric.compute().classes_reached.sum() == 0
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        NonTargetedSuccess(3).update(labels, target, torch.tensor([0.5, float("nan")]))


# -- the same on any number of ranks, and with any batch size ----------------------------------------------------------


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(CLASSES, (COUNT,), generator=generator)
    others = torch.stack([torch.tensor([k for k in range(CLASSES) if k != int(label)]) for label in labels])
    hit = torch.rand(COUNT, CLASSES - 1, generator=generator) < 0.4
    third = torch.randint(CLASSES, (COUNT, CLASSES - 1), generator=generator)
    return {
        "labels": labels,
        "targets": others,
        "predicted": torch.where(hit, others, torch.where(third == others, labels[:, None], third)),
        # of very different size: sums in float32 would depend on their order
        "confidence": torch.rand(COUNT, CLASSES - 1, generator=generator) ** 9,
    }


def new_metrics() -> dict[str, Any]:
    return {"all": AllTargetsSuccess(CLASSES), "non": NonTargetedSuccess(CLASSES)}


def feed(metrics: dict[str, Any], images: dict[str, Tensor], rows: Tensor) -> None:
    batch = {name: values[rows] for name, values in images.items()}
    image = torch.arange(len(rows)).repeat_interleave(CLASSES - 1).to(batch["labels"].device)
    flat = [batch[name].flatten() for name in ("targets", "predicted", "confidence")]
    metrics["all"].update(batch["labels"], image, *flat)
    metrics["non"].update(batch["labels"], batch["predicted"][:, 0], batch["confidence"][:, 0])


def results(metrics: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": value.cpu()
        for kind, metric in metrics.items()
        for name, value in metric.compute()._asdict().items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rate = value.dim() == 0 and not name.endswith(("images", "runs"))
        assert value.dtype == (torch.float64 if rate else torch.int64)
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0, equal_nan=True)


def in_one_go() -> dict[str, Tensor]:
    metrics = new_metrics()
    feed(metrics, data(), torch.arange(COUNT))
    return results(metrics)


def _rank(rank: int, world: int, batch: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    metrics, images = new_metrics(), data()
    for start in range(rank * batch, COUNT, world * batch):
        feed(metrics, images, torch.arange(start, min(start + batch, COUNT)))
    torch.save(results(metrics), f"{folder}/{rank}.pt")
    assert int(metrics["all"].classes_reached.sum()) < COUNT or world == 1, "compute must leave a rank its own state"
    distributed.destroy_process_group()


@pytest.mark.parametrize(("world", "batch"), [(2, 4), (3, 10)])
def test_real_processes_agree(world: int, batch: int, tmp_path: Path) -> None:
    # with 3 ranks and batches of 10 the last rank has no image at all
    method = "fork" if "fork" in mp.get_all_start_methods() else "spawn"
    mp.start_processes(_rank, args=(world, batch, str(tmp_path)), nprocs=world, start_method=method)
    expected = in_one_go()
    for rank in range(world):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(COUNT)), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_any_order_batching_and_sharding_agrees(order: list[int], sizes: list[int], ranks: int) -> None:
    shards, images = [new_metrics() for _ in range(ranks)], data()
    start = turn = 0
    while start < COUNT:
        size = sizes[turn % len(sizes)]
        feed(shards[turn % ranks], images, torch.tensor(order[start : start + size]))
        start, turn = start + size, turn + 1
    merged = shards[0]
    for name, metric in merged.items():
        for shard in shards[1:]:
            metric.merge_state(shard[name])
    assert_same(results(merged), in_one_go())


def test_empty_batches_inference_mode_and_half_precision_change_nothing() -> None:
    metrics, images = new_metrics(), data()
    feed(metrics, images, torch.arange(5))
    metrics = copy.deepcopy(metrics)
    with torch.inference_mode():
        for metric in metrics.values():
            metric.reset()
            metric.half().bfloat16()  # what Lightning calls on a module in true half precision
    feed(metrics, images, torch.arange(7))
    feed(metrics, images, torch.arange(0))
    with torch.inference_mode():
        feed(metrics, images, torch.arange(7, COUNT))
    assert_same(results(metrics), in_one_go())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees() -> None:
    metrics = {name: metric.to("cuda") for name, metric in new_metrics().items()}
    feed(metrics, {name: values.cuda() for name, values in data().items()}, torch.arange(COUNT))
    assert_same(results(metrics), in_one_go())
