"""Every logged number is the same on any number of devices and with any batch size; so are trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import APGD, FGSM, PGD
from lightning_robust.attacks.kl_pgd import KLPGD
from lightning_robust.callbacks import AdversarialAccuracy, InputGradientMap, PixelIoU, RobustnessCurve
from lightning_robust.datamodules import Digits
from lightning_robust.datamodules.sampler import UnpaddedSampler
from lightning_robust.loggers import RunLogger
from lightning_robust.modules import ImageClassifier, OptimizerSettings, ScheduleSettings
from lightning_robust.objectives import AWP, MART, TRADES, Natural, Objective, PGDAdversarial

ODD = 37  # test images: neither 2 nor 3 nor a batch size divides them


def tiny(norm: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Weights that classify most digits: an attack fools some images and not others."""
    torch.manual_seed(0)
    network = tiny()
    dataset = Digits().dataset("train")
    images, labels = next(iter(DataLoader(dataset, len(dataset), collate_fn=lambda b: (b.images, b.labels))))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.state_dict()


def classifier(weights: dict[str, Tensor] | None = None, norm: bool = True, **settings: Any) -> ImageClassifier:
    torch.manual_seed(0)
    network = tiny(norm)
    if weights is not None:
        network.load_state_dict(weights)
    return ImageClassifier(network, num_classes=10, image_shape=(1, 8, 8), **settings)


def still(weights: dict[str, Tensor]) -> ImageClassifier:
    """A model that training leaves as it is: what can differ is which images are measured."""
    model = classifier(weights, optimizer=OptimizerSettings(lr=1e-14, momentum=0, weight_decay=0))
    model.network[1].momentum = 0.0  # BatchNorm's statistics
    return model


def trainer(folder: Path, devices: int, **settings: Any) -> pl.Trainer:
    torch.set_num_threads(1)  # ranks are forked, which threads under way do not survive
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            "precision": "64-true",
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **settings,
        }
    )


def run_logger(folder: Path) -> RunLogger:
    logger = RunLogger(str(folder), "run")
    logger.prepare()  # before ranks are forked, so that this process knows the folder, too
    return logger


def measurements(folder: Path, **fitting: Any) -> list[pl.Callback]:
    mask = folder / "mask.npy"
    np.save(mask, np.tri(8) > 0)
    return [
        AdversarialAccuracy(
            {
                "fgsm": FGSM(eps=0.1),
                "pgd": PGD(eps=0.1, steps=4, restarts=2),  # random starts
                "kl": KLPGD(eps=0.1, steps=3),
                "apgd": APGD(eps=0.05, steps=6, loss="dlr"),
                "l2": PGD(eps=0.6, norm="l2", steps=4),
            },
            examples=0,  # drawing takes time
            **fitting,
        ),
        InputGradientMap(per_class=True, **fitting),
        PixelIoU(),
        PixelIoU(mask=str(mask), share=0.3, name="file_iou"),
        RobustnessCurve([0, "8/255", 0.1, 0.3], attack=PGD(steps=3)),
    ]


def metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}


def assert_same(found: dict[str, float], wanted: dict[str, float], tolerance: float = 1e-8) -> None:
    assert found.keys() == wanted.keys()
    different = {n: (found[n], wanted[n]) for n in wanted if not abs(found[n] - wanted[n]) <= tolerance}
    assert not different


@pytest.mark.parametrize("function", ["test", "validate"])
def test_every_number_on_any_number_of_devices_and_batch_size(
    trained: dict[str, Tensor], tmp_path: Path, function: str
) -> None:
    found, maps = [], []
    for devices, batch_size in ((1, ODD), (1, 5), (2, 7), (3, 4)):
        folder = tmp_path / f"{devices}_{batch_size}"
        folder.mkdir()
        logger = run_logger(folder)
        run = trainer(folder, devices, logger=logger, callbacks=measurements(folder))
        data = Digits(limit={"train": 400, "val": ODD, "test": ODD}, val_size=0.2, eval_batch_size=batch_size)
        getattr(run, function)(classifier(trained), data, verbose=False)
        found.append(metrics(run))
        stage = "val" if function == "validate" else "test"
        tables = Path(logger.log_dir) / "tables"
        names = (f"input_gradient_{stage}", f"input_gradient_per_class_{stage}")
        maps.append([np.load(tables / f"{name}.npy") for name in names])
        tables = {file.name: file.read_text() for file in tables.glob("*.csv")}
        found[-1] |= {f"{name}:{text}": 0.0 for name, text in tables.items()}
    # the numbers are not trivial: what is 0 or 1 everywhere would be equal in any case
    assert 0 < found[0][f"{stage}/robust_acc/worst_case"] < found[0][f"{stage}/robust_acc/fgsm"] < 1
    assert 0 < found[0][f"{stage}/robust_acc/kl"] < 1
    assert len(found[0]) >= 25
    for other, other_maps in zip(found[1:], maps[1:], strict=True):
        assert_same(other, found[0])
        for one, two in zip(maps[0], other_maps, strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-8)


