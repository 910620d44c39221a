"""Training with a manipulator: which part learns, from which loss, and what a checkpoint brings along."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.cli import main
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError
from lightning_robust.models import ManipulatedNetwork, PixelRobustnessManipulator, SparsePattern
from lightning_robust.modules import ImageClassifier, OptimizerSettings, PRMClassifier, PRMSettings, ScheduleSettings
from lightning_robust.objectives import FastFGSM, Natural, PGDAdversarial

SHAPE = (1, 8, 8)
SMALL = PRMSettings(width=4, depth=2)


def own(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def digits(**settings: Any) -> Digits:
    settings = {"limit": {"train": 40, "val": 21, "test": 23}, "val_size": 0.2, "batch_size": 20} | settings
    return Digits(**{"eval_batch_size": 8, **settings})


def classifier(network: Any = None, **settings: Any) -> PRMClassifier:
    network = own() if network is None else network
    torch.manual_seed(1)
    settings = {"prm": SMALL, "optimizer": OptimizerSettings(lr=0.05)} | settings
    return PRMClassifier(network, 10, SHAPE, **settings)


def trainer(folder: Path, *callbacks: pl.Callback, devices: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **settings,
        }
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


class EachEpoch(pl.Callback):
    """Keeps both parts' weights and statistics as they were before each epoch and at the end."""

    def __init__(self) -> None:
        self.prm: list[dict[str, Tensor]] = []
        self.classifier: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.prm.append(state(module.network.prm))
        self.classifier.append(state(module.network.classifier))

    on_train_end = on_train_epoch_start


# -- which part learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_frozen_classifier_does_not_move(tmp_path: Path, weight: float) -> None:
    """Not even BatchNorm's statistics, over validation and a second epoch."""
    kept = EachEpoch()
    module = classifier(classification_weight=weight)
    trainer(tmp_path, kept, max_epochs=2).fit(module, digits())
    assert same(kept.classifier[0], kept.classifier[-1])
    assert not same(kept.prm[0], kept.prm[1])
    module.train()
    assert not any(part.training for part in module.network.classifier.modules())
    assert module.network.prm.training
    assert all(parameter.grad is None for parameter in module.network.classifier.parameters())


def test_the_classifier_learns_behind_the_frozen_manipulator(tmp_path: Path) -> None:
    kept = EachEpoch()
    module = classifier(trains="classifier", prm=PRMSettings(body="segnet", width=4, depth=2))
    trainer(tmp_path, kept, max_epochs=2).fit(module, digits())
    assert same(kept.prm[0], kept.prm[-1])
    assert not torch.equal(kept.classifier[0]["4.weight"], kept.classifier[-1]["4.weight"])
    assert not torch.equal(kept.classifier[0]["1.running_mean"], kept.classifier[-1]["1.running_mean"])


