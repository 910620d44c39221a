"""The mean |∇x| map: equal to a loop over images, and free where training has computed it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import InputGradientMap, PixelIoU
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier
from lightning_robust.objectives import TRADES, Natural, PGDAdversarial

Make = Callable[..., Any]
FROM_CLEAN = PGDAdversarial(attack=PGD(eps=0.1, steps=3, random_start=False))


def naive_map(model: ImageClassifier, data: Digits, split: str, count: int | None = None) -> tuple[Any, Any]:
    """The map over the first images of a split and of each class, one image at a time."""
    model = model.eval()
    dataset = data.dataset(split)  # type: ignore[arg-type]
    rows, labels = [], []
    for index in range(len(dataset) if count is None else count):
        image, label = dataset[index]
        image = image[None].to(model.dtype).requires_grad_()
        F.cross_entropy(model(image), torch.tensor([label])).backward()
        rows.append(image.grad[0].abs().mean(0).double())
        labels.append(label)
    maps = torch.stack(rows)
    classes = torch.stack([maps[torch.tensor(labels) == k].mean(0) for k in range(10)])
    model.zero_grad()
    return maps.mean(0).numpy(), classes.numpy()


def test_equals_a_loop_over_images(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(InputGradientMap(per_class=True), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    wanted, classes = naive_map(model().double(), digits(), "test")
    folder = tmp_path / "runs" / "run" / "version_0"
    found = np.load(folder / "tables" / "input_gradient_test.npy")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.load(folder / "tables" / "input_gradient_per_class_test.npy"), classes, atol=1e-12)
    assert float(run.callback_metrics["test/input_gradient_mean"]) == pytest.approx(wanted.mean())
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "input_gradient_test.png",
        "input_gradient_per_class_test.png",
    }


def test_fit_takes_the_first_validation_batches_every_n_epochs(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    module = model(objective=Natural())
    run = trainer(InputGradientMap(every_n_epochs=2, limit_batches=2), logger=True, max_epochs=3)
    run.fit(module, digits(eval_batch_size=4))
    tables = tmp_path / "runs" / "run" / "version_0" / "tables"
    assert [path.name for path in tables.iterdir()] == ["input_gradient_val_epoch001.npy"]
    run = trainer(InputGradientMap(limit_batches=2), logger=True, max_epochs=1)
    run.fit(module, digits(eval_batch_size=4))
    wanted, _ = naive_map(module, digits(), "val", count=8)
    found = np.load(tables.parent.parent / "version_1" / "tables" / "input_gradient_val_epoch000.npy")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("acceleration", ["exact", "none"])
def test_training_map_equals_the_map_at_the_same_weights(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, acceleration: str
) -> None:
    """One batch an epoch: the weights that the gradient was taken at are those before the epoch."""
    data = digits(batch_size=48)
    module = model(objective=FROM_CLEAN, attack_acceleration=acceleration)
    wanted, classes = naive_map(model().double(), data, "train")
    run = trainer(InputGradientMap(per_class=True), PixelIoU(), logger=True, precision="64-true")
    run.fit(module, data)
    tables = tmp_path / "runs" / "run" / "version_0" / "tables"
    np.testing.assert_allclose(np.load(tables / "input_gradient_train_epoch000.npy"), wanted, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        np.load(tables / "input_gradient_per_class_train_epoch000.npy"), classes, rtol=0, atol=1e-9
    )
    assert float(run.callback_metrics["train/input_gradient_mean"]) == pytest.approx(wanted.mean())
    top = np.zeros(64, bool)
    top[np.argsort(wanted.ravel())[::-1][:16]] = True
    even = np.zeros((8, 8), bool)
    even[::2, ::2] = True
    iou = (top & even.ravel()).sum() / (top | even.ravel()).sum()
    assert float(run.callback_metrics["train/input_gradient_iou"]) == pytest.approx(iou)
    assert "val/input_gradient_mean" not in run.callback_metrics  # it would cost passes


def passes(module: ImageClassifier, fit: Callable[[], None]) -> int:
    """Images that go forward through the network."""
    seen = 0

    def count(_: Any, inputs: Any) -> None:
        nonlocal seen
        seen += len(inputs[0])

    handle = module.network.register_forward_pre_hook(count)
    fit()
    handle.remove()
    return seen


def test_no_further_pass_in_fit(model: Make, trainer: Make, digits: Make) -> None:
    counts = []
    for callbacks in ([], [InputGradientMap(per_class=True), PixelIoU()]):
        module = model(objective=FROM_CLEAN, attack_acceleration="none")
        run = trainer(*callbacks, max_epochs=2)
        counts.append(passes(module, lambda run=run, module=module: run.fit(module, digits())))
    assert counts[0] == 2 * (48 * (3 + 1) + 21)  # 3 steps and the loss; validation
    assert counts[1] == counts[0]


@pytest.mark.parametrize(
    "objective", [PGDAdversarial(attack=PGD(eps=0.1, steps=2)), TRADES(eps=0.1, step_size=0.05, steps=2)]
)
def test_other_objectives_measure_on_validation_images(
    model: Make, trainer: Make, digits: Make, objective: Any
) -> None:
    """From a random start, or with another loss, the first gradient is another one."""
    run = trainer(InputGradientMap())
    run.fit(model(objective=objective), digits())
    assert "val/input_gradient_mean" in run.callback_metrics
    assert "train/input_gradient_mean" not in run.callback_metrics


def test_first_step_of_fgsm_gives_it_too(model: Make, trainer: Make, digits: Make) -> None:
    run = trainer(InputGradientMap())
    run.fit(model(objective=PGDAdversarial(attack=FGSM(eps=0.1, stop_at_success=False))), digits())
    assert "train/input_gradient_mean" in run.callback_metrics


def test_a_run_resumed_inside_an_epoch(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """Lightning calls no on_train_epoch_start there."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer(InputGradientMap(), Stop()).fit(model(objective=FROM_CLEAN), digits())
    run = trainer(InputGradientMap(), PixelIoU())
    run.fit(model(objective=FROM_CLEAN), digits(), ckpt_path=tmp_path / "inside.ckpt")
    assert "train/input_gradient_iou" in run.callback_metrics


