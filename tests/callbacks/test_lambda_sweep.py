"""The sweep over λ: equal to a loop over images, on any number of devices, and the module is left as it was."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lightning_robust.callbacks.lambda_sweep as lambda_sweep
from lightning_robust.callbacks import LambdaSweep
from lightning_robust.callbacks.lambda_sweep import LAMS, chance_iou
from lightning_robust.errors import UserError
from lightning_robust.modules import PRMClassifier, PRMSettings

Make = Callable[..., Any]
FEW = [0, 0.5, 0.9, 1]


@pytest.fixture
def manipulated(model: Make) -> Make:
    """Make a module of the digits' classifier behind a small manipulator."""

    def make(**settings: Any) -> PRMClassifier:
        torch.manual_seed(1)
        settings = {"prm": PRMSettings(width=4, depth=2, skip=True), "lam": 0.7, **settings}
        return PRMClassifier(model().network, num_classes=10, image_shape=(1, 8, 8), **settings)

    return make


def measured(run: Any, stage: str = "test") -> dict[str, float]:
    start = f"{stage}/lambda_sweep/"
    return {
        name.removeprefix(start): float(value) for name, value in run.callback_metrics.items() if name.startswith(start)
    }


def by_hand(module: Any, dataset: Any, lams: list[float], share: float = 0.25) -> dict[str, float]:
    """Image by image, with autograd and nothing of ours but the network."""
    module, found = module.double().eval(), {}
    designated = np.zeros((8, 8), bool)
    designated[::2, ::2] = True
    for lam in lams:
        right, losses, squares, rebuilt, maps = [], [], [], [], []
        for index in range(len(dataset)):
            image, label = dataset[index]
            image = image[None].double().requires_grad_()
            a = module.network.prm.reconstruct(image)
            x = (1 - lam) * image + lam * a
            logits = module.network.classifier(x)
            loss = F.cross_entropy(logits, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, image)
            maps.append(gradient[0].abs().mean(0).numpy())
            right.append(int(logits.argmax()) == label)
            losses.append(float(loss.detach()))
            squares.append(float((x - image).detach().square().mean()))
            rebuilt.append(float((a - image).detach().square().mean()))
        mean = np.mean(maps, axis=0)
        top = np.zeros(64, bool)
        top[np.argsort(-mean.ravel(), kind="stable")[: round(share * 64)]] = True
        both = (top & designated.ravel()).sum() / (top | designated.ravel()).sum()
        found |= {f"acc/lam={lam:g}": np.mean(right), f"loss/lam={lam:g}": np.mean(losses)}
        found |= {f"iou/lam={lam:g}": both, f"mean_gradient/lam={lam:g}": mean.mean()}
        if lam > 0:
            found[f"psnr/lam={lam:g}"] = -10 * math.log10(np.mean(squares))
        found["reconstruction_psnr"] = -10 * math.log10(np.mean(rebuilt))
    return found


def test_equals_a_loop_over_images(manipulated: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any) -> None:
    module = manipulated()
    run = trainer(LambdaSweep(FEW), logger=True, precision="64-true")
    run.test(module, digits(), verbose=False)
    found, wanted = measured(run), by_hand(manipulated(), digits().dataset("test"), FEW)
    assert found == pytest.approx(wanted)
    assert found["iou/lam=1"] == 1  # no other pixel has a gradient
    assert 0 < found["iou/lam=0"] < 0.5
    assert found["psnr/lam=1"] == pytest.approx(found["reconstruction_psnr"])
    assert 0.3 < found["acc/lam=1"] < found["acc/lam=0"] <= 1
    assert module.network.prm.lam == 0.7
    folder = tmp_path / "runs" / "run" / "version_0"
    with (folder / "tables" / "lambda_sweep_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lam"]) for row in rows] == FEW
    assert [float(row["iou"]) for row in rows] == [found[f"iou/lam={lam:g}"] for lam in FEW]
    assert np.load(folder / "tables" / "lambda_sweep_maps_test.npy").shape == (4, 8, 8)
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "lambda_sweep_test.png",
        "lambda_sweep_maps_test.png",
    }
    printed = capsys.readouterr().out
    assert "Sweep over λ (test)" in printed
    assert f"{100 * found['acc/lam=0.9']:.2f} %" in printed


