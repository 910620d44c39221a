"""Runs' folders as training and testing leave them, and worse."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}


def config(**model: Any) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "a.PixelIoU", "init_args": {"stride": 2}}]},
        "model": {"class_path": "a.ImageClassifier", "init_args": {"network": "digits_cnn", "seed": 0, **model}},
        "data": {"class_path": "a.Digits", "init_args": {"seed": 0}},
    }


def results(acc: float = 0.95) -> dict[str, float]:
    return {
        "epochs": 3,
        "test/acc": acc,
        "test/loss": 0.25,
        "test/input_gradient_iou": 0.5,
        "test/robust_acc/pgd": acc - 0.2,
        "test/robust_acc/apgd": acc - 0.3,
        "test/robust_acc/worst_case": acc - 0.35,
        "time/fit_seconds": 12.5,
        "val/acc": 0.9,
    }


AUDIT: dict[str, Any] = {
    "version": 1,
    "model": "resnet20",
    "data": "CIFAR10",
    "budget": "quick",
    "threat_model": {"norm": "linf", "eps": 0.03137254901960784},
    "images": 500,
    "seed": 0,
    "clean_accuracy": 0.91,
    "robust_accuracy": 0.012,
    "confidence_interval": [0.004, 0.028],
    "confidence": 0.95,
    "verdict": "masked",
    "sentence": "The gradients are masked because gradient-free attacks beat gradient ones.",
    "checks": [
        {
            "name": "steps", "title": "More steps", "outcome": "pass", "figure": 0.01, "text": "No gain.",
            "rule": "at most 0.02", "source": "arXiv 1902.06705", "mend": "", "seconds": 3.5,
        },
        {
            "name": "gradient_free", "title": "Gradient-free attacks", "outcome": "flag", "figure": 0.4,
            "text": "Square fools 40 % more.", "rule": "at most 0.0", "source": "arXiv 1802.00420",
            "mend": "Attack with BPDA.", "seconds": 8,
        },
        {
            "name": "eot", "title": "Randomness", "outcome": "skipped", "figure": None, "text": "", "rule": "",
            "source": "", "mend": "", "seconds": 0,
        },
    ],
    "attacks": [{"name": "apgd", "robust_accuracy": 0.012, "seconds": 12.0, "adaptive": False}],
}  # fmt: skip


def picture(path: Path, width: int = 60, height: int = 40, noise: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width * height)
    pixels = (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8) if noise else np.zeros((height, width, 3), np.uint8)
    )
    Image.fromarray(pixels).save(path)


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run("run/version_0", acc=0.9, model={"lam": 0.5})``: a whole run's folder."""

    def make(name: str = "quick/version_0", acc: float = 0.95, seed: int = 0, **model: Any) -> Path:
        folder = tmp_path / name
        (folder / "tables").mkdir(parents=True)
        told = config(**{"seed": seed, **model})
        told["seed_everything"] = seed
        (folder / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
        (folder / "results.json").write_text(json.dumps(results(acc)))
        rows = [f"{epoch},{epoch * 10 + 9},{2 - epoch / 2},{0.5 + epoch / 10}," for epoch in range(3)]
        rows[1] += "0.4"  # measured every second epoch
        (folder / "metrics.csv").write_text("\n".join(["epoch,step,val/loss,val/acc,val/robust_acc/pgd", *rows]) + "\n")
        (folder / "tables" / "robust_accuracy_per_class_test.csv").write_text(
            f"attack,class,images,robust_acc\npgd,cat,20,{acc - 0.2}\npgd,dog,3,0.5\npgd,a10,100,0.25\n"
        )
        (folder / "tables" / "lambda_sweep_test.csv").write_text(f"lam,acc,iou\n0,{acc},0.1\n1,{acc - 0.3},1.0\n")
        (folder / "environment.json").write_text(
            json.dumps(
                {
                    "version": 1, "command": ["lightning-robust", "train", "--config", "quickstart"],
                    "started": "2026-01-02T03:04:05+00:00", "status": "finished", "error": None,
                    "stages": ["fit", "test"],
                    "versions": {"torch": "2.15"}, "system": "Linux",
                    "devices": {"count": 2, "names": ["cpu"], "strategy": "DDPStrategy", "precision": "32-true"},
                }
            )
        )  # fmt: skip
        for figure in ("input_gradient_test", "adversarial_examples_pgd_test", "lambda_sweep_maps_test", "other"):
            picture(folder / "figures" / f"{figure}.png")
        return folder

    return make


@dataclass
class Page(html.parser.HTMLParser):
    """A page taken apart: tags are checked to be closed in order while it is read."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th", "dd"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            if self.tags[-1][0] == "wbr":  # in the middle of a word
                self.words[-1] += data
            else:
                self.words.append(data)
            if self.cells and {"td", "th", "dd"} & set(self._open):
                self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def said(self) -> str:
        """All text, with single blanks."""
        return " ".join(" ".join(self.words).split())
