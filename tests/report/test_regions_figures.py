"""The figures of regions: what stands where, and colours that are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from lightning_robust.errors import UserError
from lightning_robust.regions import REGION_NAMES, Region
from lightning_robust.report import (
    REGION_COLOURS,
    blob_figure,
    region_examples,
    region_representatives,
    save_figure,
    score_figure,
    to_uint8_image,
)


def maps(count: int, side: int = 12) -> list[torch.Tensor]:
    return list(torch.rand(count, side, side))


def regions(count: int, side: int = 12) -> list[torch.Tensor]:
    return list(torch.randint(0, 4, (count, side, side)))


def test_the_colours_differ_in_brightness_too() -> None:
    weights = np.array([0.299, 0.587, 0.114])
    brightness = sorted(float(weights @ np.array(to_rgb(REGION_COLOURS[region]))) for region in Region)
    assert min(np.diff(brightness)) > 0.08
    assert set(REGION_COLOURS) == set(Region)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 64), (3, 400)])
def test_examples(channels: int, side: int, tmp_path: Any) -> None:
    images = list(torch.rand(3, channels, side, side))
    figure = region_examples(
        images, maps(3, side), maps(3, side), regions(3, side), ["0 → 1", "0 → 1", "$1 → 0"], title="FGSM"
    )
    assert len(figure.axes) == 3 * 4 + 2  # and two colour bars
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [REGION_NAMES[region] for region in Region]
    picture = to_uint8_image(figure)
    assert picture.shape[1] < 1400
    assert save_figure(figure, tmp_path / "f.png").stat().st_size > 1000


def test_the_regions_have_their_colours() -> None:
    white = [torch.ones(1, 4, 4)]
    parts = [torch.arange(16).view(4, 4) % 4]
    figure = region_examples(white, maps(1, 4), maps(1, 4), parts, ["a"], title="t")
    shown = figure.axes[2 + 3].images[0].get_array()  # the two colour bars come first
    for region in Region:
        np.testing.assert_allclose(shown[0, region], to_rgb(REGION_COLOURS[region]), atol=1e-6)


def test_representatives_and_blobs() -> None:
    figure = region_representatives(maps(2), maps(2), torch.stack(regions(2)), ["a", "b"], title="t")
    assert len(figure.axes) == 2 * 3 + 2
    assert [axes.get_ylabel() for axes in figure.axes[:2]] == ["mean importance", "mean change (L2, pixel units)"]
    many = region_representatives(maps(12), maps(12), regions(12), ["x"] * 12, title="t")
    assert any("first 10 of 12" in text.get_text() for text in many.texts)
    images = list(torch.rand(2, 3, 12, 12))
    masks = [values > 0.5 for values in maps(2)]
    figure = blob_figure(maps(2), masks, images, images, ["a", "b"], title="t")
    assert any("magenta: the blob" in text.get_text() for text in figure.texts)
    shown = figure.axes[1 + 1].images[0].get_array()
    outside = ~masks[0].numpy()
    np.testing.assert_allclose(shown[outside], images[0].numpy().transpose(1, 2, 0)[outside], atol=1e-6)
    assert not np.allclose(shown[~outside], images[0].numpy().transpose(1, 2, 0)[~outside])


def row(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"attack": "fgsm", "budget": "ε", "direction": "0 → 1", "blob_of": "known"}
    for name in ("clean", "adv", "mod", "write", "held", "adaptive"):
        values |= {name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6}
    return values | changes


def test_scores() -> None:
    figure = score_figure([row(), row(direction="1 → 0", adaptive=None), row(blob_of="pair")], title="t")
    assert [text.get_text().splitlines()[0] for text in figure.axes[0].get_yticklabels()] == ["0 → 1", "1 → 0"]
    assert len(figure.axes[0].containers) == 6 + 5
    assert len(figure.legends[0].get_texts()) == 6
    paper = score_figure([row(paper_clean=1.0, paper_mod=None, paper_adv=0.9, paper_mod_adv=0.9)], title="t")
    assert paper.legends[0].get_texts()[-1].get_text() == "hollow: the paper's (FGSM)"


def test_bad_input() -> None:
    images = list(torch.rand(2, 1, 12, 12))
    for make, message in (
        (lambda: region_examples(images, maps(1), maps(2), regions(2), ["a", "b"], title=""), "importance maps"),
        (lambda: region_examples(images, maps(2), maps(2), regions(2), ["a"], title=""), "1 labels for 2 images"),
        (
            lambda: region_examples(
                list(torch.rand(1, 2, 4, 4)), maps(1, 4), maps(1, 4), regions(1, 4), ["a"], title=""
            ),
            "one or three channels",
        ),
        (lambda: region_representatives(maps(2), maps(1), regions(2), ["a", "b"], title=""), "give one of each"),
        (lambda: blob_figure(maps(2), maps(2), images, images, ["a"], title=""), "1 labels, 2 images"),
        (lambda: score_figure([row(blob_of="pair")], title=""), "no row with blob_of='known'"),
    ):
        with pytest.raises(UserError, match=message):
            make()
