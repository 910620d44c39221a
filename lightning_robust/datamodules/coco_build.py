"""The builder of MS-COCO-IC: photograph by photograph, in several processes, restartable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_robust.datamodules.base import cores
from lightning_robust.datamodules.coco_annotations import CocoIndex, parse, read_index
from lightning_robust.datamodules.coco_crops import crops
from lightning_robust.datamodules.coco_rules import CocoRules, CocoSplit, folder_name
from lightning_robust.datamodules.dataset import UNREADABLE
from lightning_robust.datamodules.masks import read_mask, resize_masks, write_mask
from lightning_robust.datamodules.masks_parallel import parallel_map
from lightning_robust.datamodules.segmenters.base import require
from lightning_robust.errors import UserError
from lightning_robust.report.atomic import atomic_file
from lightning_robust.report.contact_sheet import contact_sheet
from lightning_robust.report.figures import save_figure
from lightning_robust.report.tables import write_csv, write_json

_BATCH: Final = 64  # photographs that a process takes at a time; also what a stopped run may lose, for each process
_VERSION: Final = 1  # raised whenever the same settings give other files
_SHEET: Final = 42


def build_coco_ic(
    out: str | Path, splits: dict[str, CocoSplit], rules: CocoRules | None = None, workers: int | None = None
) -> list[dict[str, Any]]:
    """Write MS-COCO-IC as a folder that :class:`MaskedImageFolder` reads.

    ``out/images/SPLIT/CLASS/IMAGE_ANNOTATION.png`` and ``out/masks/SPLIT/CLASS/…`` of the same name; of a single split
    called ``all`` without the folders of splits. With ``statistics.csv``, ``crops.csv`` (the square of each crop in its
    photograph), ``sheet.png`` and, when all is done, ``build.json``. A build that was stopped goes on where it was; a
    finished one is left as it is. Memory does not grow with the photographs: some 40 bytes per annotation are kept, and
    a few photographs per process.

    Args:
        out: The folder, new or of the same build.
        splits: ``{"train": …, "test": …}``, or ``{"all": …}``.
        rules: What is cut out and how.
        workers: Processes; by default one per core.

    Returns:
        The statistics: a row for each split and class.

    Raises:
        UserError: If pycocotools is missing, files are missing or damaged, categories do not exist, or the folder has a
            build with other settings.
    """
    require("pycocotools", "building MS-COCO-IC")
    rules = rules or CocoRules()
    out = Path(out)
    if not splits or ("all" in splits and len(splits) > 1) or not set(splits) <= {"train", "val", "test", "all"}:
        raise UserError(f"splits {list(splits)}: give some of train, val and test, or all alone.")
    settings = _settings(splits, rules)
    _check_settings(out, settings)
    finished = out / "build.json"
    if finished.is_file():
        return list(json.loads(finished.read_text(encoding="utf-8"))["statistics"])
    indices = {name: read_index(Path(split.annotations), rules.least_area) for name, split in splits.items()}
    names = rules.chosen(next(iter(indices.values())))
    for index in indices.values():
        dataclasses.replace(rules, categories=tuple(names)).chosen(index)
    for name, split in splits.items():
        _check_images(Path(split.images), indices[name], rules, names)
    write_json(out / "settings.json", settings)
    rows: list[dict[str, Any]] = []
    with atomic_file(out / "crops.csv") as temporary, temporary.open("w", encoding="utf-8") as table:
        table.write("split,class,image,annotation,top,left,side,foreground,cut,hidden\n")
        for name, split in splits.items():
            rows += _build_split(out, name, split, indices[name], names, rules, workers, table)
    write_csv(out / "statistics.csv", rows)
    bare = [f"{row['class']} ({row['split']})" for row in rows if not row["crops"] and row["class"] != "all"]
    if bare:
        rank_zero_warn(f"MS-COCO-IC has no crop of {', '.join(bare)}: give other --data.rules.categories, or more data")
    _sheet(out)
    write_json(finished, settings | {"statistics": rows})
    crops = sum(row["crops"] for row in rows if row["class"] == "all")
    rank_zero_info(f"MS-COCO-IC: {crops} crops in {out}; look at {out / 'sheet.png'} and {out / 'statistics.csv'}")
    return rows


def _settings(splits: dict[str, CocoSplit], rules: CocoRules) -> dict[str, Any]:
    """All that the files depend on."""
    annotations = {}
    for name, split in splits.items():
        path = Path(split.annotations)
        if not path.is_file():
            raise UserError(f"the annotation file {path} does not exist.")
        with path.open("rb") as file:
            annotations[name] = hashlib.file_digest(file, "sha256").hexdigest()
    given: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(rules)))
    return {"version": _VERSION, "rules": given, "annotations": annotations}


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    written = out / "settings.json"
    if written.is_file():
        try:
            same = json.loads(written.read_text(encoding="utf-8")) == settings
        except ValueError:
            same = False
        if not same:
            raise UserError(
                f"{out} was built with other settings or annotations (settings.json there says which): delete it, or "
                "build into another folder."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not built by this: choose a new folder.")


def _check_images(folder: Path, index: CocoIndex, rules: CocoRules, names: Sequence[str]) -> None:
    """Name photographs that the annotations speak of and the folder does not have."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: it should have the photographs of {index.path}.")
    there = {path.name for path in folder.iterdir()}
    missing = [index.images[number][0] for number in index.bounds if index.images[number][0] not in there]
    if missing:
        raise UserError(
            f"{index.path} names {len(missing)} images that {folder} does not have, the first is {missing[0]}: add "
            "them, or name the folder that has them."
        )


