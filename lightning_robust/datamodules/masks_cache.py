"""Masks that a segmenter made, kept in files so that they are made once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_robust.datamodules.masks_parallel import parallel_map
from lightning_robust.datamodules.segmenters import BoolArray, Box, Pixels, Segmenter
from lightning_robust.errors import UserError
from lightning_robust.report.atomic import atomic_file

SHARD: Final = 512  # images in a file: what a run that is stopped may lose
_TASK: Final = 32  # images that a process takes at a time


class Scene(NamedTuple):
    """An image to segment.

    Attributes:
        image: (H, W, 3) RGB.
        box: Its region of interest.
    """

    image: Pixels
    box: Box

    def key(self, seed: int) -> int:
        """A number that depends on the image, its region and the seed alone; from 0 to below 2**32."""
        box = np.asarray(self.box, dtype=np.float64).tobytes()
        shape = np.asarray((seed, *self.image.shape), dtype=np.int64).tobytes()
        return zlib.crc32(np.ascontiguousarray(self.image).tobytes(), zlib.crc32(box, zlib.crc32(shape)))


@dataclass(frozen=True)
class MaskCache:
    """A folder of masks, made with one segmenter and its settings.

    The folder's name has a hash of the segmenter's name, version and settings and of the seed, so that other settings
    have another folder. Each file knows the images that its masks were made for: where the images have changed, it is
    made again.

    Args:
        root: Folder to put the folder into.
        segmenter: What makes the masks.
        seed: Of its randomness.
        workers: Processes that make them.
    """

    root: Path
    segmenter: Segmenter
    seed: int = 0
    workers: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """All that masks depend on besides the images."""
        made: Any = self.segmenter
        own = dataclasses.asdict(made)
        return {"segmenter": made.name, "version": made.version, "seed": self.seed, "settings": own}

    @property
    def folder(self) -> Path:
        """Where the masks of these settings are."""
        text = json.dumps(self.settings, sort_keys=True)
        return self.root / f"{self.segmenter.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def masks(self, name: str, scenes: Sequence[Scene]) -> list[BoolArray]:
        """Return a mask (H, W) for each image, making those that are missing; empty where the segmenter failed.

        Args:
            name: Of this set of images, for its files.
            scenes: The images.

        Raises:
            UserError: If the folder was made with other settings, or cannot be written.
        """
        self._check_settings()
        keys = np.array([scene.key(self.seed) for scene in scenes], dtype=np.uint32)
        shards = [slice(start, min(start + SHARD, len(scenes))) for start in range(0, len(scenes), SHARD)]
        found = {number: self._load(self._file(name, number), keys[rows]) for number, rows in enumerate(shards)}
        missing = [number for number, masks in found.items() if masks is None]
        if missing:
            self._make(name, scenes, keys, {number: shards[number] for number in missing}, found)
        return [mask for number in range(len(shards)) for mask in found[number] or []]

    def digest(self, scenes: Sequence[Scene]) -> str:
        """What tells these images, at these settings, from others."""
        keys = np.array([scene.key(self.seed) for scene in scenes], dtype=np.uint32)
        return hashlib.sha256(keys.tobytes()).hexdigest()[:16]

    def complete(self, name: str, count: int) -> bool:
        """Whether there are files for so many images; whether they are of these images shows when they are read."""
        return all(self._file(name, number).is_file() for number in range(-(-count // SHARD)))

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05}.npz"

    def _make(
        self,
        name: str,
        scenes: Sequence[Scene],
        keys: npt.NDArray[np.uint32],
        shards: dict[int, slice],
        found: dict[int, list[BoolArray] | None],
    ) -> None:
        def tasks() -> Iterator[tuple[Segmenter, list[tuple[Pixels, Box, int]]]]:
            for rows in shards.values():
                for start in range(rows.start, rows.stop, _TASK):
                    part = range(start, min(start + _TASK, rows.stop))
                    yield self.segmenter, [(*scenes[row], int(keys[row])) for row in part]

        total = sum(rows.stop - rows.start for rows in shards.values())
        made = parallel_map(
            _segment,
            tasks(),
            min(self.workers, -(-total // _TASK)),
            description=f"segmenting the {name} images with {self.segmenter.name}",
            total=total,
            size=len,
        )
        try:
            for number, rows in shards.items():
                masks: list[BoolArray] = []
                while len(masks) < rows.stop - rows.start:
                    masks += next(made)
                self._save(self._file(name, number), masks, keys[rows])
                found[number] = masks
        except OSError as error:
            raise UserError(
                f"masks cannot be written to {self.folder} ({error}): name another folder with --data.cache."
            ) from error

    def _save(self, file: Path, masks: list[BoolArray], keys: npt.NDArray[np.uint32]) -> None:
        settings = self.folder / "settings.json"
        if not settings.is_file():
            with atomic_file(settings) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        bits = np.packbits(np.concatenate([mask.reshape(-1) for mask in masks]))
        sizes = np.array([mask.shape for mask in masks], dtype=np.int32)
        with atomic_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, keys=keys, sizes=sizes, bits=bits)

    def _load(self, file: Path, keys: npt.NDArray[np.uint32]) -> list[BoolArray] | None:
        """Read a file; None if it is missing, damaged, or of other images."""
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if not np.array_equal(arrays["keys"], keys):
                    return None
                sizes, bits = arrays["sizes"], arrays["bits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        counts = sizes.prod(1, dtype=np.int64)
        flat = np.unpackbits(bits, count=int(counts.sum())).astype(bool)
        parts = np.split(flat, np.cumsum(counts)[:-1])
        return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]

    def _check_settings(self) -> None:
        file = self.folder / "settings.json"
        if not file.is_file():
            return
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): delete the folder {self.folder}.") from error
        if written != json.loads(json.dumps(self.settings)):
            raise UserError(
                f"the masks in {self.folder} were made with other settings than its name says (settings.json): delete "
                "the folder, or name another one with --data.cache."
            )


def _segment(task: tuple[Segmenter, list[tuple[Pixels, Box, int]]]) -> list[BoolArray]:
    segmenter, scenes = task
    return [np.asarray(segmenter(image, box, key), dtype=bool) for image, box, key in scenes]
