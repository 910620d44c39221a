"""MS-COCO-IC: annotations of all kinds, crops, the builder and the data module."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_robust.datamodules import COCOIC, CocoRules, CocoSplit, build_coco_ic, coco_build
from lightning_robust.datamodules.coco_annotations import decode, parse, read_index
from lightning_robust.datamodules.coco_crops import Square, crops, square_around
from lightning_robust.datamodules.coco_stream import _CHUNK, records
from lightning_robust.datamodules.masks import read_mask
from lightning_robust.errors import UserError

pytest.importorskip("pycocotools")
from pycocotools import mask as tools
from pycocotools.coco import COCO

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 67, "name": "dining table"}]
HEIGHT, WIDTH = 40, 60


def rectangle(left: int, top: int, width: int, height: int, kind: str = "polygon") -> dict[str, Any]:
    """A box as an annotation of one of COCO's three kinds."""
    right, bottom = left + width, top + height
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    shape: Any = [[left, top, right, top, right, bottom, left, bottom]]
    if kind != "polygon":
        shape = tools.encode(mask)
        shape["counts"] = shape["counts"].decode()
    if kind == "runs":
        flat = mask.reshape(-1, order="F")
        changes = np.flatnonzero(np.diff(flat)) + 1
        shape = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, flat.size]).tolist()}
    return {"bbox": [left, top, width, height], "area": width * height, "segmentation": shape, "iscrowd": 0}


