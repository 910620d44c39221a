"""VGG-11, VGG-16 and VGG-19 for small images: the convolutions of arXiv 1409.1556 and one linear layer.

Torchvision's ``torchvision/vgg16`` has the three wide linear layers of the original, made for 224×224 images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network

_CHANNELS = (1, 2, 4, 8, 8)  # in units of the first stage's


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each ending in 2×2 max pooling.

    Pooling rounds sizes up, so that images smaller than 32×32 keep at least one pixel; powers of two are not
    affected.

    Args:
        depths: convolutions in each of the five stages.
        batch_norm: BatchNorm after each convolution; without it the network is hard to train from scratch.
        num_classes: length of the logits.
        in_channels: channels of the images.
        width: channels of the first stage; 64 in the paper, 8 to 16 train in minutes on a CPU.

    Raises:
        UserError: for a width below 1.
    """

    def __init__(
        self, depths: tuple[int, ...], batch_norm: bool, num_classes: int, in_channels: int, width: int = 64
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UserError(f"VGG: width={width!r}: give the channels of the first stage, 64 in the paper")
        layers: list[nn.Module] = []
        for factor, depth in zip(_CHANNELS, depths, strict=True):
            channels = width * factor
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU())
                in_channels = channels
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * _CHANNELS[-1], num_classes)
        kaiming_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N,C,H,W)."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


@register_network("vgg11")
def vgg11(num_classes: int, image_shape: ImageShape, *, batch_norm: bool = True, width: int = 64) -> nn.Module:
    """VGG-11 for small images: 9.23 million parameters for 10 classes."""
    return VGG((1, 1, 2, 2, 2), batch_norm, num_classes, image_shape[0], width)


@register_network("vgg16")
def vgg16(num_classes: int, image_shape: ImageShape, *, batch_norm: bool = True, width: int = 64) -> nn.Module:
    """VGG-16 for small images: 14.73 million parameters for 10 classes."""
    return VGG((2, 2, 3, 3, 3), batch_norm, num_classes, image_shape[0], width)


@register_network("vgg19")
def vgg19(num_classes: int, image_shape: ImageShape, *, batch_norm: bool = True, width: int = 64) -> nn.Module:
    """VGG-19 for small images: 20.04 million parameters for 10 classes."""
    return VGG((2, 2, 4, 4, 4), batch_norm, num_classes, image_shape[0], width)
