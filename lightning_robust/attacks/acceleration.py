"""A faster stand-in for a model under attack: BatchNorm folded into convolutions, channels_last, lower precision.

An attack only needs the eval-mode function of a model and its gradient with respect to the image. That allows what
training does not: fold every BatchNorm into the convolution before it, lay tensors out channels last, and, where a
lower precision is asked for, convert the weights once instead of at every forward pass.

Folding and layout change logits by rounding alone (about 1e-6 relative in float32). A lower precision changes them
more: what an attack finds on such a stand-in is to be confirmed on the model itself, as
``attack.run(model, ..., stand_in=accelerate(model, dtype=torch.bfloat16))`` does.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_robust.attacks.context import Model, compiled_from, unwrap


class Accelerated(nn.Module):
    """The eval-mode function of a model, made for attacking; call :meth:`refresh` after the model's weights changed.

    Only tensors are followed by :meth:`refresh`: after a change of anything else that the forward pass reads (a
    temperature kept as a Python number, another head), make a new stand-in.

    Args:
        model: the model to stand in for; it is not changed.
        fold: fold BatchNorms into the convolutions before them, where the model can be traced.
        channels_last: lay images and weights out channels last, which convolutions of CPU and GPU prefer.
        dtype: run in this precision (``torch.bfloat16``); images and logits stay in the caller's type.

    Attributes:
        folded: how many BatchNorm layers were folded; 0 where the model cannot be traced, which costs speed only.
    """

    @torch.inference_mode(False)  # tensors made in inference mode could not be differentiated through
    def __init__(
        self,
        model: nn.Module,
        *,
        fold: bool = True,
        channels_last: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._source = [model]  # in a list, so that it does not become a submodule
        self.channels_last, self.dtype = channels_last, dtype
        private = _eval_copy(model)
        self.copy, self._pairs = _fold(private) if fold else (private, [])
        self.folded = len(self._pairs)
        self.copy.eval().requires_grad_(False)
        if channels_last:
            self.copy.to(memory_format=torch.channels_last)
        self.eval()
        self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights, buffers and device."""
        source = self._source[0]
        folded = {conv for conv, _ in self._pairs}
        # with duplicates: a tied tensor that moves to another type or device has to move at each of its places
        mine = [
            *self.copy.named_parameters(remove_duplicate=False),
            *self.copy.named_buffers(remove_duplicate=False),
        ]
        for name, target in mine:
            owner, _, leaf = name.rpartition(".")
            if owner not in folded:
                self._assign(owner, leaf, getattr(source.get_submodule(owner), leaf), target)
        for conv, norm in self._pairs:
            weight, bias = _fused(source.get_submodule(conv), source.get_submodule(norm))
            target_conv = cast(nn.Conv2d, self.copy.get_submodule(conv))
            self._assign(conv, "weight", weight, target_conv.weight)
            self._assign(conv, "bias", bias, cast(Tensor, target_conv.bias))

    def _assign(self, owner: str, leaf: str, value: Tensor, target: Tensor) -> None:
        """Copy in place where type and device agree already, else put a new tensor there."""
        dtype = self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype
        if target.dtype == dtype and target.device == value.device and target.shape == value.shape:
            target.copy_(value)
            return
        layout = torch.channels_last if self.channels_last and value.dim() == 4 else torch.contiguous_format
        value = value.detach().to(dtype=dtype, copy=True, memory_format=layout)
        module = self.copy.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, of the type that the network itself gives."""
        given = images.dtype
        if self.dtype is not None:
            images = images.to(self.dtype)
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        logits = self.copy(images)
        return logits if self.dtype is None else logits.to(given)


def accelerate(
    model: Model, *, fold: bool = True, channels_last: bool = True, dtype: torch.dtype | None = None
) -> Model:
    """A faster stand-in for ``model`` under attack, or ``model`` itself where it is not an ``nn.Module``.

    Args:
        model: from images in [0, 1] to logits; a distributed wrapper is taken off. It is not changed.
        fold: see :class:`Accelerated`.
        channels_last: see :class:`Accelerated`.
        dtype: see :class:`Accelerated`; results need confirmation on ``model``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> fast = accelerate(net)
        >>> fast.folded, bool(torch.allclose(fast(images), net.eval()(images), atol=1e-5))
        (1, True)
    """
    model = unwrap(model)
    model = compiled_from(model) or model  # a compiled graph is of the unfolded network
    if not isinstance(model, nn.Module) or isinstance(model, Accelerated):
        return model
    return Accelerated(model, fold=fold, channels_last=channels_last, dtype=dtype)


def _fold(private: nn.Module) -> tuple[nn.Module, list[tuple[str, str]]]:
    """The module without the BatchNorms that fold, and the names of the (convolution, BatchNorm) pairs.

    Args:
        private: our own copy in eval mode; it is taken apart.
    """
    graph = _trace(private)
    if graph is None:
        return private, []
    traced = fx.GraphModule(private, graph)
    uses = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        conv_name, norm_name = str(before.target), str(node.target)
        conv, norm = traced.get_submodule(conv_name), traced.get_submodule(norm_name)
        if len(before.users) > 1 or uses[conv_name] > 1 or uses[norm_name] > 1 or not _foldable(conv, norm):
            continue
        weight, bias = _fused(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        node.replace_all_uses_with(before)
        graph.erase_node(node)
        pairs.append((conv_name, norm_name))
    if not pairs:
        return private, []
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Exactly torch's own layers: a subclass may do more, and a hook (a recorder, weight norm) wants to be called."""
    return (
        type(conv) is nn.Conv2d
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and cast(nn.BatchNorm2d, norm).running_mean is not None
        and not any(
            (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
            != ({}, {}, {}, {})
            for layer in (conv, norm)
        )
    )


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of a module, or ``None`` where it has none that would always be the module's function."""
    with _RandomWatch() as random_state:
        try:
            graph = _Tracer().trace(module)
        except Exception:  # a forward handed proxies instead of tensors may raise anything; folding is optional
            return None
    # A tensor that the forward makes, or a number that it draws (a randomised defense), would be baked into the graph.
    baked = any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes)
    return None if baked or random_state.moved else graph


class _RandomWatch:
    """Puts the global random states of torch, Python and NumPy back, and says whether they had moved."""

    moved = False

    def __enter__(self) -> Self:
        self._before = self._states()
        return self

    def __exit__(self, *error: object) -> None:
        self.moved = pickle.dumps(self._before) != pickle.dumps(self._states())
        torch_state, python_state, numpy_state = self._before
        torch.set_rng_state(torch.from_numpy(torch_state))
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002  # the global generator is the one that others' code draws from

    @staticmethod
    def _states() -> tuple[Any, Any, Any]:
        return torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()  # noqa: NPY002  # as above


def _eval_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, of plain tensors (a tensor that belongs to a graph cannot be deep-copied)."""
    memo: dict[int, object] = {}
    # also what a forward pass leaves behind as a plain attribute, such as the weight that weight norm computes
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in [*model.parameters(), *model.buffers(), *kept]:
        clone = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone
    return copy.deepcopy(model, memo).eval()


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def _fused(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what ``conv`` and then ``norm`` do."""
    conv, norm = cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    return weight.detach(), bias.detach()
