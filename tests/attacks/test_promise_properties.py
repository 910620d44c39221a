"""The attack promise on inputs that nobody chose, found by Hypothesis.

Every attack × norm × mask × targeted, on models in train and eval mode, compiled, in bf16 and constant ones; and every
attack on two devices, each of which holds some of the images.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from conformance import CLASSES, SHAPE, Setting, Snapshot, assert_result, evaluate, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    CW,
    EOT,
    FAB,
    FGSM,
    JSMA,
    KLPGD,
    PGD,
    Attack,
    AutoAttack,
    DeepFool,
    OnePixel,
    OptMargin,
    RandomNoise,
    Square,
    Transfer,
    accelerate,
)

EPS = {"linf": 0.06, "l2": 0.8, "l1": 5.0}
INF = float("inf")

# name: (attack, norm, budget)
ATTACKS: dict[str, tuple[Attack, str, float]] = {}
for _norm, _eps in EPS.items():
    ATTACKS[f"PGD-{_norm}"] = (PGD(eps=_eps, norm=_norm, steps=3), _norm, _eps)
    ATTACKS[f"APGD-{_norm}"] = (APGD(eps=_eps, norm=_norm, steps=4), _norm, _eps)
    ATTACKS[f"FAB-{_norm}"] = (FAB(norm=_norm, steps=4), _norm, INF)
    ATTACKS[f"FAB-{_norm}-eps"] = (FAB(eps=_eps, norm=_norm, steps=4, targeted_classes=2), _norm, _eps)
    ATTACKS[f"RandomNoise-{_norm}"] = (RandomNoise(eps=_eps, norm=_norm, draws=20), _norm, _eps)
for _norm in ("linf", "l2"):
    ATTACKS[f"Square-{_norm}"] = (Square(eps=EPS[_norm], norm=_norm, queries=20), _norm, EPS[_norm])
    ATTACKS[f"DeepFool-{_norm}"] = (DeepFool(norm=_norm, steps=5), _norm, INF)
for _norm in ("l2", "linf", "l0"):
    ATTACKS[f"CW-{_norm}"] = (CW(norm=_norm, steps=8, binary_search_steps=2, initial_const=1.0, lr=0.05), _norm, INF)
ATTACKS |= {
    "OptMargin": (OptMargin(radius=0.02, surrogates=3, steps=8, binary_search_steps=2, initial_const=1.0), "l2", INF),
    "FGSM": (FGSM(eps=0.06), "linf", 0.06),
    "JSMA": (JSMA(max_features=8), "l0", 8),
    "OnePixel": (OnePixel(pixels=2, population=6, generations=3), "l0", 2),
    "EOT": (EOT(attack=PGD(eps=0.06, steps=2), samples=2), "linf", 0.06),
    "Transfer": (Transfer(attack=PGD(eps=0.06, steps=3), surrogate=make_model()), "linf", 0.06),
    "APGD-l1-warm-up": (APGD(eps=5.0, norm="l1", steps=6, warm_up=True), "l1", 5.0),
    "AutoAttack": (
        AutoAttack(eps=0.06, attacks=[APGD(eps=0.06, steps=3), Square(eps=0.06, queries=10)], version="custom"),
        "linf",
        0.06,
    ),
}
UNTARGETED: dict[str, tuple[Attack, str, float]] = {"KLPGD": (KLPGD(eps=0.06, steps=3), "linf", 0.06)}


class HalfInside(nn.Module):
    """A network that computes in bfloat16, and gives logits in the images' type."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = accelerate(model, fold=False, channels_last=False, dtype=torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class Constant(nn.Module):
    """The same logits for every image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True) * 0 + torch.linspace(0, 1, CLASSES)


@functools.cache
def compiled() -> nn.Module:
    """One for all, since each is traced anew."""
    return torch.compile(make_model().eval(), backend="aot_eager", dynamic=True)  # type: ignore[return-value]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "train mode": make_model,
    "eval mode": lambda: make_model().eval(),
    "bf16": lambda: HalfInside(make_model()),
    "constant": Constant,
    "compiled": compiled,
}


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, Tensor, Tensor | None, int, int]:
    """Kind of model, images with pixels at both ends of the range, mask, offset of labels, seed."""
    count = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    stretch = draw(st.sampled_from([0.2, 1.0, 3.0, 100.0]))  # from flat grey to black and white
    images = (0.5 + stretch * (torch.rand(count, *SHAPE, generator=generator) - 0.5)).clamp(0, 1)
    mask = None
    if draw(st.booleans()):
        mask = (torch.rand(SHAPE[1:], generator=generator) < draw(st.sampled_from([0.1, 0.5]))).float()
        mask[0, :3] = 1  # three pixels at the least: an attack on two has some choice
    return draw(st.sampled_from(sorted(KINDS))), images, mask, draw(st.integers(0, 1)), draw(st.integers(0, 9))


def hold(name: str, attack: Attack, norm: str, eps: float, targeted: bool, problem: tuple) -> None:
    kind, images, mask, offset, seed = problem
    model = KINDS[kind]()
    predicted = evaluate(model, images).argmax(1)
    labels = (predicted + offset) % CLASSES  # offset 1: misclassified to begin with
    targets = (labels + 1) % CLASSES if targeted else None
    before, state = Snapshot.of(model), torch.get_rng_state()
    found = attack.run(model, images, labels, targets=targets, mask=mask, seed=seed)
    assert_result(found.images, images, Setting(norm, eps, mask, targeted))
    before.assert_same(model)
    assert torch.equal(torch.get_rng_state(), state)
    reached = evaluate(model, found.images).argmax(1)
    fooled = reached != labels if targets is None else reached == targets
    assert torch.equal(found.success, fooled), f"{name} tells another success than the model"
    again = attack(model, images, labels, targets=targets, mask=mask, seed=seed)
    assert torch.equal(again, found.images)
    if not isinstance(attack, EOT):  # which stops for no single draw
        done = predicted != labels if targets is None else predicted == targets
        assert torch.equal(found.images[done], images[done])
    assert bool((found.queries >= 0).all() and (found.iterations >= 0).all())


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problem=problems())
def test_promise_on_any_problem(name: str, targeted: bool, problem: tuple) -> None:
    hold(name, *ATTACKS[name], targeted, problem)


@pytest.mark.parametrize("name", UNTARGETED)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problem=problems())
def test_promise_of_untargeted_attacks(name: str, problem: tuple) -> None:
    hold(name, *UNTARGETED[name], False, problem)


# -- on two devices ----------------------------------------------------------------------------------------------------


def _in_float64(name: str) -> Attack:
    """An attack for networks in double precision, in which sums round alike in every batch."""
    attack = (ATTACKS | UNTARGETED)[name][0]
    return attack.replace(surrogate=make_model(torch.float64)) if isinstance(attack, Transfer) else attack


def _rank(rank: int, address: str, pipe: Connection) -> None:
    """A process of two: attacks every other image that it is told of, behind DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = make_model(torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model)
    while (told := pipe.recv()) is not None:
        name, seed, *arrays = told
        images, labels, targets, mask = (None if each is None else torch.from_numpy(each) for each in arrays)
        found = None
        mine = slice(rank, None, 2)
        if len(images[mine]):
            attack = _in_float64(name)
            given = {"targets": None if targets is None else targets[mine], "mask": mask, "seed": seed}
            found = attack(wrapped, images[mine], labels[mine], **given)
        # arrays, since a tensor would be shared through a file
        pipe.send(None if found is None else found.numpy())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Connection]]:
    """Pipes to two processes of one group."""
    address = f"file://{tmp_path_factory.mktemp('group') / 'rendezvous'}"
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=_rank, args=(rank, address, pairs[rank][1])) for rank in range(2)]
    for process in processes:
        process.start()
    yield [mine for mine, _ in pairs]
    for (mine, _), process in zip(pairs, processes, strict=True):
        mine.send(None)
        process.join(30)
        assert process.exitcode == 0


