"""What a teacher says of a batch: asked each time, or looked up where its answers cannot change."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_robust.attacks.randomness import image_keys
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.datamodules.augmentation import augmentation_steps
from lightning_robust.datamodules.dataset import TensorSource

_BATCH = 512  # images of a pass over the data; the same on any number of ranks, so that the logits are, to the bit
_MOST_BYTES = 256 * 2**20  # of a cache that nobody asked for


class Teacher:
    """A frozen network in eval mode, and its logits of the training images once they are computed.

    The logits of an image are found again by a hash of its pixels, so an image that an augmentation has changed is
    never given those of another: where a batch holds one that is not in the cache, the network is asked.

    Args:
        network: from images to logits; it is frozen.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self._keys: Tensor | None = None
        self._logits: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move it to where the student is trained."""
        self.network.to(device=device, dtype=dtype)

    @property
    def cached(self) -> int:
        """Images whose logits are known."""
        return 0 if self._logits is None else len(self._logits)

    def ask(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``, in the precision of the weights whatever autocast is on."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.network(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``, from the cache if it knows all of them."""
        if self._keys is not None and self._logits is not None:
            wanted = image_keys(images, 0)
            rows = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
            if bool((self._keys[rows] == wanted).all()):
                return self._logits[rows]
        return self.ask(images)

    def remember(self, dataset: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the logits of a whole set, each rank its share of the batches.

        Args:
            dataset: of our data modules, without augmentation.
            device: where the images are asked about and the logits are kept.
            dtype: of the images.
        """
        count = len(dataset)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        rank = dist.get_rank() if world > 1 else 0
        keys = torch.zeros(count, dtype=torch.int64, device=device)
        logits: Tensor | None = None
        for number, start in enumerate(range(0, count, _BATCH)):
            if number % world != rank and logits is not None:
                continue
            rows = range(start, min(start + _BATCH, count))
            images = dataset.__getitems__(rows).images.to(device=device, dtype=dtype)
            found = self.ask(images)
            if logits is None:  # a rank without a share looks at one batch all the same, for the shape
                logits = torch.zeros(count, found.shape[1], dtype=found.dtype, device=device)
            if number % world == rank:
                keys[rows.start : rows.stop] = image_keys(images, 0)
                logits[rows.start : rows.stop] = found
        assert logits is not None
        if world > 1:  # the others' rows are zero: a sum that rounds nothing
            dist.all_reduce(keys)
            dist.all_reduce(logits)
        self._keys, order = keys.sort()
        self._logits = logits[order]


def why_not_cached(datamodule: Any, num_classes: int, asked_for: bool) -> str | None:
    """Why soft labels cannot, or by themselves should not, be computed once.

    Args:
        datamodule: of the trainer.
        num_classes: K.
        asked_for: only what makes it wrong counts, not what makes it dear.

    Returns:
        The reason; ``None`` where they can.
    """
    if not isinstance(datamodule, ImageDataModule):
        return "the data are not given as one of this package's data modules"
    if augmentation_steps(datamodule.augmentation):
        return f"augmentation={datamodule.augmentation!r} changes the images from epoch to epoch"
    if asked_for:
        return None
    dataset = datamodule.dataset("train")
    if not isinstance(dataset.source, TensorSource):
        return "the images are read from files"
    size = len(dataset) * num_classes * 4
    return None if size <= _MOST_BYTES else f"they would take {size / 2**20:.0f} MiB"
