"""Initial weights shared by the own networks."""

from __future__ import annotations

from torch import nn


def kaiming_initialize(network: nn.Module) -> None:
    """Initialise convolutions for ReLU networks as He et al. (arXiv 1502.01852), variance kept backwards.

    Convolution weights are drawn from N(0, 2 / (kernel height · kernel width · output channels)), biases and
    BatchNorm shifts become 0, BatchNorm scales 1. Linear layers keep PyTorch's default.

    Args:
        network: changed in place.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