Task = tuple[Path, str, list[tuple[int, Path, tuple[int, int], list[bytes]]], dict[int, str], CocoRules]


def _build_split(
    out: Path,
    name: str,
    split: CocoSplit,
    index: CocoIndex,
    names: Sequence[str],
    rules: CocoRules,
    workers: int | None,
    table: Any,
) -> list[dict[str, Any]]:
    wanted = {number: category for number, category in index.categories.items() if category in names}
    part = "" if name == "all" else name
    for kind in ("images", "masks"):
        for category in names:
            (out / kind / part / folder_name(category)).mkdir(parents=True, exist_ok=True)
    numbers = sorted(index.bounds)

    def tasks() -> Iterator[Task]:
        for start in range(0, len(numbers), _BATCH):
            log = out / ".done" / f"{name}-{start:07}.json"
            batch = []
            if not log.is_file():  # what a former run has finished needs no annotations
                for number in numbers[start : start + _BATCH]:
                    file, height, width = index.images[number]
                    batch.append((number, Path(split.images, file), (height, width), index.annotations(number)))
            yield log, part, batch, wanted, rules

    counts: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    done = parallel_map(
        _build_batch,
        tasks(),
        cores() if workers is None else workers,
        description=f"cutting objects out of the {name} photographs",
        total=len(numbers),
        size=lambda found: found["photographs"],
    )
    for found in done:
        left_out.update(found["left_out"])
        for row in found["crops"]:
            counts[row[0]] += 1
            shares[row[0]] += row[6]
            table.write(f"{name},{','.join(str(value) for value in row)}\n")
    rows = [
        {"split": name, "class": each, "crops": counts[each], "foreground": shares[each] / max(counts[each], 1)}
        for each in names
    ]
    total = {"split": name, "class": "all", "crops": counts.total()}
    total["foreground"] = sum(shares.values()) / max(counts.total(), 1)
    return [*rows, total | {f"left out: {reason}": number for reason, number in left_out.items()}]


def _build_batch(task: Task) -> dict[str, Any]:
    """Write the crops of some photographs, and then a file that says so."""
    log, part, batch, wanted, rules = task
    if not batch and log.is_file():
        finished: dict[str, Any] = json.loads(log.read_text(encoding="utf-8"))
        return finished
    out = log.parent.parent
    left_out: Counter[str] = Counter()
    rows = []
    for number, path, size, texts in batch:
        parsed = parse(texts)
        if not any(each["category_id"] in wanted for each in parsed):
            continue
        found, without = crops(
            _photograph(path, size),
            parsed,
            list(wanted),
            least_area=rules.least_area,
            context=rules.context,
            overlap=rules.overlap,
            name=path.name,
        )
        left_out.update(without)
        for crop in found:
            folder = folder_name(wanted[crop.category])
            file = Path(part, folder, f"{number}_{crop.annotation}.png")
            image, mask = crop.image, crop.mask
            if rules.size is not None and crop.square.side != rules.size:
                image = np.asarray(Image.fromarray(image).resize((rules.size,) * 2, Image.Resampling.BICUBIC))
                mask = resize_masks(torch.from_numpy(mask)[None], (rules.size, rules.size))[0].numpy()
            with atomic_file(out / "images" / file) as temporary:
                Image.fromarray(image).save(temporary)
            with atomic_file(out / "masks" / file) as temporary:
                write_mask(temporary, mask)
            share, cut, hidden = float(mask.mean()), crop.cut, crop.hidden
            row = [wanted[crop.category], number, crop.annotation, *crop.square]
            rows.append([*row, *(round(value, 4) for value in (share, cut, hidden))])
    summary = {"photographs": len(batch), "crops": rows, "left_out": dict(left_out)}
    write_json(log, summary)
    return summary


def _photograph(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace it.") from error
    if pixels.shape[:2] != size:
        raise UserError(
            f"{path} is {pixels.shape[0]} × {pixels.shape[1]} pixels and was annotated at {size[0]} × {size[1]}: take "
            "the photographs that belong to the annotations."
        )
    return pixels


def _sheet(out: Path) -> None:
    """Write the contact sheet."""
    with (out / "crops.csv").open(encoding="utf-8") as table:
        lines = sum(1 for _ in table) - 1
        chosen = set(np.random.default_rng(0).permutation(lines)[:_SHEET].tolist())
        table.seek(0)
        next(table)
        shown = [line.split(",") for number, line in enumerate(table) if number in chosen]
    if not shown:
        return
    images, masks, captions = [], [], []
    for split, category, image, annotation, *_ in shown:
        file = Path("" if split == "all" else split, folder_name(category), f"{image}_{annotation}.png")
        with Image.open(out / "images" / file) as opened:
            images.append(np.asarray(opened.convert("RGB")))
        masks.append(read_mask(out / "masks" / file))
        captions.append(f"{category} {image}")
    title = f"MS-COCO-IC: {len(shown)} of {lines} crops drawn at random"
    save_figure(contact_sheet(images, masks, captions, title=title), out / "sheet.png")
