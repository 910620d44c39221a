"""Accuracy under attack: equal to an evaluation by hand, and measuring leaves training as it was."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging

from lightning_robust.attacks import APGD, FGSM, PGD, Attack, OnePixel, ThreatModel
from lightning_robust.attacks.base import Outcome, Problem
from lightning_robust.callbacks import AdversarialAccuracy, InputGradientMap, RobustnessCurve
from lightning_robust.callbacks.measurement import budget
from lightning_robust.errors import UserError
from lightning_robust.objectives import PGDAdversarial

Make = Callable[..., Any]
ATTACKS = {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=5), "l2": PGD(eps=0.4, norm="l2", steps=5)}


def by_hand(module: Any, data: Any, split: str, attacks: dict[str, Any], count: int | None = None) -> dict[str, float]:
    """Image by image, without our metrics and stand-ins."""
    module = module.eval()
    dataset = data.dataset(split)
    right, robust, robust_8bit = [], {name: [] for name in attacks}, {name: [] for name in attacks}
    for index in range(len(dataset) if count is None else count):
        image, label = dataset[index]
        image, labels = image[None].to(module.dtype), torch.tensor([label])
        right.append(int(module(image).argmax()) == label)
        for name, attack in attacks.items():
            adversarial = attack(module, image, labels)
            robust[name].append(right[-1] and int(module(adversarial).argmax()) == label)
            rounded = (adversarial * 255).round() / 255
            robust_8bit[name].append(robust[name][-1] or int(module(rounded).argmax()) == label)
    n, found = len(right), {}
    for name in attacks:
        found[f"robust_acc/{name}"] = sum(robust[name]) / n
        found[f"success_rate/{name}"] = (sum(right) - sum(robust[name])) / sum(right)
        found[f"success_rate_8bit/{name}"] = sum(right[i] and not robust_8bit[name][i] for i in range(n)) / sum(right)
    worst = [all(robust[name][i] for name in attacks) for i in range(n)]
    found["robust_acc/worst_case"] = sum(worst) / n
    found["acc"] = sum(right) / n
    return found


@pytest.mark.parametrize("acceleration", ["exact", "none"])
def test_equals_an_evaluation_by_hand(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, acceleration: str
) -> None:
    run = trainer(AdversarialAccuracy(ATTACKS, acceleration=acceleration), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    wanted = by_hand(model().double(), digits(), "test", ATTACKS)
    found = {name.removeprefix("test/"): float(value) for name, value in run.callback_metrics.items()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    folder = tmp_path / "runs" / "run" / "version_0"
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"adversarial_examples_{name}_test.png" for name in ATTACKS
    }
    with (folder / "tables" / "robust_accuracy_per_class_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attack"] for row in rows] == [name for name in [*ATTACKS, "worst_case"] for _ in range(10)]
    robust = sum(int(row["robust_correct"]) for row in rows if row["attack"] == "pgd")
    assert robust == round(wanted["robust_acc/pgd"] * 23)


@dataclass(frozen=True, kw_only=True)
class Blackout(Attack):
    """Blackens the images of even or of odd labels."""

    parity: int = 0
    seed: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel("linf", 1)

    def perturb(self, problem: Problem) -> Outcome:
        hit = problem.labels % 2 == self.parity
        zeros = torch.zeros_like(problem.labels)
        return Outcome(torch.where(hit[:, None, None, None], 0.0, problem.images), zeros, zeros)


def test_worst_case_is_counted_image_by_image(model: Make, trainer: Make, digits: Make) -> None:
    """Two attacks that fool different images leave fewer robust than the better of them."""
    attacks = {"even": Blackout(), "odd": Blackout(parity=1)}
    run = trainer(AdversarialAccuracy(attacks))
    run.test(model(), digits(), verbose=False)
    found = {name.removeprefix("test/"): float(value) for name, value in run.callback_metrics.items()}
    wanted = by_hand(model(), digits(), "test", attacks)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["robust_acc/worst_case"] < min(found["robust_acc/even"], found["robust_acc/odd"]) - 0.2


def test_fit_attacks_limit_and_every_n_epochs(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, set[str]]] = []

    class Spy(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append((trainer.current_epoch, {n for n in trainer.callback_metrics if "robust" in n}))

    callback = AdversarialAccuracy(ATTACKS, every_n_epochs=2, limit_batches=2, fit_attacks=["fgsm"])
    module = model()
    run = trainer(callback, Spy(), logger=True, max_epochs=2, precision="64-true")
    run.fit(module, digits(eval_batch_size=5))
    assert seen == [(0, set()), (1, {"val/robust_acc/fgsm"})]
    wanted = by_hand(module, digits(), "val", {"fgsm": ATTACKS["fgsm"]}, count=10)
    assert float(run.callback_metrics["val/robust_acc/fgsm"]) == pytest.approx(wanted["robust_acc/fgsm"])
    assert not list((tmp_path / "runs" / "run" / "version_0" / "figures").iterdir())


def test_measuring_in_fit_changes_nothing(model: Make, trainer: Make, digits: Make) -> None:
    """Weights, BatchNorm statistics and the random state are the same with and without; so are modes and .grad."""
    ends, kept = [], []

    class Spy(pl.Callback):
        def state(self, module: pl.LightningModule) -> Any:
            gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            buffers = {name: value.clone() for name, value in module.named_buffers()}
            modes = [m.training for m in module.network.modules()]
            wants = [p.requires_grad for p in module.parameters()]
            return gradients, buffers, modes, wants, torch.get_rng_state()

        def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if not kept:
                next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
                module.network[2].train()  # a layer that somebody has in another mode
            kept.append(self.state(module))

        def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            kept.append(self.state(module))

    callbacks = [AdversarialAccuracy(ATTACKS, limit_batches=None), InputGradientMap(limit_batches=None)]
    for measuring in ([], [Spy(), *callbacks]):
        torch.manual_seed(3)
        module = model(objective=PGDAdversarial(attack=PGD(eps=0.1, steps=2)))
        trainer(*measuring, max_epochs=2).fit(module, digits())
        ends.append((module.state_dict(), torch.get_rng_state()))
    for name, value in ends[0][0].items():
        assert torch.equal(ends[1][0][name], value), name
    assert torch.equal(ends[0][1], ends[1][1])
    for before, after in pairwise(kept[:4]):  # the batches of the first validation, and its end
        assert before[2:4] == after[2:4]
        assert torch.equal(before[4], after[4])
        assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
        for one, two in zip(before[0], after[0], strict=True):
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)
    assert torch.equal(kept[0][0][0], torch.ones_like(kept[0][0][0]))


@pytest.mark.parametrize("ema_first", [True, False])
def test_the_search_is_on_the_averaged_weights(model: Make, trainer: Make, digits: Make, ema_first: bool) -> None:
    """Weight averaging swaps weights as validation starts, after the callbacks that stand before it."""
    found = []
    for acceleration in ("exact", "none"):
        averaging, accuracy = EMAWeightAveraging(decay=0.5), AdversarialAccuracy(ATTACKS, 1, None, acceleration)
        order = [averaging, accuracy] if ema_first else [accuracy, averaging]
        run = trainer(*order, precision="64-true")
        run.fit(model(), digits(batch_size=6))
        found.append({n: float(v) for n, v in run.callback_metrics.items() if n.startswith("val/")})
    assert found[0] == found[1]


def test_stand_in_is_folded(model: Make) -> None:
    from lightning_robust.callbacks.adversarial_accuracy import Search

    search = Search("exact")
    module = model()
    stand_in = search.model(module)
    assert stand_in is not None
    assert stand_in.folded == 1  # the BatchNorm: the whole module can be traced
    assert search.model(module) is stand_in
    assert Search("none").model(module) is None


def test_two_callbacks(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    two = {"a": ATTACKS["fgsm"], "b": ATTACKS["l2"]}
    cheap = AdversarialAccuracy(two)
    with pytest.raises(UserError, match="attack name 'a' is used by two callbacks"):
        trainer(cheap, AdversarialAccuracy({"a": FGSM()})).test(model(), digits(), verbose=False)
    with pytest.raises(UserError, match="two of them log under the name ''"):  # both would log worst_case
        trainer(cheap, AdversarialAccuracy({"c": FGSM()})).test(model(), digits(), verbose=False)
    strong = AdversarialAccuracy({"c": ATTACKS["pgd"], "d": APGD(eps=0.1, steps=5)}, every_n_epochs=2, name="strong")
    run = trainer(cheap, strong, logger=True)
    run.test(model(), digits(), verbose=False)
    assert {"test/robust_acc/worst_case", "test/robust_acc/worst_case_strong"} <= run.callback_metrics.keys()
    tables = {path.name for path in (tmp_path / "runs" / "run" / "version_0" / "tables").iterdir()}
    assert tables == {"robust_accuracy_per_class_test.csv", "robust_accuracy_per_class_strong_test.csv"}


def test_robustness_curve(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(RobustnessCurve([0.2, 0, "0.1"], attack=PGD(steps=5)), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    wanted = {
        f"test/robust_acc_curve/pgd/eps={eps:.4g}": by_hand(
            model().double(), digits(), "test", {"x": PGD(eps=eps, steps=5)}
        )["robust_acc/x"]
        for eps in (0, 0.1, 0.2)
    }
    found = {name: float(value) for name, value in run.callback_metrics.items() if "curve" in name}
    assert found == pytest.approx(wanted)
    assert wanted["test/robust_acc_curve/pgd/eps=0"] == float(run.callback_metrics["test/acc"])
    folder = tmp_path / "runs" / "run" / "version_0"
    assert (folder / "figures" / "robust_accuracy_curve_pgd_test.png").is_file()
    with (folder / "tables" / "robust_accuracy_curve_pgd_test.csv").open() as file:
        assert [float(row["eps"]) for row in csv.DictReader(file)] == [0, 0.1, 0.2]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_curve_of_some_images(model: Make, trainer: Make, digits: Make, devices: int, stage: str) -> None:
    """The first ones, on any number of devices: 7 of more than 20, which gives another share than all."""
    attack, split = PGD(steps=5), {"test": "test", "validate": "val"}[stage]
    run = trainer(RobustnessCurve([0.1], attack=attack, limit_batches=1), devices=devices, precision="64-true")
    getattr(run, stage)(model(), digits(eval_batch_size=7), verbose=False)
    shares = [
        by_hand(model().double(), digits(), split, {"x": attack.replace(eps=0.1)}, count=count)["robust_acc/x"]
        for count in (7, None)
    ]
    assert shares[0] != shares[1]
    assert float(run.callback_metrics[f"{split}/robust_acc_curve/pgd/eps=0.1"]) == pytest.approx(shares[0])


def test_no_pass_but_the_attacks(model: Make, trainer: Make, digits: Make) -> None:
    """The model sees each image clean; what it makes of the adversarial one it has said to the attack."""
    seen: list[int] = []
    module = model()
    module.network.register_forward_hook(lambda network, images, logits: seen.append(len(images[0])))
    callbacks = [AdversarialAccuracy({"even": Blackout()}, limit_batches=None, acceleration="none")]
    run = trainer(*callbacks)
    run.fit(module, digits(limit={"train": 48, "val": 20, "test": 23}))
    training = 2 * [24]
    # two batches, each: the module's own pass, the callback's clean one, and the attack's confirmation
    assert sorted(seen) == sorted(training + 2 * 3 * [10])


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (FGSM(eps=8 / 255), "linf ε = 8/255"),
        (FGSM(eps=0.1), "linf ε = 0.1"),
        (PGD(eps=128 / 255, norm="l2"), "l2 ε = 0.502"),
        (FGSM(eps="4/255"), "linf ε = 4/255"),
    ],
)
def test_the_budget_in_a_title(attack: Attack, text: str) -> None:
    assert budget(attack.threat_model) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialAccuracy({}), "name at least one attack"),
        (lambda: AdversarialAccuracy({"a/b": FGSM()}), "'a/b' cannot be an attack's name"),
        (lambda: AdversarialAccuracy({"worst_case": FGSM()}), "'worst_case' cannot be"),
        (lambda: AdversarialAccuracy({"a": FGSM()}, fit_attacks=["b"]), "fit_attacks names 'b'"),
        (lambda: AdversarialAccuracy({"a": FGSM()}, acceleration="fast"), "choose exact, bf16 or none"),
        (lambda: RobustnessCurve([]), "at least one ε"),
        (lambda: RobustnessCurve([8]), r"8/255"),
        (lambda: RobustnessCurve([0.1], attack=PGD(step_size=0.1)), "leave the attack's step_size out"),
        (lambda: RobustnessCurve([0, 0.1], attack=OnePixel()), "OnePixel has no budget eps to vary"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
