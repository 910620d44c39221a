"""ResNet-18, -34 and -50 with the stem for small images: one 3×3 convolution, no pooling.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, in the form that the adversarial
training literature uses for CIFAR-10. Parameter names are those of that literature's published checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut of a post-activation block: identity, or 1×1 convolution and BatchNorm where shapes change."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution around a shortcut; the last widens fourfold."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4·channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, depth: int, stride: int
) -> nn.Sequential:
    """Blocks of equal width; the first carries the stride."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(block.expansion * channels, channels, 1) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """Four stages of 64, 128, 256 and 512 channels; all but the first halve the image; mean pooling at the end.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: length of the logits.
        in_channels: channels of the images.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        kaiming_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N,C,H,W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_network("resnet18")
def resnet18(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ResNet-18 with the stem for small images: 11.17 million parameters for 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, image_shape[0])


@register_network("resnet34")
def resnet34(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ResNet-34 with the stem for small images: 21.28 million parameters for 10 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, image_shape[0])


@register_network("resnet50")
def resnet50(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ResNet-50 with the stem for small images: 23.52 million parameters for 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, image_shape[0])
