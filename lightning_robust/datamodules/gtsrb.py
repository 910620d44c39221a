"""GTSRB-IC: traffic signs with masks that a segmenter makes (Vaishnavi et al., arXiv 1911.11946)."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torchvision import datasets

from lightning_robust.datamodules.base import ImageDataModule, Split, checked_image_size, cores
from lightning_robust.datamodules.dataset import resize_and_centre
from lightning_robust.datamodules.download import download_or_explain
from lightning_robust.datamodules.gtsrb_files import CLASS_NAMES, Entry, GtsrbSplit, entries, load
from lightning_robust.datamodules.gtsrb_shapes import sign_shape
from lightning_robust.datamodules.masks import MaskedTensorSource, resize_mask_and_centre, warn_of_full
from lightning_robust.datamodules.masks_cache import MaskCache, Scene
from lightning_robust.datamodules.masks_quality import failed, quality_rows
from lightning_robust.datamodules.segmenters import BoolArray, create_segmenter, ellipse
from lightning_robust.errors import UserError
from lightning_robust.report.contact_sheet import contact_sheet
from lightning_robust.report.figures import save_figure
from lightning_robust.report.tables import write_csv, write_json

_SHEET = 56  # images on a contact sheet


class GTSRBIC(ImageDataModule):
    """GTSRB with a mask of each sign: 43 classes, 26,640 (torchvision's) or 39,209 training and 12,630 test images.

    Batches are ``(images, labels, masks bool (N, 1, H, W))``. Masks are made on the first use, on all cores, and kept
    beside the data; other settings of the segmenter make other masks. Beside them stand ``quality_<split>.csv`` and a
    contact sheet ``sheet_<split>.png``: have a look before training, since the source calls its own segmenter
    imperfect, too. Shots of one sign (a track of about 30) are never divided over training and validation.

    Args:
        root: Folder that has torchvision's folder ``gtsrb``, with ``GTSRB/Training``, ``GTSRB/Final_Test/Images`` and
            ``GT-final_test.csv`` in it.
        download: Whether to fetch missing files from the internet.
        segmenter: ``graph_cut`` (after the source), ``grab_cut`` (OpenCV; starts from the region of interest) or
            ``ellipse`` (that of the region of interest).
        segmenter_settings: Settings of the segmenter that differ from its defaults.
        segmenter_seed: Seed of its randomness; an image's draws depend on the image and this alone.
        segmenter_workers: Processes that segment; by default one a core.
        cache: Folder for the masks; by default ``masks`` in ``gtsrb``.
        mask_share: A mask that covers a smaller or larger share of its image than these two has failed.
        on_failure: What takes the place of a failed mask: the ``ellipse`` in the region of interest, or the ``full``
            image.
        image_size: As of :class:`ImageDataModule`; signs come in all sizes, so there must be one.
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If files or a library are missing or damaged, a setting is wrong, or the cache is of other settings.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        segmenter: Literal["graph_cut", "grab_cut", "ellipse"] = "graph_cut",
        segmenter_settings: dict[str, Any] | None = None,
        segmenter_seed: int = 0,
        segmenter_workers: int | None = None,
        cache: str | None = None,
        mask_share: tuple[float, float] = (0.1, 0.9),
        on_failure: Literal["ellipse", "full"] = "ellipse",
        image_size: int | tuple[int, int] = 32,
        **kwargs: Any,
    ) -> None:
        self.folder, self.download = Path(root) / "gtsrb", download
        if len(mask_share) != 2 or not 0 <= mask_share[0] < mask_share[1] <= 1:
            raise UserError(f"mask_share={mask_share}: give two shares from 0 to 1, the smaller one first.")
        if on_failure not in ("ellipse", "full"):
            raise UserError(f"on_failure={on_failure!r}: give ellipse or full.")
        if segmenter_seed < 0:
            raise UserError(f"segmenter_seed={segmenter_seed} is too small: give at least 0.")
        self.mask_share, self.on_failure = (float(mask_share[0]), float(mask_share[1])), on_failure
        self.cache = MaskCache(
            self.folder / "masks" if cache is None else Path(cache),
            create_segmenter(segmenter, segmenter_settings),
            segmenter_seed,
            cores() if segmenter_workers is None else segmenter_workers,
        )
        self._size = checked_image_size(image_size)
        self._entries: dict[GtsrbSplit, list[Entry]] = {}
        if not download:
            self._list("test" if not (self.folder / "GTSRB" / "Training").is_dir() else "train")
        super().__init__(root=root, image_size=image_size, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """What the 43 signs say."""
        return list(CLASS_NAMES)

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """Three channels of the size that was asked for."""
        assert self._size is not None
        return 3, *self._size

    def prepare_data(self) -> None:
        """Fetch missing files, if ``download`` is on, and make missing masks, so that other processes find them."""
        if self.download and not (self.folder / "GTSRB").is_dir():
            for name in ("train", "test"):
                download_or_explain(_torchvision(name), self.root, [self.folder / "GTSRB"])
        splits: tuple[GtsrbSplit, ...] = ("train", "test")
        for split in splits:
            if self._has(split) and not self.cache.complete(split, len(self._list(split))):
                self._source(split)

    def mend(self, split: Split) -> str:
        """Say which folder is missing."""
        where = {"test": "GTSRB/Final_Test/Images and GT-final_test.csv"}.get(split, "GTSRB/Training")
        return f"put {where} into {self.folder}."

    def read(self, split: Split) -> MaskedTensorSource | None:
        """Read the images of a split and their masks, which are made where they are missing."""
        if split == "val" or not self._has(split):
            return None
        listed = self._list(split)
        scenes = self.scenes(split)
        masks = self.cache.masks(split, scenes)
        labels = np.array([entry.label for entry in listed], dtype=np.int64)
        # the figures are of these images, labels and bounds; masks know their own settings
        of = {"images": self.cache.digest(scenes), "labels": zlib.crc32(labels.tobytes())}
        self._report(split, scenes, masks, labels, {**of, "mask_share": list(self.mask_share)})
        usable = [self._usable(scene, mask) for scene, mask in zip(scenes, masks, strict=True)]
        warn_of_full(sum(bool(mask.all()) for mask in usable), len(usable), f"GTSRB-IC's {split} images")
        size = self.image_shape[1:]
        images = [resize_and_centre(torch.from_numpy(scene.image).permute(2, 0, 1), size) for scene in scenes]
        centred = [resize_mask_and_centre(torch.from_numpy(mask)[None], size) for mask in usable]
        tracks = [entry.track for entry in listed]
        groups = None if split == "test" else np.unique(tracks, return_inverse=True)[1].astype(np.int64)
        return MaskedTensorSource(torch.stack(images), labels, torch.stack(centred), groups)

    def scenes(self, split: GtsrbSplit) -> list[Scene]:
        """Read a split's images at their own sizes, with their regions of interest."""
        with ThreadPoolExecutor(min(8, cores())) as pool:
            return list(pool.map(load, self._list(split)))

    def _usable(self, scene: Scene, mask: BoolArray) -> BoolArray:
        if not failed(mask, *self.mask_share):
            return mask
        if self.on_failure == "full":
            return np.ones_like(mask)
        inside = ellipse((mask.shape[0], mask.shape[1]), scene.box)
        return inside if inside.any() else np.ones_like(mask)

    def _has(self, split: GtsrbSplit) -> bool:
        return (self.folder / "GTSRB" / {"train": "Training", "test": "Final_Test"}[split]).is_dir()

    def _list(self, split: GtsrbSplit) -> list[Entry]:
        if split not in self._entries:
            self._entries[split] = entries(self.folder, split)
        return self._entries[split]

    def _report(
        self, split: GtsrbSplit, scenes: list[Scene], masks: list[BoolArray], labels: Any, of: dict[str, Any]
    ) -> None:
        """Write the figures and the contact sheet, unless they are there and ``of`` the same."""
        written = self.cache.folder / f"quality_{split}.json"
        if written.is_file() and written.with_suffix(".csv").is_file() and _read_json(written) == of:
            return
        boxes = [scene.box for scene in scenes]
        shapes = [
            sign_shape(int(label), (mask.shape[0], mask.shape[1]), box)
            for label, mask, box in zip(labels, masks, boxes, strict=True)
        ]
        rows = quality_rows(masks, boxes, labels, CLASS_NAMES, *self.mask_share, shapes)
        chosen = np.random.default_rng(0).permutation(len(scenes))[:_SHEET]
        chosen = np.sort(chosen)
        name = self.cache.segmenter.name
        figure = contact_sheet(
            [scenes[row].image for row in chosen],
            [masks[row] for row in chosen],
            [f"{row}: {CLASS_NAMES[labels[row]]}" for row in chosen],
            title=f"GTSRB-IC, {split}: {len(chosen)} of {len(scenes)} images drawn at random, masks of {name}",
        )
        try:
            save_figure(figure, self.cache.folder / f"sheet_{split}.png")
            write_csv(self.cache.folder / f"quality_{split}.csv", rows)
            write_json(written, of)
        except OSError as error:
            raise UserError(
                f"{self.cache.folder} cannot be written ({error}): name another folder with --data.cache."
            ) from error
        whole = rows[0]
        rank_zero_info(
            f"GTSRB-IC, {split}: {whole['foreground']:.0%} foreground, {whole['failed']:.1%} of the masks failed, IoU "
            f"{whole['box_iou']:.2f} of their boxes with the regions of interest and {whole['shape_iou']:.2f} with the "
            f"signs' shapes; contact sheet {self.cache.folder / f'sheet_{split}.png'}"
        )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # broken: as good as none
        return None


def _torchvision(split: str) -> Any:
    """A stand-in for torchvision's class that fetches one split."""

    def fetch(root: str, download: bool) -> None:
        datasets.GTSRB(root, split=split, download=download)

    fetch.__name__ = "GTSRB"
    return fetch
