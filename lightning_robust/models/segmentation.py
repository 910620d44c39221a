"""Networks that tell foreground from background, by name: a small U-Net of our own, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models.from_timm import hub_errors, unreachable
from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.normalization import Normalized, normalization_of
from lightning_robust.models.weights import load_weights

SegmenterName = Literal[
    "unet",
    "lraspp_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
]
SEGMENTERS = (
    "unet",
    "lraspp_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
)


class MaskUNet(nn.Module):
    """A small U-Net (Ronneberger et al., arXiv 1505.04597) with BatchNorm and padded convolutions.

    Images of a size that its pooling does not divide are padded by their edges inside, and the answer is cropped.

    Args:
        channels: of the images.
        image_size: their (height, width).
        width: channels of the first block; each further one doubles them.
        depth: how often it pools.

    Raises:
        UserError: for a width or depth below 1, and images that are too small for the depth.
    """

    def __init__(self, channels: int, image_size: tuple[int, int], width: int = 16, depth: int = 3) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise UserError(f"the U-Net of the segmenter: width={width}, depth={depth}: give 1 or more")
        if min(image_size) < 2**depth:
            raise UserError(
                f"the U-Net of the segmenter pools {depth} times, which images of {image_size[0]}×{image_size[1]} "
                "pixels do not bear: give a smaller depth"
            )
        self._size = image_size
        # of the last side first, as F.pad wants it
        self._pad = [part for side in reversed(image_size) for part in (0, -side % 2**depth)]
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(before, after, 2, 2) for before, after in steps)
        self.up = nn.ModuleList(_block(before, after) for before, after in steps)
        self.head = nn.Conv2d(width, 1, 1)
        kaiming_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,1,H,W)."""
        if any(self._pad):
            x = F.pad(x, self._pad, mode="replicate")
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level, (rise, block) in enumerate(zip(self.rise, self.up, strict=True)):
            x = block(torch.cat((rise(x), kept[-2 - level]), 1))
        return self.head(x)[..., : self._size[0], : self._size[1]]


class TorchvisionSegmenter(nn.Module):
    """One of torchvision's segmentation networks with a single output; grey images are given to it as three channels.

    Args:
        network: with an answer ``{"out": (N, 1, H, W)}``.
        channels: of the images, 1 or 3.
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,1,H,W)."""
        return self.network(x.expand(-1, 3, -1, -1) if self.channels == 1 else x)["out"]


def create_segmenter(
    name: str,
    image_shape: tuple[int, int, int],
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    width: int = 16,
    depth: int = 3,
) -> nn.Module:
    """Create a network from images in [0, 1] to the logit of "foreground" of each pixel.

    Args:
        name: "unet" for small images (a tenth of a million to some million parameters), or one of torchvision's, made
            for images of some hundred pixels: their answer is a sixteenth or an eighth as fine, and interpolated.
        image_shape: ``(C, H, W)``.
        pretrained: torchvision's networks begin with the published ImageNet weights of their backbone.
        weights: a file of weights, see :func:`~lightning_robust.models.load_weights`.
        width: of the U-Net.
        depth: of the U-Net.

    Returns:
        The network in training mode, its normalisation inside: ``(N, C, H, W)`` to ``(N, 1, H, W)``.

    Raises:
        UserError: for a name that does not exist, and settings that do not fit the images.

    Example:
        >>> create_segmenter("unet", (3, 30, 35), width=4)(torch.rand(2, 3, 30, 35)).shape
        torch.Size([2, 1, 30, 35])
    """
    channels, height, size = image_shape
    if name not in SEGMENTERS:
        raise UserError(f"there is no segmenter named {name!r}: choose from {', '.join(SEGMENTERS)}")
    if pretrained and weights is not None:
        raise UserError("pretrained and weights are two sources of the segmenter's numbers: give one of them")
    if name == "unet":
        if pretrained:
            raise UserError("the segmenter unet is this package's own, without published weights: give weights")
        network: nn.Module = Normalized(MaskUNet(channels, (height, size), width, depth))
    else:
        if channels not in (1, 3):
            raise UserError(f"the segmenter {name} takes images of 1 or 3 channels, not {channels}: take unet")
        bare = _torchvision(name, pretrained)
        # with and without published weights: a checkpoint does not say which it began with
        usual = normalization_of("imagenet") if channels == 3 else (None, None)
        network = Normalized(TorchvisionSegmenter(bare, channels), *usual)
    if weights is not None:
        load_weights(network, weights)
    return network


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision.models import segmentation

    build: Callable[..., nn.Module] = getattr(segmentation, name)
    options: dict[str, Any] = {} if name.startswith("lraspp") else {"aux_loss": False}
    try:
        return build(weights=None, weights_backbone="DEFAULT" if pretrained else None, num_classes=1, **options)
    except hub_errors() as error:
        raise unreachable(f"the backbone of torchvision/{name}", error) from error


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
