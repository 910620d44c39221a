"""The estimate before attacks start: a bound that attacks keep, and times that are added up rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    CW,
    EOT,
    FAB,
    FGSM,
    JSMA,
    PGD,
    Attack,
    AutoAttack,
    DeepFool,
    OnePixel,
    OptMargin,
    RandomNoise,
    Square,
    Transfer,
)
from lightning_robust.attacks.external import External
from lightning_robust.callbacks.attack_cost import (
    DAY,
    Passes,
    Speed,
    Task,
    cost_rows,
    duration,
    knobs,
    measured_speed,
    most_passes,
    warning,
)
from lightning_robust.defenses import RegionBased


class Counting(nn.Module):
    """A classifier that no attack fools, and that counts what it is asked."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16, classes)
        self.forwards = self.backwards = 0
        nn.init.zeros_(self.linear.bias)
        self.linear.bias.data[0] = 1e4

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits: Tensor = self.linear(images.flatten(1))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(self, "backwards", self.backwards + len(gradient)))
        return logits


BOUNDED: list[tuple[str, Attack]] = [
    ("fgsm", FGSM(eps=0.1)),
    ("pgd", PGD(eps=0.1, steps=7, restarts=3)),
    ("apgd", APGD(eps=0.1, steps=10, loss="dlr_targeted", n_targets=3)),
    ("cw", CW(steps=20, binary_search_steps=3, abort_early=False)),
    ("optmargin", OptMargin(steps=10, binary_search_steps=2, surrogates=4, abort_early=False)),
    ("deepfool", DeepFool(steps=6)),
    ("fab", FAB(steps=5, restarts=2)),
    ("fab_t", FAB(steps=5, targeted_classes=3)),
    ("jsma", JSMA(gamma=0.3)),
    ("jsma_all", JSMA(gamma=0.3, target="all", theta=0.5)),
    ("one_pixel", OnePixel(population=12, generations=5)),
    ("square", Square(eps=0.1, queries=30, restarts=2)),
    ("noise", RandomNoise(eps=0.1, draws=40)),
    ("eot", EOT(attack=PGD(eps=0.1, steps=4), samples=6)),
    ("transfer", Transfer(attack=PGD(eps=0.1, steps=4), surrogate=nn.Identity())),
    ("autoattack", AutoAttack(eps=0.1, version="custom", attacks=["apgd-ce", "square"])),
]


@pytest.mark.parametrize(("name", "attack"), BOUNDED, ids=[name for name, _ in BOUNDED])
def test_no_attack_exceeds_its_bound(name: str, attack: Attack) -> None:
    model, images = Counting(), torch.rand(2, 3, 4, 4)
    bound = most_passes(attack, features=48, classes=5)
    assert bound is not None
    if isinstance(attack, Transfer):
        attack = Transfer(attack=attack.attack, surrogate=model)
    attack.run(model, images, torch.zeros(2, dtype=torch.int64), rounding=False)
    assert model.forwards / 2 <= bound.forward + (8 if name == "autoattack" else 1)  # its checks ask a few times more
    assert model.backwards / 2 <= bound.backward + (8 if name == "autoattack" else 1)
    if name in ("pgd", "cw", "optmargin", "one_pixel", "square", "eot"):  # and it is no idle bound
        assert model.forwards / 2 > 0.4 * bound.forward


def test_what_is_not_known() -> None:
    unknown = External(function=lambda model, images, labels: images)
    assert most_passes(unknown, 48, 5) is None
    assert most_passes(EOT(attack=unknown), 48, 5) is None


def test_speed_counts_the_votes_and_leaves_the_model_alone() -> None:
    inner = Counting()
    inner.train()
    speed = measured_speed(RegionBased(inner, votes=9), inner, torch.rand(16, 3, 4, 4))
    assert speed.votes == 9
    assert speed.forward > 0
    assert speed.backward >= 0
    assert inner.training
    assert all(parameter.grad is None for parameter in inner.parameters())
    assert not inner._forward_pre_hooks
    plain = measured_speed(inner, inner, torch.rand(3, 3, 4, 4))
    assert plain.votes == 1


def tasks() -> list[Task]:
    speed = Speed(forward=2.0, backward=3.0, votes=1)
    pgd, one = PGD(steps=10), OnePixel(population=10, generations=9)
    return [
        Task(what="pgd on none", attack=pgd, passes=Passes(11, 10), speed=speed),
        Task(what="one on region", attack=one, passes=Passes(101), speed=Speed(20.0, 0.0, 100), defense="region"),
        Task(what="own on none", attack=pgd, passes=None, speed=speed),
        Task(what="verdicts of region", attack=None, passes=Passes(3), speed=speed, defense="region"),
    ]


def test_times_add_up() -> None:
    rows = cost_rows(tasks(), images=50)
    total = (11 * 2 + 10 * 3 + 101 * 20 + 3 * 2) * 50
    assert rows[-1] == {"attack": "all, 50 images", "time, at most": duration(total)}
    assert rows[0]["time, at most"] == duration(52 * 50)
    assert rows[1]["× images in a pass"] == "100"
    assert rows[2]["time, at most"] == "not known"
    assert warning(tasks(), 10) is None
    beyond = warning(tasks(), 50)
    assert total > DAY > total / 5
    assert beyond is not None
    for words in (
        duration(total),
        "97% is one on region",
        "limit_images",
        "its population and generations",
        "the votes of region",
    ):
        assert words in beyond


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (EOT(attack=CW()), "steps and binary_search_steps and eot_samples"),
        (JSMA(), "gamma"),
        (PGD(), "steps"),
        (OptMargin(), "steps, binary_search_steps and surrogates"),
    ],
)
def test_knobs(attack: Any, settings: str) -> None:
    assert knobs(attack) == settings
