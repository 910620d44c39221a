"""Segmenters by name: shapes, odd sizes, weights, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.models import create_segmenter
from lightning_robust.models.segmentation import SEGMENTERS


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 35, 37), (4, 9, 8)])
def test_the_unet_takes_any_size(shape: tuple[int, int, int]) -> None:
    segmenter = create_segmenter("unet", shape, width=4, depth=3)
    assert segmenter(torch.rand(2, *shape)).shape == (2, 1, *shape[1:])


@pytest.mark.parametrize("name", [name for name in SEGMENTERS if name in ("lraspp_mobilenet_v3_large", "fcn_resnet50")])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_networks(name: str, channels: int) -> None:
    segmenter = create_segmenter(name, (channels, 40, 48)).eval()
    with torch.no_grad():
        assert segmenter(torch.rand(1, channels, 40, 48)).shape == (1, 1, 40, 48)


def test_the_unet_learns_a_mask() -> None:
    torch.manual_seed(0)
    segmenter = create_segmenter("unet", (3, 16, 16), width=4, depth=2)
    images = torch.rand(32, 3, 16, 16) * 0.5
    masks = torch.zeros(32, 1, 16, 16)
    for number in range(32):
        row, column = number % 8, number // 4
        masks[number, :, row : row + 6, column : column + 6] = 1
    images = (images + 0.4 * masks).clamp(0, 1)
    optimizer = torch.optim.Adam(segmenter.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(segmenter(images), masks).backward()
        optimizer.step()
    right = ((segmenter.eval()(images) > 0) == masks.bool()).float().mean()
    assert right > 0.97


def test_weights_from_a_file(tmp_path: Path) -> None:
    made = create_segmenter("unet", (3, 16, 16), width=4).eval()
    torch.save(made.state_dict(), tmp_path / "s.pt")
    again = create_segmenter("unet", (3, 16, 16), width=4, weights=tmp_path / "s.pt").eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(made(images), again(images))


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("segnet", (3, 32, 32), {}, "there is no segmenter named 'segnet'"),
        ("unet", (3, 6, 32), {}, "pools 3 times, which images of 6×32"),
        ("unet", (3, 32, 32), {"width": 0}, "give 1 or more"),
        ("unet", (3, 32, 32), {"pretrained": True}, "without published weights"),
        ("fcn_resnet50", (4, 32, 32), {}, "1 or 3 channels"),
        ("fcn_resnet50", (3, 32, 32), {"pretrained": True, "weights": "x.pt"}, "two sources"),
    ],
)
def test_bad_settings(name: str, shape: tuple[int, int, int], settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_segmenter(name, shape, **settings)