class Masked(pl.LightningDataModule):
    """Digits with a mask for each image."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def test_dataloader(self) -> DataLoader[Any]:
        dataset = Digits(limit={"test": self.count}).dataset("test")
        whole = dataset.__getitems__(range(len(dataset)))
        masks = whole.images[:, 0] > 0.5
        replicas, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = UnpaddedSampler(dataset, replicas, rank)
        return DataLoader(TensorDataset(whole.images, whole.labels, masks), self.batch_size, sampler=sampler)


def test_masks_of_the_batch(trained: dict[str, Tensor], tmp_path: Path) -> None:
    found = []
    for devices, batch_size in ((1, 50), (2, 7), (3, 5)):
        iou = PixelIoU(mask="batch", share=0.25)
        run = trainer(tmp_path, devices, callbacks=[iou, InputGradientMap()])
        run.test(classifier(trained), Masked(ODD, batch_size), verbose=False)
        found.append(metrics(run))
    assert 0 < found[0]["test/input_gradient_iou"] < 1
    for other in found[1:]:
        assert_same(other, found[0])


def test_fit_measures_the_same_images_on_any_number_of_devices(trained: dict[str, Tensor], tmp_path: Path) -> None:
    found = []
    for devices in (1, 2, 3):
        folder = tmp_path / str(devices)
        folder.mkdir()
        callbacks = measurements(folder, limit_batches=2)[:4]
        run = trainer(folder, devices, max_epochs=1, callbacks=callbacks)
        data = Digits(limit={"train": 60, "val": ODD}, val_size=0.2, batch_size=30, eval_batch_size=5)
        run.fit(still(trained), data)
        found.append(metrics(run))
    for other in found[1:]:
        assert_same(other, found[0])
    # by hand: the first 2 batches of 5 images
    dataset = Digits(limit={"train": 60, "val": ODD}, val_size=0.2).dataset("val")
    batch = dataset.__getitems__(range(10))
    model = classifier(trained).double().eval()
    with torch.no_grad():
        clean = model(batch.images.double()).argmax(1) == batch.labels
    adversarial = FGSM(eps=0.1)(model, batch.images.double(), batch.labels)
    robust = clean & (model(adversarial).argmax(1) == batch.labels)
    assert found[0]["val/robust_acc/fgsm"] == pytest.approx(float(robust.double().mean()))


def test_fewer_wanted_images_than_devices(trained: dict[str, Tensor], tmp_path: Path) -> None:
    """One image is measured: the other rank has none and must not wait or spoil the mean."""
    found = []
    for devices in (1, 2):
        callbacks = [AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}, limit_batches=1), InputGradientMap(), PixelIoU()]
        run = trainer(tmp_path, devices, max_epochs=1, callbacks=callbacks)
        data = Digits(limit={"train": 20, "val": 11}, val_size=0.2, batch_size=20, eval_batch_size=1)
        run.fit(still(trained), data)
        found.append(metrics(run))
    assert np.isfinite(found[0]["val/input_gradient_mean"])
    assert_same(found[1], found[0])


def test_one_device_evaluates_in_inference_mode(trained: dict[str, Tensor], tmp_path: Path) -> None:
    """A distributed test runs under no_grad instead, so it cannot see what inference mode breaks."""
    modes = []

    class Spy(pl.Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            modes.append(torch.is_inference_mode_enabled())

        on_validation_batch_end = on_test_batch_end

    data = Digits(limit={"train": 60, "val": 20, "test": 20}, val_size=0.2, batch_size=30)
    model = classifier(trained)
    run = trainer(tmp_path, 1, max_epochs=1, callbacks=[*measurements(tmp_path), Spy()])
    run.validate(model, data, verbose=False)
    run.test(model, data, verbose=False)
    run.fit(model, data)  # and training goes on with the metrics that were made in inference mode
    run.test(model, data, verbose=False)
    assert modes == [True, True, False, True]  # validation inside fit runs under no_grad


OBJECTIVES: dict[str, Objective] = {
    "natural": Natural(),
    "pgd": PGDAdversarial(attack=PGD(eps=0.1, steps=3)),
    "pgd_awp": PGDAdversarial(attack=PGD(eps=0.1, steps=3, random_start=False), awp=AWP(gamma=0.01)),
    "trades": TRADES(eps=0.1, step_size=0.04, steps=3),
    "trades_awp": TRADES(eps=0.1, step_size=0.04, steps=3, awp=AWP(gamma=0.005)),
    "mart": MART(eps=0.1, step_size=0.04, steps=3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, name: str) -> None:
    ends, logged = [], []
    for devices in (1, 2):
        model = classifier(
            norm=False,
            objective=OBJECTIVES[name],
            optimizer=OptimizerSettings(lr=0.1),
            schedule=ScheduleSettings(name="cyclic"),
        )
        start = {key: value.clone() for key, value in model.state_dict().items()}
        path = tmp_path / f"{devices}.ckpt"
        run = trainer(tmp_path, devices, max_epochs=2, callbacks=[InputGradientMap(), _Save(path)])
        run.fit(model, Digits(limit={"train": 96, "val": 20}, val_size=0.2, batch_size=24, augmentation="crop"))
        ends.append(torch.load(path, weights_only=True))
        logged.append({key: float(value) for key, value in run.callback_metrics.items()})
    assert all(value.dtype == torch.float64 for value in ends[0].values())
    assert max(float((ends[0][key] - start[key]).abs().max()) for key in start) > 0.01
    for key in ends[0]:
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=0, atol=1e-6)
    assert_same(logged[1], logged[0], 1e-6)
    assert "train/loss" in logged[0]
    assert ("train/input_gradient_mean" in logged[0]) == (name == "pgd_awp")


class _Save(pl.Callback):
    """A forked rank's weights die with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)
