"""Figures of the distillation study, and the command that draws several runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_robust.errors import UserError
from lightning_robust.metrics.gradient_amplitude import RANGE_NAMES
from lightning_robust.report import gradient_ranges, success_against_temperature, success_bars, to_uint8_image
from lightning_robust.report.temperature import main, summarize


def test_success_bars() -> None:
    figure = success_bars({"jsma": 0.01, "cw": 1.0}, {"jsma": 0.95}, title="T = 100")
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in figure.axes[0].containers}
    assert bars == {"naive: softmax as it is": [0.01], "on logits / T": [0.95], "on the logits": [1.0]}
    assert [bar.get_x() + bar.get_width() / 2 for bar in figure.axes[0].patches] == pytest.approx([-0.2, 0.2, 1.0])
    assert to_uint8_image(figure).shape[2] == 3
    with pytest.raises(UserError, match="no attack"):
        success_bars({}, {}, title="")


def test_gradient_ranges_stack_up_to_all_images() -> None:
    counts = {"1": [0, 0, 0, 0, 0, 0, 0, 0, 25, 75], "100": [60, 10, 0, 0, 0, 0, 0, 10, 0, 0]}
    figure = gradient_ranges(counts, title="T")
    bars = figure.axes[0].patches
    assert len(bars) == 20
    for column in (0, 1):
        assert sum(bar.get_height() for bar in bars[column::2]) == pytest.approx(1)
    assert bars[1].get_height() == pytest.approx(0.75)  # the smallest range, of T = 100
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(RANGE_NAMES[::-1])
    alone = gradient_ranges({"100": counts["100"]}, title="T").axes[0].patches
    assert [bar.get_height() for bar in alone] == pytest.approx([0.75, 0.125, 0, 0, 0, 0, 0, 0.125, 0, 0])
    for bad in ({}, {"1": [1, 2]}):
        with pytest.raises(UserError, match="10 numbers of images"):
            gradient_ranges(bad, title="")


def test_success_against_temperature() -> None:
    figure = success_against_temperature([1, 10], {"jsma": [0.9, 0.0], "cw": [1, 1]}, {"jsma": [0.9, 0.95]}, title="T")
    lines = figure.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "-", "-"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [0.9, 0.0])
    np.testing.assert_array_equal(lines[1].get_ydata(), [0.9, 0.95])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["1", "10"]
    for bad in (([], {}, {}), ([1], {"jsma": [1, 2]}, {}), ([1], {"jsma": [1]}, {"jsma": []})):
        with pytest.raises(UserError, match="one rate for each temperature"):
            success_against_temperature(*bad, title="")


def run(folder: Path, temperature: float, **changes: Any) -> Path:
    """A run's results of a study."""
    start = "test/distillation"
    results = {f"{start}/gradient_range/{place}": 0.1 for place in range(10)} | {
        "test/acc": 0.99,
        f"{start}/temperature": temperature,
        f"{start}/images": 100.0,
        f"{start}/success_rate/jsma": 0.9 / temperature,
        f"{start}/success_rate/jsma_rescaled": 0.9,
        f"{start}/success_rate/fgsm": 0.3,
        f"{start}/success_rate/fgsm_rescaled": 0.4,
        f"{start}/robustness": 0.02,
        f"{start}/robustness_rescaled": 0.015,
        f"{start}/gradient_mean": 1e-5,
        f"{start}/gradient_log10": -temperature,
        f"{start}/logit_mean": 5 * temperature,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(tmp_path / name, value) for name, value in (("a", 100.0), ("b", 1.0))]
    rows = summarize([runs[0], runs[1] / "results.json"])
    assert [row["temperature"] for row in rows] == [1, 100]
    assert rows[1]["success_rate/jsma"] == pytest.approx(0.009)
    assert math.isnan(rows[0]["success_rate/pgd"])  # not measured
    main([*map(str, runs), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "0.90%" in said
    assert "1e-100.0" in said
    lines = (tmp_path / "out" / "temperature.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("temperature,acc,success_rate/jsma,success_rate/jsma_rescaled")
    for name in ("temperature_success.png", "temperature_gradients.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(tmp_path / "a", 1.0)
    run(tmp_path / "b", 1.0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text('{"test/acc": 1.0}')
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for given, message in (
        (tmp_path / "none", "is no run: give folders that hold a results.json"),
        (other, "has no test/distillation/temperature: measure the run with DistillationStudy"),
        (broken, "holds no JSON"),
        (tmp_path / "b", "are both of T = 1: leave one out"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(good), str(given)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
