"""The zoo's matrix: its cells, that every family and defense can be made, and that a second run computes nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_robust.batch import Batch
from lightning_robust.datamodules import Digits

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def zoo() -> Any:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("audit_zoo")
    torch.set_num_threads(threads)  # the scripts set it


def row(family: str, defense: str, **changes: Any) -> dict[str, Any]:
    figures = {"verdict": "trusted", "pgd": 66.3, "robust": 60.4, "flagged": [], "unsure": []}
    return {"family": family, "training": "PGD", "defense": defense, **figures, **changes}


def test_matrix(zoo: Any) -> None:
    masked = row("prm", "PixelShift", verdict="masked", robust=6.2, flagged=["randomness", "uphill"])
    rows = [row("image", "none"), row("prm", "none", verdict="not_enough_evidence", unsure=["restarts"]), masked]
    assert zoo.matrix(rows, zoo.verdict_cell).splitlines() == [
        "| model | no defense | `PixelShift` |",
        "| --- | --- | --- |",
        "| image, PGD | trusted · 66 → 60 % |  |",
        "| prm, PGD | not enough evidence · 66 → 60 % | masked · 66 → 6 % |",
    ]
    assert zoo.matrix(rows, zoo.flagged_cell).splitlines()[2:] == [
        "| image, PGD | – |  |",
        "| prm, PGD | `restarts`? | `randomness`, `uphill` |",
    ]


@pytest.mark.parametrize("family", ["image", "prm", "distilled", "foreground", "segmented"])
def test_every_family_is_trained_both_ways(zoo: Any, family: str) -> None:
    natural, against = (zoo.FAMILIES[family].make(training) for training in zoo.TRAININGS)
    assert natural.objective.attack is None
    assert against.objective.attack.threat_model.radius == pytest.approx(0.2)
    assert type(natural) is type(against)
    assert natural(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("defense", ["PixelShift", "Randomization", "PixelDeflection", "RegionBased", "Binarization"])
def test_every_defense_fits_digits(zoo: Any, defense: str) -> None:
    model = zoo.FAMILIES["image"].make("natural").network.eval()
    images = torch.rand(3, 1, 8, 8)
    defended = zoo.DEFENSES[defense](model, Batch(images, torch.arange(3), None)).eval()
    with torch.no_grad():
        assert defended(images).isfinite().all()
        assert not torch.equal(defended(images), model(images))


def test_ink_is_the_mask(zoo: Any) -> None:
    plain, inked = (data().dataset("test").__getitems__([0, 1, 2]) for data in (Digits, zoo.InkedDigits))
    assert torch.equal(inked.images, plain.images)
    assert torch.equal(inked.masks, plain.images > zoo.INK)


def test_a_second_run_only_prints(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "EPOCHS", 1)
    written = tmp_path / "zoo.json"
    options = ["--families", "foreground", "--defenses", "none,Binarization", "--images", "6", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["audit_zoo", "--folder", str(tmp_path), "--output", str(written), *options])
    zoo.main()
    first = json.loads(written.read_text())["rows"]
    assert [(found["training"], found["defense"]) for found in first] == [
        ("natural", "none"),
        ("natural", "Binarization"),
        ("PGD", "none"),
        ("PGD", "Binarization"),
    ]
    assert all(0 <= found["robust"] <= found["pgd"] <= found["clean"] <= 100 for found in first)
    assert "| foreground, natural | " in capsys.readouterr().out

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(zoo, "audit", never)
    monkeypatch.setattr(zoo, "trained", never)
    zoo.main()
    assert json.loads(written.read_text())["rows"] == first
    monkeypatch.setattr(sys, "argv", ["audit_zoo", "--families", "images"])
    with pytest.raises(SystemExit):
        zoo.main()
    assert "images: choose from image, prm" in capsys.readouterr().err
