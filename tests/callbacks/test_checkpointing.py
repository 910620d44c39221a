"""Best epochs, early stops and averaged weights: Lightning's callbacks on our numbers and modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import AdversarialAccuracy, RobustCheckpoint
from lightning_robust.callbacks.robust_checkpoint import RobustEarlyStopping
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier, OptimizerSettings
from lightning_robust.objectives import AWP, FastFGSM, Natural, PGDAdversarial

Make = Callable[..., Any]
ADVERSARIAL = PGDAdversarial(attack=PGD(eps=0.1, steps=2))


class Fixed(AdversarialAccuracy):
    """Reports a robust accuracy of its own for each epoch."""

    def __init__(self, values: list[float], **settings: Any) -> None:
        super().__init__({"fgsm": FGSM()}, **settings)
        self.values = values

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        module.log("val/robust_acc/fgsm", self.values[trainer.current_epoch])


def test_best_and_last_epoch(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """The best is the most robust; the last is the last although it is not the best."""
    save = RobustCheckpoint("fgsm")
    run = trainer(Fixed([0.2, 0.6, 0.5, 0.4]), save, logger=True, max_epochs=4)
    run.fit(model(objective=ADVERSARIAL), digits())
    folder = tmp_path / "runs" / "run" / "version_0" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best-epoch=1.ckpt", "last.ckpt"}
    assert save.best_model_path == str(folder / "best-epoch=1.ckpt")
    saved = {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.iterdir()}
    assert saved == {"best-epoch=1.ckpt": 1, "last.ckpt": 3}


def test_every_n_epochs(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    save = RobustCheckpoint("fgsm", every_n_epochs=2)
    run = trainer(Fixed([0.9, 0.2, 0.9, 0.4, 0.9], every_n_epochs=2), save, logger=True, max_epochs=5)
    run.fit(model(objective=ADVERSARIAL), digits())
    folder = tmp_path / "runs" / "run" / "version_0" / "checkpoints"
    saved = {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.iterdir()}
    assert saved == {"best-epoch=3.ckpt": 3, "last.ckpt": 4}


def test_clean_accuracy_decides_for_natural_training(model: Make, trainer: Make, digits: Make) -> None:
    save = RobustCheckpoint("fgsm")
    run = trainer(Fixed([0.2, 0.6, 0.5]), save, max_epochs=3)
    run.fit(model(objective=Natural(), optimizer=OptimizerSettings(lr=1e-14, weight_decay=0)), digits())
    assert save.monitor == "val/acc"
    assert save.best_model_score == pytest.approx(float(run.callback_metrics["val/acc"]))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "no AdversarialAccuracy measures an attack 'pgd' in fit .none is measured"),
        ([AdversarialAccuracy({"fgsm": FGSM()})], "these are measured: fgsm"),
        ([AdversarialAccuracy({"fgsm": FGSM(), "pgd": PGD()}, fit_attacks=["fgsm"])], "these are measured: fgsm"),
        ([AdversarialAccuracy({"pgd": PGD()}, every_n_epochs=2)], "'pgd' is measured every 2 epochs"),
    ],
)
def test_nothing_to_decide_by_is_told_before_training(
    model: Make, trainer: Make, digits: Make, callbacks: list[pl.Callback], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(*callbacks, RobustCheckpoint("pgd")).fit(model(objective=ADVERSARIAL), digits())


def test_early_stopping_on_robust_accuracy(model: Make, trainer: Make, digits: Make) -> None:
    stop = EarlyStopping("val/robust_acc/fgsm", mode="max", patience=2)
    run = trainer(Fixed([0.2, 0.6, 0.5, 0.4, 0.9]), stop, max_epochs=5)
    run.fit(model(objective=ADVERSARIAL), digits())
    assert run.current_epoch == 4  # two epochs without a better one


def test_it_stops_where_robust_accuracy_no_longer_rises(model: Make, trainer: Make, digits: Make) -> None:
    stop = RobustEarlyStopping("fgsm", patience=2)
    run = trainer(Fixed([0.2, 0.6, 0.5, 0.6, 0.9]), stop, max_epochs=5)
    run.fit(model(objective=ADVERSARIAL), digits())
    assert run.current_epoch == 4  # the same again is not better
    assert float(stop.best_score) == pytest.approx(0.6)
    run = trainer(Fixed([0.2, 0.6, 0.5, 0.7, 0.6]), RobustEarlyStopping("fgsm", patience=2), max_epochs=5)
    run.fit(model(objective=ADVERSARIAL), digits())
    assert run.current_epoch == 5
    run = trainer(Fixed([0.2, 0.6, 0.605, 0.61]), RobustEarlyStopping("fgsm", patience=2, min_delta=0.02), max_epochs=4)
    run.fit(model(objective=ADVERSARIAL), digits())
    assert run.current_epoch == 4


def test_only_measurements_count_for_stopping(model: Make, trainer: Make, digits: Make) -> None:
    measure = Fixed([0.9, 0.6, 0.9, 0.5, 0.9, 0.4, 0.9, 0.9], every_n_epochs=2)
    run = trainer(measure, RobustEarlyStopping("fgsm", patience=2), max_epochs=8)
    run.fit(model(objective=ADVERSARIAL), digits())
    assert run.current_epoch == 6


def test_natural_training_stops_by_clean_accuracy(model: Make, trainer: Make, digits: Make) -> None:
    """Under an attack it stands at zero from the first epoch on, and would end there."""
    stop = RobustEarlyStopping("fgsm", patience=1)
    still = OptimizerSettings(lr=1e-14, weight_decay=0)
    run = trainer(Fixed([0.2, 0.3, 0.4, 0.5]), stop, max_epochs=4)
    run.fit(model(objective=Natural(), optimizer=still), digits())
    assert stop.monitor == "val/acc"
    assert run.current_epoch == 2  # whose clean accuracy is that of the first


def test_stopping_by_what_nobody_measures_is_told_before_training(model: Make, trainer: Make, digits: Make) -> None:
    with pytest.raises(UserError, match="RobustEarlyStopping: no AdversarialAccuracy measures an attack 'pgd'"):
        trainer(RobustEarlyStopping("pgd", patience=3)).fit(model(objective=ADVERSARIAL), digits())
    with pytest.raises(UserError, match="patience=0: at least one"):
        RobustEarlyStopping("pgd", patience=0)


class Weights(pl.Callback):
    """Keeps the weights after each step or epoch, and those that are validated and tested."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epoch_starts: list[dict[str, Tensor]] = []
        self.seen: dict[str, dict[str, Tensor]] = {}

    def copy(self, module: pl.LightningModule) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in module.network.named_parameters()}

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_starts.append(self.copy(module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(self.copy(module))

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen["val"] = self.copy(module)

    def on_test_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen["test"] = self.copy(module)


@pytest.mark.parametrize("objective", [ADVERSARIAL, PGDAdversarial(attack=PGD(eps=0.1, steps=2), awp=AWP(gamma=0.01))])
def test_exponential_averaging(model: Make, trainer: Make, digits: Make, tmp_path: Path, objective: Any) -> None:
    spy, save = Weights(), RobustCheckpoint("fgsm")
    callbacks = [EMAWeightAveraging(decay=0.8), spy, AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}), save]
    run = trainer(*callbacks, logger=True, max_epochs=2)
    module = model(objective=objective)
    run.fit(module, digits(batch_size=12))
    average = spy.steps[0]  # the first update copies
    for weights in spy.steps[1:]:
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in average}
    for name, value in average.items():
        torch.testing.assert_close(spy.seen["val"][name], value)
    run.test(module, digits(), verbose=False)
    for name, value in average.items():
        torch.testing.assert_close(spy.seen["test"][name], value)
    folder = tmp_path / "runs" / "run" / "version_0" / "checkpoints"
    loaded = ImageClassifier.load_from_checkpoint(folder / "last.ckpt", network=model().network)
    for name, value in average.items():
        torch.testing.assert_close(loaded.network.get_parameter(name), value)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported")
