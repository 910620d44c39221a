"""Pre-activation ResNet-18 for small images: the network of fast adversarial training (arXiv 2001.03994).

He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027: BatchNorm and ReLU stand before each
convolution, and once more before the pooling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and 3×3 convolution, twice; a projecting shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """Four stages of 64, 128, 256 and 512 channels; all but the first halve the image.

    Args:
        depths: blocks in each of the four stages.
        num_classes: length of the logits.
        in_channels: channels of the images.
    """

    def __init__(self, depths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.layer1 = self._stage(64, 64, depths[0], stride=1)
        self.layer2 = self._stage(64, 128, depths[1], stride=2)
        self.layer3 = self._stage(128, 256, depths[2], stride=2)
        self.layer4 = self._stage(256, 512, depths[3], stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)
        kaiming_initialize(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
        first = PreActBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N,C,H,W)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


@register_network("preact_resnet18")
def preact_resnet18(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """Pre-activation ResNet-18 for small images: 11.17 million parameters for 10 classes."""
    return PreActResNet((2, 2, 2, 2), num_classes, image_shape[0])
