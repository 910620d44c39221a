"""What the region maps of many images cost, and how far one step of FGSM gets at any length.

    python benchmarks/regions.py --root DATA --weights mnist01.ckpt --threads 1
    python benchmarks/regions.py --root DATA --weights mnist01.ckpt --curve mnist01

``--root`` holds MNIST/raw, ``mnist01.ckpt`` is a checkpoint of ``regions/mnist01``. The first line measures all maps of
RegionMaps under FGSM, in one ``test`` over so many images of 28×28, each number of images in a process of its own: CPU
seconds of the pass, and the process's peak memory. Were a map kept for each image, 10,000 images would take 9,000 × 784
numbers of 4 bytes for each kind of map (27 MiB) more than 1,000.

The second prints what is left of each class's accuracy on validation images (the first 200, where there are more)
against ε, under FGSM and PGD-10: of ``mnist01``, ``fashion_trouser_pullover``, ``cats_dogs`` or ``malaria``, ``--root``
and ``--weights`` being those of that problem.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from _common import common_arguments, console, machine, print_table, write_rows
from torch import Tensor

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import RegionMaps
from lightning_robust.datamodules import MNIST, Arrays, CatsDogs, FashionMNIST, Malaria
from lightning_robust.datamodules.base import ImageDataModule
from lightning_robust.modules import ImageClassifier

GRAY, COLOUR = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), tuple(number / 255 for number in (1, 2, 4, 8, 12, 16))
AT_ONCE = 100  # images that the curve attacks at a time


def cost(images: Path, weights: Path) -> dict[str, Any]:
    """One pass of this process."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # none are wanted: they cost memory
    module = ImageClassifier.load_from_checkpoint(weights)
    data = Arrays(test=str(images), layout="NCHW", num_workers=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[RegionMaps({"fgsm": FGSM(eps=0.1)})],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.test(module, data, verbose=False)
    counted = [value for name, value in trainer.callback_metrics.items() if name.endswith("/images")]
    return {
        "images": len(data.dataset("test")),
        "mapped": int(sum(counted)),
        "CPU s": round(time.process_time() - start, 1),
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def costs(root: Path, weights: Path, counts: list[int], threads: int) -> list[dict[str, Any]]:
    """One process a number of images."""
    dataset = MNIST(str(root), classes=[0, 1], val_size=0).dataset("train")
    rows = []
    for count in counts:
        batch = dataset.__getitems__(range(min(count, len(dataset))))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npz"
            np.savez(path, images=(batch.images * 255).round().byte().numpy(), labels=batch.labels.numpy())
            command = [sys.executable, __file__, "--weights", str(weights), "--one", str(path)]
            done = subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        console.print(rows[-1])
    return rows


def problem(name: str, root: Path) -> tuple[ImageDataModule, tuple[float, ...]]:
    """The validation images of a config of regions/, and values of ε."""
    if name == "mnist01":
        return MNIST(str(root), classes=[0, 1], val_size=1000, limit={"val": 200}), GRAY
    if name == "fashion_trouser_pullover":
        return FashionMNIST(str(root), classes=[1, 2], val_size=1000, limit={"val": 200}), GRAY
    kind = CatsDogs if name == "cats_dogs" else Malaria
    return kind(str(root), image_size=64, val_size=0.15), COLOUR


def percent(right: Tensor) -> float:
    """Share of the images, in %."""
    return round(100 * float(right.double().mean()), 1)


def curve(name: str, root: Path, weights: Path) -> list[dict[str, Any]]:
    """Accuracy of each class against ε, in %."""
    data, radii = problem(name, root)
    module = ImageClassifier.load_from_checkpoint(weights).eval()
    dataset = data.dataset("val")
    batch = dataset.__getitems__(range(len(dataset)))
    rows = []
    for label, title in enumerate(data.class_names):
        own = batch.labels == label
        parts = list(zip(batch.images[own].split(AT_ONCE), batch.labels[own].split(AT_ONCE), strict=True))
        with torch.no_grad():
            clean = torch.cat([module(images).argmax(1) == labels for images, labels in parts])
        rows.append({"class": title, "images": len(clean), "eps": 0.0, "FGSM": percent(clean), "PGD": percent(clean)})
        for eps in radii:
            row: dict[str, Any] = {"class": title, "images": len(clean), "eps": round(eps, 4)}
            for attack in (FGSM(eps=eps), PGD(eps=eps, steps=10)):
                right = [~attack.run(module, images, labels, rounding=False).success for images, labels in parts]
                row[type(attack).__name__] = percent(torch.cat(right))
            rows.append(row)
    return rows


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder that has MNIST/raw, or the problem's of --curve")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000], help="how many images to map")
    parser.add_argument(
        "--curve", choices=["mnist01", "fashion_trouser_pullover", "cats_dogs", "malaria"], help="accuracy against ε"
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(cost(args.one, args.weights)))
        return
    if args.root is None:
        parser.error("--root: the folder of the images")
    if args.curve:
        rows = curve(args.curve, args.root, args.weights)
        print_table(f"Accuracy (%) on validation images against ε: {args.curve}", rows)
    else:
        rows = costs(args.root, args.weights, args.images, args.threads)
        print_table("All maps of RegionMaps, 28×28, FGSM, one pass", rows)
    if args.output:
        write_rows(args.output, rows, {"machine": machine()})


if __name__ == "__main__":
    main()
