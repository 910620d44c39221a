"""The table of foreground masks over several runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_robust.errors import UserError
from lightning_robust.report.foreground import PUBLISHED, draw, main, printed, summarize, write


def run_of(folder: Path, adversarial: int, own_view: int, base: float, **more: float) -> Path:
    """A run's results with numbers that say where they come from."""
    values = {
        "own_view": own_view,
        "adversarial": adversarial,
        "whole/clean": base,
        "whole/foreground": base - 0.1,
        "whole/image": base - 0.2,
        "given/clean": base - 0.05,
        "given/foreground": base - 0.15,
        "given/image": base - 0.25,
        "dilated_1/clean": base - 0.06,
        "dilated_1/foreground": base - 0.16,
        "gradient_inside": 0.2,
        "gradient_outside": 0.1,
        "iou": 0.5,
        "iou_by_chance": 0.3,
        **more,
    }
    folder.mkdir()
    results: dict[str, Any] = {f"test/foreground/{name}": value for name, value in values.items()}
    (folder / "results.json").write_text(json.dumps({**results, "test/acc": 0.9, "test/other": None}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """In no order."""
    predicted = {"predicted/clean": 0.8, "predicted/foreground": 0.7, "predicted/image": 0.6, "predicted/held": 0.75}
    predicted |= {"predicted/masks": 0.65, "mask_iou": 0.9, "mask_iou_attacked": 0.4}
    return [
        run_of(tmp_path / "xfg_a", 1, 1, 0.5, strong=0.33),
        run_of(tmp_path / "x_n", 0, 0, 0.9),
        run_of(tmp_path / "x_a", 1, 0, 0.6),
        run_of(tmp_path / "xfg_n", 0, 1, 0.85),
        run_of(tmp_path / "learned", 0, 2, 0.85, **predicted),
    ]


def test_rows_in_the_papers_order(runs: list[Path]) -> None:
    rows = summarize(runs)
    names = [(row["train"], row["data"]) for row in rows]
    assert names == [("N", "X"), ("N", "X_fg"), ("N", "X_fg, predicted"), ("A", "X"), ("A", "X_fg")]
    whole, given, predicted, _, attacked = rows
    assert (whole["natural"], whole["pgd"], whole["pgd_foreground"]) == pytest.approx((0.9, 0.7, 0.8))
    assert (given["natural"], given["pgd"], given["pgd_image"]) == pytest.approx((0.8, 0.7, 0.6))
    assert (predicted["natural"], predicted["pgd"], predicted["pgd_held"]) == pytest.approx((0.8, 0.6, 0.75))
    assert attacked["strong"] == 0.33
    assert (predicted["pgd_masks"], predicted["mask_iou"], predicted["mask_iou_attacked"]) == (0.65, 0.9, 0.4)
    assert math.isnan(whole["pgd_masks"])
    assert math.isnan(given["pgd_held"])
    assert whole["views"]["dilated_1"] == pytest.approx({"clean": 0.84, "foreground": 0.74})


def test_files_and_words(runs: list[Path], tmp_path: Path) -> None:
    rows = summarize(runs)
    files = write(rows, tmp_path / "out", "gtsrb")
    assert [file.name for file in files] == ["foreground.csv", "foreground_views.csv", "foreground.png"]
    with files[0].open() as file:
        table = list(csv.DictReader(file))
    assert [row["paper_pgd"] for row in table] == ["0.1869", "0.3838", "nan", "0.5525", "0.6457"]
    shown = printed(rows, "gtsrb")
    assert shown[0]["natural"] == "90.00%"
    assert shown[0]["paper: PGD"] == "18.69%"
    assert shown[2]["paper: PGD"] is None
    assert "AutoAttack" in shown[0]
    assert "PGD, masks held" not in printed(rows[:2])[0]
    texts = [text.get_text() for axes in draw(rows).axes for text in axes.texts]
    assert "90.0" in texts
    named = " ".join(text.get_text().replace("\n", " ") for text in draw(rows).texts)
    assert named.index("whole") < named.index("dilated 1") < named.rindex("predicted")


def test_the_published_differences() -> None:
    """The text of the paper names them: +0.73, +19.69, +22.82 and +9.32 points."""
    coco, gtsrb = PUBLISHED["coco"], PUBLISHED["gtsrb"]
    gains = [
        coco["N", "X_fg"][1] - coco["N", "X"][1],
        gtsrb["N", "X_fg"][1] - gtsrb["N", "X"][1],
        coco["A", "X_fg"][1] - coco["A", "X"][1],
        gtsrb["A", "X_fg"][1] - gtsrb["A", "X"][1],
    ]
    assert [round(100 * gain, 2) for gain in gains] == [0.73, 19.69, 22.82, 9.32]


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*map(str, runs), "--out", str(tmp_path / "out"), "--paper", "coco"])
    said = capsys.readouterr().out
    assert "72.92%" in said
    assert str(tmp_path / "out" / "foreground.png") in said


def test_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="are both trained adversarially on X_fg: leave one out"):
        summarize([runs[0], run_of(tmp_path / "again", 1, 1, 0.4)])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="is no run"):
        summarize([tmp_path / "bare"])
    (tmp_path / "bare" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="measure the run with ForegroundStudy"):
        summarize([tmp_path / "bare"])
    (tmp_path / "bare" / "results.json").write_text("{")
    with pytest.raises(UserError, match="holds no JSON"):
        summarize([tmp_path / "bare"])
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "bare")])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