def test_two_need_names(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="InputGradientMap: two of them log under the name 'input_gradient'"):
        trainer(InputGradientMap(), InputGradientMap(per_class=True)).test(model(), digits(), verbose=False)
    run = trainer(InputGradientMap(), InputGradientMap(name="second", per_class=True), logger=True)
    run.test(model(), digits(), verbose=False)
    assert run.callback_metrics["test/second_mean"] == run.callback_metrics["test/input_gradient_mean"]
    tables = tmp_path / "runs" / "run" / "version_0" / "tables"
    assert (tables / "second_test.npy").is_file()


def test_only_rank_zero_writes(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """On two ranks the file is written once and holds the mean of both."""

    class Writes(pl.Callback):
        def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            from lightning_robust.callbacks.measurement import run_folder

            (tmp_path / f"rank{trainer.global_rank}").write_text(str(run_folder(trainer)))

    run = trainer(InputGradientMap(), Writes(), logger=True, devices=2, precision="64-true")
    run.test(model(), digits(), verbose=False)
    folder = tmp_path / "runs" / "run" / "version_0"
    assert (tmp_path / "rank0").read_text() == str(folder)
    assert (tmp_path / "rank1").read_text() == "None"
    wanted, _ = naive_map(model().double(), digits(), "test")
    found = np.load(folder / "tables" / "input_gradient_test.npy")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every_n_epochs": -1}, "every_n_epochs=-1"), ({"limit_batches": 0}, "limit_batches=0: at least one batch")],
)
def test_bad_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputGradientMap(**settings)
