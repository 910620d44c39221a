"""Figures are looked at by people; what can be checked without eyes is checked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from PIL import Image

from lightning_robust.errors import UserError
from lightning_robust.report import (
    adversarial_examples,
    class_heatmaps,
    curve,
    heatmap,
    save_figure,
    to_uint8_image,
)
from lightning_robust.report.heatmaps import _edges

from .conftest import assert_legible, texts, written

UNIT = "mean |∂ loss / ∂ pixel| (nat per unit of pixel value)"
NAMES = ["T-shirt/top", "German short-haired pointer, a sausage dog and other hounds", "$5 bill, not $10", "ship"]


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (224, 224), (12, 40), (300, 20), (1, 1)])
@pytest.mark.parametrize("designated", [False, True])
def test_heatmap_of_any_size_is_legible(size: tuple[int, int], designated: bool) -> None:
    marks = torch.zeros(size, dtype=torch.bool)
    marks[::2, ::2] = True
    title = "Mean input gradient of a network with a rather long name on a data set, as measured"
    figure = heatmap(torch.rand(size), title=title, unit_label=UNIT, designated=marks if designated else None)
    assert_legible(figure)
    assert title in written(figure)
    assert UNIT in written(figure)
    assert ("designated" in written(figure)) == designated
    # each pixel has the same whole number of screen pixels
    box = figure.axes[0].get_window_extent()
    assert box.width / size[1] == pytest.approx(round(box.width / size[1]), abs=1e-6)
    assert box.height / size[0] == pytest.approx(round(box.width / size[1]), abs=1e-6)


def test_heatmap_shows_the_values_where_they_are() -> None:
    values = torch.zeros(8, 8)
    values[1, 6] = 1.0
    figure = heatmap(values, title="one pixel", unit_label="value")
    image, box = to_uint8_image(figure), figure.axes[0].get_window_extent()
    step = box.width / 8
    bright = [
        (row, column)
        for row in range(8)
        for column in range(8)
        if image[int(image.shape[0] - box.y1 + (row + 0.5) * step), int(box.x0 + (column + 0.5) * step)].sum() > 300
    ]
    assert bright == [(1, 6)]


def test_outlines_surround_exactly_the_designated_pixels() -> None:
    marks = np.zeros((3, 4), dtype=bool)
    marks[0, 0] = marks[2, 2] = marks[2, 3] = True
    edges = {tuple(map(tuple, edge)) for edge in _edges(marks).tolist()}
    assert edges == {
        *[
            ((-0.5, -0.5), (-0.5, 0.5)),
            ((0.5, -0.5), (0.5, 0.5)),
            ((-0.5, -0.5), (0.5, -0.5)),
            ((-0.5, 0.5), (0.5, 0.5)),
        ],
        *[((1.5, 1.5), (1.5, 2.5)), ((3.5, 1.5), (3.5, 2.5))],
        *[((x - 0.5, y), (x + 0.5, y)) for x in (2, 3) for y in (1.5, 2.5)],
    }
    figure = heatmap(torch.rand(3, 4), title="t", unit_label="u", designated=torch.from_numpy(marks))
    (lines,) = figure.axes[0].findobj(LineCollection)
    assert len(lines.get_segments()) == len(edges)


def test_a_fine_grid_is_shown_in_a_detail_and_a_contour_on_the_map() -> None:
    grid, region = torch.zeros(2, 224, 224, dtype=torch.bool)
    grid[::2, ::2] = True
    region[50:150, 60:170] = True
    assert "detail" in written(heatmap(torch.rand(224, 224), title="t", unit_label="u", designated=grid))
    figure = heatmap(torch.rand(224, 224), title="t", unit_label="u", designated=region)
    assert "detail" not in written(figure)
    assert len(figure.axes[0].findobj(LineCollection)) == 1


def test_an_outlier_does_not_take_the_contrast_and_is_told() -> None:
    values = torch.rand(32, 32)
    assert "above the scale" not in written(heatmap(values, title="t", unit_label="u"))
    values[3, 3] = 50
    figure = heatmap(values, title="t", unit_label="u")
    assert "above the scale, up to 50" in written(figure)
    assert figure.axes[0].images[0].norm.vmax < 1.01
    assert_legible(figure)


def test_constant_map_has_a_scale() -> None:
    for value in (0.0, -3.0, 1e-30):
        assert_legible(heatmap(torch.full((4, 4), value), title="t", unit_label="u"))


@pytest.mark.parametrize("count", [1, 4, 10, 43])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (96, 64)])
def test_class_heatmaps_are_legible_and_share_a_scale(count: int, size: tuple[int, int]) -> None:
    maps = torch.rand(count, *size) * torch.arange(1, count + 1)[:, None, None]
    names = [NAMES[i % 4] for i in range(count)]
    marks = torch.zeros(size)
    marks[::2, ::2] = 1
    figure = class_heatmaps(maps, names, title="Gradients of each class", unit_label=UNIT, designated=marks)
    assert_legible(figure)
    assert len({image.norm for axes in figure.axes for image in axes.images if image.get_cmap().name == "magma"}) == 1
    assert all(name in written(figure) for name in names[:1])


def test_class_without_images_is_named() -> None:
    maps = torch.rand(3, 8, 8)
    maps[1] = float("nan")
    assert "no images" in written(class_heatmaps(maps, NAMES[:3], title="t", unit_label="u"))
    with pytest.raises(UserError, match="no class has a map"):
        class_heatmaps(maps[1:2], NAMES[:1], title="t", unit_label="u")


def test_many_classes_are_cut_with_a_word() -> None:
    figure = class_heatmaps(torch.rand(70, 4, 4), [str(i) for i in range(70)], title="Maps", unit_label="u")
    assert "Maps (first 64 of 70 classes)" in written(figure)


def pictures(count: int, channels: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.rand(count, channels, side, side)
    return clean, (clean + 8 / 255 * torch.randn_like(clean).sign()).clamp(0, 1)


@pytest.mark.parametrize(("count", "channels", "side"), [(1, 1, 8), (3, 3, 32), (8, 1, 28), (8, 3, 32), (2, 3, 224)])
@pytest.mark.parametrize("confident", [False, True])
def test_adversarial_examples_are_legible(count: int, channels: int, side: int, confident: bool) -> None:
    labels = torch.arange(count) % 4
    sure = torch.rand(count) if confident else None
    figure = adversarial_examples(
        *pictures(count, channels, side),
        labels,
        labels,
        (labels + 1) % 4,
        NAMES,
        title="PGD-20 on a network",
        eps="8/255",
        norm="linf",
        clean_confidence=sure,
        adversarial_confidence=sure,
    )
    assert_legible(figure)
    assert len(figure.axes) == 3 * count
    assert "L∞, ε = 8/255" in written(figure)
    assert "difference × 16" in written(figure)
    assert ("%" in written(figure)) == confident


def test_robust_is_green_and_fooled_is_red() -> None:
    figure = adversarial_examples(
        *pictures(2, 3, 8), [0, 3], [0, 3], [0, 0], ["cat", "-", "-", "ship"], title="t", clean_confidence=[0.5, 1]
    )
    colours = {t.get_text(): to_hex(t.get_color()) for t in texts(figure) if t.get_text() not in ("clean", "t")}
    assert colours["cat (50%)"] == colours["ship (100%)"] == colours["cat"] == "#1b7837"
    assert colours["cat\nlabel: ship"] == "#b2182b"


def test_difference_is_signed_around_grey() -> None:
    clean = torch.full((1, 1, 2, 2), 0.5)
    adversarial = clean + torch.tensor([[0.1, -0.1], [0.0, 0.05]])
    figure = adversarial_examples(clean, adversarial, [0], [0], [0], ["a"], title="t", eps=0.1, norm="linf")
    difference = figure.axes[2].images[0].get_array()
    np.testing.assert_allclose(difference[..., 0], [[1.0, 0.0], [0.5, 0.75]], atol=1e-6)
    assert "difference × 5" in written(figure)


def test_unchanged_images_are_grey() -> None:
    clean, _ = pictures(2, 3, 8)
    figure = adversarial_examples(clean, clean, [0, 1], [0, 1], [0, 1], NAMES, title="t")
    assert (figure.axes[2].images[0].get_array() == 0.5).all()


def test_at_most_eight_examples() -> None:
    labels = [0] * 20
    assert len(adversarial_examples(*pictures(20, 1, 8), labels, labels, labels, ["a"], title="t").axes) == 24


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "ε = 8/255"), (0.3, "ε = 0.3"), ("8/255", "ε = 8/255")])
def test_budget_is_written_as_the_field_writes_it(eps: float | str, text: str) -> None:
    figure = adversarial_examples(*pictures(1, 1, 8), [0], [0], [0], ["a"], title="t", eps=eps, norm="linf")
    assert text in written(figure)


def test_curves_are_legible() -> None:
    x = [0, 1, 2, 4, 8]
    series = {"PGD-20, a network with a long name": [0.9, 0.7, float("nan"), 0.3, 0.1], "$x$ [0, 1]": torch.rand(5)}
    ci = {"$x$ [0, 1]": (torch.zeros(5), torch.ones(5))}
    figure = curve(x, series, "ε (1/255)", "robust accuracy", "Robust accuracy over ε", ci)
    assert_legible(figure)
    axes = figure.axes[0]
    assert axes.get_ylim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4", "8"]
    assert len(axes.collections) == 1
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), series["PGD-20, a network with a long name"])
    many = {f"series number {i}": np.arange(60) * i for i in range(12)}
    assert_legible(curve(np.linspace(0, 1, 60), many, "λ", "loss (nat)", "Twelve series"))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UserError, match="2 dimensions"):
        heatmap(torch.rand(3, 4, 4), title="t", unit_label="u")
    with pytest.raises(UserError, match="NaN"):
        heatmap(torch.tensor([[float("nan")]]), title="t", unit_label="u")
    with pytest.raises(UserError, match="do not fit"):
        heatmap(torch.rand(4, 4), title="t", unit_label="u", designated=torch.ones(4, 5))
    with pytest.raises(UserError, match="3 class names for 2 maps"):
        class_heatmaps(torch.rand(2, 4, 4), NAMES[:3], title="t", unit_label="u")
    with pytest.raises(UserError, match="1 or 3"):
        adversarial_examples(*pictures(1, 2, 8), [0], [0], [0], ["a"], title="t")
    with pytest.raises(UserError, match="labels are 2 classes"):
        adversarial_examples(*pictures(2, 1, 8), [0, 4], [0, 0], [0, 0], NAMES, title="t")
    with pytest.raises(UserError, match="3 confidences for 1 images"):
        adversarial_examples(*pictures(1, 1, 8), [0], [0], [0], ["a"], title="t", clean_confidence=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="no series"):
        curve([1], {}, "x", "y", "t")
    with pytest.raises(UserError, match="a has 2 values for 3 positions"):
        curve([1, 2, 3], {"a": [1, 2]}, "x", "y", "t")
    with pytest.raises(UserError, match="which is no series"):
        curve([1, 2], {"a": [1, 2]}, "x", "y", "t", ci={"b": ([0, 0], [1, 1])})


def test_saved_and_drawn_images_are_the_same(tmp_path: Path) -> None:
    figure = heatmap(torch.rand(8, 8), title="t", unit_label="u")
    path = save_figure(figure, tmp_path / "figures" / "map.png")
    drawn = to_uint8_image(figure)
    assert drawn.dtype == np.uint8
    assert drawn.shape[2] == 3
    np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), drawn)
    assert [entry.name for entry in path.parent.iterdir()] == ["map.png"]
    for suffix in ("pdf", "svg"):
        assert save_figure(figure, tmp_path / f"map.{suffix}").stat().st_size > 1000
    with pytest.raises(UserError, match=r"name it \.png"):
        save_figure(figure, tmp_path / "map.doc")


def test_no_window_and_no_global_state() -> None:
    code = (
        "import sys, torch, lightning_robust.report as r\n"
        "r.to_uint8_image(r.heatmap(torch.rand(4, 4), title='t', unit_label='u'))\n"
        "r.to_uint8_image(r.curve([1, 2], {'a': [1, 2]}, 'x', 'y', 't'))\n"
        "pyplot = sys.modules.get('matplotlib.pyplot')\n"  # torchmetrics may have imported it; no figure may be its own
        "sys.exit('pytorch_lightning' in sys.modules or pyplot is not None and bool(pyplot.get_fignums()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real_data
def test_real_images(real_data: Path, tmp_path: Path) -> None:
    strip = np.asarray(Image.open(real_data / "cifar10" / "test_images.png")).reshape(-1, 32, 32, 3)[:8]
    clean = torch.from_numpy(strip.copy()).permute(0, 3, 1, 2) / 255
    adversarial = (clean + 8 / 255 * torch.randn_like(clean).sign()).clamp(0, 1)
    labels = np.load(real_data / "cifar10" / "test_labels.npz")
    truth = labels["labels"][:8]
    figure = adversarial_examples(
        clean, adversarial, truth, truth, truth, [str(name) for name in labels["classes"]], title="noise", eps=8 / 255
    )
    assert_legible(figure)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), strip[0] / 255, atol=1e-6)
    assert save_figure(figure, tmp_path / "examples.png").is_file()
