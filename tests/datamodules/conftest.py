"""Small data sets that the tests write themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Write an image folder: ``write({"train/a": 3, "train/b": 2})`` with random images."""

    def write(counts: dict[str, int], size: tuple[int, int] = (12, 10), kind: str = "png", mode: str = "RGB") -> Path:
        rng = np.random.default_rng(0)
        for name, count in counts.items():
            folder = tmp_path / "images" / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shape = (*size, 3) if mode == "RGB" else size
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.{kind}")
        return tmp_path / "images"

    return write
