"""Wide residual networks, the large networks of the CIFAR robustness tables.

Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146. Parameter names are those of the checkpoints of
TRADES (arXiv 1901.08573) and its successors.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


class WideBlock(nn.Module):
    """BatchNorm, ReLU and 3×3 convolution, twice, with dropout between; a projection starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.convShortcut: nn.Module | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.dropout(F.relu(self.bn2(self.conv1(out))))
        return self.conv2(out) + shortcut


class WideStage(nn.Module):
    """Blocks of equal width; the first carries the stride."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = WideBlock(in_channels, channels, stride, dropout)
        rest = (WideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width.

    Args:
        depth: number of convolutions, ``6·n + 4``.
        width: factor on the 16, 32 and 64 channels of the three stages.
        dropout: probability between the two convolutions of a block.
        num_classes: length of the logits.
        in_channels: channels of the images.

    Raises:
        UserError: for a depth that is not ``6·n + 4``, or a width below 1.
    """

    def __init__(self, depth: int, width: int, dropout: float, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"a wide ResNet has a depth of 6·n + 4 (10, 16, 22, 28, 34, 40 …), not {depth}.")
        if width < 1:
            raise UserError(f"the width of a wide ResNet is at least 1, not {width}.")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(blocks, 16, 16 * width, 1, dropout)
        self.block2 = WideStage(blocks, 16 * width, 32 * width, 2, dropout)
        self.block3 = WideStage(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        kaiming_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N,C,H,W)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1))


@register_network("wide_resnet")
def wide_resnet(
    num_classes: int, image_shape: ImageShape, *, depth: int = 16, width: int = 4, dropout: float = 0.0
) -> nn.Module:
    """A wide ResNet of any depth ``6·n + 4`` and width."""
    return WideResNet(depth, width, dropout, num_classes, image_shape[0])


@register_network("wide_resnet28_10")
def wide_resnet28_10(num_classes: int, image_shape: ImageShape, *, dropout: float = 0.0) -> nn.Module:
    """WRN-28-10: 36.5 million parameters for 10 classes."""
    return WideResNet(28, 10, dropout, num_classes, image_shape[0])


@register_network("wide_resnet34_10")
def wide_resnet34_10(num_classes: int, image_shape: ImageShape, *, dropout: float = 0.0) -> nn.Module:
    """WRN-34-10: 46.2 million parameters for 10 classes."""
    return WideResNet(34, 10, dropout, num_classes, image_shape[0])
