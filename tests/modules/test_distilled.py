"""Distillation: both phases, their resumption, and the teacher that no student's checkpoint holds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError
from lightning_robust.modules import DistilledClassifier, ImageClassifier, OptimizerSettings, ScheduleSettings
from lightning_robust.modules.soft_labels import Teacher
from lightning_robust.modules.teacher import checksum
from lightning_robust.objectives import ARD, RSLAD, Distillation, Natural, PGDAdversarial

SHAPE = (1, 8, 8)
SGD = OptimizerSettings(lr=0.5, momentum=0.5, weight_decay=0)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def normed(seed: int = 0) -> nn.Module:
    """With BatchNorm and dropout, which a resumed run must repeat."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(64, 10),
    )  # fmt: skip


def digits(**settings: Any) -> Digits:
    settings = {"limit": {"train": 60, "val": 21, "test": 23}, "val_size": 0.2, "batch_size": 20} | settings
    return Digits(**{"eval_batch_size": 8, **settings})


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    torch.set_num_threads(1)  # ranks are forked, which threads under way do not survive
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "strategy": "ddp_fork" if settings.get("devices", 1) > 1 else "auto",
            "max_epochs": 4,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            **settings,
        }
    )


def distilled(network: Any = None, **settings: Any) -> DistilledClassifier:
    settings = {"optimizer": SGD, "temperature": 4.0, **settings}
    return DistilledClassifier(linear() if network is None else network, 10, SHAPE, **settings)


def trained_teacher(folder: Path, **settings: Any) -> Path:
    """A checkpoint of an ordinary classifier."""
    module = ImageClassifier("digits_cnn", 10, SHAPE, optimizer=SGD, **settings)
    run = trainer(folder, max_epochs=1)
    run.fit(module, digits())
    run.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


