"""Traffic signs: reading torchvision's layout, segmenting them, and keeping the masks."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_robust.datamodules import GTSRBIC
from lightning_robust.datamodules.gtsrb_files import entries, load
from lightning_robust.datamodules.gtsrb_shapes import sign_shape
from lightning_robust.datamodules.masks_cache import MaskCache, Scene
from lightning_robust.datamodules.masks_quality import bounding_box, quality_rows
from lightning_robust.datamodules.segmenters import Box, GraphCut, create_segmenter, ellipse
from lightning_robust.errors import UserError

COLUMNS = ["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"]


def sign(seed: int, size: int = 30) -> Scene:
    """A red ring around white on a grey-green background with noise."""
    rng = np.random.default_rng(seed)
    box = Box(4, 5, size - 6, size - 5)
    image = np.full((size, size, 3), (60, 80, 60)) + rng.normal(0, 6, (size, size, 3))
    image[ellipse((size, size), box)] = (190, 30, 30)
    inner = Box(box.left + 4, box.top + 4, box.right - 4, box.bottom - 4)
    image[ellipse((size, size), inner)] = (230, 230, 225)
    return Scene(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), box)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with two tracks of three shots each, and four test images."""
    base = tmp_path / "gtsrb"

    def write(folder: Path, table: Path, names: list[tuple[str, int]]) -> None:
        folder.mkdir(parents=True)
        with table.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(COLUMNS)
            for number, (name, label) in enumerate(names):
                scene = sign(number + 10 * label)
                Image.fromarray(scene.image).save(folder / name)
                left, top, right, bottom = (2 * int(edge) for edge in scene.box)
                # the table is of an original of twice the size
                writer.writerow([name, 60, 60, left, top, right + 1, bottom + 1, label])

    for label in (0, 1):
        folder = base / "GTSRB" / "Training" / f"{label:05}"
        names = [(f"{track:05}_{shot:05}.ppm", label) for track in range(2) for shot in range(3)]
        write(folder, folder / f"GT-{label:05}.csv", names)
    tests = [(f"{number:05}.ppm", number % 2) for number in range(4)]
    write(base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv", tests)
    return tmp_path


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


# ---- segmenters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph_cut", "grab_cut", "ellipse"])
def test_a_plain_sign_is_found(name: str) -> None:
    if name != "ellipse":
        pytest.importorskip({"graph_cut": "maxflow", "grab_cut": "cv2"}[name])
    segment = create_segmenter(name)
    for seed in range(4):
        scene = sign(seed)
        mask = segment(*scene, seed)
        assert iou(mask, ellipse((30, 30), scene.box)) > 0.85
        assert np.array_equal(mask, segment(*scene, seed))


def test_the_graph_cut_of_a_large_image_and_of_a_flat_one() -> None:
    pytest.importorskip("maxflow")
    scene = sign(0, size=120)
    assert iou(GraphCut()(*scene, 0), ellipse((120, 120), scene.box)) > 0.8
    flat = GraphCut()(np.full((20, 25, 3), 7, dtype=np.uint8), Box(2, 2, 17, 17), 0)
    assert flat.shape == (20, 25)
    assert GraphCut()(np.full((3, 3, 3), 7, dtype=np.uint8), Box(0, 0, 2, 2), 0).shape == (3, 3)


def test_the_cut_is_the_minimal_one() -> None:
    """Against all cuts of a small grid."""
    pytest.importorskip("maxflow")
    from lightning_robust.datamodules.segmenters.graph_cut import _cut

    rng = np.random.default_rng(0)
    pixels, source, sink = rng.random((3, 3, 3)), rng.random((3, 3)), rng.random((3, 3))
    right, down = (((np.diff(pixels, axis=axis)) ** 2).sum(-1) for axis in (1, 0))
    variance = (right.mean() + down.mean()) / 2

    def cost(mask: np.ndarray) -> float:
        between = sum(
            float((weights * (np.diff(mask.astype(int), axis=axis) != 0)).sum())
            for axis, weights in ((1, np.exp(-right / 2 / variance)), (0, np.exp(-down / 2 / variance)))
        )
        return float(source[~mask].sum() + sink[mask].sum()) + 0.3 * between

    every = [np.array([number >> place & 1 for place in range(9)], dtype=bool).reshape(3, 3) for number in range(512)]
    best = min(every, key=cost)
    assert 0 < best.sum() < 9
    assert np.array_equal(_cut(pixels, source, sink, 0.3), best)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("snake", {}, "segmenter 'snake' is unknown: choose from graph_cut, grab_cut, ellipse"),
        ("graph_cut", {"sigma": 1}, "graph_cut has no setting 'sigma': it has seeds, spread"),
        ("graph_cut", {"seeds": 0}, "GraphCut: seeds=0: give a number from 1"),
        ("graph_cut", {"bandwidth": "wide"}, "bandwidth='wide'"),
        ("ellipse", {"scale": 0}, "RoiEllipse: scale=0"),
    ],
)
def test_wrong_segmenters(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_segmenter(name, settings)


@pytest.mark.parametrize(("name", "module"), [("graph_cut", "maxflow"), ("grab_cut", "cv2")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs {module}.*pip install 'lightning-robust\[masks\]'"):
        create_segmenter(name)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_masks_are_made_once_for_each_setting_and_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = type(create_segmenter("ellipse")).__call__
    monkeypatch.setattr(
        type(create_segmenter("ellipse")), "__call__", lambda self, *a: made.append(1) or original(self, *a)
    )
    scenes = [sign(seed, size=20 + seed) for seed in range(5)]
    cache = MaskCache(tmp_path, create_segmenter("ellipse"))
    first = cache.masks("train", scenes)
    again = cache.masks("train", scenes)
    assert len(made) == 5
    assert all(np.array_equal(a, b) and b.dtype == bool for a, b in zip(first, again, strict=True))
    other = MaskCache(tmp_path, create_segmenter("ellipse", {"scale": 0.5}))
    assert other.folder != cache.folder != MaskCache(tmp_path, create_segmenter("ellipse"), seed=1).folder
    assert other.masks("train", scenes)[0].sum() < first[0].sum()
    # an image that changed, and a damaged file
    scenes[2].image[0, 0] += 1
    made.clear()
    cache.masks("train", scenes)
    assert len(made) == 5
    (file,) = cache.folder.glob("train-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert all(np.array_equal(a, b) for a, b in zip(cache.masks("train", scenes), first, strict=True))


def test_processes_make_the_same_masks(tmp_path: Path) -> None:
    scenes = [sign(seed) for seed in range(70)]
    alone = MaskCache(tmp_path / "a", create_segmenter("ellipse"), workers=1).masks("x", scenes)
    shared = MaskCache(tmp_path / "b", create_segmenter("ellipse"), workers=2).masks("x", scenes)
    assert len(alone) == 70
    assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    cache = MaskCache(tmp_path, create_segmenter("ellipse"))
    cache.masks("train", [sign(0)])
    settings = cache.folder / "settings.json"
    settings.write_text(json.dumps(cache.settings | {"seed": 9}))
    with pytest.raises(UserError, match=r"were made with other settings .*delete the folder"):
        cache.masks("train", [sign(0)])
    settings.write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        cache.masks("train", [sign(0)])


def test_quality() -> None:
    masks = [np.zeros((10, 10), dtype=bool) for _ in range(2)]
    masks[0][2:7, 2:7] = True
    assert bounding_box(masks[0]) == Box(2, 2, 6, 6)
    rows = quality_rows(masks, [Box(2, 2, 6, 6), Box(0, 0, 9, 9)], np.array([0, 1]), ["a", "b", "c"], 0.1, 0.9)
    assert [row["class"] for row in rows] == ["all", "a", "b"]
    assert rows[1] == {"class": "a", "images": 1, "foreground": 0.25, "failed": 0.0, "roi_iou": 1.0, "box_iou": 1.0}
    assert rows[2] == {"class": "b", "images": 1, "foreground": 0.0, "failed": 1.0, "roi_iou": 0.0, "box_iou": 0.0}
    assert rows[0]["failed"] == 0.5
    shapes = [masks[0], ellipse((10, 10), Box(0, 0, 9, 9))]
    (whole, *_) = quality_rows(masks, [Box(2, 2, 6, 6)] * 2, np.array([0, 1]), ["a", "b"], 0.1, 0.9, shapes)
    assert (whole["shape_iou"], whole["shape_covered"]) == (0.5, 0.5)


def test_shapes_of_signs() -> None:
    box, size = Box(4, 2, 35, 33), (40, 40)
    areas = {label: sign_shape(label, size, box)[2:34, 4:36].mean() for label in (1, 11, 13, 12, 14)}
    assert areas[1] == pytest.approx(np.pi / 4, abs=0.01)
    assert areas[11] == areas[13] == pytest.approx(0.5, abs=0.07)
    assert areas[12] == pytest.approx(0.5, abs=0.04)
    assert areas[14] == pytest.approx(0.828, abs=0.02)
    up = sign_shape(25, size, box)
    assert np.array_equal(up[2:34][::-1], sign_shape(13, size, box)[2:34])
    assert up[33].sum() == 32
    assert up[2].sum() <= 4
    for label in range(43):
        shape = sign_shape(label, size, box)
        assert bounding_box(shape) == box
        assert np.array_equal(shape[:, 4:36], shape[:, 4:36][:, ::-1])


# ---- the data module -------------------------------------------------------------------------------------------------


def test_the_region_is_scaled_to_the_image(root: Path) -> None:
    (scene, *_) = map(load, entries(root / "gtsrb", "train"))
    assert scene.box == sign(0).box
    assert np.array_equal(scene.image, sign(0).image)


def test_from_files_to_batches(root: Path) -> None:
    settings: dict[str, Any] = {"segmenter": "ellipse", "image_size": 16, "val_size": 0.5, "segmenter_workers": 1}
    data = GTSRBIC(root=str(root), batch_size=4, **settings)
    assert (data.num_classes, data.image_shape) == (43, (3, 16, 16))
    data.prepare_data()
    data.setup("fit")
    sizes = [len(data.dataset(split)) for split in ("train", "val", "test")]
    assert sizes == [6, 6, 4]
    shots = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert not set(shots[data.dataset("train").rows]) & set(shots[data.dataset("val").rows])
    images, labels, masks = next(iter(data.test_dataloader()))
    assert labels.tolist() == [0, 1, 0, 1]
    assert (images.shape, masks.shape, masks.dtype) == ((4, 3, 16, 16), (4, 1, 16, 16), torch.bool)
    # signs are brighter than what is behind them
    assert images.mean(1)[masks[:, 0]].mean() > 1.5 * images.mean(1)[~masks[:, 0]].mean()
    files = {file.name for file in data.cache.folder.iterdir()}
    assert files >= {"settings.json", "quality_train.csv", "sheet_train.png", "quality_test.csv", "sheet_test.png"}
    assert data.cache.folder.parent == root / "gtsrb" / "masks"


def test_failed_masks_are_replaced(root: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"root": str(root), "segmenter": "ellipse", "segmenter_settings": {"scale": 0.1}}
    common |= {"cache": str(tmp_path / "else"), "image_size": 30, "segmenter_workers": 1}
    replaced = GTSRBIC(**common).dataset("test")[0][2]
    assert np.array_equal(replaced[0].numpy(), ellipse((30, 30), sign(0).box))
    with pytest.warns(UserWarning, match="4 of 4 masks of GTSRB-IC's test images are full"):
        assert GTSRBIC(on_failure="full", **common).dataset("test")[0][2].all()

    def share_that_failed() -> str:
        quality = next((tmp_path / "else").glob("*/quality_test.csv")).read_text().splitlines()
        return quality[1].split(",")[3]

    assert share_that_failed() == "1.0"
    kept = GTSRBIC(mask_share=(0, 1), **common).dataset("test")[0][2]
    assert 0 < kept.sum() < 20
    assert share_that_failed() == "0.0"  # the masks are the same, and their figures are not


def test_the_figures_are_those_of_the_images(root: Path) -> None:
    settings: dict[str, Any] = {"root": str(root), "segmenter": "ellipse", "segmenter_workers": 1}
    data = GTSRBIC(**settings)
    data.dataset("test")
    sheet = data.cache.folder / "sheet_test.png"
    first = sheet.stat().st_mtime_ns, sheet.read_bytes()
    GTSRBIC(**settings).dataset("test")
    assert sheet.stat().st_mtime_ns == first[0]  # not drawn again
    Image.fromarray(sign(99).image).save(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00001.ppm")
    GTSRBIC(**settings).dataset("test")
    assert sheet.read_bytes() != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_share": (0.9, 0.1)}, "mask_share"),
        ({"on_failure": "skip"}, "on_failure='skip'"),
        ({"segmenter_seed": -1}, "segmenter_seed=-1"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_wrong_settings(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GTSRBIC(root=str(root), segmenter="ellipse", **settings)


def test_missing_and_damaged_files(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GTSRB was not found: run with --data\.download true"):
        GTSRBIC(root=str(tmp_path / "none"), segmenter="ellipse")
    data = GTSRBIC(root=str(root), segmenter="ellipse", segmenter_workers=1)
    (root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00002.ppm").write_bytes(b"P6 text")
    with pytest.raises(UserError, match=r"00002\.ppm cannot be read"):
        data.dataset("test")
    (root / "gtsrb" / "GT-final_test.csv").unlink()
    with pytest.raises(UserError, match=r"GT-final_test\.csv is missing"):
        GTSRBIC(root=str(root), segmenter="ellipse").dataset("test")
    table = root / "gtsrb" / "GTSRB" / "Training" / "00001" / "GT-00001.csv"
    table.write_text(table.read_text().replace(";60;60;", ";60;wide;", 1))
    with pytest.raises(UserError, match=r"GT-00001\.csv, line 2: .*'wide'.* whole numbers"):
        GTSRBIC(root=str(root), segmenter="ellipse")
    table.write_text("a,b\n")
    with pytest.raises(UserError, match="is no table of GTSRB"):
        GTSRBIC(root=str(root), segmenter="ellipse")


@pytest.mark.real_data
def test_real(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("maxflow")
    listed = entries(real_data / "gtsrb", "test")[::16]
    scenes = [load(entry) for entry in listed]
    masks = MaskCache(tmp_path, GraphCut()).masks("test", scenes)
    labels = np.array([entry.label for entry in listed])
    shapes = [
        sign_shape(entry.label, scene.image.shape[:2], scene.box) for entry, scene in zip(listed, scenes, strict=True)
    ]
    whole = quality_rows(masks, [scene.box for scene in scenes], labels, [""] * 43, 0.1, 0.9, shapes)[0]
    assert whole["failed"] <= 0.05
    assert whole["box_iou"] > 0.8
    assert whole["shape_iou"] > 0.7
    assert whole["shape_covered"] > 0.85
    assert 0.35 < whole["foreground"] < 0.6


@pytest.mark.real_data
def test_a_core_keeps_grab_cut_from_losing_half_of_the_sign(real_data: Path) -> None:
    pytest.importorskip("cv2")
    listed = entries(real_data / "gtsrb", "test")[::16]
    scenes = [load(entry) for entry in listed]
    shapes = [
        sign_shape(entry.label, scene.image.shape[:2], scene.box) for entry, scene in zip(listed, scenes, strict=True)
    ]

    def mean_iou(**settings: Any) -> float:
        segment = create_segmenter("grab_cut", settings)
        return float(np.mean([iou(segment(*scene, 0), shape) for scene, shape in zip(scenes, shapes, strict=True)]))

    assert mean_iou() > mean_iou(core=0, iterations=5, convex=False) + 0.2