def write(root: Path, annotations: list[dict[str, Any]], images: int = 3, categories: Any = CATEGORIES) -> CocoSplit:
    folder = root / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    listed = []
    for number in range(1, images + 1):
        pixels = rng.integers(50, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        listed.append({"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
    numbered = [{"id": 100 + place, **each} for place, each in enumerate(annotations)]
    content = {"info": {"é": "ü"}, "annotations": numbered, "images": listed, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return CocoSplit(str(folder), str(root / "instances.json"))


def scene() -> list[dict[str, Any]]:
    """A table with a car on it, a person beside, a crowd of cars, a small car; and a table in another photograph."""
    return [
        {"image_id": 2, "category_id": 67, **rectangle(5, 5, 30, 20)},
        {"image_id": 2, "category_id": 3, **rectangle(10, 8, 10, 8, "runs")},
        {"image_id": 2, "category_id": 1, **rectangle(30, 0, 6, 30, "rle")},
        {"image_id": 2, "category_id": 3, **rectangle(0, 20, 60, 20, "runs"), "iscrowd": 1},
        {"image_id": 2, "category_id": 3, **rectangle(50, 2, 3, 3)},
        {"image_id": 1, "category_id": 67, **rectangle(20, 0, 40, 40)},
        {"image_id": 1, "category_id": 3, **rectangle(0, 30, 12, 10)},
    ]


RULES = CocoRules(categories=("car", "dining table"), size=None, least_area=20)


def photo(split: CocoSplit, number: int) -> np.ndarray:
    return np.asarray(Image.open(Path(split.images) / f"{number}.png"))


# ---- annotations -----------------------------------------------------------------------------------------------------


def test_records_are_those_of_a_json_reader_with_their_places(tmp_path: Path) -> None:
    split = write(tmp_path, scene())
    path = Path(split.annotations)
    whole = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, list[Any]] = {}
    for record in records(path):
        text = path.read_bytes()[record.start : record.start + record.length]
        found.setdefault(record.section, []).append(json.loads(text))
    assert found == {name: whole[name] for name in ("annotations", "images", "categories")}


def test_a_record_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    long = {"annotations": [1, {"a": "x" * (3 * _CHUNK)}, [12345]], "images": [], "b": 3.25}
    (tmp_path / "long.json").write_text(json.dumps(long))
    assert [record.value for record in records(tmp_path / "long.json")] == long["annotations"]


@pytest.mark.parametrize("text", ["", "[1]", '{"images": [{"id": 1}, ', '{"images": [1 2]}', '{"images": [1]'])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="is no whole COCO annotation file"):
        list(records(tmp_path / "a.json"))
    with pytest.raises(UserError, match="does not exist"):
        list(records(tmp_path / "b.json"))


@pytest.mark.parametrize("kind", ["polygon", "runs", "rle"])
def test_masks_are_those_of_pycocotools(tmp_path: Path, kind: str) -> None:
    split = write(tmp_path, [{"image_id": 1, "category_id": 3, **rectangle(7, 9, 21, 13, kind)}])
    index = read_index(Path(split.annotations))
    (annotation,) = parse(index.annotations(1))
    official = COCO(split.annotations)
    mask = decode(annotation, (HEIGHT, WIDTH), "it")
    assert np.array_equal(mask, official.annToMask(official.loadAnns([100])[0]).astype(bool))
    assert mask[9:22, 7:28].all()
    assert mask.sum() == 21 * 13
    with pytest.raises(UserError, match="it cannot be decoded"):
        decode(annotation | {"segmentation": 3}, (HEIGHT, WIDTH), "it")
    if kind != "polygon":
        with pytest.raises(UserError, match=r"its mask is of size \(40, 60\)"):
            decode(annotation, (60, 40), "it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 5}, "annotations of category 5, which it does not define"),
        ({"image_id": 9}, "annotations of 1 images that it does not list, the first is 9"),
        ({"area": None}, "an entry of annotations"),
        ({"bbox": None}, "annotation 107 has the box None"),
        ({"bbox": [0, 0, -1, 4]}, "four finite numbers"),
        ({"bbox": [0, 0, float("nan"), 4]}, "four finite numbers"),
        ({"id": 103}, "has 2 annotations of number 103"),
    ],
)
def test_annotations_that_lead_nowhere(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    broken = [*scene(), {"image_id": 1, "category_id": 3, **rectangle(0, 0, 9, 9), **change}]
    with pytest.raises(UserError, match=message):
        read_index(Path(write(tmp_path, broken).annotations))


@pytest.mark.parametrize("kind", ["runs", "rle"])
def test_runs_that_end_before_their_image_does(tmp_path: Path, kind: str) -> None:
    """pycocotools itself leaves the other pixels to chance."""
    annotation = rectangle(5, 5, 20, 20, kind)
    assert decode(annotation, (HEIGHT, WIDTH), "it").sum() == 400
    counts = annotation["segmentation"]["counts"]
    if kind == "runs":
        annotation["segmentation"]["counts"] = counts[:-1]
    else:
        short = tools.encode(np.ones((HEIGHT, WIDTH - 1), dtype=np.uint8, order="F"))
        annotation["segmentation"]["counts"] = short["counts"].decode()
    with pytest.raises(UserError, match=r"its runs are of \d+ pixels and its image is of 2400"):
        decode(annotation, (HEIGHT, WIDTH), "it")


def test_long_compressed_runs(tmp_path: Path) -> None:
    """Runs of many sizes, whose differences have either sign."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.1] = 1
    mask[:, 20:45] = 1
    annotation = {"segmentation": tools.encode(mask)}
    assert np.array_equal(decode(annotation, (HEIGHT, WIDTH), "it"), mask.astype(bool))


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_squares_lie_in_the_image_and_hold_the_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top = rng.uniform(0, 50), rng.uniform(0, 35)
        box = (left, top, rng.uniform(0.5, 60 - left), rng.uniform(0.5, 40 - top))
        square = square_around(box, (HEIGHT, WIDTH), context=float(rng.uniform(0, 0.3)))
        assert 0 <= square.top <= HEIGHT - square.side
        assert 0 <= square.left <= WIDTH - square.side
        if max(box[2:]) <= square.side - 1:
            assert square.left <= left + 0.5
            assert square.left + square.side >= left + box[2] - 0.5
            assert square.top <= top + 0.5
            assert square.top + square.side >= top + box[3] - 0.5
    assert square_around((0, 0, 60, 40), (HEIGHT, WIDTH)) == Square(0, 10, 40)


@pytest.mark.parametrize("overlap", ["front", "keep"])
def test_only_one_objects_pixels_are_left(tmp_path: Path, overlap: Any) -> None:
    split = write(tmp_path, scene())
    annotations = parse(read_index(Path(split.annotations)).annotations(2))
    image = photo(split, 2)
    found, left_out = crops(image, annotations, [3, 67], least_area=20, context=0, overlap=overlap, name="2.png")
    assert left_out == {"small": 1, "hidden": 0, "outside": 0, "crowd": 1}
    assert [crop.annotation for crop in found] == [100, 101]
    masks = [decode(each, (HEIGHT, WIDTH), "it") for each in annotations]
    table, car = found
    # the car on the table, the person and the crowd are black around the table; the table is black around the car
    own = masks[0] & ~(masks[1] | masks[2] | masks[4]) if overlap == "front" else masks[0]
    others = np.logical_or.reduce([masks[1], masks[2], masks[3], masks[4]])
    assert np.array_equal(table.mask, table.square.of(own))
    assert (table.image[table.square.of(others) & ~table.mask] == 0).all()
    assert np.array_equal(table.image[table.mask], table.square.of(image)[table.mask])
    free = ~table.square.of(others | masks[0])
    assert np.array_equal(table.image[free], table.square.of(image)[free])
    assert np.array_equal(car.mask, car.square.of(masks[1]))
    assert (car.image[~car.mask] == 0).all()
    assert (table.hidden > 0) == (overlap == "front")


# ---- the builder -----------------------------------------------------------------------------------------------------


def tree(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_builds_the_same_with_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = write(tmp_path, scene())
    monkeypatch.setattr(coco_build, "_BATCH", 1)
    rows = build_coco_ic(tmp_path / "one", {"all": split}, RULES, workers=1)
    build_coco_ic(tmp_path / "two", {"all": split}, RULES, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert {row["class"]: row["crops"] for row in rows} == {"car": 2, "dining table": 2, "all": 4}
    listed = list(csv.DictReader((tmp_path / "one" / "crops.csv").open()))
    assert len(listed) == 4
    for row in listed:
        file = Path(row["class"].replace(" ", "_")) / f"{row['image']}_{row['annotation']}.png"
        mask = read_mask(tmp_path / "one" / "masks" / file)
        image = np.asarray(Image.open(tmp_path / "one" / "images" / file))
        assert mask.shape == image.shape[:2] == (int(row["side"]),) * 2
        inside = Square(int(row["top"]), int(row["left"]), int(row["side"])).of(photo(split, int(row["image"])))
        assert np.array_equal(image[mask], inside[mask])


def test_a_stopped_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = write(tmp_path, scene())
    monkeypatch.setattr(coco_build, "_BATCH", 1)
    build_coco_ic(tmp_path / "whole", {"all": split}, RULES, workers=1)
    original, seen = coco_build._photograph, []

    def stop(path: Path, size: tuple[int, int]) -> np.ndarray:
        seen.append(path.name)
        if path.name == "2.png":
            raise KeyboardInterrupt
        return original(path, size)

    monkeypatch.setattr(coco_build, "_photograph", stop)
    with pytest.raises(KeyboardInterrupt):
        build_coco_ic(tmp_path / "out", {"all": split}, RULES, workers=1)
    with pytest.raises(UserError, match="is not built to the end"):
        COCOIC(root=str(tmp_path / "out"))
    assert seen == ["1.png", "2.png"]
    monkeypatch.setattr(coco_build, "_photograph", lambda path, size: seen.append(path.name) or original(path, size))
    build_coco_ic(tmp_path / "out", {"all": split}, RULES, workers=1)
    assert seen == ["1.png", "2.png", "2.png"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    # a finished build is left alone
    build_coco_ic(tmp_path / "out", {"all": split}, RULES, workers=1)
    assert len(seen) == 3


def test_other_settings_and_strange_folders_are_refused(tmp_path: Path) -> None:
    split = write(tmp_path, scene())
    build_coco_ic(tmp_path / "out", {"all": split}, RULES, workers=1)
    for other in (CocoRules(categories=("car",)), CocoRules(categories=RULES.categories, size=None, least_area=21)):
        with pytest.raises(UserError, match="was built with other settings or annotations"):
            build_coco_ic(tmp_path / "out", {"all": split}, other, workers=1)
    changed = write(tmp_path, scene()[:-1])
    with pytest.raises(UserError, match="was built with other settings or annotations"):
        build_coco_ic(tmp_path / "out", {"all": changed}, RULES, workers=1)
    with pytest.raises(UserError, match="is not empty and was not built by this"):
        build_coco_ic(tmp_path / "photos", {"all": split}, RULES, workers=1)
    with pytest.raises(UserError, match=r"splits \['all', 'test'\]"):
        build_coco_ic(tmp_path / "new", {"all": split, "test": split}, RULES)


def test_classes(tmp_path: Path) -> None:
    index = read_index(Path(write(tmp_path, scene()).annotations))
    assert CocoRules(categories=1).chosen(index) == ["car"]  # three of them; people do not count
    assert CocoRules(categories=2).chosen(index) == ["car", "dining table"]
    with pytest.raises(UserError, match="has only 2 classes"):
        CocoRules(categories=3).chosen(index)
    with pytest.raises(UserError, match="has no category 'chair': choose from car, dining table, person"):
        CocoRules().chosen(index)
    for settings in (
        {"categories": ("person",)},
        {"categories": ()},
        {"size": 0},
        {"least_area": -1},
        {"overlap": "x"},
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            CocoRules(**settings)  # type: ignore[arg-type]


def test_missing_photographs_and_photographs_of_another_size(tmp_path: Path) -> None:
    split = write(tmp_path, scene())
    Image.new("RGB", (30, 30)).save(Path(split.images) / "2.png")
    with pytest.raises(UserError, match=r"2\.png is 30 × 30 pixels and was annotated at 40 × 60"):
        build_coco_ic(tmp_path / "a", {"all": split}, RULES, workers=1)
    (Path(split.images) / "2.png").unlink()
    with pytest.raises(UserError, match=r"names 1 images that .*photos does not have, the first is 2\.png"):
        build_coco_ic(tmp_path / "b", {"all": split}, RULES, workers=1)


def test_the_data_module_builds_and_reads(tmp_path: Path) -> None:
    more = [{"image_id": n, "category_id": c, **rectangle(5, 5, 20, 20)} for n in range(1, 13) for c in (3,)]
    more += [{"image_id": n, "category_id": 67, **rectangle(30, 10, 24, 24)} for n in range(1, 13)]
    train, test = write(tmp_path / "train", more, 12), write(tmp_path / "test", scene())
    rules = CocoRules(categories=("car", "dining table"), size=16, least_area=20)
    settings: dict[str, Any] = {"root": str(tmp_path / "out"), "val_size": 0.25, "num_workers": 0}
    data = COCOIC(train=train, test=test, rules=rules, build_workers=1, **settings)
    assert (data.class_names, data.image_shape) == (["car", "dining_table"], (3, 16, 16))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [18, 6, 4]
    parts = [
        {data.dataset(s).source.path(r).name.split("_")[0] for r in data.dataset(s).rows} for s in ("train", "val")
    ]  # type: ignore
    assert not parts[0] & parts[1]
    images, _, masks = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert masks.flatten(1).any(1).all()
    again = COCOIC(rules=rules, **settings)
    assert len(again.dataset("test")) == 4
    with pytest.raises(UserError, match="was built with other rules"):
        COCOIC(rules=CocoRules(), **settings)
    with pytest.raises(UserError, match=r"has no MS-COCO-IC: give --data\.train\.images"):
        COCOIC(root=str(tmp_path / "none"))


@pytest.mark.real_data
@pytest.mark.parametrize("overlap", ["front", "keep"])
def test_real(real_data: Path, tmp_path: Path, overlap: Any) -> None:
    """No person, no crop outside its photograph, one object's pixels alone, masks as pycocotools decodes them."""
    folder = real_data / "coco"
    split = CocoSplit(str(folder / "images"), str(folder / "annotations" / "instances_dev.json"))
    rules = CocoRules(size=None, least_area=1024, overlap=overlap)
    build_coco_ic(tmp_path / "out", {"all": split}, rules, workers=1)
    official = COCO(split.annotations)
    names = {each["id"]: each["name"] for each in official.loadCats(official.getCatIds())}
    listed = list(csv.DictReader((tmp_path / "out" / "crops.csv").open()))
    assert len(listed) > 140
    for row in listed:
        annotation = official.loadAnns([int(row["annotation"])])[0]
        assert names[annotation["category_id"]] == row["class"] != "person"
        assert not annotation["iscrowd"]
        about = official.loadImgs([annotation["image_id"]])[0]
        square = Square(int(row["top"]), int(row["left"]), int(row["side"]))
        assert min(square.top, square.left) >= 0
        assert square.top + square.side <= about["height"]
        assert square.left + square.side <= about["width"]
        file = Path(row["class"].replace(" ", "_")) / f"{row['image']}_{row['annotation']}.png"
        mask = read_mask(tmp_path / "out" / "masks" / file)
        decoded = official.annToMask(annotation).astype(bool)
        own, in_front = square.of(decoded).copy(), np.zeros_like(mask)
        image = np.asarray(Image.open(tmp_path / "out" / "images" / file))
        photograph = np.asarray(Image.open(folder / "images" / about["file_name"]).convert("RGB"))
        for other in official.loadAnns(official.getAnnIds([annotation["image_id"]])):
            if other["id"] != annotation["id"]:
                whole = official.annToMask(other).astype(bool)
                theirs = square.of(whole)
                assert (image[theirs & ~mask] == 0).all()
                if (whole.sum(), other["id"]) < (decoded.sum(), annotation["id"]) and not other["iscrowd"]:
                    in_front |= theirs
        assert np.array_equal(mask, own & ~in_front if overlap == "front" else own)
        assert np.array_equal(image[mask], square.of(photograph)[mask])