class Rates(pl.Callback):
    """The learning rate of each step, and who was trained."""

    def __init__(self) -> None:
        self.rates: list[tuple[bool, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append((module.apprentice is not None, optimizer.param_groups[0]["lr"]))


# -- what the two phases do --------------------------------------------------------------------------------------------


def by_hand(net: nn.Module, data: Digits, epochs: range, temperature: float, targets: Any) -> None:
    """SGD at a cosine over these epochs; ``targets`` from images and labels to probabilities."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5)
    step, steps = 0, 3 * len(epochs)
    for epoch in epochs:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * (step + 0.5) / steps))
            optimizer.zero_grad()
            log_probabilities = (net(images) / temperature).log_softmax(1)
            (-(targets(images, labels) * log_probabilities).sum(1).mean()).backward()
            optimizer.step()
            step += 1


def test_both_phases_are_what_they_say(tmp_path: Path) -> None:
    """Against two loops: the teacher on hard labels at T, the student on softmax(teacher / T) at the same T."""
    data, rates = digits(), Rates()
    module = distilled(teacher_epochs=2, temperature=4.0)
    run = trainer(tmp_path, rates, max_epochs=5)
    run.fit(module, data)
    teacher, student = linear(), linear()
    by_hand(teacher, data, range(2), 4.0, lambda _, labels: F.one_hot(labels, 10).float())
    by_hand(student, data, range(2, 5), 4.0, lambda images, _: (teacher(images) / 4).softmax(1).detach())
    for found, wanted in ((module._teacher[0].network, teacher), (module.network, student)):
        for one, two in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert [own for own, _ in rates.rates] == [True] * 6 + [False] * 9
    wanted_rates = [0.25 * (1 + math.cos(math.pi * (k + 0.5) / n)) for n in (6, 9) for k in range(n)]
    assert [rate for _, rate in rates.rates] == pytest.approx(wanted_rates)
    saved = torch.load(tmp_path / "checkpoints" / "teacher.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["network.1.weight"], module._teacher[0].network[1].weight)


def test_what_is_logged_in_which_phase(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            trainer.callback_metrics.clear()

    module = distilled(teacher_epochs=2)
    untrained = linear()
    run = trainer(tmp_path, Watch(), max_epochs=3)
    run.fit(module, digits())
    batch = digits().dataset("val").__getitems__(range(21))
    # the student rests in the teacher's phase, and is what val/acc is of
    rest = float((untrained(batch.images).argmax(1) == batch.labels).float().mean())
    assert [metrics["val/acc"] for metrics in seen[:2]] == pytest.approx([rest, rest])
    assert {"train/teacher_loss", "train/teacher_acc", "val/teacher_loss", "val/teacher_acc"} <= seen[1].keys()
    teacher = module._teacher[0].network
    logits = teacher(batch.images) / 4
    assert seen[1]["val/teacher_loss"] == pytest.approx(float(F.cross_entropy(logits, batch.labels)), rel=1e-5)
    assert seen[1]["val/teacher_acc"] == pytest.approx(float((logits.argmax(1) == batch.labels).float().mean()))


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    file = trained_teacher(tmp_path)
    weights = torch.load(file, weights_only=True)["state_dict"]
    module = distilled("digits_cnn", teacher=str(file), soft_labels="on_the_fly")
    modes: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            modes.append(any(part.training for part in module._teacher[0].network.modules()))

    run = trainer(tmp_path, Watch(), max_epochs=1)
    run.fit(module, digits())
    assert modes == [False] * 3
    teacher = module._teacher[0].network
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[f"network.{name}"]), name
    assert all(name.startswith(("network.", "scores.")) for name in module.state_dict())
    run.save_checkpoint(tmp_path / "student.ckpt")
    checkpoint = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert checkpoint["lightning_robust"]["distillation"]["teacher"] == {"file": str(file), "sha256": checksum(file)}
    count = sum(1 for _ in module.network.parameters())
    assert len(checkpoint["optimizer_states"][0]["param_groups"][0]["params"]) == count


def test_a_student_is_deployed_without_its_teacher(tmp_path: Path) -> None:
    file = trained_teacher(tmp_path)
    module = distilled("digits_cnn", teacher=str(file), objective=Distillation(hard_label_weight=0.25))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, digits())
    run.save_checkpoint(tmp_path / "student.ckpt")
    file.unlink()
    loaded = DistilledClassifier.load_from_checkpoint(tmp_path / "student.ckpt")
    assert dict(loaded.hparams) == dict(module.hparams)
    assert loaded.temperature == 4
    assert loaded.objective == Distillation(hard_label_weight=0.25)
    images = torch.rand(3, *SHAPE)
    # at T = 1: the logits themselves
    assert torch.equal(loaded.eval()(images), module.network.eval()(images))
    trainer(tmp_path).test(loaded, digits(), ckpt_path=tmp_path / "student.ckpt", verbose=False, weights_only=True)
    with pytest.raises(UserError, match="there is no such file"):
        trainer(tmp_path).fit(loaded, digits())


@pytest.mark.parametrize("objective", [ARD(eps=0.1, steps=2, alpha=0.9), RSLAD(eps=0.1, steps=2)])
def test_robust_distillation_trains(tmp_path: Path, objective: Any) -> None:
    """From a teacher that the same run trains adversarially, through the stand-ins."""
    module = distilled(
        normed(),
        objective=objective,
        temperature=1.0,
        teacher_epochs=1,
        teacher_network="digits_cnn",
        teacher_objective=PGDAdversarial(attack=PGD(eps=0.1, steps=2)),
    )
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, digits())
    assert all(bool((value != before[name]).any()) for name, value in module.network.named_parameters())
    assert math.isfinite(float(run.callback_metrics["train/loss"]))
    # the file says what network the teacher is, so that another student can do with the file alone
    again = distilled(normed(), objective=objective, teacher=str(tmp_path / "checkpoints" / "teacher.ckpt"))
    trainer(tmp_path, max_epochs=1).fit(again, digits())
    images = torch.rand(2, *SHAPE)
    assert torch.equal(again._teacher[0].ask(images), module._teacher[0].ask(images))
    base = ImageClassifier.load_from_checkpoint(tmp_path / "checkpoints" / "teacher.ckpt").eval()
    assert torch.equal(base(images), module._teacher[0].ask(images))
    assert base.objective == PGDAdversarial(attack=PGD(eps=0.1, steps=2))


# -- soft labels -------------------------------------------------------------------------------------------------------


def test_cached_soft_labels_are_those_on_the_fly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked, ends = trained_teacher(tmp_path), [], []
    ask = Teacher.ask
    monkeypatch.setattr(Teacher, "ask", lambda self, images: (asked.append(len(images)), ask(self, images))[1])
    for soft_labels in ("cached", "auto", "on_the_fly"):
        asked.clear()
        module = distilled(teacher=str(file), teacher_network="digits_cnn", soft_labels=soft_labels)
        trainer(tmp_path, max_epochs=3).fit(module, digits())
        assert sum(asked) == (180 if soft_labels == "on_the_fly" else 60)
        ends.append(module.network[1].weight.detach())
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[2], ends[0])


def test_images_that_the_cache_does_not_know() -> None:
    teacher = Teacher(linear())
    dataset = digits().dataset("train")
    teacher.remember(dataset, torch.device("cpu"), torch.float32)
    assert teacher.cached == 60
    batch = dataset.__getitems__([7, 3]).images
    torch.testing.assert_close(teacher(batch), teacher.network(batch))
    changed = torch.cat([batch, batch.flip(3)])
    assert torch.equal(teacher(changed), teacher.network(changed))


def test_when_the_cache_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = trained_teacher(tmp_path)

    def fit(data: Any) -> None:
        trainer(tmp_path).fit(distilled("digits_cnn", teacher=str(file), soft_labels="cached"), data)

    with pytest.raises(UserError, match=r"soft_labels=cached: augmentation='crop' changes the images .* on_the_fly"):
        fit(digits(augmentation="crop"))
    loader = digits().train_dataloader()
    with pytest.raises(UserError, match="soft_labels=cached: the data are not given as one of this package's"):
        fit(loader)
    with caplog.at_level("INFO"):
        module = distilled("digits_cnn", teacher=str(file))
        trainer(tmp_path, max_epochs=1).fit(module, digits(augmentation="crop"))
    assert "Soft labels on the fly: augmentation='crop' changes the images" in caplog.text
    assert module._teacher[0].cached == 0


# -- resuming ----------------------------------------------------------------------------------------------------------


class StopAt(pl.Callback):
    """Ends a fit after a batch, having saved a checkpoint."""

    def __init__(self, epoch: int, batch: int, path: Path) -> None:
        self.epoch, self.batch, self.path = epoch, batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def weights_of(module: DistilledClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def fitted(folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None, **settings: Any) -> DistilledClassifier:
    module = distilled(normed(), teacher_epochs=2, teacher_network=normed(5), **settings)
    run = trainer(folder, *callbacks)
    run.fit(module, digits(), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 2), (2, 0), (3, 1)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, epoch: int, batch: int, elsewhere: bool) -> None:
    whole = fitted(tmp_path / "whole")
    first, second = tmp_path / "first", tmp_path / "second" if elsewhere else tmp_path / "first"
    checkpoint = first / "checkpoints" / "stopped.ckpt"
    with pytest.raises(SystemExit):
        fitted(first, StopAt(epoch, batch, checkpoint))
    held = torch.load(checkpoint, weights_only=True)
    has_teacher = any(name.startswith("apprentice.") for name in held["state_dict"])
    assert has_teacher == (epoch < 2)
    resumed = fitted(second, ckpt=checkpoint)
    for name, value in weights_of(whole).items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    for name, value in whole._teacher[0].network.state_dict().items():
        assert torch.equal(resumed._teacher[0].network.state_dict()[name], value), name
    files = [folder / "checkpoints" / "teacher.ckpt" for folder in (tmp_path / "whole", second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resumed_between_the_phases(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole")
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "first" / "checkpoints", "{epoch}", save_top_k=-1)
    fitted(tmp_path / "first", keep)
    resumed = fitted(tmp_path / "second", ckpt=tmp_path / "first" / "checkpoints" / "epoch=1.ckpt")
    for name, value in weights_of(whole).items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


def test_a_teachers_file_that_changed_or_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoint, file = folder / "checkpoints" / "stopped.ckpt", folder / "checkpoints" / "teacher.ckpt"
    with pytest.raises(SystemExit):
        fitted(folder, StopAt(2, 1, checkpoint))
    good = file.read_bytes()
    shutil.copyfile(file, tmp_path / "copy.ckpt")
    held = torch.load(file, weights_only=True)
    held["state_dict"]["network.5.weight"][0] += 1e-3
    torch.save(held, file)
    with pytest.raises(UserError, match=r"teacher's file .*teacher.ckpt changed since .*SHA-256 was \w{12}…"):
        fitted(folder, ckpt=checkpoint)
    file.unlink()
    with pytest.raises(UserError, match=r"teacher's file .*teacher.ckpt is gone.*--model.teacher"):
        fitted(folder, ckpt=checkpoint)
    moved = distilled(normed(), teacher=str(tmp_path / "copy.ckpt"), teacher_network=normed())
    trainer(tmp_path).fit(moved, digits(), ckpt_path=checkpoint, weights_only=True)
    file.write_bytes(good)
    whole = fitted(folder, ckpt=checkpoint)
    for name, value in weights_of(whole).items():
        assert torch.equal(moved.network.state_dict()[name], value), name


def test_a_given_file_that_changed(tmp_path: Path) -> None:
    file = trained_teacher(tmp_path)
    module = distilled("digits_cnn", teacher=str(file))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, digits())
    run.save_checkpoint(tmp_path / "student.ckpt")
    held = torch.load(file, weights_only=True)
    torch.save(held | {"epoch": 99}, file)
    with pytest.raises(UserError, match="changed since the student's checkpoint"):
        trainer(tmp_path).fit(
            distilled("digits_cnn", teacher=str(file)), digits(), ckpt_path=tmp_path / "student.ckpt", weights_only=True
        )


def test_a_checkpoint_of_the_teachers_phase(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "stopped.ckpt"
    with pytest.raises(SystemExit):
        fitted(tmp_path, StopAt(0, 1, checkpoint))
    student = distilled(normed(3))
    trainer(tmp_path).test(student, digits(), ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert torch.equal(student.network[5].weight, normed()[5].weight)  # untrained as it was
    module = distilled(normed(), teacher=str(trained_teacher(tmp_path)), teacher_network="digits_cnn")
    with pytest.raises(UserError, match=r"was still training its own teacher: give --model\.teacher_epochs"):
        trainer(tmp_path).fit(module, digits(), ckpt_path=checkpoint, weights_only=True)
    with pytest.raises(UserError, match=r"was still training its own teacher: give the teacher\.ckpt"):
        trainer(tmp_path).fit(distilled(normed(), teacher=str(checkpoint)), digits())


def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    ends = []

    class Save(pl.Callback):
        """A forked rank's weights die with it."""

        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.is_global_zero:
                teacher = module._teacher[0].network.state_dict()
                state = {**module.network.state_dict(), **{f"teacher.{name}": value for name, value in teacher.items()}}
                torch.save(state, Path(trainer.default_root_dir) / "end.pt")

    for devices in (1, 2):
        folder = tmp_path / str(devices)
        module = distilled(
            linear(),
            teacher_epochs=2,
            teacher_network=nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)),
            objective=RSLAD(eps=0.1, steps=2),
            schedule=ScheduleSettings(name="cyclic"),
        )
        run = trainer(folder, Save(), devices=devices, precision="64-true")
        run.fit(module, digits())
        found = torch.load(folder / "end.pt", weights_only=True)
        ends.append(
            found | {"val/acc": run.callback_metrics["val/acc"], "train/loss": run.callback_metrics["train/loss"]}
        )
        assert (folder / "checkpoints" / "teacher.ckpt").is_file()
    assert float((ends[0]["1.weight"] - linear()[1].weight).detach().abs().max()) > 1e-3
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name].double(), value.double(), rtol=0, atol=1e-8, msg=name)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0: logits are divided by it: give a positive number"),
        ({"temperature": -3.0}, "temperature=-3"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"objective": Natural()}, "the objective Natural has no teacher: choose Distillation, ARD or RSLAD"),
        ({"teacher_objective": Distillation()}, "would need a teacher of its own"),
        ({"teacher_epochs": -1}, "teacher_epochs=-1"),
        ({"teacher_epochs": 2, "teacher": "a.ckpt"}, "two sources of one teacher"),
        ({"soft_labels": "never"}, "soft_labels='never': auto, cached or on_the_fly"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distilled(**settings)


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    def fit(module: DistilledClassifier, **settings: Any) -> None:
        trainer(tmp_path, **settings).fit(module, digits())

    with pytest.raises(
        UserError, match=r"has no teacher: give the file of one as --model\.teacher, or .*teacher_epochs"
    ):
        fit(distilled())
    with pytest.raises(UserError, match=r"teacher .*none\.ckpt: there is no such file"):
        fit(distilled(teacher=str(tmp_path / "none.ckpt")))
    file = trained_teacher(tmp_path, normalization="mnist")
    with pytest.raises(UserError, match=r"trained with the normalization mnist and the student has mean \[0\.0\]"):
        fit(distilled("digits_cnn", teacher=str(file)))
    fit(distilled("digits_cnn", teacher=str(file), normalization=[[0.1307], [0.3081]]), max_epochs=1)
    held = torch.load(file, weights_only=True)
    for name, value in (("num_classes", 7), ("image_shape", [3, 8, 8])):
        torch.save(held | {"hyper_parameters": held["hyper_parameters"] | {name: value}}, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match=rf"trained with {name} .* soft labels are of the same classes"):
            fit(distilled("digits_cnn", teacher=str(tmp_path / "other.ckpt"), normalization="mnist"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"teacher: weights .*plain\.pth.* do not fit the network: .* 7"):
        fit(distilled(teacher=str(tmp_path / "plain.pth")))
    torch.save(linear(3).state_dict(), tmp_path / "plain.pth")
    module = distilled(teacher=str(tmp_path / "plain.pth"))
    fit(module, max_epochs=1)
    assert torch.equal(module._teacher[0].network[1].weight, linear(3)[1].weight)
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"teacher: weights .*broken\.ckpt.* cannot be read"):
        fit(distilled(teacher=str(tmp_path / "broken.ckpt")))


def test_trainers_that_cannot_train_both(tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, **settings: Any) -> None:
        trainer(tmp_path, *callbacks, **settings).fit(distilled(teacher_epochs=3), digits())

    with pytest.raises(UserError, match="teacher_epochs=3 of max_epochs=3 leave the student none"):
        fit(max_epochs=3)
    with pytest.raises(UserError, match="EMAWeightAveraging would average over the teacher's epochs"):
        fit(pl.callbacks.EMAWeightAveraging())
    with pytest.raises(UserError, match="EarlyStopping with patience=3 would end the run before the student"):
        fit(pl.callbacks.EarlyStopping("val/acc", mode="max"))
    fit(fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


def test_it_says_that_it_is_broken(tmp_path: Path) -> None:
    assert "broken" in (DistilledClassifier.__doc__ or "").split("\n")[0]
    with pytest.warns(UserWarning, match=r"defensive distillation is no defense: it hides gradients"):
        trainer(tmp_path, fast_dev_run=True).fit(distilled(teacher_epochs=1), digits())
