"""Graph cuts a second on all cores against one, and what building all of MS-COCO-IC would take.

    python benchmarks/masks.py --root DATA --output masks.json

``DATA`` has torchvision's folder ``gtsrb`` (else signs are made up), and ``coco`` with ``images`` and
``annotations/instances_*.json`` (else that part is left out). The building time is that of the photographs there,
taken ``--copies`` times under new numbers; the time of a single copy is subtracted, so that starting costs nothing.
Times by the clock are worth something on a machine that does nothing else; processor time hardly depends on that. Peak
memory is that of fresh processes: one that builds a single copy and one that builds them all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from _common import common_arguments, console, interleaved, machine, print_table, write_rows

from lightning_robust.datamodules.base import cores
from lightning_robust.datamodules.coco_annotations import read_index
from lightning_robust.datamodules.coco_build import build_coco_ic
from lightning_robust.datamodules.coco_rules import CocoRules, CocoSplit
from lightning_robust.datamodules.gtsrb_files import entries, load
from lightning_robust.datamodules.masks_cache import MaskCache, Scene
from lightning_robust.datamodules.segmenters import Box, create_segmenter, ellipse

GTSRB: Final = 39_209 + 12_630  # images of the whole benchmark
COCO: Final = 118_287 + 5_000  # photographs of train2017 and val2017
COCO_CROPS: Final = 151_271  # that the source cuts out of them (arXiv 1911.11946)
COCO_MEGABYTES: Final = 469  # instances_train2017.json and instances_val2017.json


def signs(root: Path | None, count: int) -> list[Scene]:
    """Images of traffic signs, or made-up ones of GTSRB's usual size."""
    if root is not None and (root / "gtsrb" / "GTSRB").is_dir():
        return [load(entry) for entry in entries(root / "gtsrb", "test")[:count]]
    made, size = [], 40
    for seed in range(count):
        rng = np.random.default_rng(seed)
        box = Box(5, 5, size - 6, size - 6)
        image = np.full((size, size, 3), (70, 90, 70)) + rng.normal(0, 8, (size, size, 3))
        image[ellipse((size, size), box)] = rng.integers(100, 256, 3)
        made.append(Scene(np.clip(image, 0, 255).astype(np.uint8), box))
    return made


def processor_time() -> float:
    """Seconds that this process and those that it started and that ended have computed."""
    return sum(os.times()[:4])


