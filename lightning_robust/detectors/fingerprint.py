"""Which network a detector was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits of all that a network computes with: its parameters and buffers, to float32.

    Names count by their last part alone, so that a network and a module around it, or a DataParallel of it, have one
    fingerprint; device and precision do not count.
    """
    digest = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("num_batches_tracked"):  # nothing is computed with it
            continue
        digest.update(f"{name.rpartition('.')[2]} {tuple(value.shape)}".encode())
        numbers = value.detach().to(device="cpu")
        numbers = numbers.to(torch.float32 if numbers.is_floating_point() else torch.int64).contiguous()
        digest.update(numbers.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class SameModel:
    """Remembers which model was looked at, so that its weights are hashed again only after they changed.

    Args:
        expected: the fingerprint that a model must have.
    """

    def __init__(self, expected: str) -> None:
        self.expected = expected
        self._seen: tuple[object, ...] = ()

    def __call__(self, model: nn.Module) -> bool:
        """Whether the model is the one."""
        tensors = [*model.parameters(), *model.buffers()]
        # an in-place change raises a tensor's version; a tensor put in another one's place has another id
        state = tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors)
        if state == self._seen:
            return True
        if fingerprint(model) != self.expected:
            return False
        self._seen = () if any(tensor.is_inference() for tensor in tensors) else state  # those have no version
        return True


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
