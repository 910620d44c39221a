"""IoU of the map's top pixels with designated ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_robust.callbacks import InputGradientMap, PixelIoU
from lightning_robust.errors import UserError

Make = Callable[..., Any]


def iou(values: np.ndarray, designated: np.ndarray, count: int) -> float:
    top = np.zeros(values.size, bool)
    top[np.argsort(values.ravel())[::-1][:count]] = True
    return float((top & designated.ravel()).sum() / (top | designated.ravel()).sum())


def test_patterns_and_files(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    mask = np.tri(8) > 0
    np.save(tmp_path / "mask.npy", mask)
    callbacks = [
        PixelIoU(),  # stands before the map's callback: the order does not matter
        InputGradientMap(),
        PixelIoU(stride=4, offset=1, name="sparse"),
        PixelIoU(mask=str(tmp_path / "mask.npy"), name="own"),
        PixelIoU(mask=str(tmp_path / "mask.npy"), share=0.1, name="few"),
    ]
    run = trainer(*callbacks, logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    folder = tmp_path / "runs" / "run" / "version_0"
    values = np.load(folder / "tables" / "input_gradient_test.npy")
    even, sparse = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    even[::2, ::2] = True
    sparse[1::4, 1::4] = True
    wanted = {
        "input_gradient_iou": iou(values, even, 16),
        "sparse": iou(values, sparse, 4),
        "own": iou(values, mask, 36),
        "few": iou(values, mask, 6),
    }
    found = {name: float(run.callback_metrics[f"test/{name}"]) for name in wanted}
    assert found == pytest.approx(wanted)
    assert {f"{name}_test.png" for name in wanted} <= {path.name for path in (folder / "figures").iterdir()}


def test_bad_masks_are_refused_before_anything_runs(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.ones((4, 4)))
    cases: list[tuple[list[Any], str]] = [
        ([PixelIoU()], "reads the map of InputGradientMap"),
        ([InputGradientMap(), PixelIoU(), PixelIoU(stride=4)], "two of them log under the name 'input_gradient_iou'"),
        ([InputGradientMap(), PixelIoU(mask=str(tmp_path / "small.npy"))], "4.*4"),
        ([InputGradientMap(), PixelIoU(mask=str(tmp_path / "missing.npy"))], "missing.npy"),
        ([InputGradientMap(), PixelIoU(mask="batch", share=0.1)], "the data gives none: batches must be"),
    ]
    for callbacks, message in cases:
        with pytest.raises(UserError, match=message):
            trainer(*callbacks).test(model(), digits(), verbose=False)
    with pytest.raises(UserError, match="give share"):
        PixelIoU(mask="batch")
    with pytest.raises(UserError, match="share=2"):
        PixelIoU(share=2)
