"""Mutants of a model (Wang et al., ICSE 2019, arXiv 1812.05793): weights changed a little, with about its accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_robust.detectors.mutation import Bench, Mutation, Trial
from lightning_robust.detectors.shared_forward import Change, Patch, SharedForward
from lightning_robust.errors import UserError

ModelOperator = Literal["nai", "gf", "ws", "ns"]

_NAMES = {
    "nai": "neuron activation inverse",
    "gf": "Gaussian fuzzing",
    "ws": "weight shuffling",
    "ns": "neuron switch",
}
_SWITCHED_FROM = 10  # neurons that a layer has at least for its neurons to be switched
_LONGEST_BATCH = 16  # mutants between two looks at who is decided
_KEPT_MUTANTS = 256 << 20  # bytes
_KEPT_RESULTS = 256 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class ModelMutation(Mutation):
    """Mutants of a network: some weights or neurons of its convolutions and linear layers are changed.

    A neuron is an output channel of a ``Conv2d`` or an output of a ``Linear``.

    * ``gf``, Gaussian fuzzing: ``rate`` of all weights and biases are drawn anew, from a normal distribution with mean
      and standard deviation of the tensor that they are in.
    * ``ws``, weight shuffling: the incoming weights of ``rate`` of all neurons are permuted, each neuron's on its own.
    * ``ns``, neuron switch: in each layer of 10 neurons or more, ``rate`` of the neurons change places (their incoming
      weights; biases stay). As in the authors' code that is rate · n rounded down, or up where it is 2 or less; one
      alone has nobody to change places with.
    * ``nai``, neuron activation inverse: weights and bias of ``rate`` of all neurons change sign.

    BatchNorm and every other layer stay as they are, so that in a network whose convolutions have BatchNorm after them
    it is what goes into BatchNorm that is mutated: there ``nai`` is no exact inversion of the activation.

    Only mutants that are still about as accurate are used: round(accuracy, 2) ≥ round(``min_accuracy`` · the model's
    accuracy, 2) on the images that the detector is calibrated on. What fails is drawn again, ``tries`` times at most.

    A mutant is kept as what it changes, not as a network, and is drawn from (seed, number) alone.

    Args:
        operator: "nai", "gf", "ws" or "ns".
        rate: share of the weights or neurons, in (0, 1]; 0.05 for MNIST and 0.005 for CIFAR-10 in the paper.
        min_accuracy: of a mutant, as a share of the model's; 0 for none.
        tries: mutants in a row that may be too inaccurate before it is given up.
        seed: of the mutants.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 20))
        >>> patch = ModelMutation(operator="nai", rate=0.1).draw(network, 0)
        >>> {name: len(change.rows) for name, change in patch.items()}
        {'1.weight': 2, '1.bias': 2}
    """

    operator: ModelOperator = "nai"
    rate: float = 0.05
    min_accuracy: float = 0.9
    tries: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.operator not in get_args(ModelOperator):
            raise UserError(
                f"ModelMutation: operator={self.operator!r} does not exist: choose one of "
                f"{', '.join(get_args(ModelOperator))}"
            )
        if not 0 < self.rate <= 1:
            raise UserError(f"ModelMutation: rate={self.rate} is a share above 0 and up to 1, such as 0.05")
        if not 0 <= self.min_accuracy <= 1:
            raise UserError(f"ModelMutation: min_accuracy={self.min_accuracy} is a share of the model's, 0.9 as a rule")
        if self.tries < 1:
            raise UserError(f"ModelMutation: tries={self.tries}: at least one mutant must be drawn")

    @property
    def of(self) -> Literal["model"]:
        """The model is mutated."""
        return "model"

    @property
    def title(self) -> str:
        """Name and rate."""
        return f"model {self.operator.upper()} {100 * self.rate:g} %"

    def draw(self, model: nn.Module, number: int) -> Patch:
        """What mutant ``number`` changes: parameter name to new values.

        Raises:
            UserError: for a model without such layers, and a rate at which nothing of this model changes.
        """
        layers = mutable_layers(model)
        if not layers:
            raise UserError(
                f"{type(model).__name__} has no Conv2d and no Linear: there is nothing for ModelMutation to mutate"
            )
        random = np.random.default_rng([self.seed % 2**63, number, list(_NAMES).index(self.operator)])
        if self.operator == "gf":
            patch = self._fuzzed(layers, random)
        elif self.operator == "ns":
            patch = self._switched(layers, random)
        else:
            patch = self._neurons(layers, random)
        if not patch:
            what = "weights" if self.operator == "gf" else "neurons"
            raise UserError(
                f"ModelMutation: {_NAMES[self.operator]} at rate={self.rate} changes none of the model's {what}: give "
                f"a higher rate, {self._lowest(layers):.2g} or more"
            )
        return patch

    def _lowest(self, layers: list[tuple[str, nn.Module]]) -> float:
        """The lowest rate at which something changes, about."""
        if self.operator == "ns":
            widest = max(len(layer.weight) for _, layer in layers)  # type: ignore[arg-type]
            return 1.01 / max(widest, _SWITCHED_FROM)
        tensors = [t for _, layer in layers for t in (layer.weight, layer.bias) if isinstance(t, Tensor)]
        units = (
            sum(t.numel() for t in tensors) if self.operator == "gf" else sum(len(t) for t in tensors if t.dim() > 1)
        )
        return 1 / units

    def _neurons(self, layers: list[tuple[str, nn.Module]], random: np.random.Generator) -> Patch:
        """Shuffled incoming weights, or inverted neurons, of a share of all neurons."""
        weights = [layer.weight for _, layer in layers]
        patch: Patch = {}
        chosen = _shares([len(weight) for weight in weights], self.rate, random)  # type: ignore[arg-type]
        for (name, layer), rows in zip(layers, chosen, strict=True):
            if not len(rows):
                continue
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            index = torch.from_numpy(rows).to(weight.device)
            values = weight[index]
            if self.operator == "nai":
                patch[f"{name}.weight"] = Change(index, -values)
                if isinstance(layer.bias, Tensor):
                    patch[f"{name}.bias"] = Change(index, -layer.bias.detach()[index])
                continue
            flat = values.flatten(1)
            order = random.permuted(np.tile(np.arange(flat.shape[1]), (len(rows), 1)), axis=1)
            patch[f"{name}.weight"] = Change(
                index, flat.gather(1, torch.from_numpy(order).to(flat.device)).view_as(values)
            )
        return patch

    def _switched(self, layers: list[tuple[str, nn.Module]], random: np.random.Generator) -> Patch:
        patch: Patch = {}
        for name, layer in layers:
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            wanted = len(weight) * self.rate
            count = math.floor(wanted) if wanted > 2 else math.ceil(wanted)
            if len(weight) < _SWITCHED_FROM or count < 2:
                continue
            rows = random.choice(len(weight), count, replace=False)
            order = random.permutation(count)
            index = torch.from_numpy(rows).to(weight.device)
            patch[f"{name}.weight"] = Change(index, weight[torch.from_numpy(rows[order]).to(weight.device)])
        return patch

    def _fuzzed(self, layers: list[tuple[str, nn.Module]], random: np.random.Generator) -> Patch:
        tensors = {
            f"{name}.{part}": value.detach()
            for name, layer in layers
            for part in ("weight", "bias")
            if isinstance(value := getattr(layer, part), Tensor)
        }
        patch: Patch = {}
        chosen = _shares([value.numel() for value in tensors.values()], self.rate, random)
        for (name, value), places in zip(tensors.items(), chosen, strict=True):
            if not len(places):
                continue
            # on the CPU and in double precision: the same draw on every device
            numbers = value.to(device="cpu", dtype=torch.float64)
            spread = float(numbers.std()) if value.numel() > 1 else 0.0
            drawn = torch.from_numpy(random.normal(float(numbers.mean()), spread, len(places)))
            patch[name] = Change(torch.from_numpy(places).to(value.device), drawn.to(value), flat=True)
        return patch

    def bench(self, model: nn.Module, chosen: Sequence[int], chunk: int) -> ModelBench:
        """Get ready for a model; see :class:`~lightning_robust.detectors.mutation.Mutation`."""
        return ModelBench(self, model, chosen, chunk)

    def differentiable(self, model: nn.Module, chosen: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """The mutated models."""

        def mutated(patch: Patch) -> Callable[[Tensor], Tensor]:
            state = dict(model.named_parameters())
            changed = {name: change.applied(state[name]) for name, change in patch.items()}
            return lambda images: functional_call(model, changed, (images,))

        return [mutated(self.draw(model, number)) for number in chosen]


class ModelBench(Bench):
    """A model with its mutants.

    Args:
        mutation: the operator.
        model: images to logits, in eval mode.
        chosen: numbers of the mutants.
        chunk: images at a time at most.
    """

    def __init__(self, mutation: ModelMutation, model: nn.Module, chosen: Sequence[int], chunk: int) -> None:
        self.mutation, self.model, self.chosen, self.chunk = mutation, model, chosen, chunk
        self.forward = SharedForward(model)
        self._drawn: dict[int, Patch] = {}
        self._bytes = 0

    def patch(self, place: int) -> Patch:
        """What the mutant at a place of ``chosen`` changes; kept, as far as there is room."""
        number = self.chosen[place]
        if number not in self._drawn:
            patch = self.mutation.draw(self.model, number)
            size = sum(change.rows.nbytes + change.values.nbytes for change in patch.values())
            if self._bytes + size > _KEPT_MUTANTS:
                return patch
            self._drawn[number], self._bytes = patch, self._bytes + size
        return self._drawn[number]

    def most_images(self, image: Tensor) -> int:
        """As many as the results that mutants share have room for."""
        return max(1, min(self.chunk, _KEPT_RESULTS // self.forward.bytes_per_image(image)))

    def trial(self, images: Tensor) -> Trial:
        """Put a batch under mutation."""
        return _ModelTrial(self, images)


class _ModelTrial(Trial):
    def __init__(self, bench: ModelBench, images: Tensor) -> None:
        self.bench, self.forward, self.images = bench, bench.forward, images
        self.predicted = self.forward.remember(images).argmax(1)
        self._left = torch.arange(len(images), device=images.device)
        self._remembered = self._left  # the images that the forward pass has remembered

    def changed(self, first: int, count: int) -> Tensor:
        where = torch.searchsorted(self._remembered, self._left)
        labels = self.predicted[self._left]
        places = range(first, min(first + count, len(self.bench.chosen)))
        seen = [self.forward(self.bench.patch(place)).argmax(1)[where] for place in places]
        return torch.stack(seen, dim=1) != labels[:, None]

    def keep(self, going: Tensor) -> None:
        self._left = self._left[going]
        # Remembering costs a pass: images that have left are taken along until they are more than a tenth.
        if len(self._left) and len(self._left) < 0.9 * len(self._remembered):
            self._remembered = self._left
            self.forward.remember(self.images[self._left])

    def batch(self, done: int) -> int:
        return max(1, min(_LONGEST_BATCH, done // 8))


def mutable_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that are mutated, by name and each once: exactly what has neurons and a weight of its own."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Conv2d | nn.Linear) and weight is not None:
            found.setdefault(id(weight), (name, layer))  # of two with one weight, the first
    return list(found.values())


def _shares(sizes: Sequence[int], rate: float, random: np.random.Generator) -> list[np.ndarray]:
    """A share of all units of some groups: the numbers, sorted, within each group."""
    ends = np.cumsum(sizes)
    # a millionth for shares such as 0.29, which times 100 is a little less than 29
    chosen = np.sort(random.choice(int(ends[-1]), int(rate * int(ends[-1]) + 1e-6), replace=False))
    return [
        part - (end - size)
        for part, end, size in zip(np.split(chosen, np.searchsorted(chosen, ends[:-1])), ends, sizes, strict=True)
    ]
