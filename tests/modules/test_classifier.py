"""The classifier: what it logs and trains, and its checkpoints."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.batch import Batch, as_batch
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier, OptimizerSettings, ScheduleSettings
from lightning_robust.objectives import AWP, MART, TRADES, FastFGSM, Natural, Objective, PGDAdversarial

SHAPE = (1, 8, 8)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def digits(**settings: Any) -> Digits:
    settings = {"limit": {"train": 40, "val": 21, "test": 23}, "val_size": 0.2, "batch_size": 20} | settings
    return Digits(**{"eval_batch_size": 8, **settings})


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **settings,
        }
    )


def classifier(network: Any = None, **settings: Any) -> ImageClassifier:
    return ImageClassifier(linear() if network is None else network, 10, SHAPE, **settings)


# -- training ----------------------------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_means_over_images(tmp_path: Path) -> None:
    """Not over batches: 23 images in batches of 8 end with one of 7."""
    module = classifier()
    run = trainer(tmp_path)
    run.test(module, digits(), verbose=False)
    dataset = digits().dataset("test")
    batch = dataset.__getitems__(range(23))
    logits = module(batch.images)
    assert float(run.callback_metrics["test/acc"]) == pytest.approx(
        float((logits.argmax(1) == batch.labels).float().mean())
    )
    assert float(run.callback_metrics["test/loss"]) == pytest.approx(F.cross_entropy(logits, batch.labels).item())


def test_a_step_is_what_it_says(tmp_path: Path) -> None:
    """One epoch of two batches with SGD and a cosine, against a loop."""
    module = classifier(optimizer=OptimizerSettings(lr=0.5, momentum=0, weight_decay=0))
    data = digits()
    trainer(tmp_path).fit(module, data)
    net = linear()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    for step, (images, labels) in enumerate(loader):
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        rate = 0.5 * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / 2))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= rate * parameter.grad
    for one, two in zip(module.network.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_schedule_counts_optimizer_steps(tmp_path: Path) -> None:
    rates: list[float] = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    schedule = ScheduleSettings(name="piecewise", milestones=(0.5,))
    module = classifier(schedule=schedule, optimizer=OptimizerSettings(lr=1.0))
    trainer(tmp_path, Spy(), max_epochs=2, accumulate_grad_batches=2).fit(module, digits(batch_size=10))
    assert rates == pytest.approx([1, 1, 0.1, 0.1])


def test_endless_training_needs_a_constant_rate(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    with pytest.raises(UserError, match="training without end has no schedule"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(), digits())
    module = classifier(schedule=ScheduleSettings(name="constant"))
    run = trainer(tmp_path, Stop(), max_epochs=-1)
    run.fit(module, digits())
    assert run.global_step == 3


def test_training_repeats_itself_and_hangs_on_the_seed(tmp_path: Path) -> None:
    """Dropout and random starts are drawn anew in every batch, and alike in a second run."""
    draws: list[list[torch.Tensor]] = []

    class Watched(nn.Dropout):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            kept = super().forward(torch.ones_like(values))
            if self.training:
                draws[-1].append(kept)
            return values * kept

    ends = []
    for seed in (1, 1, 2):
        draws.append([])
        torch.manual_seed(len(draws))  # what was drawn before must not matter
        network = nn.Sequential(nn.Flatten(), Watched(0.5), linear()[1])
        objective = PGDAdversarial(attack=PGD(eps=0.1, steps=2))
        module = classifier(network, objective=objective, seed=seed)
        trainer(tmp_path, max_epochs=2).fit(module, digits())
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert len(draws[0]) == 4
    assert all(not torch.equal(draws[0][0], other) for other in draws[0][1:])


def test_random_starts_differ_from_step_to_step(tmp_path: Path) -> None:
    seeds: list[int] = []

    class Spy(Natural):
        def perturb(self, *args: Any, seed: int, **kwargs: Any) -> Any:
            seeds.append(seed)
            return super().perturb(*args, seed=seed, **kwargs)

    module = classifier()
    module.objective = Spy()
    trainer(tmp_path, max_epochs=2).fit(module, digits())
    assert len(set(seeds)) == len(seeds) == 4


@pytest.mark.parametrize("acceleration", ["exact", "bf16", "none"])
def test_attacks_run_on_the_present_weights(tmp_path: Path, acceleration: str) -> None:
    """The stand-in follows the weights: its logits are the network's in every step."""
    gaps: list[float] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            module.eval()
            with torch.no_grad():
                gaps.append(float((module.attack_model()(batch[0]) - module(batch[0])).abs().max()))
            module.train()

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    objective = PGDAdversarial(attack=PGD(eps=0.1, steps=2))
    module = classifier(network, objective=objective, attack_acceleration=acceleration)
    trainer(tmp_path, Spy(), max_epochs=2).fit(module, digits())
    assert len(gaps) == 4
    assert max(gaps) < (0.2 if acceleration == "bf16" else 1e-5)
    assert not any("stand_in" in name or "copy" in name for name in module.state_dict())


