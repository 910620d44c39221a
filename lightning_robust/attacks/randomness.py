"""Random numbers that depend on the image and a seed, and on nothing else.

An attack's random start must be the same on one process and on eight, in a batch of 1 and of 512, and after a resumed
run; and an attack must not disturb the user's random state. So noise is not drawn from a generator but computed: a
counter-based hash (the finaliser of SplitMix64) of (key of the image, number of the value). The key of an image is a
hash of its pixels and of a seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea & Flood 2014) as signed 64-bit integers; torch's int64 product wraps.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own shift is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def mix_seed(*parts: int) -> int:
    """Fold integers (a seed, an epoch, a step, …) into one seed; every order and value gives another one.

    Example:
        >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
        (True, False)
    """
    value = torch.zeros((), dtype=torch.int64)
    for part in parts:
        # wrap to the signed 64-bit range, which torch refuses to do by itself
        signed = (part + 2**63) % 2**64 - 2**63
        value = _mix(value * _MIX_1 + _GAMMA + torch.tensor(signed))
    return int(value)


def image_keys(images: Tensor, seed: int) -> Tensor:
    """One key an image, from its pixels and a seed.

    Args:
        images: ``(N, C, H, W)``, any float type; the key is a hash of the values rounded to float32.
        seed: another seed gives other keys.

    Returns:
        ``(N,)`` int64 on the images' device.
    """
    bits = images.detach().to(torch.float32).contiguous().view(torch.int32).flatten(1).long()
    place = _mix(torch.arange(1, bits.shape[1] + 1, device=images.device) * _GAMMA)
    # a sum of integers has one value whatever order the device adds in
    return _mix((_mix(bits ^ place)).sum(1) + mix_seed(seed))


def uniform(keys: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), each image's own.

    Args:
        keys: ``(N,)`` from :func:`image_keys`.
        shape: shape of the batch ``(N, ...)``.
        dtype: float type of the result.
        stream: independent draws for one key (a restart, a step) have different streams.
    """
    count = math.prod(shape[1:])
    counter = torch.arange(1, count + 1, device=keys.device) * _GAMMA
    hashed = _mix(_mix(keys + mix_seed(stream)).unsqueeze(1) + counter)
    # 24 bits are what float32 holds exactly in [0, 1); more could round up to 1
    return (_shift(hashed, 40).to(dtype) * 2.0**-24).view(shape)


def normal(keys: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Standard normal numbers, each image's own (Box-Muller); arguments as in :func:`uniform`."""
    radius = (-2 * torch.log1p(-uniform(keys, shape, dtype, 2 * stream))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(keys, shape, dtype, 2 * stream + 1))


def ball(keys: Tensor, shape: torch.Size, dtype: torch.dtype, norm: str, eps: float, stream: int = 0) -> Tensor:
    """Perturbations drawn uniformly from the ε-ball of a norm, without the pixel box.

    For ``linf`` each value is uniform in [-ε, ε]; for ``l2`` a normal direction and the radius of a uniform ball; for
    ``l1`` normalised exponential variables with random signs and the radius of a uniform ball.
    """
    if norm == "linf":
        return (2 * uniform(keys, shape, dtype, stream) - 1) * eps
    dims = math.prod(shape[1:])
    stream = 4 * stream
    if norm == "l2":
        direction = normal(keys, shape, dtype, stream).flatten(1)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    else:
        direction = -torch.log1p(-uniform(keys, shape, dtype, stream)).flatten(1)
        sign = (uniform(keys, shape, dtype, stream + 1) < 0.5).flatten(1)
        direction = direction / direction.sum(1, keepdim=True).clamp_min(1e-12)
        direction = torch.where(sign, -direction, direction)
    radius = eps * uniform(keys, (shape[0], 1), dtype, stream + 3) ** (1 / dims)
    return (direction * radius).view(shape)
