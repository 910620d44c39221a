"""Random crops and flips whose randomness belongs to the image, not to the process.

What an image gets is a pure function of (seed, epoch, image number): the same on any number of workers and ranks and
after a resume. Its mask gets the same. No global random state is read or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_robust.errors import UserError

Keys = npt.NDArray[np.uint64]

#: Short names on the command line and the steps that they stand for.
AUGMENTATIONS: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "crop": ("crop",),
    "flip": ("flip",),
    "crop_flip": ("crop", "flip"),
    "imagenet": ("resized_crop", "flip"),
}
_PAD: Final = 4  # pixels on each side, the custom for CIFAR since He et al. 2016 (arXiv 1512.03385)
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Keys) -> Keys:
    """Scramble 64-bit numbers (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def image_keys(seed: int, epochs: npt.ArrayLike, indices: npt.ArrayLike) -> Keys:
    """Make one 64-bit key per image from (seed, epoch, image number).

    Args:
        seed: Seed of the run, at least 0.
        epochs: Epoch numbers, (N,) or one number.
        indices: Image numbers, (N,).

    Returns:
        uint64 (N,).
    """
    key = np.full(np.shape(indices), seed, dtype=np.uint64)
    for part in (epochs, indices):
        with np.errstate(over="ignore"):
            key = _mix(key + _GOLDEN) + np.asarray(part).astype(np.uint64)
    return _mix(key)


def uniforms(keys: Keys, count: int) -> npt.NDArray[np.float64]:
    """Draw ``count`` numbers in [0, 1) for each key; returns (N, count)."""
    with np.errstate(over="ignore"):
        counter = keys[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    return (_mix(counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Augmentation:
    """A chain of named augmentations for whole batches.

    * ``none``: nothing.
    * ``crop``: pad by 4 black pixels on each side and cut a random window of the original size.
    * ``flip``: mirror left and right with probability 1/2.
    * ``crop_flip``: both, the custom for CIFAR (arXiv 1512.03385).
    * ``imagenet``: torchvision's ``RandomResizedCrop`` (8 to 100 % of the area, arXiv 1409.4842) and ``flip``.

    Args:
        names: One name or several; steps given twice count once.
        seed: Seed of the randomness, at least 0.
        image_size: Height and width of the images that come out.

    Raises:
        UserError: If a name is unknown.
    """

    def __init__(self, names: str | Sequence[str] | None, seed: int, image_size: tuple[int, int]) -> None:
        self.seed = seed
        steps = augmentation_steps(names)
        self.crop, self.flip = "crop" in steps, "flip" in steps
        self.resized_crop = v2.RandomResizedCrop(image_size, antialias=True) if "resized_crop" in steps else None

    def __bool__(self) -> bool:
        return self.crop or self.flip or self.resized_crop is not None

    def cut(self, image: Tensor, key: np.uint64, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cut a random window of random size and resize it; ``imagenet`` only.

        Args:
            image: One image (C, H, W), of any size.
            key: Its key from :func:`image_keys`.
            mask: Its mask bool (1, H, W), or None.

        Returns:
            The image at ``image_size``, same dtype, and the same window of the mask (pixels at least half
            covered), which may miss the object.
        """
        assert self.resized_crop is not None
        # torchvision draws from the global CPU generator: lend it and put it back. torch.manual_seed would move the
        # generators of the accelerators too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key >> np.uint64(1)))
            if mask is None:
                return self.resized_crop(image), None
            # One call for both, so that one draw decides on both windows. As a tv_tensors.Mask the mask would get
            # nearest pixels, which lie half a pixel off an antialiased image.
            pair = self.resized_crop(tv_tensors.Image(image), tv_tensors.Image(mask.byte() * 255))
        return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor) >= 128

    def __call__(self, images: Tensor, keys: Keys, masks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Crop and flip a batch.

        Args:
            images: (N, C, H, W), any dtype.
            keys: One key per image from :func:`image_keys`.
            masks: bool (N, 1, H, W), which get what their images get, or None. What padding adds is background.

        Returns:
            A new batch of the same shape and dtype, and its masks.
        """
        draws = uniforms(keys, 3)
        offsets = torch.from_numpy((draws[:, :2] * (2 * _PAD + 1)).astype(np.int64))
        mirrored = torch.from_numpy(draws[:, 2] < 0.5)[:, None, None, None]

        def change(batch: Tensor) -> Tensor:
            if self.crop:
                batch = _crop(batch, offsets)
            return torch.where(mirrored, batch.flip(-1), batch) if self.flip else batch

        return change(images), None if masks is None else change(masks)


def augmentation_steps(names: str | Sequence[str] | None) -> set[str]:
    """Resolve augmentation names to steps.

    Raises:
        UserError: If a name is unknown.
    """
    steps: set[str] = set()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in AUGMENTATIONS:
            raise UserError(f"augmentation {name!r} is unknown: choose from {', '.join(AUGMENTATIONS)}.")
        steps.update(AUGMENTATIONS[name])
    return steps


def _crop(images: Tensor, offsets: Tensor) -> Tensor:
    """Cut one window per image from the padded batch, all at once."""
    n, _, height, width = images.shape
    padded = F.pad(images, (_PAD,) * 4)
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    # Advanced indices with a slice between them put the channel last.
    cut = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()
