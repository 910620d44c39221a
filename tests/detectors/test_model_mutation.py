"""Model mutants: what the operators change, and that sharing what mutants have in common changes no result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_robust.detectors import ImageMutation, ModelMutation
from lightning_robust.detectors.calibration import count_changes
from lightning_robust.detectors.model_mutation import mutable_layers
from lightning_robust.detectors.shared_forward import SharedForward
from lightning_robust.errors import UserError
from lightning_robust.models import create_network

OPERATORS = ("nai", "gf", "ws", "ns")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 30), nn.Linear(30, 10)
    ).eval()


def mutated(model: nn.Module, mutation: ModelMutation, number: int) -> dict[str, Tensor]:
    patch = mutation.draw(model, number)
    state = dict(model.named_parameters())
    return {name: change.applied(state[name]) for name, change in patch.items()}


def test_nai_changes_the_sign_of_whole_neurons() -> None:
    model, mutation = network(), ModelMutation(operator="nai", rate=0.1)
    state, units = dict(model.named_parameters()), 0
    for name, value in mutated(model, mutation, 0).items():
        before = state[name].detach()
        rows = (value != before).flatten(1).any(1) if value.dim() > 1 else value != before
        assert torch.equal(value, torch.where(rows.view(-1, *[1] * (value.dim() - 1)), -before, before))
        if value.dim() > 1:
            units += int(rows.sum())
            bias = mutated(model, mutation, 0)[name.replace("weight", "bias")]
            assert torch.equal(bias != state[name.replace("weight", "bias")], rows)
    assert units == int(0.1 * (12 + 30 + 10))


def test_ws_permutes_within_neurons() -> None:
    model, mutation = network(), ModelMutation(operator="ws", rate=0.1)
    state, units, orders = dict(model.named_parameters()), 0, []
    for name, value in mutated(model, mutation, 0).items():
        assert name.endswith("weight")
        before, after = state[name].detach().flatten(1), value.flatten(1)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        rows = (before != after).any(1).nonzero()[:, 0]
        units += len(rows)
        orders += [after[row].argsort().argsort().tolist() == before[row].argsort().argsort().tolist() for row in rows]
    assert units == 5
    assert not any(orders)


def test_ns_switches_neurons_of_wide_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 9, 3), nn.Flatten(), nn.Linear(9, 40), nn.Linear(40, 12), nn.Linear(12, 10))
    state = dict(model.named_parameters())
    changes = mutated(model, ModelMutation(operator="ns", rate=0.1), 1)
    # 9 neurons are too few; of 40 four; of 12 it is 1.2, up to 2; of 10 it is 1, which has nobody to switch with
    assert set(changes) <= {"2.weight", "3.weight"}
    moved = {}
    for number in range(20):
        for name, value in mutated(model, ModelMutation(operator="ns", rate=0.1), number).items():
            before = state[name].detach()
            order = [next(old for old in range(len(before)) if torch.equal(row, before[old])) for row in value]
            assert sorted(order) == list(range(len(before)))
            moved.setdefault(name, []).append(sum(place != old for place, old in enumerate(order)))
    assert max(moved["2.weight"]) == 4
    assert set(moved["3.weight"]) <= {0, 2}
    assert 2 in moved["3.weight"]


def test_gf_draws_from_each_tensors_own_distribution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 200))
    with torch.no_grad():
        model[0].weight.mul_(2).add_(5)
    state = dict(model.named_parameters())
    changes = mutated(model, ModelMutation(operator="gf", rate=0.2), 0)
    total = sum(value.numel() for value in state.values())
    assert sum(int((changes[name] != state[name]).sum()) for name in changes) == int(0.2 * total)
    for name in ("0.weight", "1.weight"):
        new = changes[name][changes[name] != state[name]]
        spread = float(state[name].detach().std())
        assert float(new.mean()) == pytest.approx(
            float(state[name].detach().mean()), abs=4 * spread / math.sqrt(len(new))
        )
        assert float(new.std()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("operator", OPERATORS)
def test_drawn_from_seed_and_number_alone(operator: str) -> None:
    model = network()
    mutation = ModelMutation(operator=operator, rate=0.1)
    torch.manual_seed(5)
    one, again = mutation.draw(model, 7), mutation.draw(model, 7)
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name].values, again[name].values) for name in one)
    for other in (mutation.draw(model, 8), ModelMutation(operator=operator, rate=0.1, seed=1).draw(model, 7)):
        assert other.keys() != one.keys() or any(
            len(other[name].rows) != len(one[name].rows) or not torch.equal(other[name].values, one[name].values)
            for name in one
        )


def test_batchnorm_stays_as_it_is() -> None:
    model = create_network("resnet20", 10, (3, 8, 8)).eval()
    names = {name for name, _ in mutable_layers(model)}
    assert names == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for operator in OPERATORS:
        changed = {n for number in range(5) for n in ModelMutation(operator=operator, rate=0.05).draw(model, number)}
        assert {name.rpartition(".")[0] for name in changed} <= names


# -- what mutants share ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 6, 3, padding=1) for c in (1, 6, 6))
        self.activation = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        start = self.first(images)
        middle = self.activation(self.second(start))
        out = self.pool(self.activation(self.third(middle) + start))
        return self.head(out.flatten(1))


class Depends(Residual):
    """The forward pass depends on the values: it cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        if float(images.mean()) > 2:
            images = images / 2
        return super().forward(images)


