"""ResNet-20 and ResNet-56, the thin networks that the ResNet paper made for CIFAR-10 (arXiv 1512.03385, 4.2).

Three stages of 16, 32 and 64 channels. Shortcuts have no parameters (the paper's option A): where the shape changes
they keep every second pixel and pad the channels with zeros, half of them on each side.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


class ThinBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ThinResNet(nn.Module):
    """A network of ``6·blocks + 2`` layers.

    Args:
        blocks: residual blocks in each of the three stages.
        num_classes: length of the logits.
        in_channels: channels of the images.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        kaiming_initialize(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        first = ThinBlock(in_channels, channels, stride=channels // in_channels)
        return nn.Sequential(first, *(ThinBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N,C,H,W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_network("resnet20")
def resnet20(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ResNet-20 of the CIFAR experiments: 0.27 million parameters for 10 classes."""
    return ThinResNet(3, num_classes, image_shape[0])


@register_network("resnet56")
def resnet56(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ResNet-56 of the CIFAR experiments: 0.85 million parameters for 10 classes."""
    return ThinResNet(9, num_classes, image_shape[0])