def hold_on_two(name: str, targeted: bool, problem: tuple[Any, ...], ranks: list[Connection]) -> None:
    _, images, mask, offset, seed = problem
    model = make_model(torch.float64)
    images = images.double()
    mask = None if mask is None else mask.double()
    labels = (evaluate(model, images).argmax(1) + offset) % CLASSES
    targets = (labels + 1) % CLASSES if targeted else None
    whole = _in_float64(name)(model, images, labels, targets=targets, mask=mask, seed=seed)
    for pipe in ranks:
        arrays = (None if each is None else each.numpy() for each in (images, labels, targets, mask))
        pipe.send((name, seed, *arrays))
    for rank, pipe in enumerate(ranks):
        assert pipe.poll(60)
        found, expected = pipe.recv(), whole[rank::2]
        assert (found is None) == (len(expected) == 0)
        if found is not None:
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_each_image_comes_out_the_same_on_two_devices(
    name: str, targeted: bool, problem: tuple[Any, ...], ranks: list[Connection]
) -> None:
    hold_on_two(name, targeted, problem, ranks)


@pytest.mark.parametrize("name", UNTARGETED)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_each_image_comes_out_the_same_on_two_devices_untargeted(
    name: str, problem: tuple[Any, ...], ranks: list[Connection]
) -> None:
    hold_on_two(name, False, problem, ranks)
