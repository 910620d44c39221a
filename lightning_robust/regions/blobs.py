"""The blob of arXiv 2011.10794: the pixels of a class that are attacked and unimportant, and what blanks them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_robust.errors import UserError


@dataclass(frozen=True)
class Blobs:
    """A blob and its fill for each class.

    Attributes:
        masks: ``(K, H, W)`` bool; a class without a blob has an empty one.
        fill: ``(K,)`` float, 0 or 1: what a blob's pixels are set to.
        class_names: K names, or none.
    """

    masks: Tensor
    fill: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.masks.dim() != 3 or self.masks.dtype != torch.bool or 0 in self.masks.shape:
            raise UserError(
                f"blobs of shape {tuple(self.masks.shape)} and type {self.masks.dtype}: they are (K, H, W) bool, one a "
                "class"
            )
        if self.fill.shape != self.masks.shape[:1] or not bool(((self.fill == 0) | (self.fill == 1)).all()):
            raise UserError(f"blobs: fill={self.fill.tolist()}: one number a class, each 0 (black) or 1 (white)")
        if not self.masks.any():
            raise UserError("blobs: every class's blob is empty: lower θ, or the threshold of the region of attack")
        full = self.masks.flatten(1).all(1).nonzero()
        if len(full):
            raise UserError(f"blobs: that of class {int(full[0])} is the whole image: raise θ")


def blob(frequency: Tensor, theta: float) -> Tensor:
    """The pixels that lie in ŪV in at least a share θ of a class's images.

    Args:
        frequency: ``(..., H, W)`` in [0, 1]: in what share of the images a pixel is attacked and unimportant.
        theta: in (0, 1].

    Returns:
        ``(..., H, W)`` bool.

    Raises:
        UserError: for a θ out of range.

    Example:
        >>> blob(torch.tensor([[0.9, 0.2]]), 0.5).tolist()
        [[True, False]]
    """
    if not 0 < theta <= 1:
        raise UserError(f"theta={theta}: it is a share of the images, above 0 and at most 1")
    return frequency >= theta


def neutralize(images: Tensor, masks: Tensor, fill: Tensor | float) -> Tensor:
    """Images whose blob is blank; differentiable, with a gradient of 0 inside.

    Args:
        images: ``(N, C, H, W)``.
        masks: ``(H, W)`` or ``(N, H, W)`` bool.
        fill: 0 or 1, for all or ``(N,)``.
    """
    if masks.is_inference() and not torch.is_inference_mode_enabled():
        masks = masks.clone()  # made in inference mode it could not be differentiated through; a copy can
    masks = masks if masks.dim() == 2 else masks[:, None]
    value = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
    return torch.where(masks, value if value.dim() == 0 else value[:, None, None, None], images)


def save_blobs(path: str | Path, blobs: Blobs) -> Path:
    """Write blobs as an .npz of ``masks``, ``fill`` and ``class_names``, which :func:`load_blobs` reads."""
    path = Path(path)
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            masks=blobs.masks.cpu().numpy(),
            fill=blobs.fill.cpu().numpy(),
            class_names=np.array(blobs.class_names, dtype=np.str_),
        )
    return path


def load_blobs(path: str | Path) -> Blobs:
    """Read what :func:`save_blobs` wrote, or any .npz with the same arrays.

    Raises:
        UserError: for a file that is missing or damaged, and arrays that are no blobs.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"the blobs {path} do not exist: give the .npz that NeutralizerStudy wrote") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the blobs {path} cannot be read ({error}): give the .npz that NeutralizerStudy wrote"
        ) from None
    missing = [name for name in ("masks", "fill") if name not in arrays]
    if missing:
        raise UserError(f"the blobs {path} hold no array {missing[0]!r}: masks (K, H, W) bool and fill (K,) are needed")
    masks = torch.from_numpy(arrays["masks"])
    fill = torch.from_numpy(np.asarray(arrays["fill"], dtype=np.float32))
    names: Sequence[str] = [str(name) for name in arrays.get("class_names", np.array([], dtype=np.str_)).ravel()]
    return Blobs(masks, fill, tuple(names))