def graph_cuts(scenes: list[Scene], name: str, processes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Masks a second by numbers of processes, the files of the cache included."""
    with tempfile.TemporaryDirectory() as folder:
        turns = iter(range(10**6))
        processor: dict[int, list[float]] = {n: [] for n in processes}

        def contender(workers: int) -> Any:
            def make() -> None:
                root = Path(folder, str(next(turns)))  # a cache of its own, so that nothing is found in it
                start = processor_time()
                MaskCache(root, create_segmenter(name), workers=workers).masks("bench", scenes)
                processor[workers].append(processor_time() - start)

            return make

        seconds = interleaved({f"{n} processes": contender(n) for n in processes}, rounds, name)
    walls = {n: statistics.median(taken.wall for taken in seconds[f"{n} processes"]) for n in processes}
    first = next(iter(walls.values()))
    return [
        {
            f"{name}, processes": n,
            "images": len(scenes),
            "masks_per_second": len(scenes) / wall,
            "times_one_process": first / wall,
            "processor_ms_per_mask": 1000 * statistics.median(processor[n]) / len(scenes),
            "minutes_for_GTSRB": GTSRB / len(scenes) * wall / 60,
        }
        for n, wall in walls.items()
    ]


def multiplied(split: CocoSplit, copies: int, file: Path) -> CocoSplit:
    """The same photographs several times, under new numbers."""
    content = json.loads(Path(split.annotations).read_text(encoding="utf-8"))
    images = [dict(each, id=each["id"] + copy * 10**8) for copy in range(copies) for each in content["images"]]
    annotations = [
        dict(each, id=each["id"] + copy * 10**12, image_id=each["image_id"] + copy * 10**8)
        for copy in range(copies)
        for each in content["annotations"]
    ]
    file.write_text(json.dumps(content | {"images": images, "annotations": annotations}), encoding="utf-8")
    return CocoSplit(split.images, str(file))


def _build(split: CocoSplit, out: str, workers: int, answer: Any) -> None:
    """Build in a fresh process; answers with seconds, crops and peak memory."""
    start = time.perf_counter()
    index = read_index(Path(split.annotations))
    reading = time.perf_counter() - start
    start, computed = time.perf_counter(), processor_time()
    rows = build_coco_ic(out, {"all": split}, CocoRules(), workers)
    seconds, computed = time.perf_counter() - start, processor_time() - computed
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, children = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    crops = next(row["crops"] for row in rows if row["class"] == "all")
    answer.put((seconds, computed, reading, len(index.images), len(index.starts), crops, own, children))


def coco(split: CocoSplit, copies: int, workers: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Build one copy and several: a row each, and what all of COCO would take."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, copies):
            many = multiplied(split, number, Path(folder, f"{number}.json"))
            sizes.append(os.path.getsize(many.annotations) / 1e6)
            answer = context.Queue()
            process = context.Process(target=_build, args=(many, f"{folder}/out{number}", workers, answer))
            process.start()
            seconds, computed, reading, photographs, annotations, crops, own, children = answer.get()
            process.join()
            rows.append(
                {
                    "copies": number,
                    "photographs": photographs,
                    "annotations": annotations,
                    "crops": crops,
                    "seconds": seconds,
                    "processor_seconds": computed,
                    "seconds_to_index": reading,
                    "peak_MiB": own,
                    "peak_MiB_of_a_worker": children,
                }
            )
    one, all_ = rows
    seconds, computed = (all_[key] - one[key] for key in ("seconds", "processor_seconds"))
    reading = (all_["seconds_to_index"] - one["seconds_to_index"]) / (sizes[1] - sizes[0])
    photographs, crops = all_["photographs"] - one["photographs"], all_["crops"] - one["crops"]
    estimate = {
        "photographs_per_second": photographs / seconds,
        "crops_per_second": crops / seconds,
        "hours_by_photographs": COCO * seconds / photographs / 3600,
        "hours_by_crops": COCO_CROPS * seconds / crops / 3600,
        "processor_hours_by_photographs": COCO * computed / photographs / 3600,
        "processor_hours_by_crops": COCO_CROPS * computed / crops / 3600,
        "minutes_to_index": COCO_MEGABYTES * reading / 60,
        "bytes_per_annotation": 2**20
        * (all_["peak_MiB"] - one["peak_MiB"])
        / (all_["annotations"] - one["annotations"]),
    }
    return rows, estimate


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder that has gtsrb and coco")
    parser.add_argument("--segmenter", default="graph_cut", help="graph_cut, grab_cut or ellipse")
    parser.add_argument("--images", type=int, default=632, help="traffic signs")
    parser.add_argument("--workers", type=int, default=cores(), help="processes, against one")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is taken")
    parser.add_argument("--copies", type=int, default=16, help="of the photographs")
    args = parser.parse_args()
    if args.copies < 2:
        parser.error("--copies: at least 2, since the time of one is subtracted")
    cuts = graph_cuts(signs(args.root, args.images), args.segmenter, sorted({1, args.workers}), args.rounds)
    print_table("Masks of traffic signs", cuts)
    about: dict[str, Any] = {"machine": machine(), "cores": cores()}
    rows = list(cuts)
    files = sorted((args.root / "coco" / "annotations").glob("instances_*.json")) if args.root is not None else []
    if files:
        built, estimate = coco(CocoSplit(str(args.root / "coco" / "images"), str(files[0])), args.copies, args.workers)
        print_table(f"MS-COCO-IC on {args.workers} processes", built)
        print_table("All of COCO, from the difference", [estimate])
        rows, about = rows + built, about | {"all of COCO": estimate}
    else:
        console.print("no --root with coco: MS-COCO-IC is left out")
    if args.output:
        write_rows(args.output, rows, about)


if __name__ == "__main__":
    main()
