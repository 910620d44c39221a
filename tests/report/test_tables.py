from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_robust.report import atomic_file, print_table, write_csv, write_json


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        {"class": 'a "quoted", name\nwith a line', "acc": 0.1 + 0.2, "images": 3},
        {"class": "Größe", "acc": torch.tensor(0.5, dtype=torch.float64), "late": np.int64(7)},
        {"class": None, "acc": float("nan")},
    ]
    path = write_csv(tmp_path / "tables" / "t.csv", rows)
    assert read(path) == [
        {"class": 'a "quoted", name\nwith a line', "acc": "0.30000000000000004", "images": "3", "late": ""},
        {"class": "Größe", "acc": "0.5", "images": "", "late": "7"},
        {"class": "", "acc": "nan", "images": "", "late": ""},
    ]


def test_csv_columns_and_no_rows(tmp_path: Path) -> None:
    assert write_csv(tmp_path / "a.csv", [{"x": 1, "y": 2}], columns=["y", "z"]).read_text() == "y,z\n2,\n"
    assert write_csv(tmp_path / "b.csv", [], columns=["y"]).read_text() == "y\n"
    assert write_csv(tmp_path / "c.csv", []).read_text() == ""


def test_json_is_strict(tmp_path: Path) -> None:
    content = {
        "nan": float("nan"),
        "inf": torch.tensor(-torch.inf),
        "tensor": torch.tensor([1.5, float("nan")]),
        "scalar": torch.tensor(3),
        "array": np.array([[1, 2]]),
        "numpy": np.float32(0.5),
        "nested": {"a": [True, None, ("ε", Path("runs"))]},
    }
    text = write_json(tmp_path / "results.json", content).read_text(encoding="utf-8")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "inf": None,
        "tensor": [1.5, None],
        "scalar": 3,
        "array": [[1, 2]],
        "numpy": 0.5,
        "nested": {"a": [True, None, ["ε", "runs"]]},
    }
    assert "ε" in text


def test_json_of_something_else_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "results.json", {"acc": 1})
    with pytest.raises(TypeError):
        write_json(path, {"acc": object()})
    assert json.loads(path.read_text()) == {"acc": 1}


def test_failure_while_writing_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_may_be_read_by_others_as_usual(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    ours = write_json(tmp_path / "ours.json", {})
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


ROWS = [
    {"class": "[bold]a name :smile: " + "that goes on and on " * 12 + "end", "images": 1000, "acc": 0.91234},
    {"class": "b", "images": 7, "acc": float("nan"), "gradient": torch.tensor(1.234567e-7)},
]


def test_table_outside_of_a_terminal_is_plain_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    print_table("Accuracy [test]", ROWS, file=out)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "Accuracy [test]"
    (named,) = [line for line in lines if ROWS[0]["class"] in line]
    assert named.split("end")[1].split() == ["1000", "0.9123", "–"]
    (other,) = [line for line in lines if line.strip().startswith("b ")]
    assert other.split() == ["b", "7", "–", "1.235e-07"]


def _all_of(reader: int) -> str:
    """What was written to a pseudo-terminal: it comes in pieces, and its end is an error (EIO) or nothing."""
    pieces = []
    with contextlib.suppress(OSError):
        while piece := os.read(reader, 65536):
            pieces.append(piece)
    os.close(reader)
    return b"".join(pieces).decode()


def test_table_in_a_narrow_terminal_is_folded_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    name = "W" * 70 + "END"
    with os.fdopen(writer, "w") as terminal:
        print_table("T", [{"class": name, "images": 1}], file=terminal)
    shown = _all_of(reader)
    assert shown.count("W") == 70
    assert "…" not in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.splitlines()) <= 60


def test_table_chooses_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("T", ROWS, columns=["acc", "images"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].split() == ["acc", "images"]
    assert "name" not in printed


def test_empty_table_prints_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Nothing to see", [], columns=["acc"])
    assert "Nothing to see" in capsys.readouterr().out
    print_table("Nothing at all", [])
    assert "Nothing at all" in capsys.readouterr().out
