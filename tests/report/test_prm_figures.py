"""The figures of the sweep over λ and of the gray-box table: legible at every size, and of the right values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_robust.errors import UserError
from lightning_robust.report import AccuracyMatrix, accuracy_matrices, lambda_curves, lambda_maps, to_uint8_image

from .conftest import assert_legible

LAMS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1]
UNIT = "mean |∂loss/∂pixel|"


def axes_texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


class TestLambdaCurves:
    def test_chance_is_a_dashed_line(self) -> None:
        acc = np.linspace(0.9, 0.4, 14)
        figure = lambda_curves(
            LAMS, acc, np.linspace(0.1, 1, 14), chance=1 / 7, title="Accuracy and IoU of a net (test)"
        )
        assert_legible(figure)
        axes = figure.axes[0]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), acc)
        chance = axes.lines[2]
        np.testing.assert_allclose(chance.get_ydata(), 1 / 7)
        assert (chance.get_linestyle(), chance.get_marker()) == ("--", "none")
        handle = figure.legends[0].legend_handles[2]
        assert (handle.get_linestyle(), handle.get_marker()) == ("--", "none")
        assert "IoU by chance (0.14)" in [text.get_text() for text in figure.legends[0].get_texts()]


class TestLambdaMaps:
    @pytest.mark.parametrize("size", [(8, 8), (32, 32), (224, 224), (100, 20), (1, 1)])
    @pytest.mark.parametrize("count", [1, 3, 7, 14, 20])
    def test_legible(self, size: tuple[int, int], count: int) -> None:
        maps = torch.rand(count, *size) * 1e-3
        figure = lambda_maps(maps, LAMS[:1] * count, title="Mean input gradient as λ grows", unit_label=UNIT)
        assert_legible(figure)
        shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        assert len(shown) == count
        assert max(shown[0].shape) <= 64

    def test_each_map_has_its_own_scale(self) -> None:
        maps = torch.rand(14, 32, 32) * torch.logspace(-4, 0, 14)[:, None, None]
        figure = lambda_maps(maps, LAMS, title="Maps", unit_label=UNIT, iou=np.linspace(0, 1, 14).tolist())
        assert_legible(figure)
        for number, axes in enumerate(axes for axes in figure.axes if axes.images):
            assert axes.images[0].get_clim() == (0, pytest.approx(float(maps[number].max())))
        written = " ".join(text.get_text() for text in figure.texts)
        assert "λ = 0.999" in written
        assert "IoU 1.00" in written
        assert f"largest {float(maps[3].max()):.2e}" in written

    def test_a_map_of_zeros_and_the_middle_of_a_large_one(self) -> None:
        maps = torch.zeros(1, 100, 100)
        to_uint8_image(lambda_maps(maps, [0.0], title="Maps", unit_label=UNIT))
        maps[0, 18:82, 18:82] = 1
        figure = lambda_maps(maps, [0.0], title="Maps", unit_label=UNIT)
        assert figure.axes[0].images[0].get_array().min() == 1
        assert "in the middle of 100 × 100" in " ".join(text.get_text().replace("\n", " ") for text in figure.texts)

    def test_bad_input(self) -> None:
        for maps, lams in (
            (-torch.ones(1, 2, 2), [0]),
            (torch.full((1, 2, 2), torch.nan), [0]),
            (torch.ones(2, 2, 2), [0]),
        ):
            with pytest.raises(UserError, match="lambda_maps"):
                lambda_maps(maps, lams, title="Maps", unit_label=UNIT)


def matrix(rows: int, columns: int, title: str = "gray-box: transfer-from-base") -> AccuracyMatrix:
    values = torch.linspace(0, 1, rows * columns).view(rows, columns)
    return AccuracyMatrix(
        title=title,
        rows=[f"pixel deflection {number} (clean 91 %)" for number in range(rows)],
        columns=[f"attack {number} of a long name"[: 8 + 7 * (number % 3)] for number in range(columns)],
        values=values,
        marks=values < 0.3,
    )


class TestAccuracyMatrices:
    @pytest.mark.parametrize("shapes", [[(6, 6)], [(7, 6), (2, 6), (7, 4), (5, 5)], [(1, 1), (3, 2)], [(2, 3)] * 3])
    def test_legible(self, shapes: list[tuple[int, int]]) -> None:
        matrices = [matrix(*shape, title=f"reading {number}\n(of a kind)") for number, shape in enumerate(shapes)]
        note = "falls: less than half is left of what the defense showed in the gray-box reading"
        assert_legible(accuracy_matrices(matrices, title="Accuracy of defenses, 200 images (test)", note=note))

    def test_numbers_marks_and_what_was_not_measured(self) -> None:
        values = np.array([[0.914, np.nan], [0.05, 1.0]])
        marks = np.array([[False, False], [True, False]])
        figure = accuracy_matrices(
            [AccuracyMatrix(title="adaptive", rows=["a", "b"], columns=["x", "y"], values=values, marks=marks)],
            title="Accuracy",
        )
        assert axes_texts(figure) == ["91.4", "–", "5.0", "falls", "100.0"]
        cells = [patch for patch in figure.axes[0].patches if patch.get_fill()]
        frames = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
        assert len(cells) == 4
        assert len(frames) == 1
        dark = [sum(to_rgb(cell.get_facecolor())) for cell in cells]
        assert dark[3] < dark[0] < dark[2]  # the higher, the darker

    def test_bad_input(self) -> None:
        with pytest.raises(UserError, match="no matrix"):
            accuracy_matrices([], title="")
        good = {"title": "t", "rows": ["a"], "columns": ["x"], "values": np.ones((1, 1))}
        for change in (
            {"rows": ["a", "b"]},
            {"values": np.full((1, 1), 1.5)},
            {"values": np.full((1, 1), -0.1)},
            {"marks": np.ones((2, 1), bool)},
        ):
            with pytest.raises(UserError, match="accuracy_matrices: t"):
                accuracy_matrices([AccuracyMatrix(**(good | change))], title="")
