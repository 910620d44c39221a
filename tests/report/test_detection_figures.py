"""Figures of the detection study say what they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.report import roc_curves, save_figure, sensitivity_histograms, to_uint8_image


def test_roc_curves(tmp_path) -> None:
    false, true = torch.tensor([0.0, 0.2, 1.0]), torch.tensor([0.0, 0.9, 1.0])
    figure = roc_curves({"fgsm": (false, true, 0.85), "$cw$": (false, false, 0.5)}, title="nai $ 5 %")
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(lines) == ["fgsm  0.8500", "$cw$  0.5000"]
    np.testing.assert_allclose(lines["fgsm  0.8500"].get_xydata(), torch.stack([false, true], 1))
    assert save_figure(figure, tmp_path / "roc.png").stat().st_size > 1000
    assert to_uint8_image(figure).std() > 5


def test_roc_curves_refuse() -> None:
    with pytest.raises(UserError, match="no curve"):
        roc_curves({}, title="")
    with pytest.raises(UserError, match="2 false and 3 true"):
        roc_curves({"a": (torch.zeros(2), torch.zeros(3), 0.5)}, title="")


def test_sensitivity_histograms() -> None:
    normal, attacked = torch.zeros(101, dtype=torch.int64), torch.zeros(101, dtype=torch.int64)
    normal[0], normal[2], attacked[50], attacked[100] = 6, 2, 3, 1
    counts = {"normal": normal, "wrong": torch.zeros(101, dtype=torch.int64), "fgsm": attacked}
    figure = sensitivity_histograms(counts, threshold=0.04, natural=("normal", "wrong"), title="nai")
    to_uint8_image(figure)
    assert [axes.get_title(loc="right") for axes in figure.axes] == [
        "normal: 8 images, mean κ 0.0050",
        "fgsm: 4 images, mean κ 0.6250",
    ]
    for axes, shares in zip(figure.axes, ({0: 1.0}, {20: 0.75, 39: 0.25}), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert {place: height for place, height in enumerate(heights) if height > 0} == pytest.approx(shares)
        assert axes.lines[0].get_xdata()[0] == 0.04
    colours = [axes.patches[0].get_facecolor() for axes in figure.axes]
    assert colours[0] != colours[1]


def test_sensitivity_histograms_refuse() -> None:
    with pytest.raises(UserError, match="no kind has images"):
        sensitivity_histograms({"normal": torch.zeros(5)}, threshold=0.1, natural=(), title="")
