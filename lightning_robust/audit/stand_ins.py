"""What an adaptive attack asks in place of a model that hides: the same answers, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_robust.attacks.context import Model

_ROUNDING = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "fake_quantize_per_tensor_affine"}
_DETACHING = {"detach", "data", "alias_copy"}
_CASTS = {"byte", "char", "short", "int", "long"}
_NUMBERS = {"__float__", "__int__", "__bool__", "__index__", "item", "tolist", "numpy", "__array__"}
_CLIPPING = {"clamp", "clip"}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Logarithm(nn.Module):
    """The logarithm of outputs that are probabilities, up to a factor: logits with the same verdict.

    Args:
        model: images to probabilities.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``."""
        outputs = self.model(images)
        shares = outputs / outputs.sum(1, keepdim=True)
        # what has underflowed has no gradient; the tiniest number keeps its logarithm finite
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


class Reseeded(nn.Module):
    """A random model that draws the same at each call.

    Args:
        model: draws from torch's global generator, which is put back after each call.
        seed: of the draws.
    """

    def __init__(self, model: Model, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``."""
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(self.seed % 2**63)
            return self.model(images)


class StraightThrough(nn.Module):
    """A model through whose non-differentiable steps the gradient goes straight: BPDA with the identity, by itself.

    Forward it is the model. What rounds (``round``, ``floor``, ``ceil``, ``trunc``, ``sign``, a cast to whole numbers)
    passes the gradient on as it is (arXiv 1308.3432, 1802.00420), and so does what clips between two bounds; what cuts
    the gradient off (``detach``, ``.data``, ``no_grad``) does not cut. What happens outside PyTorch's functions (NumPy,
    an autograd function of one's own) cannot be reached so.

    Args:
        model: images to logits.
        casts: also go through casts to whole numbers, which then stay floats: not where they are used as indices.
    """

    def __init__(self, model: Model, casts: bool = True) -> None:
        super().__init__()
        self.model, self.casts = model, casts

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``."""
        if not torch.is_grad_enabled():
            return self.model(images)
        with _PassOn(self.casts):
            return self.model(images)


class _PassOn(TorchFunctionMode):
    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "_set_grad_enabled":
            return None  # no_grad within the model
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return func(*args, **kwargs)
        given = args[0]
        if name in _DETACHING:
            return given.clone()  # what is changed in place must not be the image itself
        if name in _NUMBERS:  # what was detached is not here, and numbers of it are no mistake
            return func(given.detach(), *args[1:], **kwargs)
        if self.casts and _to_integers(name, args, kwargs):
            return _straight(given, given.detach().trunc())
        passes = name in _ROUNDING or (name in _CLIPPING and _bounds(args, kwargs) == 2)
        if passes and _in_place(func):
            before = given.clone()
            return given.copy_(_straight(before, func(given.detach().clone(), *args[1:], **kwargs)))
        result = func(*args, **kwargs)
        if passes and isinstance(result, Tensor) and result.shape == given.shape:
            return _straight(given, result)
        return result


def _in_place(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name.endswith("_") and not name.startswith("_")


def _bounds(args: Any, kwargs: Any) -> int:
    """How many bounds a clipping has; with one alone it may be an activation."""
    return sum(bound is not None for bound in (*args[1:], *(kwargs.get(name) for name in ("min", "max"))))


def _to_integers(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("to", "type"):
        return any(isinstance(value, torch.dtype) and value in _INTEGERS for value in (*args, *kwargs.values()))
    return name in _CASTS


def _straight(given: Tensor, result: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return result.detach() + (given - given.detach())


class Watch(TorchFunctionMode):
    """Notes which of a model's steps are not differentiable, and which behave as in training.

    Attributes:
        shattering: names of what rounds or cuts the gradient off.
        training: names of what behaves as in training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shattering: dict[str, None] = {}
        self.training: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        differentiated = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
        whole = _to_integers(name, args, kwargs)
        if differentiated and (name in _ROUNDING | _DETACHING or whole):
            self.shattering["a cast to whole numbers" if whole else name] = None
        if "dropout" in name and _is_on(args, kwargs) and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0:
            self.training["dropout"] = None
        # of the function in C the training flag is the sixth argument, of that in Python likewise
        if name == "batch_norm" and _is_on(args, kwargs, place=5):
            self.training["batch_norm"] = None
        return func(*args, **kwargs)


def _is_on(args: Any, kwargs: Any, place: int = 2) -> bool:
    for name in ("training", "train"):
        if name in kwargs:
            return bool(kwargs[name])
    return len(args) > place and args[place] is True


def name_of(func: Any) -> str:
    """What a function that a mode is asked about is called, without overload and underscores of methods in place."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":  # a property such as Tensor.data
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return name.partition(".")[0].strip() if name.startswith("_") else name.partition(".")[0].rstrip("_")


def undefended(model: Model) -> nn.Module | None:
    """The classifier inside a defense, without the defense; ``None`` where the model is none."""
    inner = getattr(model, "model", None)
    if isinstance(model, nn.Module) and hasattr(model, "draws") and isinstance(inner, nn.Module):
        return inner
    return None