@pytest.mark.parametrize("function", ["test", "validate"])
def test_the_same_on_any_number_of_devices_and_batch_size(
    manipulated: Make, trainer: Make, digits: Make, function: str
) -> None:
    found = []
    for devices, size in ((1, 23), (1, 5), (2, 4)):
        run = trainer(LambdaSweep(FEW), devices=devices, precision="64-true")
        getattr(run, function)(manipulated(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run, "val" if function == "validate" else "test"))
    assert len(found[0]) == 4 * 5  # λ = 0 has no finite PSNR, and A(x) has one
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert other == pytest.approx(found[0], rel=0, abs=1e-9)


def test_in_fit_on_the_first_validation_batches(manipulated: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    module = manipulated()
    run = trainer(
        LambdaSweep([0, 1], every_n_epochs=2, limit_batches=2), logger=True, precision="64-true", max_epochs=2
    )
    data = digits(eval_batch_size=5, limit={"train": 48, "val": 21})
    run.fit(module, data)
    first = torch.utils.data.Subset(data.dataset("val"), range(10))
    assert measured(run, "val") == pytest.approx(by_hand(module, first, [0, 1]))
    tables = tmp_path / "runs" / "run" / "version_0" / "tables"
    assert sorted(path.name for path in tables.iterdir()) == [
        "lambda_sweep_maps_val_epoch001.npy",
        "lambda_sweep_val_epoch001.csv",
    ]
    assert module.network.prm.lam == 0.7


def test_lam_is_put_back_after_an_exception(
    manipulated: Make, trainer: Make, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = lambda_sweep.input_gradient

    def fails(model: Any, *args: Any) -> Any:
        seen.append(model.network.prm.lam)
        if len(seen) == 3:
            raise InterruptedError
        return original(model, *args)

    monkeypatch.setattr(lambda_sweep, "input_gradient", fails)
    module = manipulated()
    with pytest.raises(InterruptedError):
        trainer(LambdaSweep(FEW)).test(module, digits(), verbose=False)
    assert seen == FEW[:3]
    assert module.network.prm.lam == 0.7


def test_share_and_the_papers_grid(manipulated: Make, trainer: Make, digits: Make) -> None:
    run = trainer(LambdaSweep([1], share=0.125), LambdaSweep(name="grid"), precision="64-true")
    run.test(manipulated(), digits(), verbose=False)
    assert measured(run)["iou/lam=1"] == 0.5  # 8 of the 16 connected pixels, and no other
    assert [f"test/grid/acc/lam={lam:g}" in run.callback_metrics for lam in LAMS] == [True] * 14
    assert len(LAMS) == 14


def test_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    for a, b in ((0.25, 0.25), (0.1, 0.4)):
        one, two = (torch.rand(1_000_000, generator=generator) < share for share in (a, b))
        assert chance_iou(a, b) == pytest.approx(float((one & two).sum() / (one | two).sum()), abs=2e-3)
    assert chance_iou(0.25, 0.25) == pytest.approx(1 / 7)


def test_bad_input(model: Make, manipulated: Make, trainer: Make, digits: Make) -> None:
    for settings, message in (
        ({"lams": []}, "values of λ from 0 to 1"),
        ({"lams": [0.5, -1]}, "values of λ from 0 to 1"),
        ({"share": 2.0}, "share=2.0"),
        ({"name": "a/b"}, "cannot be a name"),
    ):
        with pytest.raises(UserError, match=message):
            LambdaSweep(**settings)
    with pytest.raises(UserError, match=r"ImageClassifier has no pixel robustness manipulator.*use PRMClassifier"):
        trainer(LambdaSweep()).test(model(), digits(), verbose=False)
    with pytest.raises(UserError, match=r"lam=1\.5"):
        trainer(LambdaSweep([0, 1.5])).test(manipulated(), digits(), verbose=False)
    with pytest.raises(UserError, match="two of them log under the name 'lambda_sweep'"):
        trainer(LambdaSweep(), LambdaSweep([0])).test(manipulated(), digits(), verbose=False)
    ace = manipulated(prm=PRMSettings(body="ace"), classification_weight=1.0)
    run = trainer(LambdaSweep([0, 1.5]))
    run.test(ace, digits(), verbose=False)  # the light form allows it
    assert "test/lambda_sweep/acc/lam=1.5" in run.callback_metrics
