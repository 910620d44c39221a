"""A loss that becomes NaN stops the run before the weights are touched, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialAccuracy, NonFiniteGuard, RobustCheckpoint
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier
from lightning_robust.objectives import Natural, PGDAdversarial
from lightning_robust.objectives.base import ObjectiveOutput, Perturbed

Make = Callable[..., Any]


class Poison(pl.Callback):
    """Makes one batch's loss NaN, on one rank, by its images."""

    def __init__(self, epoch: int, batch: int, rank: int = 0) -> None:
        self.at = (epoch, batch, rank)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == self.at:
            batch[0][3] = float("nan")


def saved(folder: Path) -> tuple[list[str], dict[str, Any]]:
    files = sorted(folder.glob("non_finite_batch_rank*.pt"))
    return [file.name for file in files], torch.load(files[0], weights_only=True)


@pytest.mark.parametrize(("devices", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_nan_loss(model: Make, trainer: Make, digits: Make, tmp_path: Path, devices: int, rank: int) -> None:
    callbacks = [NonFiniteGuard(), Poison(1, 1, rank), AdversarialAccuracy({"fgsm": _fgsm()}), RobustCheckpoint("fgsm")]
    run = trainer(*callbacks, devices=devices, logger=True, max_epochs=3)
    expected = UserError if devices == 1 else torch.multiprocessing.ProcessRaisedException
    where = f" on device {rank}" if devices == 2 else ""
    with pytest.raises(expected, match=rf"the loss became .* in epoch 1, batch 1{where}: stopped .* batch is saved in"):
        run.fit(model(), digits(batch_size=12))
    folder = tmp_path / "runs" / "run" / "version_0"
    names, batch = saved(folder)
    assert names == [f"non_finite_batch_rank{rank}.pt"]
    assert batch["images"].shape == (12 // devices, 1, 8, 8)
    assert batch["images"].isnan().flatten(1).all(1).tolist() == [row == 3 for row in range(12 // devices)]
    assert (batch["epoch"], batch["batch"]) == (1, 1)
    good = ImageClassifier.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", network=model().network)
    assert all(torch.isfinite(value).all() for value in good.state_dict().values())
    if devices == 1:
        assert run.global_step == 5
        assert all(torch.isfinite(value).all() for value in run.lightning_module.parameters())


def _fgsm() -> Any:
    from lightning_robust.attacks import FGSM

    return FGSM(eps=0.1)


def test_the_culprit_among_accumulated_batches(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """The step is taken after three batches; the second is the bad one."""
    run = trainer(NonFiniteGuard(), Poison(0, 1), accumulate_grad_batches=3)
    before = model()
    start = {name: value.detach().clone() for name, value in before.named_parameters()}
    with pytest.raises(UserError, match="batch 1: stopped"):
        run.fit(before, digits(batch_size=8))
    assert saved(tmp_path)[1]["batch"] == 1
    assert all(torch.equal(value, start[name]) for name, value in before.named_parameters())


class Exploding(Natural):
    """A finite loss whose gradient is infinite: the square root at 0."""

    def loss(self, model: Any, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        output = super().loss(model, images, labels, perturbed)
        output.loss = (output.loss * 0).sqrt()
        return output


@pytest.mark.parametrize("devices", [1, 2])
def test_a_gradient_that_is_not_finite(model: Make, trainer: Make, digits: Make, tmp_path: Path, devices: int) -> None:
    module = model()
    module.objective = Exploding()
    expected = UserError if devices == 1 else torch.multiprocessing.ProcessRaisedException
    with pytest.raises(expected, match="a gradient became NaN or infinite in epoch 0, batch 0"):
        trainer(NonFiniteGuard(), devices=devices).fit(module, digits())
    assert saved(tmp_path)[0] == [f"non_finite_batch_rank{rank}.pt" for rank in range(devices)]


class InfiniteOnOneRank(Natural):
    """An infinite loss with finite gradients, on the second device alone."""

    def loss(self, model: Any, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        output = super().loss(model, images, labels, perturbed)
        if torch.distributed.get_rank() == 1:
            output.loss = output.loss + float("inf")
        return output


def test_an_infinite_loss_on_one_device(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """The gradients are finite on all devices: the others do not see it by themselves."""
    module = model()
    module.objective = InfiniteOnOneRank()
    expected = torch.multiprocessing.ProcessRaisedException
    with pytest.raises(expected, match=r"became .*inf.* in epoch 0, batch 0 on device 1: stopped"):
        trainer(NonFiniteGuard(), devices=2).fit(module, digits())
    assert saved(tmp_path)[0] == ["non_finite_batch_rank1.pt"]


class Overflow(pl.Callback):
    """Spoils the weights, as a step that was too long does, or the images."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            if self.what == "images":
                batch[0][3] = float("nan")
            else:
                with torch.no_grad():
                    module.network[4].bias[2] = float("nan")


@pytest.mark.parametrize(("what", "told"), [("weights", "the model gave NaN"), ("images", "images hold NaN")])
def test_nan_within_the_attack(model: Make, trainer: Make, digits: Make, tmp_path: Path, what: str, told: str) -> None:
    """The attack stops before there is a loss."""
    module = model(objective=PGDAdversarial(attack=PGD(eps=0.1, steps=2)))
    run = trainer(NonFiniteGuard(), Overflow(what), max_epochs=2)
    with pytest.raises(UserError, match=f"{told}.*; this was in epoch 1, batch 1: the batch is saved in .*_rank0.pt$"):
        run.fit(module, digits(batch_size=12))
    names, batch = saved(tmp_path)
    assert names == ["non_finite_batch_rank0.pt"]
    assert (batch["epoch"], batch["batch"], len(batch["images"])) == (1, 1, 12)
    assert bool(batch["images"].isnan().any()) == (what == "images")


def test_other_mistakes_are_not_the_guards(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    class Mistake(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise UserError("a mistake")

    with pytest.raises(UserError, match=r"^a mistake$"):
        trainer(NonFiniteGuard(), Mistake()).fit(model(), digits())
    assert not list(tmp_path.glob("*.pt"))


def test_a_good_run_is_left_alone(model: Make, trainer: Make, digits: Make) -> None:
    ends = []
    for callbacks in ([], [NonFiniteGuard()]):
        module = model()
        trainer(*callbacks, max_epochs=2).fit(module, digits())
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*ends)