def test_both_learn_end_to_end(tmp_path: Path) -> None:
    kept = EachEpoch()
    trainer(tmp_path, kept).fit(classifier(trains="both"), digits())
    assert not torch.equal(kept.classifier[0]["4.weight"], kept.classifier[-1]["4.weight"])
    assert not torch.equal(kept.prm[0]["entry.weight"], kept.prm[-1]["entry.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_in_turn_one_part_rests(tmp_path: Path, optimizer: str) -> None:
    """Its weights, statistics and momenta stay: the turn's other steps do not show later either."""
    kept = EachEpoch()
    module = classifier(
        trains="in_turn",
        turn_epochs=2,
        prm=PRMSettings(body="segnet", width=4, depth=2),
        optimizer=OptimizerSettings(name=optimizer, lr=0.01),
    )
    trainer(tmp_path, kept, max_epochs=6).fit(module, digits())
    moved = [
        (not same(kept.prm[epoch], kept.prm[epoch + 1]), not same(kept.classifier[epoch], kept.classifier[epoch + 1]))
        for epoch in range(6)
    ]
    assert moved == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 2
    assert all(part.training for part in module.network.modules())


def test_layers_that_one_keeps_in_eval_mode_stay_so(tmp_path: Path) -> None:
    modes: list[bool] = []

    class Spy(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
            modes.append(module.network.classifier[1].training)

    module = classifier(trains="in_turn")
    module.network.classifier[1].eval()
    trainer(tmp_path, Spy(), max_epochs=4).fit(module, digits())
    assert modes == [False] * 8


# -- from which loss ---------------------------------------------------------------------------------------------------


def manual_step(module: PRMClassifier, images: Tensor, labels: Tensor, lam: float) -> Tensor:
    net = module.network
    reconstruction = net.prm.reconstruct(images)
    logits = net.classifier((1 - lam) * images + lam * reconstruction)
    return 2.0 * F.mse_loss(reconstruction, images) + 0.5 * F.cross_entropy(logits, labels)


@pytest.mark.parametrize("objective", ["natural", "recomputed"])
def test_the_loss_is_what_it_says(tmp_path: Path, objective: str) -> None:
    """One epoch of two batches with plain SGD, against a loop."""

    class Copying(Natural):
        """A(x) is not at hand when the objective changes the images' tensor."""

        def loss(self, model: Any, images: Tensor, *args: Any) -> Any:
            return super().loss(model, images.clone(), *args)

    settings: dict[str, Any] = {
        "lam": 0.4,
        "train_lam": 0.7,
        "trains": "both",
        "reconstruction_weight": 2.0,
        "classification_weight": 0.5,
        "optimizer": OptimizerSettings(lr=0.1, momentum=0, weight_decay=0),
        "schedule": ScheduleSettings(name="constant"),
    }
    module, wanted = classifier(**settings), classifier(**settings)
    if objective == "recomputed":
        module.objective = Copying()
    run = trainer(tmp_path)
    run.fit(module, digits())
    loader = digits().train_dataloader()
    loader.sampler.set_epoch(0)
    losses = []
    for images, labels in loader:
        wanted.zero_grad()
        loss = manual_step(wanted.train(), images, labels, 0.7)
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for parameter in wanted.parameters():
                parameter -= 0.1 * parameter.grad
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    for name, value in wanted.network.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert module.network.prm.lam == 0.4


def test_reconstruction_alone_does_not_run_the_classifier(tmp_path: Path) -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = own(), 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(images)

    network = Watched()
    module = classifier(network, optimizer=OptimizerSettings(lr=0.1, momentum=0, weight_decay=0))
    run = trainer(tmp_path, limit_val_batches=0)
    start = state(module.network.prm)
    run.fit(module, digits())
    assert network.calls == 0
    logged = run.callback_metrics
    assert {"train/loss", "train/psnr"} <= logged.keys()
    assert "train/acc" not in logged
    assert not same(start, state(module.network.prm))


def test_the_error_in_normalised_space(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"normalization": [[0.5], [0.25]], "prm": SMALL}
    pixels = PRMClassifier("digits_cnn", 10, SHAPE, **settings)
    normalized = PRMClassifier("digits_cnn", 10, SHAPE, reconstruction_space="normalized", **settings)
    x, made = torch.rand(2, *SHAPE), torch.rand(2, *SHAPE)
    error = pixels._reconstruction_error(made, x)
    torch.testing.assert_close(error, F.mse_loss(made, x))
    torch.testing.assert_close(normalized._reconstruction_error(made, x), 16 * error)
    with pytest.raises(UserError, match="the classifier has no normalisation"):
        classifier(reconstruction_space="normalized")


def test_lambda_is_drawn_anew_for_each_batch(tmp_path: Path) -> None:
    drawn: list[list[float]] = []

    class Spy(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
            drawn[-1].append(module.drawn)

    class Spied(PRMClassifier):
        def training_output(self, *args: Any) -> Any:
            self.drawn = self.network.prm.lam
            return super().training_output(*args)

    for seed in (0, 0, 1):
        drawn.append([])
        torch.manual_seed(len(drawn))
        module = Spied(own(), 10, SHAPE, prm=SMALL, train_lam=[0.0, 0.5, 1.0], trains="both", seed=seed)
        trainer(tmp_path, Spy(), max_epochs=10).fit(module, digits())
        assert module.network.prm.lam == 0.9
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20
    assert set(drawn[0]) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("acceleration", ["exact", "none"])
def test_an_objectives_attack_goes_through_the_manipulator(tmp_path: Path, acceleration: str) -> None:
    """At λ = 1 it changes connected pixels alone, and its stand-in is of the batch's λ."""
    changed: list[Tensor] = []
    gaps: list[float] = []

    class Spied(PGDAdversarial):
        def perturb(self, model: Any, images: Tensor, labels: Tensor, **options: Any) -> Any:
            found = super().perturb(model, images, labels, **options)
            changed.append((found.images - images).abs().amax((0, 1)) > 0)
            return found

    class Gap(PRMClassifier):
        def training_output(self, images: Tensor, labels: Tensor, batch_idx: int) -> Any:
            self.eval()
            with torch.no_grad():
                gaps.append(float((self.attack_model()(images) - self.network(images)).abs().max()))
            self.train()
            return super().training_output(images, labels, batch_idx)

    module = Gap(own(), 10, SHAPE, prm=SMALL, trains="both", train_lam=[0.2, 1.0], attack_acceleration=acceleration)
    module.objective = Spied(attack=PGD(eps=0.1, steps=2, random_start=False))
    lams: list[float] = []
    draw = module._draw_lam
    module._draw_lam = lambda index: lams.append(draw(index)) or lams[-1]  # type: ignore[method-assign, func-returns-value]
    trainer(tmp_path, max_epochs=4).fit(module, digits())
    connected = module.network.prm.connected_pixels(8, 8)
    assert {0.2, 1.0} == set(lams)
    for lam, pixels in zip(lams, changed, strict=True):
        assert bool(pixels[connected].any())
        assert bool(pixels[~connected].any()) == (lam < 1)
    assert max(gaps) < 1e-5


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_psnr_is_of_all_pixels_for_any_batches_and_devices(tmp_path: Path) -> None:
    found = []
    for devices, batch in ((1, 23), (1, 5), (2, 4)):
        module = classifier(lam=0.3)
        with torch.no_grad():
            module.network.prm.exit.rise.bias.fill_(1.0)  # some of it is beyond 1
        run = trainer(tmp_path, devices=devices, precision="64-true")
        run.test(module, digits(eval_batch_size=batch), verbose=False)
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert found[0].keys() == {"test/acc", "test/loss", "test/psnr"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)
    batch = digits().dataset("test").__getitems__(range(23))
    made = module.double().network.prm.reconstruct(batch.images.double())
    assert float(made.max()) > 1
    error = (made.clamp(0, 1) - batch.images.double()).square().mean()
    assert found[0]["test/psnr"] == pytest.approx(-10 * math.log10(float(error)))
    logits = module.network.classifier.eval()(0.7 * batch.images.double() + 0.3 * made)
    assert found[0]["test/loss"] == pytest.approx(F.cross_entropy(logits, batch.labels).item())


@pytest.mark.parametrize(
    "settings", [{"trains": "both"}, {"trains": "in_turn"}, {"classification_weight": 0.5}, {}], ids=str
)
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    ends, logged = [], []

    class Save(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.is_global_zero:  # a forked rank's weights die with it
                torch.save(module.state_dict(), path)

    for devices in (1, 2):
        path = tmp_path / f"{devices}.pt"
        module = classifier(own(norm=False), train_lam=[0.3, 1.0], **settings)
        start = state(module)
        run = trainer(tmp_path, Save(), devices=devices, max_epochs=4, precision="64-true")
        run.fit(module, digits())
        ends.append(torch.load(path, weights_only=True))
        logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert max(float((ends[0][name] - start[name]).abs().max()) for name in start) > 0.01
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-8)
    assert logged[1] == pytest.approx(logged[0], abs=1e-8)
    assert {"train/psnr", "val/psnr", "val/acc"} <= logged[0].keys()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def fitted(folder: Path, name: str = "run.ckpt", network: Any = "digits_cnn", **settings: Any) -> tuple[Any, Path]:
    module = classifier(network, **settings)
    run = trainer(folder)
    run.fit(module, digits())
    run.save_checkpoint(folder / name)
    return module.eval(), folder / name


def test_a_checkpoint_needs_neither_the_bases_file_nor_the_masks(tmp_path: Path) -> None:
    base = ImageClassifier("digits_cnn", 10, SHAPE)
    torch.save(base.network.network.state_dict(), tmp_path / "base.pt")
    mask = np.arange(64).reshape(8, 8) % 3 == 0
    np.save(tmp_path / "mask.npy", mask)
    pattern = SparsePattern(mask=str(tmp_path / "mask.npy"))
    settings: dict[str, Any] = {
        "prm": PRMSettings(pattern=pattern, width=4, depth=2, skip=True, refine=True),
        "lam": 0.8,
        "train_lam": [0.5, 1.0],
        "trains": "in_turn",
        "turn_epochs": 3,
        "reconstruction_weight": 2.0,
        "classification_weight": 0.25,
        "reconstruction_space": "normalized",
        "normalization": "mnist",
        "weights": str(tmp_path / "base.pt"),
    }
    module, path = fitted(tmp_path, **settings)
    (tmp_path / "mask.npy").unlink()
    (tmp_path / "base.pt").unlink()
    assert torch.load(path, weights_only=True)["hyper_parameters"]["prm"]["width"] == 4
    loaded = PRMClassifier.load_from_checkpoint(path).eval()
    assert dict(loaded.hparams) == dict(module.hparams)
    assert torch.equal(loaded.network.prm.connected_pixels(8, 8), torch.from_numpy(mask))
    images = torch.rand(3, *SHAPE)
    assert torch.equal(loaded(images), module(images))
    assert PRMClassifier.load_from_checkpoint(path, lam=0.1).network.prm.lam == 0.1
    with pytest.raises(UserError, match="made by PRMClassifier, not by ImageClassifier"):
        ImageClassifier.load_from_checkpoint(path)


def test_a_classifier_is_fine_tuned_behind_a_trained_manipulator(tmp_path: Path) -> None:
    module, path = fitted(tmp_path, prm=PRMSettings(width=3, depth=1, skip=True), classification_weight=1.0)
    images = torch.rand(2, *SHAPE)
    # the manipulator's settings and weights, and the classifier, from one file
    tuned = PRMClassifier("digits_cnn", 10, SHAPE, trains="classifier", prm_weights=str(path), weights=str(path)).eval()
    assert torch.equal(tuned(images), module(images))
    assert tuned.hparams["prm"] == module.hparams["prm"]
    # the manipulator alone, in front of another classifier
    other = PRMClassifier(own(), 10, SHAPE, prm_weights=str(path))
    assert same(state(other.network.prm), state(module.network.prm))
    with pytest.raises(UserError, match=r"were made with prm.width=3, not 5: give the same, or leave prm out"):
        PRMClassifier(own(), 10, SHAPE, prm=PRMSettings(width=5, depth=1, skip=True), prm_weights=str(path))
    torch.save(module.network.prm.state_dict(), tmp_path / "prm.pt")
    again = PRMClassifier(
        own(), 10, SHAPE, prm=PRMSettings(width=3, depth=1, skip=True), prm_weights=str(tmp_path / "prm.pt")
    )
    assert same(state(again.network.prm), state(module.network.prm))
    with pytest.raises(UserError, match=r"prm_weights .* do not fit the manipulator"):
        PRMClassifier(own(), 10, SHAPE, prm=SMALL, prm_weights=str(tmp_path / "prm.pt"))
    with pytest.raises(UserError, match="there is no weights file"):
        PRMClassifier(own(), 10, SHAPE, prm=SMALL, prm_weights=str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"the classifier of weights .* does not fit the network"):
        PRMClassifier("small_cnn", 10, SHAPE, prm=SMALL, weights=str(path))


def test_weights_of_a_plain_run(tmp_path: Path) -> None:
    run, base = trainer(tmp_path), ImageClassifier("digits_cnn", 10, SHAPE)
    run.fit(base, digits())
    run.save_checkpoint(tmp_path / "base.ckpt")
    module = PRMClassifier("digits_cnn", 10, SHAPE, prm=SMALL, lam=0.0, weights=str(tmp_path / "base.ckpt")).eval()
    images = torch.rand(2, *SHAPE)
    assert torch.equal(module(images), base.eval()(images))


@pytest.mark.parametrize("settings", [{"trains": "in_turn"}, {}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_a_resumed_run_ends_as_one_that_was_left_alone(tmp_path: Path, settings: dict[str, Any], inside: bool) -> None:
    """Interrupted between epochs and inside one."""

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if inside and (trainer.current_epoch, index) == (1, 0) and not path.exists():
                trainer.save_checkpoint(path)

        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            if not inside and not path.exists():
                trainer.save_checkpoint(path)

    path = tmp_path / "kept.ckpt"
    ends, logged = [], []
    for resume in (False, True):
        dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        module = classifier(
            dropout, train_lam=[0.2, 0.6, 1.0], optimizer=OptimizerSettings(name="adamw", lr=0.01), **settings
        )
        run = trainer(tmp_path, Keep(), max_epochs=3)
        run.fit(module, digits(), ckpt_path=path if resume else None, weights_only=True)
        ends.append(state(module))
        logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert same(ends[0], ends[1])
    assert logged[0] == logged[1]


def test_what_an_interrupted_epoch_had_counted_is_in_its_log(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 0 and not path.exists():
                trainer.save_checkpoint(path)

    path = tmp_path / "kept.ckpt"
    logged = []
    for resume in (False, True):
        run = trainer(tmp_path, Keep())
        run.fit(classifier(), digits(), ckpt_path=path if resume else None, weights_only=True)
        logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert logged[0] == logged[1]


def test_callbacks_of_an_objective_that_is_not_used() -> None:
    assert not classifier(objective=FastFGSM(eps=0.1)).configure_callbacks()
    assert classifier(objective=FastFGSM(eps=0.1), classification_weight=1.0).configure_callbacks()


@pytest.mark.parametrize(
    ("trains", "said"), [("prm", "the classifier behind the manipulator"), ("classifier", "the manipulator in front")]
)
def test_a_frozen_part_that_knows_nothing_is_warned_of(tmp_path: Path, trains: str, said: str) -> None:
    with pytest.warns(UserWarning, match=f"{said}.* has random weights"):
        trainer(tmp_path, fast_dev_run=True).fit(classifier("digits_cnn", trains=trains), digits())


def test_from_the_command_line_to_a_fine_tuned_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, test the checkpoint without the file of its base, and fine-tune the classifier behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-robust"])
    data = ["--data.limit", "{train: 128, val: 20, test: 20}", "--trainer.accelerator", "cpu", "--run.wandb", "off"]
    base = ["--model", "ImageClassifier", "--model.network", "digits_cnn", "--data", "Digits"]
    main(["fit", *base, *data, "--trainer.max_epochs", "1", "--run.name", "base"])
    (weights,) = tmp_path.glob("runs/base/version_0/checkpoints/*.ckpt")
    words = ["--config", "prm_digits", *data, "--trainer.max_epochs", "2"]
    frozen = ["--model.trains", "prm", "--model.classification_weight", "0.1", "--model.prm.width", "3"]
    main(["train", *words, *frozen, "--model.weights", str(weights), "--run.name", "frozen"])
    weights.unlink()
    run = tmp_path / "runs" / "frozen" / "version_0"
    results = json.loads((run / "results.json").read_text())
    assert {"test/acc", "test/psnr", "test/input_gradient_iou", "train/loss"} <= results.keys()
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    main(["test", "--ckpt_path", str(best), "--run.name", "again", "--run.wandb", "off"])
    again = json.loads((tmp_path / "runs" / "again" / "version_0" / "results.json").read_text())
    assert again["test/psnr"] == results["test/psnr"]
    assert again["test/loss"] == results["test/loss"]
    tuning = ["--model.trains", "classifier", "--model.prm_weights", str(best), "--model.weights", str(best)]
    main(["fit", *words, *tuning, "--model.prm.width", "3", "--run.name", "tuned"])
    one = PRMClassifier.load_from_checkpoint(best)
    two = PRMClassifier.load_from_checkpoint(tmp_path / "runs/tuned/version_0/checkpoints/last.ckpt")
    assert same(state(one.network.prm), state(two.network.prm))
    assert not same(state(one.network.classifier), state(two.network.classifier))


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trains": "autoencoder"}, "trains='autoencoder': choose one of prm, classifier, both, in_turn"),
        ({"lam": 1.5}, "lam=1.5 is the share of the autoencoder"),
        ({"train_lam": [0.5, 2.0]}, "lam=2 is the share"),
        ({"train_lam": []}, "train_lam is an empty list"),
        ({"turn_epochs": 0}, "turn_epochs=0"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight=-1.0 weighs a term"),
        ({"classification_weight": float("nan")}, "classification_weight=nan weighs a term"),
        ({"trains": "both", "classification_weight": 0.0}, "the classifier would learn nothing"),
        ({"reconstruction_weight": 0.0}, "nothing is left to train for"),
        ({"prm": PRMSettings(body="ace")}, "best where it adds nothing; give a classification_weight"),
        ({"prm": PRMSettings()}, "8×8 pixels .* give a depth of 3 or less"),
        ({"reconstruction_space": "lab"}, "reconstruction_space='lab': choose pixels or normalized"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        classifier(**settings)


def test_the_ace_form_trains_with_a_classification_loss(tmp_path: Path) -> None:
    module = classifier(prm=PRMSettings(body="ace"), lam=3.0, classification_weight=1.0)
    start = state(module.network.prm)
    trainer(tmp_path).fit(module, digits())
    assert not same(start, state(module.network.prm))
    assert isinstance(module.network, ManipulatedNetwork)
    assert isinstance(module.network.prm, PixelRobustnessManipulator)
