"""The temperature study over several runs: ``python -m lightning_robust.report.temperature RUN [RUN …] --out FOLDER``.

Each run is one that :class:`~lightning_robust.callbacks.DistillationStudy` measured (``study/distillation``), each at
another temperature. Draws success against T and the amplitudes of the gradients, and writes and prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_robust.errors import UserError
from lightning_robust.metrics.gradient_amplitude import RANGE_NAMES
from lightning_robust.report.distillation import gradient_ranges, success_against_temperature
from lightning_robust.report.figures import save_figure
from lightning_robust.report.several_runs import results_of, runs_parser, said_in_a_line
from lightning_robust.report.tables import print_table, write_csv

_ATTACKS = ("jsma", "fgsm", "pgd", "cw")
_SUFFIX = "_rescaled"
_NUMBERS = (
    *(f"success_rate/{name}" for name in ("jsma", f"jsma{_SUFFIX}", "jsma_any_target", f"jsma_any_target{_SUFFIX}")),
    *(f"success_rate/{name}" for name in ("fgsm", f"fgsm{_SUFFIX}", "pgd", f"pgd{_SUFFIX}", "cw")),
    "mean_norm/cw",
    "robustness",
    f"robustness{_SUFFIX}",
    "gradient_mean",
    "gradient_log10",
    "logit_mean",
    "logit_std",
    "images",
)


def summarize(runs: Sequence[str | Path], *, name: str = "distillation", stage: str = "test") -> list[dict[str, Any]]:
    """One row a run, by rising temperature.

    Args:
        runs: folders of runs, or their ``results.json``.
        name: of the study.
        stage: "test" or "val".

    Returns:
        Rows of ``temperature``, ``acc``, what the study logged, and ``ranges``, ten shares; NaN for what is missing.

    Raises:
        UserError: for a run that has no results of such a study, and two of one temperature.
    """
    rows: dict[float, dict[str, Any]] = {}
    for run in runs:
        file, results = results_of(run)
        temperature = results.get(f"{stage}/{name}/temperature")
        if temperature is None:
            raise UserError(
                f"{file} has no {stage}/{name}/temperature: measure the run with DistillationStudy (study/distillation)"
            )
        if temperature in rows:
            raise UserError(f"{rows[temperature]['run']} and {run} are both of T = {temperature:g}: leave one out")

        def number(what: str, found: dict[str, Any] = results) -> float:
            value = found.get(what)
            return math.nan if value is None else float(value)

        rows[temperature] = {
            "temperature": temperature,
            "acc": number(f"{stage}/acc"),
            **{what: number(f"{stage}/{name}/{what}") for what in _NUMBERS},
            "ranges": [number(f"{stage}/{name}/gradient_range/{place}") for place in range(len(RANGE_NAMES))],
            "run": str(run),
        }
    return [rows[temperature] for temperature in sorted(rows)]


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the table and the two figures.

    Args:
        rows: from :func:`summarize`.
        folder: where to.

    Returns:
        The files.
    """
    flat = [
        {what: value for what, value in row.items() if what != "ranges"}
        | {f"gradient {name}": share for name, share in zip(RANGE_NAMES, row["ranges"], strict=True)}
        for row in rows
    ]
    temperatures = [row["temperature"] for row in rows]

    def rates(ending: str) -> dict[str, list[float]]:
        found = {name: [row.get(f"success_rate/{name}{ending}", math.nan) for row in rows] for name in _ATTACKS}
        return {name: values for name, values in found.items() if not all(map(math.isnan, values))}

    curves = success_against_temperature(
        temperatures, rates(""), rates(_SUFFIX), title="Defensive distillation: success rate against the temperature"
    )
    images = [max(round(row["images"]), 1) for row in rows]
    counts = {
        f"{row['temperature']:g}": [round(share * count) for share in row["ranges"]]
        for row, count in zip(rows, images, strict=True)
    }
    amplitudes = gradient_ranges(counts, title="Amplitude of adversarial gradients against the temperature")
    return [
        write_csv(folder / "temperature.csv", flat),
        save_figure(curves, folder / "temperature_success.png"),
        save_figure(amplitudes, folder / "temperature_gradients.png"),
    ]


def printed(rows: Sequence[dict[str, Any]]) -> list[dict[str, str | None]]:
    """The rows in words, naive and rescaled side by side."""

    def percent(value: float) -> str | None:
        return None if math.isnan(value) else f"{value:.2%}"

    shown = []
    for row in rows:
        line: dict[str, str | None] = {"T": f"{row['temperature']:g}", "clean": percent(row["acc"])}
        for attack in _ATTACKS:
            line[attack] = percent(row[f"success_rate/{attack}"])
            if f"success_rate/{attack}{_SUFFIX}" in row:
                line[f"{attack} /T"] = percent(row[f"success_rate/{attack}{_SUFFIX}"])
        line |= {
            "ρ": percent(row["robustness"]),
            "ρ /T": percent(row[f"robustness{_SUFFIX}"]),
            "mean |∇F|": f"{row['gradient_mean']:.1e}",
            "typical |∇F|": f"1e{row['gradient_log10']:.1f}",
            "mean |z|": f"{row['logit_mean']:.1f}",
        }
        shown.append(line)
    return shown


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: its arguments; by default those of the process.

    Raises:
        SystemExit: with status 2 after a mistake in the user's input.
    """
    parser = runs_parser(
        "lightning_robust.report.temperature",
        "Draw the temperature study of defensive distillation from runs of study/distillation.",
        each="temperature",
        out="temperature_study",
        name="distillation",
    )
    given = parser.parse_args(words)
    with said_in_a_line():
        rows = summarize(given.runs, name=given.name, stage=given.stage)
        files = write(rows, Path(given.out))
    print_table("Defensive distillation against the temperature (/T: on logits divided by T)", printed(rows))
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    main()
