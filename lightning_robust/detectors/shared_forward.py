"""Forward passes of many mutated copies of one model over the same images, of which what is alike is computed once."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

_INPLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
    operator.delitem,
}


class Change(NamedTuple):
    """New values for a part of a parameter.

    Attributes:
        rows: ``(k,)`` places along the first dimension.
        values: ``(k, ...)``.
        flat: places in the flattened parameter instead.
    """

    rows: Tensor
    values: Tensor
    flat: bool = False

    def applied(self, parameter: Tensor) -> Tensor:
        """A changed copy; the parameter stays as it is."""
        changed = parameter.detach().clone(memory_format=torch.contiguous_format)
        (changed.view(-1) if self.flat else changed).index_copy_(0, self.rows, self.values.to(changed))
        return changed


Patch = dict[str, Change]
"""A mutated model as what it changes: parameter name to new values."""


class SharedForward:
    """Calls mutated copies of a model without changing it.

    Where the model can be traced, the results of all its layers are computed once for a batch and kept. A mutant shares
    them with the model as far as they do not depend on what it changes: it begins at its first changed layer, and of
    that layer only the changed neurons are computed. The traced model's logits are compared with the model's own for
    every batch; where they differ, where tracing fails, or where layers work in place, mutants make whole forward
    passes.

    The model's own parameters are never written to: changed copies take their place for one call.

    Args:
        model: images to logits, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graph = _shareable(model)
        self._steps = [] if self._graph is None else _steps(self._graph)
        self._modules = dict(model.named_modules())
        self._called = {str(step.node.target) for step in self._steps if step.node.op == "call_module"}
        self._images: Tensor | None = None
        self._known: dict[fx.Node, Any] = {}

    @property
    def shares(self) -> bool:
        """Whether mutants share results with the model."""
        return self._graph is not None

    @torch.no_grad()
    def remember(self, images: Tensor) -> Tensor:
        """The model's own logits of a batch, which the mutants are asked about from now on."""
        self._images, self._known = images, {}
        logits: Tensor = self.model(images)
        if self._graph is not None:
            interpreter = fx.Interpreter(self.model, garbage_collect_values=False, graph=self._graph)
            traced = interpreter.run(images)
            if traced.shape == logits.shape and torch.allclose(traced, logits, rtol=1e-4, atol=1e-5, equal_nan=True):
                self._known = dict(interpreter.env)
            else:  # the forward pass depends on more than the graph says
                self._graph = None
        return logits

    @torch.no_grad()
    def __call__(self, patch: Patch) -> Tensor:
        """Logits ``(n, K)`` of a mutant, of the images that were remembered."""
        assert self._images is not None, "remember() comes first"
        layers: dict[str, Patch] = {}
        for name, change in patch.items():
            layer, _, leaf = name.rpartition(".")
            layers.setdefault(layer, {})[leaf] = change
        if self._graph is not None and layers.keys() <= self._called:
            return self._run(layers)
        changed = {name: change.applied(self.model.get_parameter(name)) for name, change in patch.items()}
        logits: Tensor = functional_call(self.model, changed, (self._images,))
        return logits

    def _run(self, layers: dict[str, Patch]) -> Tensor:
        """What depends on changed layers, computed anew."""
        known: dict[fx.Node, Any] = self._known
        found: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return found[node] if node in found else known[node]

        for node, inputs, over in self._steps:
            change = layers.get(str(node.target)) if node.op == "call_module" else None
            moved = any(before in found for before in inputs)
            if node.op == "output":
                logits: Tensor = fx.node.map_arg(node.args[0], value)  # type: ignore[assignment]
                return logits
            if change is None and not moved:
                continue
            args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
            if change is not None:
                before = None if moved else known[node]
                found[node] = _changed_layer(self._modules[str(node.target)], change, before, args, kwargs)
            else:
                found[node] = self._plain(node, args, kwargs)
            for done in over:
                found.pop(done, None)
        raise AssertionError("a graph ends with its output")

    def _plain(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A node of the graph as it is."""
        if node.op == "call_module":
            layer = self._modules[str(node.target)]
            if _pools_pairs(layer) and args[0].device.type == "cpu":
                return _pooled_pairs(args[0])
            return layer(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def bytes_per_image(self, image: Tensor) -> int:
        """Memory that remembering takes for an image; ``image`` ``(1, C, H, W)`` is one of them."""
        self.remember(image)
        kept = {id(value): value for value in self._known.values() if isinstance(value, Tensor)}
        weights = {id(value) for value in [*self.model.parameters(), *self.model.buffers()]}
        return sum(value.nbytes for key, value in kept.items() if key not in weights) or image.nbytes


class _Step(NamedTuple):
    """A node, what it takes, and what nobody needs after it."""

    node: fx.Node
    inputs: list[fx.Node]
    over: list[fx.Node]


def _steps(graph: fx.Graph) -> list[_Step]:
    last = {before: node for node in graph.nodes for before in node.all_input_nodes}
    return [
        _Step(node, node.all_input_nodes, [before for before in node.all_input_nodes if last[before] is node])
        for node in graph.nodes
    ]


def _changed_layer(layer: nn.Module, patch: Patch, before: Tensor | None, args: Any, kwargs: Any) -> Any:
    """A layer with other weights; ``before`` is what it gave for the same input without the change."""
    weight = patch.get("weight")
    plain = type(layer) in (nn.Conv2d, nn.Linear) and not (layer._forward_hooks or layer._forward_pre_hooks or kwargs)
    if not plain or weight is None:
        changed = {leaf: change.applied(layer.get_parameter(leaf)) for leaf, change in patch.items()}
        return functional_call(layer, changed, args, kwargs)
    bias, rows = layer.bias, weight.rows
    whole = weight.flat or before is None or getattr(layer, "groups", 1) != 1
    if not whole and ("bias" not in patch or patch["bias"].rows is rows):
        # other neurons than the changed ones give what they gave before
        own = bias if bias is None else patch["bias"].values if "bias" in patch else bias[rows]  # type: ignore[index]
        part = _apply(layer, args[0], weight.values, own)
        assert before is not None
        return before.index_copy(1 if isinstance(layer, nn.Conv2d) else before.dim() - 1, rows, part)
    own = patch["bias"].applied(bias) if "bias" in patch else bias  # type: ignore[arg-type]
    return _apply(layer, args[0], weight.applied(layer.weight), own)  # type: ignore[arg-type]


def _apply(layer: nn.Module, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(images.dtype)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(images, weight, bias)
    return nn.functional.linear(images, weight, bias)


def _pools_pairs(layer: nn.Module) -> bool:
    """Whether a layer takes the maximum of blocks of 2 by 2 pixels, and nothing more."""
    if type(layer) is not nn.MaxPool2d or layer.return_indices or layer.ceil_mode or layer._forward_hooks:
        return False
    stride = layer.kernel_size if layer.stride is None else layer.stride
    pairs = layer.kernel_size in (2, (2, 2)) and stride in (2, (2, 2))
    return pairs and layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))


def _pooled_pairs(values: Tensor) -> Tensor:
    """The same numbers as such a layer; on a CPU its own loop takes several times as long as a convolution does."""
    height, width = values.shape[-2] // 2 * 2, values.shape[-1] // 2 * 2
    upper, lower = values[..., 0:height:2, :width], values[..., 1:height:2, :width]
    rows = torch.maximum(upper, lower)
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def _shareable(model: nn.Module) -> fx.Graph | None:
    """The graph of a model, or ``None`` where parts of it cannot be kept from one mutant to the next."""
    tensors = [value for module in model.modules() for value in module._parameters.values() if value is not None]
    if len(tensors) > len({id(tensor) for tensor in tensors}):
        return None  # a mutated layer's weight may be another one's, too
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(model)
    except Exception:  # a forward handed proxies instead of tensors may raise anything; sharing is optional
        return None
    modules = dict(model.named_modules())
    return None if any(_in_place(node, modules) for node in graph.nodes) else graph


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes to what other nodes have computed."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        return node.target in _INPLACE or getattr(node.target, "__name__", "").endswith("_")
    return False
