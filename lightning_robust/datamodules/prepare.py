"""Getting data ready before training: fetching files, making masks, cutting out objects, and reading it all once.

``python -m lightning_robust.datamodules`` takes the options ``--data …`` of ``lightning-robust``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_robust.batch import as_batch
from lightning_robust.datamodules.base import SPLITS, ImageDataModule, Split
from lightning_robust.errors import UserError

_PROGRAM = "python -m lightning_robust.datamodules"


def prepare(data: ImageDataModule) -> list[dict[str, Any]]:
    """Do what a Trainer would have done before training, and read each image and mask once.

    Args:
        data: Any data module.

    Returns:
        A row for each split: how many images there are, in all and of the rarest and the most frequent class, and,
        where there are masks, the mean share of foreground pixels, after ``image_size``.

    Raises:
        UserError: For the first thing that is missing, damaged or does not fit.
    """
    data.prepare_data()
    splits = [split for split in SPLITS if data._source(split) is not None or (split == "val" and data.has_val)]
    return [_read(data, split) for split in splits]


def _read(data: ImageDataModule, split: Split) -> dict[str, Any]:
    loader = data._eval_loader(split)
    console = Console(stderr=True)
    counts, foreground, masked = torch.zeros(data.num_classes, dtype=torch.int64), 0.0, False
    bar = track(
        loader,
        description=f"reading the {split} images",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for values in bar:
        batch = as_batch(values)
        counts += batch.labels.bincount(minlength=data.num_classes)
        if batch.mask is not None:
            masked = True
            foreground += float(batch.mask.double().flatten(1).mean(1).sum())
    total = int(counts.sum())
    row: dict[str, Any] = {"split": split, "images": total, "rarest class": int(counts.min())}
    row["most frequent class"] = int(counts.max())
    return row | {"foreground": round(foreground / total, 4)} if masked else row


def main(words: list[str] | None = None) -> None:
    """Run the program.

    Args:
        words: Words of the command line; by default those of the process.

    Raises:
        SystemExit: With status 2 after a mistake in the user's input, which is printed as one message.
    """
    parser = ArgumentParser(
        prog=_PROGRAM,
        description="Get data ready before training: fetch files, make masks, cut out objects, read all of it once.",
        allow_abbrev=False,
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="CLASS, and its settings: --data.root …")
    given = parser.parse_args(words)
    try:
        # jsonargparse renamed it in 4.49
        instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
        data: ImageDataModule = instantiate(given).data
        rows = prepare(data)
    except UserError as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    title = f"{type(data).__name__}: {data.num_classes} classes, images of {' × '.join(map(str, data.image_shape))}"
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
