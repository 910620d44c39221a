"""Adversarial weight perturbation (Wu, Xia & Wang, arXiv 2004.05884): train at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_robust.attacks.context import Model, unwrap
from lightning_robust.errors import UserError

_TINY = 1e-20  # keeps a zero gradient zero instead of NaN
_LOSS_SCALE = 2.0**10  # the direction does not depend on it, and float16 gradients do not underflow


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Shifts each weight tensor by γ times its norm up the gradient of the loss, for one forward and backward pass.

    w ← w + γ · ‖w‖ · g / ‖g‖ for every parameter of two dimensions or more (biases and norm layers stay); g is the
    gradient of the batch's training loss at the adversarial images. The weights are put back right after the backward
    pass, before the optimizer's step. (The authors put them back after the step, which differs by weight decay alone,
    by the factor γ.) It costs one forward and backward pass more.

    Args:
        gamma: size of the shift relative to the weights; the paper takes 0.01 for adversarial training and 0.005 for
            TRADES.
        warmup_epochs: epochs at the beginning that go without it.

    Raises:
        UserError: for a γ that is not positive and a negative number of epochs.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = net.weight.detach().clone()
        >>> restore = AWP(gamma=0.01).perturb_weights(net, lambda net: net(torch.ones(1, 2)).square().sum())
        >>> moved = net.weight.detach() - before
        >>> bool(torch.isclose(moved.norm(), 0.01 * before.norm()))
        True
        >>> restore()
        >>> bool((net.weight == before).all())
        True
    """

    gamma: float = 0.005
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise UserError(f"AWP: gamma={self.gamma} is a share of the weights' norm, for example 0.005")
        if self.warmup_epochs < 0:
            raise UserError(f"AWP: warmup_epochs={self.warmup_epochs} is negative: give 0 or more")

    def active(self, epoch: int) -> bool:
        """Whether weights are shifted in this epoch, counted from 0."""
        return epoch >= self.warmup_epochs

    def perturb_weights(self, model: Model, loss_fn: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        """Shift the weights in place; call what is returned after the backward pass to put them back, bit for bit.

        The additional pass leaves no trace: buffers (BatchNorm statistics) and the random state are as before, no
        ``.grad`` is touched, and no hook of a distributed wrapper fires. Under ``torch.distributed`` the gradient is
        averaged over the ranks, as the optimizer's is, so that all ranks shift alike; every rank must take part.

        Args:
            model: the network in the mode that it trains in; a distributed wrapper is taken off.
            loss_fn: from the network to its scalar training loss on this batch.

        Returns:
            ``restore()``; calling it again does nothing.

        Raises:
            UserError: if ``model`` is not a module, or no parameter of two dimensions asks for gradients.
        """
        network = unwrap(model)
        if not isinstance(network, nn.Module):
            raise UserError(f"AWP perturbs the weights of an nn.Module and was given a {type(model).__name__}")
        weights = [w for w in network.parameters() if w.requires_grad and w.dim() > 1]
        if not weights:
            raise UserError("AWP found no trainable weight of two dimensions or more: leave awp out or unfreeze layers")

        with torch.enable_grad(), _untouched(network):
            loss = _LOSS_SCALE * loss_fn(network)
            # autograd.grad and not backward: .grad is the optimizer's
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients = [torch.zeros_like(w) if g is None else g.detach() for w, g in zip(weights, found, strict=True)]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gradients = _averaged(gradients)

        kept: list[tuple[nn.Parameter, Tensor]] = []
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                kept.append((weight, weight.detach().clone()))
                size, length = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
                # an overflow of float16 leaves this weight where it is, instead of making it NaN
                shift = torch.where(length.isfinite(), gradient * (self.gamma * size / (length + _TINY)), 0.0)
                weight.add_(shift)
        # autocast keeps the weights that it has cast: it would go on with those from before the shift
        torch.clear_autocast_cache()

        @torch.no_grad()
        def restore() -> None:
            while kept:
                weight, value = kept.pop()
                weight.copy_(value)
            torch.clear_autocast_cache()

        return restore


@contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Give buffers and random state back as they were."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    device = next(network.parameters()).device
    devices = [] if device.type == "cpu" else [device.index]
    device_type = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer


def _averaged(gradients: list[Tensor]) -> list[Tensor]:
    """The mean over ranks, in one message."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
