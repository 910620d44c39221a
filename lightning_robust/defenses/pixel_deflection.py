"""Pixel deflection (Prakash et al., CVPR 2018, arXiv 1801.08926): a few pixels are replaced by neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_robust.attacks.adaptive import BPDA
from lightning_robust.attacks.randomness import uniform
from lightning_robust.defenses.base import Defense, Draw, integers, positive_integer
from lightning_robust.defenses.extra import require
from lightning_robust.defenses.robust_cam import Combination, last_map, robust_cam
from lightning_robust.defenses.wavelet import NoiseUnit, check_wavelet, denoise
from lightning_robust.errors import UserError


class PixelDeflection(Defense):
    """Replaces random pixels by others from nearby, most of them where no object is seen, and denoises.

    "Deflecting adversarial attacks with pixel deflection" (Prakash et al., CVPR 2018, arXiv 1801.08926): 200 times a
    pixel is drawn, with a probability that falls with its R-CAM value, and gets the value that another pixel of the
    image had, drawn from the window of ±10 around it; then the image is denoised by wavelets in YCbCr (BayesShrink
    with σ = 0.04, soft thresholds).

    It is broken: BPDA with the identity as backward pass reaches 97 % of targets at ε = 4/255 and leaves an accuracy of
    0 % (Athalye & Carlini, arXiv 1804.03286). That is the backward pass here. Its authors call it a black-box defense.

    A drawn pixel counts as one deflection with all of its channels, as in the authors' demonstration; their code draws
    for each channel and counts each (``per_channel``). Both leave the map's skipped draws uncounted, which is drawing
    in proportion to 1 - R-CAM. In their code a pixel may be copied that has been replaced before.

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`.
        deflections: pixels drawn; 200 for 224×224 images, 1500 in the authors' demonstration.
        window: how far the other pixel may be, in rows and in columns.
        sigma: standard deviation of the noise that the wavelets remove; 0: no denoising.
        cam: R-CAM as the "geometric" mean of the maps of the likeliest classes or as their sum by "rank", see
            :func:`~lightning_robust.defenses.robust_cam.robust_cam`; "none" or ``None``: every pixel is as likely.
        cam_classes: classes of the map.
        cam_layer: module that gives the feature map; by default the last one.
        per_channel: each deflection moves the value of one channel, the channels in turn.
        wavelet: an orthogonal wavelet of PyWavelets.
        sigma_unit: "image": ``sigma`` is in pixel units, as scikit-image takes it today; "channel": in units of each
            YCbCr channel's range, as it took it when the paper's figures were made.
        seed: of the draws; ``None`` for fresh ones.

    Raises:
        UserError: for settings outside these ranges, libraries that are not installed, and, when called, a network
            without a feature map.

    Example:
        >>> defense = PixelDeflection(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), cam=None, sigma=0, deflections=20)
        >>> images = torch.rand(2, 3, 8, 8)
        >>> 0 < (defense.transform(images) != images).any(1).flatten(1).sum(1).max().item() <= 20
        True
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        deflections: int = 200,
        window: int = 10,
        sigma: float = 0.04,
        cam: Combination | Literal["none"] | None = "geometric",
        cam_classes: int = 5,
        cam_layer: str | None = None,
        per_channel: bool = False,
        wavelet: str = "db1",
        sigma_unit: NoiseUnit = "image",
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        self.deflections = positive_integer(self, "deflections", deflections)
        self.window = positive_integer(self, "window", window)
        if not 0 <= sigma <= 1:
            raise UserError(f"PixelDeflection: sigma={sigma}: give a standard deviation in [0, 1], for example 0.04")
        if cam not in (None, "none", "geometric", "rank"):
            raise UserError(f"PixelDeflection: cam={cam!r}: choose geometric or rank, or none for no map")
        if sigma_unit not in ("image", "channel"):
            raise UserError(f"PixelDeflection: sigma_unit={sigma_unit!r}: choose image or channel")
        self.cam: Combination | None = None if cam == "none" else cam
        if self.cam is not None:
            require("captum", "PixelDeflection: R-CAM")
        if sigma > 0:
            check_wavelet(wavelet)
        self.sigma, self.wavelet, self.sigma_unit = sigma, wavelet, sigma_unit
        self.cam_classes = positive_integer(self, "cam_classes", cam_classes)
        self.cam_layer, self.per_channel = cam_layer, per_channel
        self._layer: str | None = None  # found with the first images

    def around(self, model: nn.Module) -> PixelDeflection:
        """A copy with the same settings that protects ``model``."""
        copied = super().around(model)
        copied._layer = None
        return copied

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """One draw's logits."""
        return self.single(images, keys)

    def single(self, images: Tensor, keys: Tensor, importance: Tensor | None = None) -> Tensor:
        """The classifier's logits of the deflected and denoised images; backward it is the classifier alone (BPDA)."""
        return self.protected()(BPDA(lambda pixels: self.transform(pixels, keys, importance))(images))

    @torch.no_grad()
    def transform(self, images: Tensor, keys: Tensor | None = None, importance: Tensor | None = None) -> Tensor:
        """The images ``(N, C, H, W)`` deflected and denoised, in [0, 1].

        Args:
            images: ``(N, C, H, W)``.
            keys: ``(N,)`` to draw with; by default those of the verdict.
            importance: ``(N, H, W)`` of :meth:`importance`, where it is known.
        """
        keys = self.keys(images) if keys is None else keys
        importance = self.importance(images) if importance is None else importance
        moved = deflect(images, keys, self.deflections, self.window, importance, per_channel=self.per_channel)
        if self.sigma == 0:
            return moved
        return denoise(moved, self.sigma, wavelet=self.wavelet, unit=self.sigma_unit).clamp(0, 1)

    def importance(self, images: Tensor) -> Tensor | None:
        """R-CAM ``(N, H, W)`` of the images, or ``None`` where none is used."""
        if self.cam is None:
            return None
        model = self.protected()
        if self.cam_layer is None and self._layer is None:
            self._layer = last_map(model, images)
        layer = self.cam_layer or self._layer
        return robust_cam(model, images, combination=self.cam, classes=self.cam_classes, layer=layer)

    def draws(self, samples: int) -> Sequence[nn.Module]:
        """Draws that share the map of their images, which is the same for all."""
        if self.cam is None:
            return super().draws(samples)
        known = _Known(self)
        return [_Deflected(self, draw.number, known) for draw in super().draws(samples) if isinstance(draw, Draw)]

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        return (
            f"deflections={self.deflections}, window={self.window}, sigma={self.sigma}, cam={self.cam!r}, "
            f"seed={self.seed}"
        )


class _Known:
    """The map of the images that were asked about last."""

    def __init__(self, defense: PixelDeflection) -> None:
        self.defense = defense
        self.images: Tensor | None = None
        self.importance: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor | None:
        if self.images is None or self.images.shape != images.shape or not torch.equal(self.images, images):
            self.images, self.importance = images.detach().clone(), self.defense.importance(images)
        return self.importance


class _Deflected(nn.Module):
    """A defense with its dice thrown."""

    def __init__(self, defense: PixelDeflection, number: int, known: _Known) -> None:
        super().__init__()
        self.defense, self.number, self.known = defense, number, known

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)`` behind this one draw."""
        return self.defense.single(images, self.defense.keys(images, self.number + 1), self.known(images))


def deflect(
    images: Tensor,
    keys: Tensor,
    deflections: int,
    window: int,
    importance: Tensor | None = None,
    *,
    per_channel: bool = False,
) -> Tensor:
    """Replace random pixels by others of the same image.

    Args:
        images: ``(N, C, H, W)``.
        keys: ``(N,)`` of :mod:`lightning_robust.attacks.randomness`.
        deflections: pixels drawn for each image; one may be drawn twice, and then the later draw counts.
        window: how far away the other pixel may lie, in rows and in columns; all that are inside the image are alike.
        importance: ``(N, H, W)`` in [0, 1], with what probability a pixel is spared when it is drawn; such a draw is
            made again.
        per_channel: each deflection is of one channel, the channels in turn.

    Returns:
        ``(N, C, H, W)``: every value is one of the same channel of the same image.
    """
    count, channels, height, width = images.shape
    pixels, device = height * width, images.device
    drawn = uniform(keys, (count, 3, deflections), torch.float64)
    if importance is None:
        place = integers(drawn[:, 0], pixels)
    else:
        # drawing again until one is not spared is drawing in proportion to 1 - importance
        spare = 1 - importance.flatten(1).double()
        spare = torch.where(spare.sum(1, keepdim=True) > 0, spare, 1)
        shares = spare.cumsum(1)
        place = torch.searchsorted(shares, drawn[:, 0] * shares[:, -1:], right=True).clamp_max(pixels - 1)
    row, column = place // width, place % width
    top, left = (row - window).clamp_min(0), (column - window).clamp_min(0)
    from_row = top + integers(drawn[:, 1], (row + window).clamp_max(height - 1) - top + 1)
    from_column = left + integers(drawn[:, 2], (column + window).clamp_max(width - 1) - left + 1)
    source = from_row * width + from_column
    number = torch.arange(deflections, device=device)
    if per_channel:
        place, source = place + number % channels * pixels, source + number % channels * pixels
    flat = images.flatten(1 if per_channel else 2)
    latest = torch.full((count, flat.shape[-1]), -1, device=device)
    latest.scatter_reduce_(1, place, number.expand(count, -1), "amax")
    origin = torch.where(
        latest >= 0, source.gather(1, latest.clamp_min(0)), torch.arange(flat.shape[-1], device=device)
    )
    if not per_channel:
        origin = origin[:, None].expand_as(flat)
    return flat.gather(-1, origin).view_as(images)
