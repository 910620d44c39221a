"""Small convolutional networks of the robustness papers for digits, garments and CIFAR images.

Each is one ``nn.Sequential``; its linear layers are sized for the image shape at hand.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models.initialization import kaiming_initialize
from lightning_robust.models.registry import ImageShape, register_network


def flat_features(features: nn.Module, image_shape: ImageShape) -> int:
    """How many numbers per image come out of convolutions and poolings, found with one empty image."""
    with torch.no_grad():
        return features(torch.zeros(1, *image_shape)).numel()


@register_network("lenet5", min_size=12)
def lenet5(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 61,706 parameters on 28×28 and 32×32 gray images.

    The original took digits of 28×28 padded to 32×32; images below 32 pixels are padded by two on each side.
    """
    channels, height, width = image_shape
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=2 if min(height, width) < 32 else 0),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
        )
    )
    classifier = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(flat_features(features, image_shape), 120),
            relu1=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu2=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )
    return _classifier(features, classifier)


@register_network("papernot_mnist", min_size=16)
def papernot_mnist(num_classes: int, image_shape: ImageShape, *, dropout: float = 0.5) -> nn.Module:
    """The MNIST network of defensive distillation (arXiv 1511.04508): 312,202 parameters on 28×28 gray images.

    Also the network of Carlini and Wagner (arXiv 1608.04644) and of TRADES (arXiv 1901.08573), whose parameter
    names it carries. ``dropout`` acts after both hidden linear layers, in training only.
    """
    return _papernot(image_shape, (32, 64), 200, dropout, num_classes)


@register_network("papernot_cifar10", min_size=16)
def papernot_cifar10(num_classes: int, image_shape: ImageShape, *, dropout: float = 0.5) -> nn.Module:
    """The CIFAR-10 network of defensive distillation (arXiv 1511.04508): 1.15 million parameters on 32×32 RGB."""
    return _papernot(image_shape, (64, 128), 256, dropout, num_classes)


def _papernot(
    image_shape: ImageShape, channels: tuple[int, int], hidden: int, dropout: float, num_classes: int
) -> nn.Module:
    first, second = channels
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(image_shape[0], first, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, first, 3),
            relu2=nn.ReLU(),
            maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(first, second, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(second, second, 3),
            relu4=nn.ReLU(),
            maxpool2=nn.MaxPool2d(2),
        )
    )
    classifier = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(flat_features(features, image_shape), hidden),
            relu1=nn.ReLU(),
            drop=nn.Dropout(dropout),
            fc2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            drop2=nn.Dropout(dropout),
            fc3=nn.Linear(hidden, num_classes),
        )
    )
    return _classifier(features, classifier)


@register_network("small_cnn", min_size=4)
def small_cnn(num_classes: int, image_shape: ImageShape, *, width: int = 1) -> nn.Module:
    """The small network of provable robustness (arXiv 1711.00851): 166,406 parameters on 28×28 gray images.

    ``width`` multiplies channels and hidden units. Parameter names are those of the authors' checkpoints.
    """
    if width < 1:
        raise UserError(f"the width of small_cnn is at least 1, not {width}.")
    features = nn.Sequential(
        nn.Conv2d(image_shape[0], 16 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16 * width, 32 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    hidden = 100 * width
    head = (nn.Linear(flat_features(features, image_shape), hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    network = nn.Sequential(*features, *head)
    kaiming_initialize(network)
    return network


@register_network("mnist_cnn", min_size=4)
def mnist_cnn(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """The MNIST network of PGD adversarial training (arXiv 1706.06083): 3,274,634 parameters on 28×28 gray images."""
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(image_shape[0], 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
        )
    )
    classifier = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(flat_features(features, image_shape), 1024),
            relu1=nn.ReLU(),
            fc2=nn.Linear(1024, num_classes),
        )
    )
    return _classifier(features, classifier)


@register_network("digits_cnn", min_size=4)
def digits_cnn(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """A tiny network for scikit-learn's 8×8 digits that trains in seconds; no paper's network."""
    layers: list[nn.Module] = []
    in_channels = image_shape[0]
    for channels, pool in ((16, False), (32, True), (64, True)):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2))
        in_channels = channels
    features = nn.Sequential(*layers)
    # BatchNorm in training mode would take the empty image into its statistics.
    size = flat_features(features.eval(), image_shape)
    return _classifier(features.train(), nn.Sequential(nn.Linear(size, num_classes)))


def _classifier(features: nn.Sequential, classifier: nn.Sequential) -> nn.Sequential:
    network = nn.Sequential(OrderedDict(feature_extractor=features, flatten=nn.Flatten(), classifier=classifier))
    kaiming_initialize(network)
    return network
