"""The table of foreground masks over several runs: ``python -m lightning_robust.report.foreground RUN [RUN …]``.

Each run is one that :class:`~lightning_robust.callbacks.ForegroundStudy` measured (``study/foreground``): trained on
whole images X or on foregrounds X_fg, naturally (N) or adversarially (A). Prints and writes the paper's table (arXiv
1911.11946) with the columns it lacks, and draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_robust.errors import UserError
from lightning_robust.report.accuracy_matrices import AccuracyMatrix, accuracy_matrices
from lightning_robust.report.figures import save_figure
from lightning_robust.report.several_runs import results_of, runs_parser, said_in_a_line
from lightning_robust.report.tables import print_table, write_csv

#: Natural and PGD accuracy by training and data (VGG-19; ε, steps and image size are in no text that could be found).
PUBLISHED: dict[str, dict[tuple[str, str], tuple[float, float]]] = {
    "gtsrb": {
        ("N", "X"): (0.9804, 0.1869),
        ("N", "X_fg"): (0.9804, 0.3838),
        ("A", "X"): (0.8954, 0.5525),
        ("A", "X_fg"): (0.9120, 0.6457),
    },
    "coco": {
        ("N", "X"): (0.7946, 0.0228),
        ("N", "X_fg"): (0.8164, 0.0301),
        ("A", "X"): (0.6151, 0.3080),
        ("A", "X_fg"): (0.7292, 0.5362),
    },
}
_VIEWS = (("X", "whole"), ("X_fg", "given"), ("X_fg, predicted", "predicted"))
_ACCURACIES = {
    "natural": "natural",
    "pgd": "PGD",
    "pgd_foreground": "PGD, foreground",
    "pgd_image": "PGD, whole image",
    "pgd_held": "PGD, masks held",
    "pgd_masks": "PGD, on the masks",
    "strong": "AutoAttack",
}
_SHIFTS = ("clean", "foreground")


def summarize(runs: Sequence[str | Path], *, name: str = "foreground", stage: str = "test") -> list[dict[str, Any]]:
    """One row a run: natural training first, whole images first.

    Args:
        runs: folders of runs, or their ``results.json``.
        name: of the study.
        stage: "test" or "val".

    Returns:
        Rows of ``train`` ("N" or "A"), ``data`` ("X", "X_fg" or "X_fg, predicted"), ``natural``, ``pgd`` (the paper's
        attacker, who may change what the classifier sees), ``pgd_foreground``, ``pgd_image``, ``pgd_held``,
        ``pgd_masks`` (who goes for predicted masks alone), ``mask_iou``, ``mask_iou_attacked``, ``strong``,
        ``gradient_inside``, ``gradient_outside``, ``iou``, ``iou_by_chance``, ``views`` (of each view its "clean" and
        "foreground" accuracy) and ``run``; NaN for what is missing.

    Raises:
        UserError: for a run that has no results of such a study, and two of one training and one kind of data.
    """
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for run in runs:
        found = _results(run, f"{stage}/{name}/")
        key = int(found["adversarial"]), int(found["own_view"])
        if key in rows:
            raise UserError(
                f"{rows[key]['run']} and {run} are both trained {'adversarially' if key[0] else 'naturally'} on "
                f"{rows[key]['data']}: leave one out"
            )
        data, view = _VIEWS[key[1]]
        of = {what: found.get(f"{view}/{what}", math.nan) for what in ("clean", "foreground", "image", "held", "masks")}
        views = dict.fromkeys(what.partition("/")[0] for what in found if what.endswith("/clean"))
        rows[key] = {
            "train": "A" if key[0] else "N",
            "data": data,
            "natural": of["clean"],
            "pgd": of["foreground" if view == "given" else "image"],
            "pgd_foreground": of["foreground"],
            "pgd_image": of["image"],
            "pgd_held": of["held"],
            "pgd_masks": of["masks"],
            "strong": found.get("strong", math.nan),
            **{
                what: found.get(what, math.nan)
                for what in (
                    "gradient_inside",
                    "gradient_outside",
                    "iou",
                    "iou_by_chance",
                    "mask_iou",
                    "mask_iou_attacked",
                )
            },
            "views": {each: {what: found.get(f"{each}/{what}", math.nan) for what in _SHIFTS} for each in views},
            "run": str(run),
        }
    return [rows[key] for key in sorted(rows)]


def _results(run: str | Path, start: str) -> dict[str, float]:
    file, results = results_of(run)
    found = {
        what.removeprefix(start): float(value)
        for what, value in results.items()
        if what.startswith(start) and value is not None
    }
    if "own_view" not in found:
        raise UserError(f"{file} has no {start}own_view: measure the run with ForegroundStudy (study/foreground)")
    return found


def write(rows: Sequence[Mapping[str, Any]], folder: Path, paper: str | None = None) -> list[Path]:
    """Write the tables and the figure.

    Args:
        rows: from :func:`summarize`.
        folder: where to.
        paper: "gtsrb" or "coco" for the published numbers beside ours.

    Returns:
        The files.
    """
    flat = [
        {what: value for what, value in row.items() if what != "views"}
        | dict(zip(("paper_natural", "paper_pgd"), _published(row, paper), strict=True) if paper else ())
        for row in rows
    ]
    shifts = [
        {"train": row["train"], "data": row["data"], "view": view, **values}
        for row in rows
        for view, values in row["views"].items()
    ]
    return [
        write_csv(folder / "foreground.csv", flat),
        write_csv(folder / "foreground_views.csv", shifts),
        save_figure(draw(rows, paper), folder / "foreground.png"),
    ]


def draw(rows: Sequence[Mapping[str, Any]], paper: str | None = None) -> Figure:
    """The accuracies as a coloured table, and natural accuracy when the masks are not those of training.

    Args:
        rows: from :func:`summarize`.
        paper: as in :func:`write`.
    """
    names = [f"{row['train']}, {row['data']}" for row in rows]
    columns = [what for what in _ACCURACIES if any(not math.isnan(row[what]) for row in rows)]
    labels = [_ACCURACIES[what] for what in columns]
    values = [[row[what] for what in columns] for row in rows]
    if paper:
        labels += ["paper: natural", "paper: PGD"]
        values = [[*of, *_published(row, paper)] for of, row in zip(values, rows, strict=True)]
    views = sorted({view for row in rows for view in row["views"]}, key=_from_less_to_more)
    nothing = {"clean": math.nan}
    matrices = [
        AccuracyMatrix(title="Accuracy by training and data", rows=names, columns=labels, values=np.asarray(values)),
        AccuracyMatrix(
            title="Natural accuracy by how the image is cut out",
            rows=names,
            columns=[view.replace("_", " ") for view in views],
            values=np.asarray([[row["views"].get(view, nothing)["clean"] for view in views] for row in rows]),
        ),
    ]
    note = (
        "N, A: natural and adversarial training; X: whole images, X_fg: foregrounds. PGD and AutoAttack may change "
        "what the classifier sees."
    )
    return accuracy_matrices(matrices, title="Foreground masks: what a background costs", note=note)


def _from_less_to_more(view: str) -> tuple[int, int]:
    """The whole image, then masks from the smallest to the largest, then those that are predicted."""
    kind, _, radius = view.partition("_")
    size = int(radius or 0)
    return ("whole", "eroded", "given", "dilated", "predicted").index(kind), -size if kind == "eroded" else size


def _published(row: Mapping[str, Any], paper: str | None) -> tuple[float, float]:
    known = PUBLISHED[paper] if paper else {}
    return known.get((str(row["train"]), str(row["data"])), (math.nan, math.nan))


def printed(rows: Sequence[Mapping[str, Any]], paper: str | None = None) -> list[dict[str, str | None]]:
    """The rows in words."""

    def percent(value: float) -> str | None:
        return None if math.isnan(value) else f"{value:.2%}"

    shown = []
    for row in rows:
        line: dict[str, str | None] = {"train": row["train"], "data": row["data"]}
        line |= {title: percent(row[what]) for what, title in _ACCURACIES.items()}
        line |= {
            "|∇x| inside": f"{row['gradient_inside']:.1e}",
            "outside": f"{row['gradient_outside']:.1e}",
            "IoU": f"{row['iou']:.3f}",
            "by chance": f"{row['iou_by_chance']:.3f}",
        }
        if paper:
            natural, pgd = _published(row, paper)
            line |= {"paper: natural": percent(natural), "paper: PGD": percent(pgd)}
        shown.append(line)
    empty = [title for title in _ACCURACIES.values() if all(line[title] is None for line in shown)]
    return [{what: value for what, value in line.items() if what not in empty} for line in shown]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: its arguments; by default those of the process.

    Raises:
        SystemExit: with status 2 after a mistake in the user's input.
    """
    parser = runs_parser(
        "lightning_robust.report.foreground",
        "Make the table of foreground masks from runs of study/foreground.",
        each="training and data",
        out="foreground_study",
        name="foreground",
    )
    parser.add_argument("--paper", choices=tuple(PUBLISHED), help="published numbers to stand beside ours")
    given = parser.parse_args(words)
    with said_in_a_line():
        rows = summarize(given.runs, name=given.name, stage=given.stage)
        files = write(rows, Path(given.out), given.paper)
    print_table("Foreground masks (X: whole images, X_fg: foregrounds; N, A: training)", printed(rows, given.paper))
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    main()
