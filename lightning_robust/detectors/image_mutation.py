"""Mutants of an image (Wang et al., arXiv 1805.05010): small changes that a normal image's label withstands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks.randomness import image_keys, mix_seed, normal, uniform
from lightning_robust.detectors.mutation import Bench, Mutation, Trial
from lightning_robust.errors import UserError

ImageOperator = Literal["mixed", "light", "occlusion", "blackout", "noise", "shift", "rotation"]

# strength where none is given: times the paper's noise, standard deviation, pixels, degrees
_STRENGTH = {"mixed": 1.0, "light": 1.0, "occlusion": 1.0, "blackout": 1.0, "noise": 0.05, "shift": 1.0, "rotation": 10}
_LARGEST = {"noise": 1.0, "rotation": 180.0}
_RECTANGLE = 3  # longest side
_FIRST = 16  # mutants before the first decision is looked at
# streams of the random numbers of one mutant
_KIND, _SIZE, _PLACE, _PATCH, _WHOLE, _OTHER = 0, 1, 2, 3, 5, 7


@dataclass(frozen=True, kw_only=True)
class ImageMutation(Mutation):
    """Mutants x' = clip(x + strength · m, 0, 1) of an image, or the image moved a little.

    Of a noise tensor with entries (u - 0.5) / (100 k), u ~ U(0, 1), k uniform in 1 … 20 (so at most 0.005):

    * ``light``: m is the noise's mean, at all pixels.
    * ``occlusion``: m is the noise inside a random rectangle with sides of 1 to 3 pixels, and 0 outside.
    * ``blackout``: m is -1 inside such a rectangle if the noise there has a mean below 0, else the image stays.
    * ``mixed``: one of these three with equal probability: the operator of the paper's code.

    That code adds (m - mean) / std to a normalised image, which shifts every mutant by -mean/std; what is built here is
    what the formula says, in pixel units. Beyond the paper:

    * ``noise``: m is normal noise with a standard deviation of 1.
    * ``shift``: moved by up to ``strength`` whole pixels each way; what moves in is the edge's colour.
    * ``rotation``: turned by up to ``strength`` degrees each way (bilinear, edges as before).

    Every number depends on the image, the seed and the mutant's number alone: no result depends on batch or device.

    Args:
        operator: one of the names above.
        strength: factor of m (for ``noise`` the standard deviation, default 0.05), pixels (``shift``, default 1) or
            degrees (``rotation``, default 10); else default 1.
        seed: of the mutants.

    Raises:
        UserError: for an operator that does not exist and a strength that it does not allow.

    Example:
        >>> images = torch.rand(2, 1, 8, 8)
        >>> ImageMutation(operator="shift").mutants(images, range(5)).shape
        torch.Size([2, 5, 1, 8, 8])
    """

    operator: ImageOperator = "mixed"
    strength: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.operator not in get_args(ImageOperator):
            raise UserError(
                f"ImageMutation: operator={self.operator!r} does not exist: choose one of "
                f"{', '.join(get_args(ImageOperator))}"
            )
        if self.strength is not None and not 0 < self.strength <= _LARGEST.get(self.operator, math.inf):
            raise UserError(
                f"ImageMutation: strength={self.strength} of {self.operator}: give a number above 0"
                + (f" and up to {_LARGEST[self.operator]:g}" if self.operator in _LARGEST else "")
            )
        if self.operator == "shift" and self.strength is not None and self.strength != int(self.strength):
            raise UserError(f"ImageMutation: strength={self.strength} of shift: give whole pixels, such as 1")

    @property
    def of(self) -> Literal["images"]:
        """Images are mutated."""
        return "images"

    @property
    def title(self) -> str:
        """Name and strength."""
        unit = {"noise": "σ = ", "shift": "± ", "rotation": "± "}.get(self.operator, "× ")
        ending = {"shift": " px", "rotation": "°"}.get(self.operator, "")
        return f"image {self.operator} {unit}{self._strength:g}{ending}"

    @property
    def _strength(self) -> float:
        return float(_STRENGTH[self.operator] if self.strength is None else self.strength)

    def mutants(self, images: Tensor, numbers: Sequence[int], keys: Tensor | None = None) -> Tensor:
        """Mutants of every image, differentiable in the image.

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            numbers: which mutants.
            keys: ``(N,)`` keys of the images, where they are known already.

        Returns:
            ``(N, len(numbers), C, H, W)`` in [0, 1].
        """
        if keys is None:
            keys = image_keys(images, self.seed)
        offsets = torch.tensor([_offset(int(number)) for number in numbers], device=images.device)
        each = (keys[:, None] + offsets).flatten()  # one key for each image and mutant
        points = images[:, None].expand(-1, len(numbers), *images.shape[1:]).flatten(0, 1)
        if self.operator == "shift":
            made = self._shifted(points, each)
        elif self.operator == "rotation":
            made = self._rotated(points, each)
        else:
            made = (points + self._strength * self._change(points, each)).clamp(0, 1)
        return made.view(len(images), len(numbers), *images.shape[1:])

    def _change(self, points: Tensor, keys: Tensor) -> Tensor:
        """The tensors m ``(M, C, H, W)``."""
        if self.operator == "noise":
            return normal(keys, points.shape, points.dtype, _WHOLE)
        kind = torch.full_like(keys, ("light", "occlusion", "blackout", "mixed").index(self.operator))
        if self.operator == "mixed":
            kind = (uniform(keys, (len(keys), 1), torch.float64, _KIND)[:, 0] * 3).long()
        change = torch.zeros_like(points)
        light = (kind == 0).nonzero()[:, 0]
        if len(light):
            noise = _noise(keys[light], points[light].shape, points.dtype, _WHOLE)
            change[light] = noise.mean((1, 2, 3), keepdim=True).expand_as(noise)
        local = (kind > 0).nonzero()[:, 0]
        if len(local):
            change[local] = _rectangles(points[local], keys[local], kind[local] == 2)
        return change

    def _shifted(self, points: Tensor, keys: Tensor) -> Tensor:
        most, (height, width) = int(self._strength), points.shape[-2:]
        if most >= min(height, width):
            raise UserError(f"ImageMutation: a shift by {most} pixels leaves nothing of images of {height}×{width}")
        drawn = uniform(keys, (len(keys), 2), torch.float64, _OTHER) * (2 * most + 1)
        moved = drawn.long() - most
        rows = (torch.arange(height, device=keys.device) - moved[:, :1]).clamp(0, height - 1)
        columns = (torch.arange(width, device=keys.device) - moved[:, 1:]).clamp(0, width - 1)
        points = points.gather(2, rows[:, None, :, None].expand(-1, points.shape[1], -1, width))
        return points.gather(3, columns[:, None, None, :].expand(-1, points.shape[1], height, -1))

    def _rotated(self, points: Tensor, keys: Tensor) -> Tensor:
        drawn = uniform(keys, (len(keys), 1), torch.float64, _OTHER)[:, 0]
        angles = (2 * drawn - 1) * math.radians(self._strength)
        height, width = points.shape[-2:]
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
        # grid_sample's coordinates run from -1 to 1 along either side
        theta = torch.stack(
            [torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)], 1
        )
        grid = F.affine_grid(theta, list(points.shape), align_corners=False).to(points.dtype)
        turned = F.grid_sample(points, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return turned.clamp(0, 1)

    def bench(self, model: nn.Module, chosen: Sequence[int], chunk: int) -> Bench:
        """Get ready for a model; see :class:`~lightning_robust.detectors.mutation.Mutation`."""
        return _ImageBench(self, model, chosen, chunk)

    def differentiable(self, model: nn.Module, chosen: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """Models that see mutants; each new point has new ones, since they depend on its pixels."""

        def seen(number: int) -> Callable[[Tensor], Tensor]:
            return lambda images: model(self.mutants(images, [number])[:, 0])

        return [seen(number) for number in chosen]


class _ImageBench(Bench):
    def __init__(self, mutation: ImageMutation, model: nn.Module, chosen: Sequence[int], chunk: int) -> None:
        self.mutation, self.model, self.chosen, self.chunk = mutation, model, chosen, chunk

    def most_images(self, image: Tensor) -> int:
        return self.chunk

    def trial(self, images: Tensor) -> Trial:
        return _ImageTrial(self, images)


class _ImageTrial(Trial):
    def __init__(self, bench: _ImageBench, images: Tensor) -> None:
        self.mutation, self.model, self.chosen, self.chunk = bench.mutation, bench.model, bench.chosen, bench.chunk
        self.images = images
        self.keys = image_keys(images, self.mutation.seed)
        self.predicted = torch.cat([self.model(part).argmax(1) for part in images.split(self.chunk)])
        self.labels = self.predicted

    def changed(self, first: int, count: int) -> Tensor:
        numbers = self.chosen[first : first + count]
        whole = max(1, self.chunk // count)  # images whose mutants go together
        parts = []
        for start in range(0, len(self.images), whole):
            rows = slice(start, start + whole)
            images, labels = self.images[rows], self.labels[rows]
            mutants = self.mutation.mutants(images, numbers, self.keys[rows])
            found = torch.zeros(mutants.shape[:2], dtype=torch.bool, device=images.device)
            # a mutant that is the image itself (a blackout of black pixels) is not worth a pass
            other = (mutants != images[:, None]).flatten(2).any(2)
            if bool(other.any()):
                asked = self.model(mutants[other]).argmax(1)
                found[other] = asked != labels[:, None].expand_as(other)[other]
            parts.append(found)
        return torch.cat(parts)

    def keep(self, going: Tensor) -> None:
        self.images, self.labels, self.keys = self.images[going], self.labels[going], self.keys[going]

    def batch(self, done: int) -> int:
        return min(self.chunk, max(_FIRST, done // 2, self.chunk // max(len(self.images), 1) // 8))


@lru_cache(maxsize=1 << 16)
def _offset(number: int) -> int:
    """What a mutant's number adds to the keys of images."""
    return mix_seed(number, 0x6D75)


