"""The one-pixel study's figures: legible, and true to the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from lightning_robust.errors import UserError
from lightning_robust.report import save_figure
from lightning_robust.report.one_pixel import class_pairs, classes_reached, pixel_examples

from .conftest import assert_legible, texts, written

NAMES = ["T-shirt/top", "German short-haired pointer, a sausage dog and other hounds", "$5 bill, not $10", "ship"]


def pictures(count: int, channels: int, side: int, pixels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    clean = 0.2 + 0.6 * torch.rand(count, channels, side, side)
    adversarial = clean.clone()
    for number in range(count):
        places = torch.randperm(side * side)[:pixels]
        adversarial[number].view(channels, -1)[:, places] = torch.rand(channels, pixels).round()
    return clean, adversarial


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "channels", "side"), [(1, 1, 8), (3, 3, 32), (20, 3, 32), (9, 1, 28), (2, 3, 227)])
@pytest.mark.parametrize("pixels", [1, 3])
def test_examples_are_legible(count: int, channels: int, side: int, pixels: int) -> None:
    labels = torch.arange(count) % 4
    sure = torch.rand(count)
    figure = pixel_examples(
        *pictures(count, channels, side, pixels),
        labels,
        (labels + 1) % 4,
        NAMES,
        title="pixels3: OnePixel on a network with a rather long name, of a data set",
        confidence=sure,
    )
    assert_legible(figure)
    assert len(figure.axes) == count
    for number, axes in enumerate(figure.axes):
        assert len([patch for patch in axes.patches if isinstance(patch, Circle)]) == 2 * pixels
        box = axes.get_window_extent()  # each pixel has the same whole number of screen pixels
        assert box.width / side == pytest.approx(round(box.width / side), abs=1e-6)
        assert f"({float(sure[number]):.0%})" in written(figure)
    assert "true: T-shirt/top" in written(figure)
    assert "circled" in written(figure)


def test_the_ring_is_around_the_changed_pixel_and_the_picture_is_the_adversarial_one() -> None:
    clean = torch.full((1, 3, 6, 8), 0.5)
    adversarial = clean.clone()
    adversarial[0, 1, 4, 2] = 1.0  # one channel of one pixel
    figure = pixel_examples(clean, adversarial, [0], [3], NAMES, title="t")
    (axes,) = figure.axes
    assert {circle.center for circle in axes.patches} == {(2, 4)}
    np.testing.assert_allclose(axes.images[0].get_array()[4, 2], [0.5, 1.0, 0.5])
    assert "→ ship" in written(figure)
    assert "%" not in written(figure)


def test_unchanged_images_have_no_ring_and_many_changes_one_frame() -> None:
    clean, _ = pictures(2, 3, 16)
    assert not pixel_examples(clean, clean, [0, 1], [0, 1], NAMES, title="t").axes[0].patches
    adversarial = clean.clone()
    adversarial[:, :, 2:8, 3:13] = 0.0
    figure = pixel_examples(clean, adversarial, [0, 1], [1, 0], NAMES, title="t")
    frames = figure.axes[0].patches
    assert all(isinstance(frame, Rectangle) for frame in frames)
    assert frames[0].get_bbox().extents.tolist() == [2.5, 1.5, 12.5, 7.5]
    assert "framed" in written(figure)


def test_at_most_twenty_examples() -> None:
    labels = [0] * 30
    assert len(pixel_examples(*pictures(30, 1, 8), labels, [1] * 30, NAMES, title="t").axes) == 20


# -- class pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 10, 43])
@pytest.mark.parametrize("largest", [0, 7, 12345])
def test_class_pairs_are_legible(count: int, largest: int) -> None:
    names = [NAMES[number % 4] for number in range(count)]
    successes = torch.randint(0, largest + 1, (count, count))
    assert_legible(class_pairs(successes, names, title="Successes from each class to each other, as measured"))


def test_class_pairs_stand_where_they_belong() -> None:
    successes = torch.tensor([[0, 12, 0], [3, 0, 0], [0, 0, 0]])
    figure = class_pairs(successes, ["cat", "dog", "ship"], title="pairs", column_label="target class")
    inside = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert inside == {"12": (1, 0), "3": (0, 1)}  # (column, row)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), successes.numpy())
    said = written(figure)
    assert all(word in said for word in ("pairs", "true class", "target class", "successes", "cat", "dog", "ship"))
    assert len(figure.axes[0].patches) == 3  # the diagonal


def test_of_many_classes_those_with_most_successes_are_shown() -> None:
    successes = torch.zeros(1000, 1000)
    successes[700, 3], successes[3, 999] = 5, 2
    figure = class_pairs(successes, [f"class {number}" for number in range(1000)], title="Pairs")
    assert "40 of 1000 classes" in written(figure)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (40, 40)
    assert shown.sum() == 7
    assert {"class 3", "class 700", "class 999"} <= {text.get_text() for text in texts(figure)}


# -- histogram ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 43])
@pytest.mark.parametrize("attacks", [1, 3])
def test_classes_reached_is_legible(classes: int, attacks: int) -> None:
    counts = {f"pixels{number}": torch.randint(0, 200, (classes,)) for number in range(attacks)}
    figure = classes_reached(counts, title="How many classes an image of the test set can be driven to")
    assert_legible(figure)


def test_bars_are_shares_and_the_legend_names_the_images() -> None:
    figure = classes_reached({"one": [3, 1, 0], "three": [0, 1, 1]}, title="t")
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    assert heights == [[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]
    assert "one (4 images)" in written(figure)
    assert "three (2 images)" in written(figure)
    single = classes_reached({"one": [3, 1, 0]}, title="t")
    assert {text.get_text() for text in single.axes[0].texts} == {"3", "1", "0"}
    assert classes_reached({"none": [0, 0]}, title="t").axes  # no image at all


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UserError, match="1 or 3"):
        pixel_examples(*pictures(1, 2, 8), [0], [1], NAMES, title="t")
    with pytest.raises(UserError, match="labels are 2 classes"):
        pixel_examples(*pictures(2, 1, 8), [0, 4], [0, 1], NAMES, title="t")
    with pytest.raises(UserError, match="3 confidences for 1 images"):
        pixel_examples(*pictures(1, 1, 8), [0], [1], NAMES, title="t", confidence=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match=r"\(K, K\) with K names"):
        class_pairs(torch.zeros(2, 3), NAMES[:2], title="t")
    with pytest.raises(UserError, match=r"\(K, K\) with K names"):
        class_pairs(torch.zeros(2, 2), NAMES, title="t")
    with pytest.raises(UserError, match="below 0"):
        class_pairs(-torch.ones(2, 2), NAMES[:2], title="t")
    with pytest.raises(UserError, match="no attack"):
        classes_reached({}, title="t")
    with pytest.raises(UserError, match="2 and 3 classes in one figure"):
        classes_reached({"a": [1, 2], "b": [1, 2, 3]}, title="t")


@pytest.mark.real_data
def test_real_images(real_data: Path, tmp_path: Path) -> None:
    strip = np.asarray(Image.open(real_data / "cifar10" / "test_images.png")).reshape(-1, 32, 32, 3)[:6]
    clean = torch.from_numpy(strip.copy()).permute(0, 3, 1, 2) / 255
    adversarial = clean.clone()
    adversarial[:, :, 10, 20] = 1.0
    labels = np.load(real_data / "cifar10" / "test_labels.npz")
    names = [str(name) for name in labels["classes"]]
    truth = labels["labels"][:6]
    figure = pixel_examples(clean, adversarial, truth, (truth + 1) % 10, names, title="one white pixel")
    assert_legible(figure)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[0], strip[0, 0] / 255, atol=1e-6)
    assert save_figure(figure, tmp_path / "examples.png").is_file()