def test_predict(tmp_path: Path) -> None:
    module = classifier()
    found = trainer(tmp_path).predict(module, digits())
    images = digits().dataset("test").__getitems__(range(23)).images
    wanted = module(images).softmax(1).max(1)
    assert torch.equal(torch.cat([batch["predicted"] for batch in found]), wanted.indices)
    torch.testing.assert_close(torch.cat([batch["confidence"] for batch in found]), wanted.values)


def test_batches() -> None:
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    assert as_batch([images, labels]) == Batch(images, labels, None)
    assert as_batch((images, labels, images)).mask is images
    for bad in (images, {"image": images}, (images,), (images, "a")):
        with pytest.raises(UserError, match="cannot be read: the data loader must yield"):
            as_batch(bad)


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), 7, SHAPE)
    with pytest.raises(UserError, match=r"labels reach from 0 to [789] but the model has 7 classes"):
        trainer(tmp_path).test(module, digits(), verbose=False)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="attack_acceleration='fast'"):
        classifier(attack_acceleration="fast")
    with pytest.raises(UserError, match="digits_cnn"):
        ImageClassifier("digits_cnm", 10, SHAPE)


# -- checkpoints -------------------------------------------------------------------------------------------------------

OBJECTIVES: list[Objective] = [
    Natural(label_smoothing=0.1),
    PGDAdversarial(attack=PGD(eps="8/255", norm="l2", steps=3, step_size=0.01), awp=AWP(gamma=0.02)),
    FastFGSM(eps=0.1),
    TRADES(beta=3.0),
    MART(steps=2),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_checkpoints_hold_plain_data_and_bring_all_settings_back(tmp_path: Path, objective: Objective) -> None:
    settings = {
        "objective": objective,
        "optimizer": OptimizerSettings(name="adamw", lr=0.003),
        "schedule": ScheduleSettings(name="piecewise", milestones=(0.3, 0.6)),
        "normalization": "mnist",
        "attack_acceleration": "none",
        "seed": 7,
    }
    module = ImageClassifier("digits_cnn", 10, SHAPE, **settings)
    run = trainer(tmp_path)
    run.fit(module, digits())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["seed"] == 7
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert loaded.objective == objective
    assert loaded.optimizer_settings == settings["optimizer"]
    assert loaded.schedule_settings == settings["schedule"]
    assert dict(loaded.hparams) == dict(module.hparams)
    images = torch.rand(3, *SHAPE)
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert ImageClassifier.load_from_checkpoint(path, seed=9).seed == 9  # the user's word beats the checkpoint's


def test_a_checkpoint_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_robust.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-robust"])
    words = [
        "--config",
        "quickstart",
        "--trainer.max_epochs",
        "1",
        "--run.wandb",
        "off",
        "--trainer.accelerator",
        "cpu",
    ]
    words += ["--trainer.limit_train_batches", "2", "--model.objective.attack.eps", "16/255"]
    main(["fit", *words, "--data.limit", "{train: 128, val: 20, test: 20}"])
    (path,) = tmp_path.glob("runs/quickstart/version_0/checkpoints/last.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert loaded.image_shape == SHAPE
    assert loaded.num_classes == 10
    assert isinstance(loaded.objective, PGDAdversarial)
    assert loaded.objective.threat_model is not None
    assert loaded.objective.threat_model.radius == pytest.approx(16 / 255)
    assert loaded.optimizer_settings.lr == 0.003
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    module = classifier()
    run = trainer(tmp_path)
    run.fit(module, digits())
    path = tmp_path / "own.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(UserError, match=r"network of your own: give it again, as .*network=\.\.\."):
        ImageClassifier.load_from_checkpoint(path)
    loaded = ImageClassifier.load_from_checkpoint(path, network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert torch.equal(loaded.network[1].weight, module.network[1].weight)


class Other(ImageClassifier):
    """Another module."""


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    module = ImageClassifier("digits_cnn", 10, SHAPE)
    run.fit(module, digits())
    good = tmp_path / "good.ckpt"
    run.save_checkpoint(good)

    for load in (
        lambda: Other.load_from_checkpoint(good),
        lambda: trainer(tmp_path).test(Other("digits_cnn", 10, SHAPE), digits(), ckpt_path=good, weights_only=True),
    ):
        with pytest.raises(UserError, match=r"made by ImageClassifier, not by Other: set model\.class_path"):
            load()

    another = ImageClassifier("small_cnn", 10, SHAPE)
    with pytest.raises(UserError, match=r"the checkpoint does not fit the model: .* missing .* unexpected"):
        trainer(tmp_path).test(another, digits(), ckpt_path=good, weights_only=True)
    with pytest.raises(UserError, match=r"the checkpoint does not fit the model: .* missing .* unexpected"):
        ImageClassifier.load_from_checkpoint(good, network="small_cnn")
    fewer = ImageClassifier("digits_cnn", 7, SHAPE)
    with pytest.raises(UserError, match="set num_classes to 10"):
        trainer(tmp_path).test(fewer, digits(), ckpt_path=good, weights_only=True)

    short = tmp_path / "short.ckpt"
    short.write_bytes(good.read_bytes()[: os.path.getsize(good) // 2])
    with pytest.raises(UserError, match=r"short.ckpt cannot be read \(broken, cut short or unsafe\)"):
        ImageClassifier.load_from_checkpoint(short)
    with pytest.raises(UserError, match="there is no such file"):
        ImageClassifier.load_from_checkpoint(tmp_path / "none.ckpt")
    torch.save(module.network.state_dict(), short)
    with pytest.raises(UserError, match="is not a checkpoint of a run: give a plain file of weights"):
        ImageClassifier.load_from_checkpoint(short)
    torch.save({"state_dict": {}, "code": Path}, short)
    with pytest.raises(UserError, match="unsafe"):
        ImageClassifier.load_from_checkpoint(short)


def test_weights_of_a_checkpoint_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    module = ImageClassifier("digits_cnn", 10, SHAPE)
    run.fit(module, digits())
    run.save_checkpoint(tmp_path / "run.ckpt")
    other = Other("digits_cnn", 10, SHAPE, weights=str(tmp_path / "run.ckpt"))
    images = torch.rand(2, *SHAPE)
    assert torch.equal(other.eval()(images), module.eval()(images))


def test_compiled_network_keeps_its_names(tmp_path: Path) -> None:
    """Not compiled here, which takes a compiler: that it is asked for, once, and leaves the names as they are."""
    calls: list[int] = []
    module = classifier(compile_network=True)
    names = list(module.state_dict())
    module.network.compile = lambda *args, **kwargs: calls.append(1)  # type: ignore[method-assign]
    module.configure_model()
    assert calls == [1]
    module.network._compiled_call_impl = module.network.__call__  # type: ignore[assignment]
    module.configure_model()
    assert calls == [1]
    assert list(module.state_dict()) == names
    assert module.attack_model() is module.network


# -- normalisation -----------------------------------------------------------------------------------------------------


def reloaded(module: ImageClassifier, folder: Path, **settings: Any) -> ImageClassifier:
    run = trainer(folder)
    run.strategy.connect(module)
    run.save_checkpoint(folder / "model.ckpt", weights_only=True)
    return ImageClassifier.load_from_checkpoint(folder / "model.ckpt", **settings)


def test_what_pretrained_weights_were_normalised_with_is_kept(tmp_path: Path) -> None:
    """The checkpoint holds the weights, but mean and std are no weights, and the hub is not asked again."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "weights.pth")
    statistics = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.25, 0.125)}
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10, **statistics}
    network = {"network_args": {"pretrained_cfg_overlay": overlay}, "pretrained": True}
    module = ImageClassifier("timm/test_resnet", 10, (3, 32, 32), **network).eval()
    assert module.hparams["normalization"] == [[0.2, 0.3, 0.4], [0.5, 0.25, 0.125]]
    (tmp_path / "weights.pth").unlink()
    again = reloaded(module, tmp_path).eval()
    assert again.hparams["normalization"] == module.hparams["normalization"]
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(again(images), module(images))
    assert not torch.allclose(module(images), module.network.network(images))


@pytest.mark.parametrize("given", ["mnist", "none", None, [[0.25], [0.5]]])
def test_normalization_by_name_or_number(tmp_path: Path, given: Any) -> None:
    module = classifier("digits_cnn", normalization=given).eval()
    assert module.hparams["normalization"] == given
    again = reloaded(module, tmp_path).eval()
    images = torch.rand(3, *SHAPE)
    assert torch.equal(again(images), module(images))
    mean, std = (given[0][0], given[1][0]) if isinstance(given, list) else (0.0, 1.0)
    if given == "mnist":
        mean, std = 0.1307, 0.3081
    torch.testing.assert_close(module(images), module.network.network((images - mean) / std))


def test_normalization_that_is_none() -> None:
    with pytest.raises(UserError, match=r"normalization=\[0.5, 0.5\]: give a name such as imagenet"):
        classifier("digits_cnn", normalization=[0.5, 0.5])
    with pytest.raises(UserError, match="do not suit images of 1 channels"):
        classifier("digits_cnn", normalization=[[0.5, 0.5], [1, 1]])
    with pytest.raises(UserError, match="no normalization named 'imagnet'"):
        classifier("digits_cnn", normalization="imagnet")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("imagenet", "imagenet"), ("none", "none"), ("[[0.5], [0.25]]", [[0.5], [0.25]]), ("null", None)],
)
def test_normalization_on_the_command_line(word: str, meant: Any) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(ImageClassifier, "model")
    assert parser.parse_args([f"--model.normalization={word}"]).model.normalization == meant


def test_a_copy_has_no_copy_of_the_attacks_copy() -> None:
    import copy

    module = classifier(objective=PGDAdversarial(attack=PGD(eps=0.1, steps=2)))
    stand_in = module.attack_model()
    assert copy.deepcopy(module)._stand_in == []
    assert module.attack_model() is stand_in
