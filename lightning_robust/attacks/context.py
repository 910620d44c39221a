"""The one place that keeps the attack promise about the model: :func:`attacking`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


def unwrap(model: Model) -> Model:
    """The network inside a distributed wrapper, whose forward would start collectives."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
            continue
        inner = compiled_from(model)
        if inner is None or unwrap(inner) is inner:
            return model
        model = inner  # compiled around the wrapper: there is no compiled network inside


def compiled_from(model: Model) -> nn.Module | None:
    """The module that ``torch.compile`` wrapped, or ``None`` where ``model`` is no such wrapper."""
    # only where the compiler was imported can there be one; importing it takes a second and 100 MB
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return None
    inner: nn.Module = model._orig_mod
    return inner


@contextmanager
def attacking(model: Model) -> Iterator[Model]:
    """Lend a model to an attack and get it back as it was.

    Inside the context the model is in eval mode (BatchNorm statistics do not move, dropout is off), its parameters do
    not ask for gradients (so no ``.grad`` can be touched and less is kept in memory), gradients are enabled even where
    Lightning validates in inference mode, and a distributed wrapper is taken off. On the way out, also after an
    exception, the mode of *every* submodule and each parameter's ``requires_grad`` are what they were: a layer that
    the user had frozen in eval mode stays frozen.

    Args:
        model: an ``nn.Module`` or any callable from images to logits; a callable that is not a module is used as it is.

    Yields:
        What to call instead of ``model``.
    """
    model = unwrap(model)
    # An inference tensor could not be saved for backward: leave inference mode before the model is called.
    with torch.inference_mode(False), torch.enable_grad():
        if not isinstance(model, nn.Module):
            yield model
            return
        training = [module for module in model.modules() if module.training]
        # An optimised module guards on requires_grad: switching it would compile everything twice.
        compiled = any(
            compiled_from(module) is not None or module._compiled_call_impl is not None for module in model.modules()
        )
        trainable = [] if compiled else [p for p in model.parameters() if p.requires_grad]
        try:
            for module in training:
                module.training = False  # not .eval(): a module may override it with side effects
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield model
        finally:
            for module in training:
                module.training = True
            for parameter in trainable:
                parameter.requires_grad_(True)