class Sneaky(Residual):
    """Traced it forgets what the trace's own call decided."""

    loud = False

    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        return out + 1 if self.loud else out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(images.flatten(1))))))


MODELS: dict[str, tuple[Any, bool]] = {
    "sequential": (lambda: nn.Sequential(*network()), True),
    "residual": (Residual, True),
    "in place": (lambda: Residual(inplace=True), False),
    "not traceable": (Depends, False),
    "tied": (Tied, False),
    "resnet20": (lambda: create_network("resnet20", 10, (1, 8, 8), mean=[0.3], std=[0.2]), True),
    "lenet5": (lambda: create_network("lenet5", 10, (1, 28, 28), mean="mnist"), True),
}


@pytest.mark.parametrize("name", MODELS)
def test_mutants_that_share_equal_whole_passes(name: str) -> None:
    torch.manual_seed(1)
    make, shares = MODELS[name]
    model = make().eval().double()
    size = 28 if name == "lenet5" else 8
    images = torch.rand(6, 1, size, size, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forward = SharedForward(model)
    assert forward.shares == shares
    assert torch.equal(forward.remember(images), model(images))
    for operator in ("nai", "gf", "ws"):
        mutation = ModelMutation(operator=operator, rate=0.05)
        for number in range(6):
            wanted = functional_call(model, mutated(model, mutation, number), (images,))
            found = forward(mutation.draw(model, number))
            assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)
            assert not torch.allclose(found, model(images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_graph_that_does_not_say_all_is_given_up() -> None:
    model = Sneaky().eval()
    forward = SharedForward(model)
    images = torch.rand(3, 1, 8, 8)
    assert forward.shares
    model.loud = True
    forward.remember(images)
    assert not forward.shares
    mutation = ModelMutation(operator="nai", rate=0.2)
    wanted = functional_call(model, mutated(model, mutation, 0), (images,))
    assert torch.allclose(forward(mutation.draw(model, 0)), wanted)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = SharedForward(model)
    forward.remember(torch.rand(2, 1, 8, 8))
    handle = model[4].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        forward(ModelMutation(operator="gf", rate=0.3).draw(model, 0))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mutation", [ModelMutation(operator="nai", rate=0.1), ImageMutation(operator="noise")])
def test_images_that_leave_change_nothing_for_the_others(mutation: Any) -> None:
    model, images = network().double(), torch.rand(20, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = mutation.bench(model, range(30), 64).trial(images).changed(0, 30)
        trial = mutation.bench(model, range(30), 64).trial(images)
        rows = torch.arange(20)
        for start in range(0, 30, 5):
            assert torch.equal(trial.changed(start, 5), whole[rows, start : start + 5])
            going = torch.rand(len(rows)) < 0.8
            going[0] = True
            trial.keep(going)
            rows = rows[going]
        assert torch.equal(count_changes(mutation.bench(model, range(30), 7), images, 30), whole.sum(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operator": "afr"}, "choose one of nai"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": 1.1}, "rate=1.1"),
        ({"min_accuracy": 1.5}, "min_accuracy"),
        ({"tries": 0}, "tries=0"),
    ],
)
def test_refuses(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelMutation(**settings)


@pytest.mark.parametrize(("operator", "rate"), [("nai", 0.01), ("ws", 0.01), ("ns", 0.03), ("gf", 1e-5)])
def test_refuses_a_rate_that_changes_nothing(operator: str, rate: float) -> None:
    model = network()
    with pytest.raises(UserError, match="or more") as said:
        ModelMutation(operator=operator, rate=rate).draw(model, 0)
    enough = float(str(said.value).rpartition("rate, ")[2].split()[0])
    assert ModelMutation(operator=operator, rate=enough * 1.06).draw(model, 0)


def test_refuses_a_model_without_layers() -> None:
    with pytest.raises(UserError, match="no Conv2d and no Linear"):
        ModelMutation().draw(nn.Sequential(nn.Flatten()), 0)
