"""The Pixel Robustness Manipulator: an autoencoder that reads few pixels, mixed with a classifier's image.

Hwang et al., "Where to be adversarial perturbations added? Investigating and manipulating pixel robustness using input
gradients" (ICLR 2019 Debugging ML workshop). Gradients with respect to the image flow through the pixels that the
autoencoder reads, and through the image's own share 1 - λ; at λ = 1 no other pixel has any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.fx import wrap

from lightning_robust.errors import UserError
from lightning_robust.models.prm_bodies import Exit, SegNet, UNet
from lightning_robust.models.prm_pattern import (
    SparsePattern,
    checked_mask,
    fill_up,
    interpolate,
    nearest,
    nearest_index,
    place,
    read_window,
    require_mask_size,
    require_reach,
)

Body = Literal["unet", "segnet", "ace"]

#: How often the published bodies pool (the ace form does not, whatever is said).
PUBLISHED_DEPTH: dict[str, int] = {"unet": 4, "segnet": 5, "ace": 1}

# Calls of these stand in a traced graph as they are (BatchNorm folding traces), so that what they ask of the size of an
# image is asked of every image, and λ is read from its buffer at every call.
wrap("_mix")
wrap("read_window")
wrap("fill_up")
wrap("place")
wrap("interpolate")
wrap("nearest")


class PixelRobustnessManipulator(nn.Module):
    """x' = (1 - λ)·x + λ·A(x), where the autoencoder A reads the pixels of a sparse pattern alone.

    A is a sparse entry (a convolution with bias, without padding), a body that works on its grid, and an exit that
    brings the size back. With channels=3 and the other defaults it is the published one of 31,033,423 parameters. Any
    image size works: what the body cannot divide is padded inside, from connected pixels only, and cropped.

    It moves the weak pixels and bounds nothing. That is no defense by itself, and with a shift in front of it
    (:class:`~lightning_robust.defenses.PixelShift`) one that falls to who averages over the shifts: ``docs/prm.md``.

    The light form of the paper's forerunner, ``body="ace"``, is x' = x + λ·T(x) with a 1×1 convolution and a 3×3
    transposed one, both of the pattern's stride; λ may exceed 1 there, and A(x) = x + T(x).

    λ is kept in a buffer that no checkpoint stores, so that a stand-in of
    :func:`~lightning_robust.attacks.accelerate` follows a change of it at its ``refresh()``, and a compiled graph
    without compiling again. A stand-in that is not refreshed keeps the λ that it was made with.

    Args:
        channels: of the images.
        pattern: which pixels are read.
        body: "unet", "segnet" (with BatchNorm) or "ace".
        width: channels of the body's first stage; 64 is the published size.
        depth: how often the body pools; by default the published 4 (unet) or 5 (segnet).
        refine: a nonlinear exit, with another convolution at full size (the development branch of the paper's code has
            it, without saying what is between the two).
        skip: add an interpolation of the connected pixels to the body's output, which then starts at zero. Not in the
            paper; small bodies learn much faster with it, and it reads connected pixels only.
        lam: λ, the share of A(x) in [0, 1]; for "ace" 0 or more.
        mask: ``(H, W)`` bool, the pixels that are read, in place of the pattern's.
        image_size: (height, width) of the images: needed for a mask in a file, and lets an image that is too small be
            refused at once.

    Attributes:
        lam: λ, may be set at any time.

    Raises:
        UserError: for settings that do not exist or do not fit, and an image that is smaller than the body's reach.

    Example:
        >>> prm = PixelRobustnessManipulator(channels=1, width=4, depth=2)
        >>> images = torch.rand(2, 1, 9, 8)
        >>> prm(images, lam=0.5).shape, bool((prm(images, lam=0.0) == images).all())
        (torch.Size([2, 1, 9, 8]), True)
    """

    lam_value: Tensor
    mask: Tensor | None
    nearest_read: Tensor | None

    def __init__(
        self,
        channels: int = 3,
        pattern: SparsePattern = SparsePattern(),  # noqa: B008 - frozen
        body: Body = "unet",
        width: int = 64,
        depth: int | None = None,
        refine: bool = False,
        skip: bool = False,
        lam: float = 0.9,
        mask: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if body not in PUBLISHED_DEPTH:
            raise UserError(f"body={body!r} of a manipulator: choose one of {', '.join(PUBLISHED_DEPTH)}")
        if channels < 1 or width < 1:
            raise UserError(f"channels={channels} and width={width} of a manipulator are at least 1")
        depth = PUBLISHED_DEPTH[body] if depth is None else depth
        if depth < 1:
            raise UserError(f"depth={depth} of a manipulator's body: it pools at least once")
        if body == "ace" and (refine or skip):
            raise UserError("the ace form has no exit to refine and is a skip itself: leave refine and skip out")
        self.channels, self.pattern, self.body_name = int(channels), pattern, body
        self.additive = body == "ace"
        mask = checked_mask(pattern, mask, image_size)
        self._kernel, self._stride, self._offset = (pattern.axes(name) for name in ("kernel", "stride", "offset"))
        if mask is not None:
            self._kernel, self._stride, self._offset = (1, 1), (1, 1), (0, 0)
        self.register_buffer("mask", mask, persistent=False)
        index = nearest_index(mask) if mask is not None and skip else None
        self.register_buffer("nearest_read", index, persistent=False)
        self.skip = skip
        self._build(body, width, depth, refine)
        self.register_buffer("lam_value", torch.zeros(()), persistent=False)
        self._remembered: tuple[Tensor, list[Tensor]] | None = None
        self.lam = lam
        if image_size is not None:
            self.check_size(*image_size)

    def _build(self, body: Body, width: int, depth: int, refine: bool) -> None:
        kernel, stride, offset = self._kernel, self._stride, self._offset
        self._before = 0, 0  # cells in front, for pixels before the first that is read, where the exit does not reach
        if body == "ace":
            self.depth, self._multiple = 0, 1
            self.entry = nn.Conv2d(self.channels, self.channels, kernel, stride)
            self.body: nn.Module = nn.Identity()
            self.exit: nn.Module = nn.ConvTranspose2d(self.channels, self.channels, 3, stride)
            self._start = -offset[0], -offset[1]
        else:
            inner = UNet(self.channels, width, depth) if body == "unet" else SegNet(width, depth)
            exit = Exit(inner.out_channels, self.channels, stride, refine=refine)
            self.depth, self._multiple = depth, inner.multiple
            self.entry = nn.Conv2d(self.channels, inner.in_channels, kernel, stride)
            self.body, self.exit, self._exit_kernel = inner, exit, exit.kernel
            missing = offset[0] - exit.centre[0], offset[1] - exit.centre[1]
            self._before = max(0, -(-missing[0] // stride[0])), max(0, -(-missing[1] // stride[1]))
            self._start = self._before[0] * stride[0] - missing[0], self._before[1] * stride[1] - missing[1]
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if isinstance(self.exit, Exit) and self.skip:
            nn.init.zeros_(self.exit.last.weight)  # type: ignore[arg-type]  # A(x) begins as the interpolation

    # -- λ -------------------------------------------------------------------------------------------------------------

    @property
    def lam(self) -> float:
        """λ, the share of A(x)."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._lam = self.check_lam(value)
        self._write_lam()

    def check_lam(self, value: float) -> float:
        """A λ that this form allows, as a number.

        Raises:
            UserError: for any other.
        """
        number = float(value)
        if self.additive and not 0 <= number < float("inf"):
            raise UserError(f"lam={number:g} of the ace form is 0 or more")
        if not self.additive and not 0 <= number <= 1:
            raise UserError(
                f"lam={number:g} is the share of the autoencoder in the image, between 0 and 1 (the ace form alone "
                "takes more)"
            )
        return number

    @torch.no_grad()
    def _write_lam(self) -> None:
        if self.lam_value.is_meta:
            return
        if self.lam_value.is_inference() and not torch.is_inference_mode_enabled():
            self.lam_value = self.lam_value.clone()
        self.lam_value.fill_(self._lam)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._write_lam()  # anew from the Python float: a double's λ is not a widened float's
        return self

    # -- images --------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """The manipulated images, not clamped.

        Args:
            images: ``(N, C, H, W)``.
            lam: λ for this call, one for all or ``(N,)`` one for each image; by default the attribute.

        Returns:
            ``(N, C, H, W)``. At λ = 0 these are the images, bit by bit.

        Raises:
            UserError: for images of another number of channels or smaller than the body's reach, and a λ out of range.
        """
        share = self.lam_value if lam is None else self._shares(lam, images)
        if self.additive:
            return _mix(images, self._autoencoder(images), share, True)
        reconstruction = self.reconstruct(images)
        if self._remembered is not None and images is self._remembered[0]:
            self._remembered[1][:] = [reconstruction]
        return _mix(images, reconstruction, share, False)

    def reconstruct(self, images: Tensor) -> Tensor:
        """A(x): what λ = 1 makes of images ``(N, C, H, W)``, not clamped."""
        values = self._autoencoder(images)
        return images + values if self.additive else values

    def _autoencoder(self, images: Tensor) -> Tensor:
        window = read_window(images, self.mask, self.channels, self._kernel, self._stride, self._offset, self.depth)
        features = self.entry(window)
        if not self.additive:
            features = fill_up(
                features, images, self._before, self._start, self._stride, self._exit_kernel, self._multiple
            )
        values = place(self.exit(self.body(features)), images, self._start)
        if not self.skip:
            return values
        if self.nearest_read is not None:
            return values + nearest(images, self.nearest_read)
        return values + interpolate(images, self._kernel, self._stride, self._offset)

    def _shares(self, lam: float | Tensor, images: Tensor) -> Tensor:
        if not isinstance(lam, Tensor):
            return torch.full((), self.check_lam(lam), dtype=images.dtype, device=images.device)
        if lam.dim() > 1 or (lam.dim() == 1 and len(lam) != len(images)):
            raise UserError(f"lam of shape {tuple(lam.shape)} for {len(images)} images: one number, or one an image")
        for extreme in torch.aminmax(lam.detach().double()) if lam.numel() else ():
            self.check_lam(float(extreme))
        lam = lam.to(images)
        return lam.view(-1, 1, 1, 1) if lam.dim() else lam

    def connected_pixels(self, height: int, width: int) -> Tensor:
        """The pixels that A reads, the only ones with a gradient at λ = 1 (not in the ace form, whose x stays whole).

        Returns:
            ``(H, W)`` bool on the CPU.

        Raises:
            UserError: for an image that no window fits into, or that is not of the mask's size.
        """
        if self.mask is None:
            return self.pattern.pixels(height, width)
        require_mask_size(self.mask, height, width)
        return self.mask.cpu()

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image that is smaller than the body's reach.

        Raises:
            UserError: with the depth that would do.
        """
        if self.mask is not None:
            require_mask_size(self.mask, height, width)
        require_reach((height, width), self._kernel, self._stride, self._offset, self.depth)

    @contextmanager
    def remembering(self, images: Tensor) -> Iterator[list[Tensor]]:
        """Keep A(x) of just this tensor when a call computes it anyway, so that a loss need not compute it again.

        Yields:
            A list: empty, or with A(x) of the latest call. A compiled network leaves it empty.
        """
        found: list[Tensor] = []
        self._remembered = images, found
        try:
            yield found
        finally:
            self._remembered = None

    def extra_repr(self) -> str:
        """What ``print(model)`` says of the pattern and λ."""
        return f"{self.pattern}, lam={self.lam:g}, skip={self.skip}"


def _mix(images: Tensor, values: Tensor, lam: Tensor, additive: bool) -> Tensor:
    """(1 - λ)·x + λ·A(x), or x + λ·T(x).

    Not x + λ·(A(x) - x): the image would leave a rounding error behind at λ = 1.
    """
    lam = lam.clone()  # the buffer may change before the backward pass
    return images + lam * values if additive else (1 - lam) * images + lam * values
