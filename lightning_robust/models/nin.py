"""Network in Network for CIFAR images (Lin, Chen, Yan, arXiv 1312.4400)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


@register_network("nin", min_size=4)
def nin(
    num_classes: int,
    image_shape: ImageShape,
    *,
    batch_norm: bool = False,
    dropout: float = 0.5,
    class_relu: bool = False,
) -> nn.Module:
    """Network in Network: 966,986 parameters for RGB images and 10 classes.

    Three blocks of a convolution and two 1×1 convolutions, pooled 3×3 with stride 2 in between (the first by maximum,
    the second by mean), then the mean over each class's map. It is the NiN of the one-pixel attack (Su et al., arXiv
    1710.08864).

    Args:
        num_classes: length of the logits.
        image_shape: channels, height and width.
        batch_norm: BatchNorm after each convolution but the last. The paper has none; with it the network also trains
            on few images and at any usual learning rate.
        dropout: share of the values dropped in training after each pooling.
        class_relu: ReLU on the class maps, as the authors' model has it. It makes logits that are never negative and
            gradients that vanish where a class's map is zero, which misleads gradient attacks; so it is off.
    """
    layers: list[nn.Module] = []

    def block(in_channels: int, *convolutions: tuple[int, int]) -> None:
        for channels, kernel in convolutions:
            layers.append(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU())
            in_channels = channels

    # pooling rounds sizes up, as the authors' does: 32, 16, 8
    block(image_shape[0], (192, 5), (160, 1), (96, 1))
    layers += [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout)]
    block(96, (192, 5), (192, 1), (192, 1))
    layers += [nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout)]
    block(192, (192, 3), (192, 1))
    layers.append(nn.Conv2d(192, num_classes, 1))
    if class_relu:
        layers.append(nn.ReLU())
    network = nn.Sequential(
        OrderedDict(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    )
    kaiming_initialize(network)
    return network