def _noise(keys: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, stream: int) -> Tensor:
    """Entries (u - 0.5) / (100 k)."""
    divisor = (uniform(keys, shape, dtype, stream + 1) * 20).floor() + 1
    return (uniform(keys, shape, dtype, stream) - 0.5) / (100 * divisor)


def _rectangles(points: Tensor, keys: Tensor, blackout: Tensor) -> Tensor:
    """The tensors m of occlusion and blackout; of the noise only what is inside the rectangle is drawn."""
    count, channels, height, width = points.shape
    drawn = uniform(keys, (count, 2), torch.float64, _SIZE)
    longest = torch.tensor([min(_RECTANGLE, height), min(_RECTANGLE, width)], device=keys.device)
    sides = (drawn * longest).long() + 1
    room = torch.tensor([height, width], device=keys.device) - sides + 1
    corner = (uniform(keys, (count, 2), torch.float64, _PLACE) * room).long()
    noise = _noise(keys, (count, channels, _RECTANGLE, _RECTANGLE), points.dtype, _PATCH)
    steps = torch.arange(_RECTANGLE, device=keys.device)
    inside = (steps < sides[:, :1])[:, :, None] & (steps < sides[:, 1:])[:, None, :]  # (M, 3, 3)
    noise = noise * inside[:, None]
    mean = noise.sum((1, 2, 3))  # of the entries inside, up to a factor above 0
    black = torch.where(mean < 0, -1.0, 0.0).to(points.dtype)[:, None, None, None] * inside[:, None].to(points.dtype)
    noise = torch.where(blackout[:, None, None, None], black.expand_as(noise), noise)
    # to its place; entries outside the rectangle are zeros, which may be added anywhere
    rows = (corner[:, :1] + steps).clamp(max=height - 1)
    columns = (corner[:, 1:] + steps).clamp(max=width - 1)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None].expand(-1, channels, -1)
    change = torch.zeros(count, channels, height * width, dtype=points.dtype, device=points.device)
    return change.scatter_add_(2, places, noise.flatten(2)).view_as(points)
