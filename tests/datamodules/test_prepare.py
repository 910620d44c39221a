"""Getting data ready from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_robust.datamodules import Digits, MaskedImageFolder
from lightning_robust.datamodules.prepare import main, prepare


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of two classes, the left quarter of each being the object."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :2] = 255
    for place in ("images", "masks"):
        for name, count in (("a", 5), ("b", 3)):
            (tmp_path / place / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(mask).save(tmp_path / place / name / f"{number}.png")
    return tmp_path


def test_counts_and_foreground(root: Path) -> None:
    rows = prepare(MaskedImageFolder(root=str(root), test_size=1.0, val_size=0, num_workers=0))
    assert rows == [{"split": "test", "images": 8, "rarest class": 3, "most frequent class": 5, "foreground": 0.25}]
    whole = prepare(Digits())
    assert [row["split"] for row in whole] == ["train", "val", "test"]
    assert "foreground" not in whole[0]


def test_the_program(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "MaskedImageFolder", "--data.root", str(root), "--data.test_size=1.0", "--data.num_workers=0"]
    main(words)
    printed = capsys.readouterr().out
    assert "MaskedImageFolder: 2 classes, images of 3 × 8 × 8" in printed
    assert "0.25" in printed
    Image.new("L", (8, 8), 7).save(root / "masks" / "b" / "1.png")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert "error: the mask" in error
    assert "has the values 7" in error
