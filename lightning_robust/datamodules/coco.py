"""MS-COCO-IC: square crops of single objects with masks (Vaishnavi et al., arXiv 1911.11946)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_robust.datamodules.coco_build import build_coco_ic
from lightning_robust.datamodules.coco_rules import CocoRules, CocoSplit
from lightning_robust.datamodules.masked_folder import MaskedImageFolder
from lightning_robust.errors import UserError


class COCOIC(MaskedImageFolder):
    """Single objects of ten COCO classes with their masks, everything else annotated being black.

    Reads what :func:`build_coco_ic` writes, and builds it first where ``root`` is not built yet and photographs and
    annotations are given: ``--data COCOIC --data.root coco_ic --data.train.images train2017 --data.train.annotations
    instances_train2017.json``, and ``--data.test…`` of val2017. Crops of one photograph are never divided over two
    splits. Look at ``root/sheet.png`` and ``root/statistics.csv`` before training.

    Args:
        root: Folder of the crops.
        train: Photographs and annotations of the training split; of the only one, where ``test`` is not given.
        test: Photographs and annotations of the test split.
        rules: What is cut out and how; those of a finished build must be the same, if given.
        build_workers: Processes that build; by default one per core.
        **kwargs: See :class:`MaskedImageFolder`.

    Raises:
        UserError: If ``root`` is not built and nothing is given to build it from, or building or reading it fails.
    """

    def __init__(
        self,
        root: str = "data/coco_ic",
        train: CocoSplit | None = None,
        test: CocoSplit | None = None,
        rules: CocoRules | None = None,
        build_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        folder = Path(root)
        if train is not None or test is not None:
            given = {name: split for name, split in (("train", train), ("test", test)) if split is not None}
            if test is None and train is not None:
                given = {"all": train}
            # the folders say what classes there are, which a model must know before any hook of Lightning is called
            if getattr(rank_zero_only, "rank", 0) > 0:
                if not (folder / "build.json").is_file():
                    raise UserError(
                        f"{folder} is not built, and one process alone can build it: run python -m "
                        "lightning_robust.datamodules with the same --data options first."
                    )
            else:
                build_coco_ic(folder, given, rules, build_workers)
        elif not (folder / "build.json").is_file():
            unfinished = (folder / "settings.json").is_file()
            raise UserError(
                f"{folder} {'is not built to the end' if unfinished else 'has no MS-COCO-IC'}: give "
                "--data.train.images and --data.train.annotations (and --data.test.…) of COCO, and it is built there."
            )
        elif rules is not None:
            written = json.loads((folder / "build.json").read_text(encoding="utf-8"))["rules"]
            wanted = json.loads(json.dumps(vars(rules)))
            if written != wanted:
                raise UserError(f"{folder} was built with other rules, {written}: delete it, or name another folder.")
        super().__init__(root=root, group=kwargs.pop("group", "^[^_]+"), **kwargs)
