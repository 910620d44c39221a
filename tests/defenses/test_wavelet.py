"""The wavelet step against scikit-image's, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_robust.defenses.wavelet import denoise

restoration = pytest.importorskip("skimage.restoration")
color = pytest.importorskip("skimage.color")


def reference(images: Tensor, sigma: float, *, wavelet: str = "db1", unit: str = "image") -> Tensor:
    """scikit-image's result, for one image after the other."""
    settings: dict[str, Any] = {"wavelet": wavelet, "mode": "soft", "method": "BayesShrink"}
    results = []
    for image in images.double().permute(0, 2, 3, 1).numpy():
        if image.shape[-1] != 3:
            result = restoration.denoise_wavelet(image[..., 0], sigma=sigma, **settings)
        elif unit == "image":
            result = restoration.denoise_wavelet(image, sigma=sigma, channel_axis=-1, convert2ycbcr=True, **settings)
        else:  # as it did until version 0.14: each channel brought to [0, 1], and there the noise is sigma
            planes = color.rgb2ycbcr(image)
            for plane in np.moveaxis(planes, -1, 0):
                low, span = plane.min(), plane.max() - plane.min()
                plane[:] = restoration.denoise_wavelet((plane - low) / span, sigma=sigma, **settings) * span + low
            result = color.ycbcr2rgb(planes)
        results.append(result)
    stacked = torch.from_numpy(np.stack(results))
    return stacked.permute(0, 3, 1, 2) if stacked.dim() == 4 else stacked[:, None]


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth patterns under noise, so that some subbands are kept and others shrunk away."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")
    return (smooth + 0.04 * torch.randn(smooth.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("unit", ["image", "channel"])
@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym4"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8), (96, 64)])
def test_it_is_scikit_images(size: tuple[int, int], wavelet: str, unit: Any) -> None:
    images = pictures(3, 3, *size)
    expected = reference(images, 0.04, wavelet=wavelet, unit=unit)
    assert (expected - images).abs().mean() > 1e-3  # it does something
    torch.testing.assert_close(denoise(images, 0.04, wavelet=wavelet, unit=unit), expected, rtol=0, atol=1e-10)
    # the channel unit differs from the pixel unit, so that a mix-up would be seen
    other = denoise(images, 0.04, wavelet=wavelet, unit="image" if unit == "channel" else "channel")
    assert (other - expected).abs().max() > 1e-3


def test_in_float32_it_is_the_same_to_rounding() -> None:
    images = pictures(2, 3, 224, 224)
    found = denoise(images.float(), 0.04)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(images.float(), 0.04), rtol=0, atol=2e-5)


def test_gray_images() -> None:
    images = pictures(3, 1, 32, 40)
    torch.testing.assert_close(denoise(images, 0.1), reference(images, 0.1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("unit", ["image", "channel"])
def test_a_plain_image_stays_as_it_is(unit: Any) -> None:
    images = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 16, 16).double().contiguous()
    torch.testing.assert_close(denoise(images, 0.04, unit=unit), images, rtol=0, atol=1e-12)


def test_it_takes_noise_away() -> None:
    clean = pictures(4, 3, 64, 64) * 0
    clean = clean + torch.linspace(0.2, 0.8, 64)[:, None]
    noisy = clean + 0.04 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    assert (denoise(noisy, 0.04) - clean).square().mean() < 0.3 * (noisy - clean).square().mean()


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images = pictures(4, 3, 32, 32)
    together = denoise(images, 0.04)
    for row in range(4):
        torch.testing.assert_close(denoise(images[row : row + 1], 0.04)[0], together[row], rtol=0, atol=1e-12)
