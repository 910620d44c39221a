"""The bodies of the Pixel Robustness Manipulator: what computes the whole image from the pixels that were read.

Both work on the grid of the sparse entry, keep its size, and take sizes that 2**depth divides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.errors import UserError

#: Convolutions of VGG-16's stages, which SegNet takes over, and their widths in units of the first.
_VGG16 = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class UNet(nn.Module):
    """U-Net (Ronneberger et al., arXiv 1505.04597) with padded convolutions and without BatchNorm.

    ``depth + 1`` blocks of two 3×3 convolutions with ReLU, of ``width``, 2·``width``, 4·``width`` … channels, with 2×2
    max pooling between them; then ``depth`` times a 2×2 transposed convolution that halves the channels, the encoder's
    map beside it, and two 3×3 convolutions with ReLU.

    Args:
        channels: of the entry's output.
        width: channels of the first block.
        depth: how often it pools.

    Attributes:
        in_channels: channels that it takes.
        out_channels: channels that it returns.
        multiple: sizes that it takes are multiples of this.
    """

    def __init__(self, channels: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.in_channels, self.out_channels, self.multiple = channels, width, 2**depth
        self.down = nn.ModuleList(
            _two_convolutions(before, after) for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(before, after, 2, 2) for before, after in steps)
        self.up = nn.ModuleList(_two_convolutions(before, after) for before, after in steps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, h, w) to (N, out_channels, h, w)."""
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level, (rise, block) in enumerate(zip(self.rise, self.up, strict=True)):
            x = block(torch.cat((rise(x), kept[-2 - level]), 1))
        return x


class SegNet(nn.Module):
    """SegNet (Badrinarayanan et al., arXiv 1511.00561): VGG-16's convolutions with BatchNorm, and its mirror image.

    Decoding puts each value back where max pooling had taken it from. The sparse entry is the first of VGG-16's
    convolutions.

    Args:
        width: channels of the first stage, 64 in VGG-16.
        depth: stages, each with a pooling; 5 in VGG-16 and at most.

    Attributes:
        in_channels: channels that it takes.
        out_channels: channels that it returns.
        multiple: sizes that it takes are multiples of this.

    Raises:
        UserError: for a depth above 5.
    """

    def __init__(self, width: int = 64, depth: int = 5) -> None:
        super().__init__()
        if depth > len(_VGG16):
            raise UserError(f"the segnet body has VGG-16's five stages: depth={depth} is too deep, give 5 or less")
        self.in_channels, self.out_channels, self.multiple = width, width, 2**depth
        convolutions = [count for count, _ in _VGG16[:depth]]
        widths = [width * factor for _, factor in _VGG16[:depth]]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for stage, (count, own) in enumerate(zip(convolutions, widths, strict=True)):
            before = widths[max(stage - 1, 0)]
            if stage == 0:  # the entry was its first convolution
                block = nn.Sequential(nn.BatchNorm2d(own), nn.ReLU(), *_normed(own, own))
                mirrored = _normed(own, own)
            else:
                block = nn.Sequential(*_normed(before, own), *(m for _ in range(count - 1) for m in _normed(own, own)))
                mirrored = [*(m for _ in range(count - 1) for m in _normed(own, own)), *_normed(own, before)]
            self.down.append(block)
            self.up.insert(0, nn.Sequential(*mirrored))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, h, w) to (N, out_channels, h, w)."""
        places: list[Tensor] = []
        for block in self.down:
            x, place = F.max_pool2d(block(x), 2, return_indices=True)
            places.append(place)
        for block in self.up:
            x = block(F.max_unpool2d(x, places.pop(), [2, 2]))
        return x


class Exit(nn.Module):
    """From the grid of the entry to pixels: a transposed convolution with the entry's stride.

    For stride 2 it is the published one, of kernel 3 (whose padding of 1 and output padding of 1 are a crop, which the
    manipulator does for all patterns alike).

    Args:
        width: channels of the body.
        channels: channels of the image.
        stride: of the entry, (rows, columns).
        refine: keep ``width`` channels and add ReLU and a 3×3 convolution at full size.

    Attributes:
        centre: row and column of the kernel that lie on the first pixel of a cell.
        kernel: its size.
    """

    def __init__(self, width: int, channels: int, stride: tuple[int, int], *, refine: bool = False) -> None:
        super().__init__()
        self.centre = (stride[0] + 1) // 2, (stride[1] + 1) // 2
        self.kernel = 2 * self.centre[0] + 1, 2 * self.centre[1] + 1
        self.rise = nn.ConvTranspose2d(width, width if refine else channels, self.kernel, stride)
        self.refine = nn.Sequential(nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1)) if refine else nn.Identity()

    @property
    def last(self) -> nn.Module:
        """The layer that ends it."""
        return self.refine[-1] if isinstance(self.refine, nn.Sequential) else self.rise

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, h, w) to (N, channels, (h - 1)·stride + kernel, (w - 1)·stride + kernel)."""
        return self.refine(self.rise(x))


def _two_convolutions(before: int, after: int) -> nn.Sequential:
    first, second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def _normed(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
