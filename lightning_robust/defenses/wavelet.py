"""Denoising by shrinking wavelet coefficients, batched: BayesShrink (Chang, Yu & Vetterli 2000)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_robust.defenses.extra import require
from lightning_robust.errors import UserError

NoiseUnit = Literal["image", "channel"]

# ITU-R BT.601, digital: pixels in [0, 1] to Y, Cb and Cr, without their offsets, which no detail has
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))

_AT_ONCE = 2**19  # pixel values


def check_wavelet(name: str) -> None:
    """Refuse what is no orthogonal wavelet of PyWavelets.

    Raises:
        UserError: for another name, and where the library is missing.
    """
    require("ptwt", "wavelet denoising")
    import pywt

    if name not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(name).orthogonal:
        raise UserError(f"wavelet={name!r}: choose an orthogonal one of PyWavelets, such as db1, db2 or sym4")


def denoise(images: Tensor, sigma: float, *, wavelet: str = "db1", unit: NoiseUnit = "image") -> Tensor:
    """Denoise in YCbCr by soft thresholds, one for each subband of each image.

    Color images are taken to YCbCr and back; images of other than 3 channels are denoised channel by channel. The three
    coarsest of the levels that the size allows are left out, and edges are continued by mirroring, as scikit-image's
    ``denoise_wavelet`` does it.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        sigma: standard deviation of the noise.
        wavelet: name of an orthogonal wavelet.
        unit: what ``sigma`` is measured in. "image": pixel units; the noise of a YCbCr channel follows from it, as in
            scikit-image from 0.16 on. "channel": the range of each YCbCr channel of each image, as before.

    Returns:
        ``(N, C, H, W)``, not clipped.
    """
    with torch.autocast(images.device.type, enabled=False):  # the transform would be taken in half precision
        # on a CPU a few images at a time, which stay in its cache
        some = max(_AT_ONCE // images[0].numel(), 1) if images.device.type == "cpu" else len(images)
        return torch.cat([_denoise(part, sigma, wavelet, unit) for part in images.split(some)])


def _denoise(images: Tensor, sigma: float, wavelet: str, unit: NoiseUnit) -> Tensor:
    import ptwt
    import pywt

    color = images.shape[1] == 3
    height, width = images.shape[2:]
    planes = images
    deviation = torch.full((1, 1, 1, 1), sigma, dtype=images.dtype, device=images.device)
    if color:
        matrix = torch.tensor(_YCBCR, dtype=images.dtype, device=images.device)
        planes = _mix(images, matrix)
        deviation = sigma * matrix.square().sum(1).sqrt()[None, :, None, None]
    if unit == "channel":
        deviation = sigma * (planes.amax((2, 3), keepdim=True) - planes.amin((2, 3), keepdim=True))
    levels = max(pywt.dwtn_max_level((height, width), wavelet) - 3, 1)
    # where nothing is padded all modes are alike, and only this one is free
    whole = pywt.Wavelet(wavelet).dec_len == 2 and height % 2**levels == 0 == width % 2**levels
    coarse, *details = ptwt.wavedec2(planes, wavelet, mode="zero" if whole else "symmetric", level=levels)
    shrunk = [type(level)(*(_shrink(band, deviation.square()) for band in level)) for level in details]
    planes = ptwt.waverec2((coarse, *shrunk), wavelet)[:, :, :height, :width]  # one more where a side is odd
    return _mix(planes, torch.linalg.inv(matrix)) if color else planes


def _mix(images: Tensor, matrix: Tensor) -> Tensor:
    # as sums of products, since a matrix product may be taken in lower precision on a GPU
    mixed = images[:, :1] * matrix[:, :1, None]
    for channel in (1, 2):
        mixed.addcmul_(images[:, channel, None], matrix[:, channel, None, None])
    return mixed


def _shrink(band: Tensor, variance: Tensor) -> Tensor:
    """Soft threshold σ² / σ_x, where σ_x² is what the band's power exceeds the noise by; all goes where it does not.

    Args:
        band: ``(N, C, h, w)``.
        variance: of the noise, ``(1 or N, 1 or C, 1, 1)``.
    """
    exact = torch.finfo(band.dtype)
    excess = band.square().mean((2, 3), keepdim=True) - variance
    threshold = variance / torch.maximum(excess, exact.eps * variance).clamp_min(exact.tiny).sqrt()
    return band - torch.clamp(band, -threshold, threshold)
