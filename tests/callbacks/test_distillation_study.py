"""The distillation study: equal to attacks by hand, on any number of devices, and right in what it says."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import CW, FGSM, JSMA, PGD
from lightning_robust.attacks.adaptive import Temperature
from lightning_robust.callbacks import DistillationStudy
from lightning_robust.callbacks.distillation_report import Findings, print_study, verdict
from lightning_robust.errors import UserError
from lightning_robust.metrics import softmax_jacobian_amplitude

Make = Callable[..., Any]
T = 300.0  # so that the softmax saturates in float64, too
SMALL: dict[str, Any] = {"temperature": T, "max_features": 12, "eps": 0.15, "pgd_steps": 3, "cw_steps": 20}


@pytest.fixture
def masked(model: Make) -> Callable[[], Any]:
    """A model whose logits are T times those of an ordinary one: what training at T makes of it."""

    def make() -> Any:
        module = model()
        with torch.no_grad():
            module.network[4].weight *= T
            module.network[4].bias *= T
        return module

    return make


def measured(run: Any) -> dict[str, float]:
    found = {name: float(value) for name, value in run.callback_metrics.items() if "/distillation/" in name}
    return {name.removeprefix("test/distillation/"): value for name, value in found.items()}


def table(tmp_path: Path, name: str) -> list[dict[str, str]]:
    with (tmp_path / "runs" / "run" / "version_0" / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_equals_attacks_by_hand(masked: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any) -> None:
    limit = 23
    run = trainer(DistillationStudy(**SMALL, limit_images=limit), logger=True, precision="64-true")
    run.test(masked(), digits(eval_batch_size=5), verbose=False)
    found = measured(run)
    module, dataset = masked().double().eval(), digits().dataset("test")
    batch = dataset.__getitems__(range(limit))
    images, labels = batch.images.double(), batch.labels
    logits = module(images).detach()
    right = (logits.argmax(1) == labels).nonzero()[:, 0]
    assert 5 < len(right) < limit
    wanted = {"temperature": T, "images": limit, "logit_mean": float(logits.abs().mean())}
    wanted["logit_std"] = float(logits.abs().std(correction=0))
    for ending, temperature in (("", 1.0), ("_rescaled", T)):
        attack = JSMA(max_features=12, output="softmax", temperature=temperature)
        hits, least, shares, any_target = [], [], [], []
        for row in right.tolist():  # image by image, target by target
            own: list[float] = []
            reached = False
            for target in set(range(10)) - {int(labels[row])}:
                result = attack.run(module, images[row, None], labels[row, None], targets=torch.tensor([target]))
                share = float((result.images != images[row]).double().mean())
                predicted = int(module(result.images).argmax())
                hits.append(predicted == target)
                reached |= predicted == target
                if predicted != int(labels[row]):
                    own.append(share)
            least.append(min([*own, 12 / 64]))
            shares += own
            any_target.append(reached)
        wanted[f"success_rate/jsma{ending}"] = sum(hits) / len(hits)
        wanted[f"success_rate/jsma_any_target{ending}"] = sum(any_target) / len(any_target)
        wanted[f"robustness{ending}"] = sum(least) / len(least)
        wanted[f"features_changed{ending}"] = sum(shares) / len(shares)
        attacked = module if temperature == 1 else Temperature(module, T)
        for name, other in (("fgsm", FGSM(eps=0.15)), ("pgd", PGD(eps=0.15, steps=3))):
            success = other.run(attacked, images[right], labels[right]).success
            wanted[f"success_rate/{name}{ending}"] = float(success.double().mean())
    result = CW(steps=20, binary_search_steps=5, initial_const=0.01).run(module, images[right], labels[right])
    wanted["success_rate/cw"] = float(result.success.double().mean())
    wanted["mean_norm/cw"] = float(result.norms["l2"][result.success].mean())
    amplitude = softmax_jacobian_amplitude(module, images)
    wanted["gradient_mean"] = float(amplitude.mean())
    wanted["gradient_log10"] = float(amplitude.clamp_min(5e-324).log10().mean())
    ranges = {name: value for name, value in found.items() if name.startswith("gradient_range/")}
    assert sum(ranges.values()) == pytest.approx(1)
    assert {name: value for name, value in found.items() if name not in ranges} == pytest.approx(wanted, rel=1e-6)
    # the study is not trivial: hidden gradients, and no more robustness
    assert wanted["success_rate/jsma"] < 0.2 < wanted["success_rate/jsma_rescaled"] < 1
    assert wanted["robustness_rescaled"] < wanted["robustness"]
    rows = table(tmp_path, "distillation_test")
    assert [(row["attack"], row["logits"]) for row in rows[:2]] == [("jsma", "as they are"), ("jsma", "divided by 300")]
    assert int(rows[0]["of"]) == 9 * len(right)
    assert float(rows[1]["success_rate_low"]) < float(rows[1]["success_rate"]) < float(rows[1]["success_rate_high"])
    assert sum(int(row["images"]) for row in table(tmp_path, "distillation_gradients_test")) == limit
    figures = {path.name for path in (tmp_path / "runs" / "run" / "version_0" / "figures").iterdir()}
    assert figures == {"distillation_test.png", "distillation_gradients_test.png"}
    said = capsys.readouterr().out
    assert "GRADIENT MASKING" in said
    assert f"{wanted['success_rate/jsma_rescaled']:.2%}" in said


def test_any_number_of_devices_and_batch_size(masked: Make, trainer: Make, digits: Make) -> None:
    found = []
    for devices, size in ((1, 23), (1, 4), (2, 3)):
        run = trainer(DistillationStudy(**SMALL, limit_images=11), devices=devices, precision="64-true")
        run.test(masked(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run))
    assert found[0]["images"] == 11
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


def test_one_temperature_is_both_columns(model: Make, trainer: Make, digits: Make, capsys: Any) -> None:
    run = trainer(DistillationStudy(**(SMALL | {"temperature": 1.0}), limit_images=6))
    run.test(model(), digits(), verbose=False)
    found = measured(run)
    for name in ("success_rate/jsma", "success_rate/fgsm", "success_rate/pgd", "robustness"):
        assert found[f"{name}_rescaled"] == found[name]
    assert "success_rate/cw_rescaled" not in found
    assert "No gradient masking seen" in capsys.readouterr().out


def test_the_modules_temperature(model: Make, trainer: Make, digits: Make) -> None:
    module = model()
    with pytest.raises(UserError, match=r"ImageClassifier does not say at what temperature .* set the callback's"):
        trainer(DistillationStudy()).test(module, digits(), verbose=False)
    module.temperature = 7.0
    run = trainer(DistillationStudy(**(SMALL | {"temperature": None, "cw_steps": 0}), limit_images=2))
    run.test(module, digits(), verbose=False)
    assert measured(run)["temperature"] == 7
    assert not any("cw" in name for name in measured(run))


def test_nothing_is_classified_rightly(model: Make, trainer: Make, digits: Make) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(network[1].weight)
    with torch.no_grad():
        network[1].bias.copy_(torch.arange(10.0))  # always a nine
    dataset = digits().dataset("test")
    first: Tensor = dataset.__getitems__(range(2)).labels
    assert 9 not in first
    run = trainer(DistillationStudy(**SMALL, limit_images=2))
    run.test(model(network=network), digits(), verbose=False)
    found = measured(run)
    assert "success_rate/jsma" not in found  # of no pair there is no share
    assert found["gradient_mean"] == 0
    assert found["gradient_range/0"] == 1


FOUND = Findings(
    stage="test",
    temperature=100.0,
    images=10,
    rates={"jsma": 0.01, "jsma_rescaled": 0.95, "pgd": 0.5, "pgd_rescaled": 1.0, "cw": 1.0},
    tried={"jsma": 90, "jsma_rescaled": 90, "pgd": 10, "pgd_rescaled": 10, "cw": 10},
    any_target={"jsma": 0.1, "jsma_rescaled": 1.0},
    robustness={"jsma": 0.14, "jsma_rescaled": 0.02},
    changed={"jsma": math.nan, "jsma_rescaled": 0.04},
    gradient_mean=1e-9,
    gradient_log10=-100.0,
    ranges=[9, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    logit_mean=500.0,
    logit_std=450.0,
    cw_norm=1.5,
)


def test_the_verdict(capsys: Any) -> None:
    said = verdict(FOUND)
    assert said.startswith("GRADIENT MASKING: JSMA on the softmax succeeds 1.0% of the time, and 95.0% once")
    assert "CW-L2 on the logits fools 100.0% at a mean L2 norm of 1.50" in said
    honest = dataclasses.replace(FOUND, rates=FOUND.rates | {"jsma": 0.9, "pgd": 0.95})
    said = verdict(honest)
    assert said.startswith("No gradient masking seen: dividing the logits by T = 100 gains no attack more than 5.0%")
    print_study(FOUND)
    printed = capsys.readouterr().out
    assert "1.00%" in printed
    assert "typical image 1e-100.0" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0: it is a positive number"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"cw_steps": -1}, "cw_steps=-1"),
        ({"name": "a/b"}, "'a/b' cannot be a name"),
        ({"max_features": 1}, "max_features=1"),
        ({"limit_images": 0}, "limit_images=0"),
        ({"pgd_steps": 0}, "steps=0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillationStudy(**settings)
