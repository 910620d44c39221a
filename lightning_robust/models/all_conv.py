"""All convolutional net for CIFAR images (Springenberg et al., arXiv 1412.6806, model All-CNN-C)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network

# output channels, kernel, stride, padding; a dropout follows each stride
_LAYERS = (
    (96, 3, 1, 1),
    (96, 3, 1, 1),
    (96, 3, 2, 1),
    (192, 3, 1, 1),
    (192, 3, 1, 1),
    (192, 3, 2, 1),
    (192, 3, 1, 0),  # not padded: the paper averages 6×6 maps of a 32×32 image
    (192, 1, 1, 0),
)


@register_network("all_conv", min_size=9)
def all_conv(
    num_classes: int,
    image_shape: ImageShape,
    *,
    batch_norm: bool = False,
    input_dropout: float = 0.2,
    dropout: float = 0.5,
) -> nn.Module:
    """The all convolutional net: 1,369,738 parameters for RGB images and 10 classes.

    Nine convolutions, of which two of stride 2 take the place of pooling, then the mean over each class's map. It is
    the AllConv of the one-pixel attack (Su et al., arXiv 1710.08864).

    Args:
        num_classes: length of the logits.
        image_shape: channels, height and width.
        batch_norm: BatchNorm after each convolution but the last. The paper has none; with it the network also trains
            on few images and at any usual learning rate.
        input_dropout: share of the pixel values dropped in training.
        dropout: share of the values dropped in training after each convolution of stride 2.
    """
    layers: list[nn.Module] = [nn.Dropout(input_dropout)]
    in_channels = image_shape[0]
    for channels, kernel, stride, padding in _LAYERS:
        layers.append(nn.Conv2d(in_channels, channels, kernel, stride, padding))
        if batch_norm:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(nn.ReLU())
        if stride == 2:
            layers.append(nn.Dropout(dropout))
        in_channels = channels
    layers.append(nn.Conv2d(in_channels, num_classes, 1))
    network = nn.Sequential(
        OrderedDict(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    )
    kaiming_initialize(network)
    return network