@pytest.mark.parametrize("awp", [None, AWP(gamma=0.01)])
def test_stochastic_averaging(model: Make, trainer: Make, digits: Make, awp: AWP | None) -> None:
    """With BatchNorm, Lightning goes through the training images once more without a backward pass."""
    spy = Weights()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    run = trainer(swa, spy, max_epochs=4)
    module = model(objective=PGDAdversarial(attack=PGD(eps=0.1, steps=2), awp=awp))
    run.fit(module, digits())
    run.test(module, digits(), verbose=False)
    # taken at the start of epochs 1, 2 and 3 (Lightning counts from 1); then a pass for BatchNorm's statistics
    average = {
        name: torch.stack([weights[name] for weights in spy.epoch_starts[1:4]]).mean(0) for name in spy.seen["test"]
    }
    assert not torch.equal(average["0.weight"], spy.steps[5]["0.weight"])
    for name, value in average.items():
        torch.testing.assert_close(spy.seen["test"][name], value)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


class TestCatastrophicOverfitting:
    @pytest.mark.parametrize("devices", [1, 2])
    def test_stops_and_restores(self, model: Make, trainer: Make, digits: Make, tmp_path: Path, devices: int) -> None:
        """A collapse by decree: PGD-5 leaves nothing in the second epoch. The weights of the first check come back."""

        class Collapsing(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
                if trainer.current_epoch == 1:  # a network that answers one class whatever it sees
                    with torch.no_grad():
                        module.network[4].weight.zero_()
                        module.network[4].bias.copy_(torch.eye(10)[0] * 100)

            def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                if trainer.is_global_zero:
                    torch.save(module.network.state_dict(), tmp_path / f"epoch{trainer.current_epoch}.pt")

            def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                if trainer.is_global_zero:
                    torch.save((module.network.state_dict(), trainer.current_epoch), tmp_path / "end.pt")

        module = model(objective=FastFGSM(eps=0.02, drop=0.3), optimizer=OptimizerSettings(lr=1e-3))
        run = trainer(Collapsing(), max_epochs=5, devices=devices)
        told = pytest.warns(UserWarning, match="catastrophic overfitting")
        with told if devices == 1 else nullcontext():  # a forked rank's warnings stay with it
            run.fit(module, digits())
        end, epochs = torch.load(tmp_path / "end.pt", weights_only=True)
        assert epochs == 2
        assert float(run.callback_metrics["train/pgd5_acc"]) < 0.3
        good = torch.load(tmp_path / "epoch1.pt", weights_only=True)  # as the first epoch left them, where it checked
        for name, value in good.items():
            assert torch.equal(end[name], value), name

    def test_not_where_it_is_switched_off_or_another_objective(self, model: Make, trainer: Make, digits: Make) -> None:
        from lightning_robust.callbacks import CatastrophicOverfitting

        run = trainer()
        run.fit(model(objective=FastFGSM(eps=0.02, detect_overfitting=False)), digits())
        assert "train/pgd5_acc" not in run.callback_metrics
        with pytest.raises(UserError, match="objective FastFGSM"):
            trainer(CatastrophicOverfitting()).fit(model(), digits())
