"""The book of the package's own networks: a name, the function that builds it, the smallest image it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

#: Channels, height and width of one image in pixels.
ImageShape = tuple[int, int, int]

#: ``builder(num_classes, image_shape, **options)`` returns an untrained classifier that ends in logits.
NetworkBuilder = Callable[..., nn.Module]


@dataclass(frozen=True)
class RegisteredNetwork:
    """One own network.

    Attributes:
        build: builds the network from ``num_classes``, ``image_shape`` and keyword options.
        min_size: the smallest height and width in pixels whose feature maps do not vanish.
    """

    build: NetworkBuilder
    min_size: int


_NETWORKS: dict[str, RegisteredNetwork] = {}


def register_network(name: str, *, min_size: int = 1) -> Callable[[NetworkBuilder], NetworkBuilder]:
    """Make a builder available to :func:`~lightning_robust.models.create_network` under a name.

    An own name hides a timm or torchvision network of the same name, which stays reachable with its prefix.

    Args:
        name: what users write.
        min_size: smallest image height and width in pixels that the network takes.

    Returns:
        The decorator; it returns the builder unchanged.

    Raises:
        ValueError: when the name is taken.

    Example:
        >>> from torch import nn
        >>> @register_network("doctest_linear")
        ... def doctest_linear(num_classes, image_shape):
        ...     return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
        >>> "doctest_linear" in registered_networks()
        True
        >>> del _NETWORKS["doctest_linear"]
    """

    def add(build: NetworkBuilder) -> NetworkBuilder:
        if name in _NETWORKS:
            raise ValueError(f"a network named {name!r} is registered already")
        _NETWORKS[name] = RegisteredNetwork(build, min_size)
        return build

    return add


def registered_networks() -> dict[str, RegisteredNetwork]:
    """Own networks by name, in alphabetical order (a copy)."""
    return dict(sorted(_NETWORKS.items()))
