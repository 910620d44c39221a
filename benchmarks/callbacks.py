"""What the mean |∇x| map costs within adversarial training.

    python benchmarks/callbacks.py

One fit for each kind of attack start; epochs with and without the map alternate within it (``every_n_epochs=2``), so
that both meet the same machine. With a random start the callback makes its own passes on one validation batch; with a
clean start it takes the gradient that the attack computed anyway, over all training images. Drawing and writing the
figure is included. The cost is (median epoch with) / (median epoch without) - 1; the aim is under 2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import InputGradientMap
from lightning_robust.datamodules import Arrays
from lightning_robust.loggers import RunLogger
from lightning_robust.modules import ImageClassifier
from lightning_robust.objectives import PGDAdversarial


class EpochTimes(pl.Callback):
    """Wall seconds from the start of an epoch's training to the start of the next one's."""

    def __init__(self) -> None:
        """Start with none."""
        self.marks: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the end of the last epoch."""
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """One number an epoch."""
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


def measure(folder: Path, images: int, pairs: int, random_start: bool) -> dict[str, Any]:
    """Fit 2 + 2 · ``pairs`` epochs; the first two warm up."""
    data = Arrays(train=str(folder / "train.npz"), val=str(folder / "val.npz"), batch_size=128, num_workers=0)
    attack = PGD(eps=0.1, steps=10, random_start=random_start)
    module = ImageClassifier(
        "small_cnn", 10, (1, 28, 28), objective=PGDAdversarial(attack=attack), network_args={"width": 2}
    )
    times = EpochTimes()
    trainer = pl.Trainer(
        max_epochs=2 + 2 * pairs,
        accelerator="auto",
        devices=1,
        logger=RunLogger(str(folder / "runs"), f"random_start_{random_start}"),
        callbacks=[times, InputGradientMap(every_n_epochs=2)],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    # every_n_epochs=2 measures the second, fourth, … epoch
    without, with_map = times.seconds[2::2], times.seconds[3::2]
    cost = statistics.median(with_map) / statistics.median(without) - 1
    return {"start": "random" if random_start else "clean", "without_s": without, "with_s": with_map, "cost": cost}


def main() -> None:
    """Measure both starts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="training images an epoch (random pixels)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of epochs with and without the map")
    parser.add_argument("--output", type=Path, help="also write the numbers to this .json file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    rng = np.random.default_rng(0)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", options.images), ("val", 512)):
            pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            np.savez(folder / f"{split}.npz", images=pixels, labels=np.arange(count) % 10)
        for random_start in (True, False):
            results.append(measure(folder, options.images, options.pairs, random_start))
    table = Table(title=f"InputGradientMap within PGD-10 training, {options.images} images an epoch")
    for column in ("attack starts at", "map from", "epoch without (s)", "epoch with (s)", "cost"):
        table.add_column(column, justify="right")
    for row in results:
        source = "one validation batch" if row["start"] == "random" else "the attack's first step"
        seconds = [f"{statistics.median(row[key]):.2f}" for key in ("without_s", "with_s")]
        table.add_row(f"{row['start']} point", source, *seconds, f"{100 * row['cost']:+.2f} %")
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
