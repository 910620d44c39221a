"""Means and deviations over repetitions."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest

from lightning_robust.report.page import read_run, render_page
from lightning_robust.report.seeds import aggregate, aggregate_table, read_seeds, write_seeds

ACC = (0.5, 0.75, 0.7)


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """Three repetitions, the last of which failed after it had written something."""
    for seed, acc in enumerate(ACC):
        folder = tmp_path / f"seed_{seed}"
        (folder / "tables").mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"test/acc": acc, "test/robust_acc/pgd": 0.25, "val/x": None}))
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{class_path: a.B}}\n")
        (folder / "metrics.csv").write_text(f"epoch,step,val/acc\n0,9,{acc - 0.1}\n1,19,{acc}\n")
        (folder / "tables" / "curve_test.csv").write_text(f"eps,robust_acc\n0,{acc}\n0.1,{acc / 2}\n")
        (folder / "tables" / "seen_test.csv").write_text(f"image,class\n{seed},{'cat' if seed else 'dog'}\n")
    return tmp_path


def test_mean_and_sample_deviation() -> None:
    found = aggregate([{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": math.nan, "c": 5.0}])
    assert (found["a"].mean, found["a"].deviation, found["a"].values) == (2.0, statistics.stdev([1, 3]), (1.0, 3.0))
    assert found["b"].values == (2.0,)
    assert math.isnan(found["b"].deviation)
    assert aggregate([{"a": math.nan}]) == {}


def test_tables_are_averaged_where_they_match() -> None:
    tables = [
        [{"eps": "0", "class": "cat", "acc": a}, {"eps": "0.1", "class": "dog", "acc": b}] for a, b in ("12", "34")
    ]
    first, second = aggregate_table(tables) or []
    assert first == {"eps": "0", "class": "cat", "acc": 2.0, "acc_std": statistics.stdev([1, 3])}
    assert (second["acc"], second["class"]) == (3.0, "dog")
    assert aggregate_table([tables[0], tables[1][:1]]) is None
    assert aggregate_table([[{"class": "cat"}], [{"class": "dog"}]]) is None
    assert aggregate_table([[{"a": "1"}], [{"b": "1"}]]) is None
    assert aggregate_table([tables[0]]) is None
    empty = aggregate_table([[{"a": "1"}], [{"a": ""}]])
    assert empty == [{"a": 1.0, "a_std": None}]


def test_a_group_is_written_and_read(group: Path) -> None:
    spreads = write_seeds(group, [0, 1, 2], ["seed_0", "seed_1", "seed_2"], {"seed_2": "it failed"})
    assert spreads["test/acc"].values == ACC[:2]
    assert json.loads((group / "results.json").read_text()) == {"test/acc": 0.625, "test/robust_acc/pgd": 0.25}
    read = read_seeds((group / "seeds.json").read_text())
    assert read.spreads["test/acc"] == spreads["test/acc"]
    assert read.failed == {"seed_2": "it failed"}
    with (group / "tables" / "seeds.csv").open(newline="") as lines:
        row = next(row for row in csv.DictReader(lines) if row["measure"] == "test/acc")
    assert (row["mean"], row["n"], row["seed_0"], row["seed_1"]) == ("0.625", "2", "0.5", "0.75")
    assert float(row["std"]) == statistics.stdev(ACC[:2])
    with (group / "tables" / "curve_test.csv").open(newline="") as lines:
        assert [row["robust_acc"] for row in csv.DictReader(lines)] == ["0.625", "0.3125"]
    assert not (group / "tables" / "seen_test.csv").exists()


def test_the_page_of_a_group(group: Path) -> None:
    write_seeds(group, [0, 1, 2], ["seed_0", "seed_1", "seed_2"], {"seed_2": "it failed"})
    text = render_page([read_run(group)])
    for words in (
        "62.50 ± 17.68 %",
        "Mean ± one sample standard deviation over 2 of 3 seeds.",
        "0, 1, 2",
        "seed_2: it failed.",
        "Bands: one standard deviation over the seeds.",
    ):
        assert words in text
    assert "config.yaml is missing" not in text


def test_a_repetition_without_its_folder(group: Path) -> None:
    write_seeds(group, [0, 1], ["seed_0", "seed_1"], {})
    for file in sorted((group / "seed_1").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (group / "seed_1").rmdir()
    assert "seed_1: the folder of this repetition is missing" in read_run(group).missing
