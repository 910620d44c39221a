"""Malaria cells, whose patients are not divided over splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_robust.datamodules import Malaria
from lightning_robust.errors import UserError


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """The archive as unpacked: 12 patients, 4 cells of each in each class."""
    for name in ("Parasitized", "Uninfected"):
        folder = tmp_path / "cell_images" / name
        folder.mkdir(parents=True)
        for patient in range(12):
            for cell in range(4):
                pixels = np.full((20 + cell, 24, 3), 10 * patient, dtype=np.uint8)
                letter = "A" if patient == 3 else ""
                Image.fromarray(pixels).save(folder / f"C{patient}{letter}P9ThinF_IMG_2015_cell_{cell}.png")
    return tmp_path


def patients(data: Malaria, split: str) -> set[int]:
    dataset = data.dataset(split)  # type: ignore[arg-type]
    return {round(float(dataset[index][0].max()) * 255) // 10 for index in range(len(dataset))}


@pytest.mark.parametrize("inside", ["", "cell_images"])
def test_no_patient_is_divided(cells: Path, inside: str) -> None:
    data = Malaria(root=str(cells / inside), image_size=16, val_size=0.25, test_size=0.25, num_workers=0)
    assert data.class_names == ["Parasitized", "Uninfected"]
    found = {split: patients(data, split) for split in ("train", "val", "test")}
    assert sum(len(part) for part in found.values()) == 12
    assert set.union(*found.values()) == set(range(12))
    assert all(len(part) >= 2 for part in found.values())
    divided = Malaria(root=str(cells), val_size=0.25, test_size=0.25, by_patient=False, num_workers=0)
    assert patients(divided, "train") & patients(divided, "test")


def test_the_second_copy_of_some_archives_is_left_alone(cells: Path) -> None:
    nested = cells / "cell_images" / "cell_images" / "Parasitized"
    nested.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(nested / "C1P1_cell_1.png")
    data = Malaria(root=str(cells), val_size=0, test_size=0, num_workers=0)
    assert data.num_classes == 2
    assert len(data.dataset("train")) == 96


def test_bad_input(cells: Path, tmp_path: Path) -> None:
    folder = cells / "cell_images" / "Uninfected"
    (folder / "C0P9ThinF_IMG_2015_cell_0.png").rename(folder / "cell_0.png")
    with pytest.raises(UserError, match=r"cell_0.png does not begin with a patient.*by_patient false"):
        Malaria(root=str(cells), num_workers=0).dataset("train")
    assert len(Malaria(root=str(cells), by_patient=False, val_size=0, num_workers=0).dataset("train")) > 0
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "other" / name / "1.png")
    with pytest.raises(UserError, match="has the class folders a, b: Malaria is of Parasitized and Uninfected"):
        Malaria(root=str(tmp_path / "other"))


@pytest.mark.real_data
def test_real_cells(real_data: Path) -> None:
    data = Malaria(root=str(real_data / "malaria"), val_size=0.2, num_workers=0)
    train, val = data.dataset("train"), data.dataset("val")
    assert len(train) + len(val) == 500
    assert len(data.dataset("test")) == 160
    groups = train.source.groups  # type: ignore[attr-defined]
    assert not set(groups[train.rows]) & set(groups[val.rows])
