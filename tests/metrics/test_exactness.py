"""The metric promise: the same number on 1, 2, 3 and 4 ranks and with any batch size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torchmetrics import Metric

from lightning_robust.metrics import InputGradient, PixelIoU, RobustAccuracy

COUNT, CLASSES, SIZE = 23, 4, (5, 6)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(CLASSES - 1, (COUNT,), generator=generator)  # the last class has no image
    return {
        # values of very different size, as gradients are: float32 sums would depend on their order
        "gradients": torch.randn(COUNT, 3, *SIZE, generator=generator)
        * 10 ** torch.randn(COUNT, 1, 1, 1, generator=generator).mul(3),
        "labels": labels,
        "clean": torch.where(torch.rand(COUNT, generator=generator) < 0.7, labels, (labels + 1) % CLASSES),
        "adversarial": torch.where(torch.rand(COUNT, generator=generator) < 0.4, labels, (labels + 2) % CLASSES),
        "fooled_8bit": torch.rand(COUNT, generator=generator) < 0.8,
        "masks": torch.rand(COUNT, *SIZE, generator=generator) < 0.25,
    }


def new_metrics() -> dict[str, Metric]:
    return {
        "overall": InputGradient(SIZE),
        "gradient": InputGradient(SIZE, CLASSES),
        "iou": PixelIoU(0.25),
        "robust": RobustAccuracy(CLASSES),
    }


def feed(metrics: dict[str, Any], images: dict[str, Tensor], rows: Tensor) -> None:
    batch = {name: values[rows] for name, values in images.items()}
    metrics["overall"].update(batch["gradients"])
    metrics["gradient"].update(batch["gradients"], batch["labels"])
    metrics["iou"].update(batch["gradients"].abs().mean(1), batch["masks"])
    metrics["robust"].update(batch["labels"], batch["clean"], batch["adversarial"], batch["fooled_8bit"])


def results(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "overall": metrics["overall"].compute().mean,
        "mean": metrics["gradient"].compute().mean,
        "per_class": metrics["gradient"].compute().per_class,
        "iou": metrics["iou"].compute(),
        **metrics["robust"].compute(),
        "rows": metrics["robust"].per_class(),
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name == "rows":
            for row, wanted in zip(actual["rows"], value, strict=True):
                assert row == pytest.approx(wanted, abs=0, rel=0, nan_ok=True)
        else:
            assert value.dtype == torch.float64
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=0, equal_nan=True)


def in_one_go() -> dict[str, Any]:
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
    assert int(metrics["overall"].images.sum()) < COUNT or world == 1, "compute must leave a rank its own state"
    distributed.destroy_process_group()


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 5), (3, 4), (4, 8)])
def test_real_processes_agree(world: int, batch: int, tmp_path: Path) -> None:
    # with 4 ranks and batches of 8 the last rank has no image at all
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


def test_empty_batch_changes_nothing() -> None:
    metrics, images = new_metrics(), data()
    feed(metrics, images, torch.arange(COUNT))
    feed(metrics, images, torch.arange(0))
    assert_same(results(metrics), in_one_go())


@pytest.mark.parametrize("reset_in_inference", [True, False])
def test_states_survive_inference_mode(reset_in_inference: bool) -> None:
    metrics, images = new_metrics(), data()
    with torch.inference_mode(reset_in_inference):
        for metric in metrics.values():
            metric.reset()
    with torch.inference_mode(not reset_in_inference):
        feed(metrics, images, torch.arange(10))
    feed(metrics, images, torch.arange(10, COUNT))
    assert_same(results(metrics), in_one_go())


def test_reset_copy_and_half_precision_keep_float64() -> None:
    metrics, images = new_metrics(), data()
    feed(metrics, images, torch.arange(3))
    metrics = copy.deepcopy(metrics)
    for metric in metrics.values():
        metric.reset()
        metric.half().bfloat16()  # what Lightning calls on a module in true half precision
    feed(metrics, images, torch.arange(COUNT))
    assert_same(results(metrics), in_one_go())


def test_sums_are_kept_in_float64() -> None:
    # in float32, 1e8 + 1 is 1e8
    metric = InputGradient((1, 1))
    metric.update(torch.full((1, 1, 1, 1), 1e8))
    for _ in range(9):
        metric.update(torch.ones(1, 1, 1, 1))
    assert float(metric.compute().mean) == (1e8 + 9) / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees() -> None:
    metrics, images = new_metrics(), data()
    feed(
        {name: metric.to("cuda") for name, metric in metrics.items()},
        {k: v.cuda() for k, v in images.items()},
        torch.arange(COUNT),
    )
    actual = {name: value if name == "rows" else value.cpu() for name, value in results(metrics).items()}
    assert_same(actual, in_one_go())
