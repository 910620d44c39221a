"""Training on foregrounds: what the network sees, where attacks go, which part learns, and what a checkpoint brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import PGD
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch
from lightning_robust.datamodules import Digits, MaskedImageFolder
from lightning_robust.errors import UserError
from lightning_robust.metrics import intersection_over_union
from lightning_robust.models import ForegroundNetwork, MaskAttack, compose, grow_masks
from lightning_robust.modules import ForegroundClassifier, ImageClassifier, OptimizerSettings, SegmenterSettings
from lightning_robust.objectives import FastFGSM, Natural, PGDAdversarial

SHAPE = (1, 8, 8)
SMALL = SegmenterSettings(width=4, depth=2)
ATTACK = PGD(eps=0.2, steps=3)


def own() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )


def classifier(**settings: Any) -> ForegroundClassifier:
    torch.manual_seed(1)
    settings = {"segmenter": SMALL, "optimizer": OptimizerSettings(lr=0.05)} | settings
    return ForegroundClassifier(own(), 10, SHAPE, **settings)


def samples(count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    batch = Digits().dataset("train").__getitems__(range(count))
    return batch.images, batch.labels, batch.images > 0.3


class WithMasks(pl.LightningDataModule):
    """Digits on grey, with masks of their ink, unevenly many; every rank gets other images."""

    def __init__(self, masks: bool = True) -> None:
        super().__init__()
        images, labels, found = samples()
        images = torch.where(found, images, 0.4 * torch.rand_like(images))
        self.data = TensorDataset(images, labels, found) if masks else TensorDataset(images, labels)

    def _loader(self, count: int) -> DataLoader[Any]:
        trainer = self.trainer
        rows = range(trainer.global_rank, count, trainer.world_size)
        return DataLoader(torch.utils.data.Subset(self.data, rows), batch_size=20 // trainer.world_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(40)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(23)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(folder: Path, *callbacks: pl.Callback, devices: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            "use_distributed_sampler": False,
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


class Seen(pl.Callback):
    """Keeps what training batches and the objective's images were."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.shown: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.batches.append(batch)
        if not self.shown:
            module.network.register_forward_pre_hook(lambda _, given: self.shown.append(given[0].detach().clone()))


# -- masks that are given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fill", "grow"), [("black", 0), ("mean", 1), ("noise", -1)])
def test_a_batch_is_cut_out_on_its_way(tmp_path: Path, fill: Any, grow: int) -> None:
    seen, module, data = Seen(), classifier(fill=fill, grow=grow), WithMasks()
    trainer(tmp_path, seen).fit(module, data)
    images, labels, masks = (part[:20] for part in data.data.tensors)
    wanted, seen_pixels = module.cut_out(images, masks)
    assert torch.equal(seen.batches[0].images, wanted)
    assert torch.equal(seen.batches[0].mask, grow_masks(masks, grow))
    assert torch.equal(seen.batches[0].mask, seen_pixels)
    inside = seen_pixels.expand_as(images)
    assert torch.equal(wanted[inside], images[inside])
    if fill == "black":
        assert (wanted[~inside] == 0).all()
    assert torch.equal(seen.batches[0].labels, labels)


def test_missing_masks_leave_the_image_whole(tmp_path: Path) -> None:
    seen, data = Seen(), WithMasks()
    trainer(tmp_path, seen).fit(classifier(masks="missing"), data)
    assert torch.equal(seen.batches[0].images, data.data.tensors[0][:20])


@pytest.mark.parametrize("acceleration", ["exact", "none"])
@pytest.mark.parametrize("objective", [PGDAdversarial(attack=ATTACK), FastFGSM(eps=0.2, detect_overfitting=True)])
def test_training_attacks_the_foreground_alone(tmp_path: Path, acceleration: Any, objective: Any) -> None:
    module, data = classifier(objective=objective, attack_acceleration=acceleration), WithMasks()
    found: list[Any] = []
    training_output = module.training_output

    def keep(*given: Any) -> Any:
        found.append((given[0], module._mask, training_output(*given)))
        return found[-1][2]

    module.training_output = keep  # type: ignore[method-assign]
    trainer(tmp_path).fit(module, data)
    assert len(found) == 2
    for images, mask, output in found:
        changed = output.images_adv != images
        assert changed.any()
        assert not changed[~mask.expand_as(changed)].any()


def test_the_whole_image_where_it_is_allowed(tmp_path: Path) -> None:
    module = classifier(objective=PGDAdversarial(attack=ATTACK), attack_pixels="image")
    images, labels, masks = samples(8)
    shown, module._mask = module.cut_out(images, masks)
    pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").strategy._lightning_module = module
    output = module.objective(module.network, shown, labels, seed=0, mask=None)
    assert (output.images_adv != shown)[~masks].any()


def test_equals_training_on_the_data_set_that_is_cut_out(tmp_path: Path) -> None:
    """The paper's X_fg: black pixels in place of the background, and no more."""
    settings = {"objective": Natural(), "optimizer": OptimizerSettings(lr=0.05)}
    data = WithMasks()
    module = classifier(**settings)
    trainer(tmp_path, max_epochs=2).fit(module, data)
    images, labels, masks = data.data.tensors
    plain = ImageClassifier(own(), 10, SHAPE, **settings)
    cut = WithMasks()
    cut.data = TensorDataset(compose(images, masks), labels)
    trainer(tmp_path, max_epochs=2).fit(plain, cut)
    assert all(torch.equal(a, b) for a, b in zip(module.network.parameters(), plain.network.parameters(), strict=True))


# -- masks that are predicted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Natural(), PGDAdversarial(attack=ATTACK)])
@pytest.mark.parametrize("trains", ["both", "classifier", "segmenter"])
def test_which_part_learns(tmp_path: Path, trains: Any, objective: Any) -> None:
    module = classifier(masks="predicted", trains=trains, objective=objective)
    assert isinstance(module.network, ForegroundNetwork)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, WithMasks())
    moved = {
        name.partition(".")[0] for name, value in module.network.state_dict().items() if not value.equal(before[name])
    }
    assert moved == {"both": {"classifier", "segmenter"}}.get(trains, {trains})
    assert 0 < float(run.callback_metrics["val/mask_iou"]) <= 1
    assert bool(run.callback_metrics["train/loss"].isfinite())


def test_the_masks_are_learned(tmp_path: Path) -> None:
    module = classifier(masks="predicted", optimizer=OptimizerSettings(name="adam", lr=0.02, weight_decay=0.0))
    run = trainer(tmp_path, max_epochs=25)
    run.test(module, WithMasks(), verbose=False)
    untrained = float(run.callback_metrics["test/mask_iou"])
    run.fit(module, WithMasks())
    run.test(module, WithMasks(), verbose=False)
    assert float(run.callback_metrics["test/mask_iou"]) > untrained + 0.2
    assert float(run.callback_metrics["test/mask_iou"]) > 0.6  # some of the background is as bright as ink
    images, _, masks = samples(10)
    with torch.no_grad():
        assert module.network.predict_masks(images).shape == masks.shape


def test_masks_trained_against_an_attack_on_them_withstand_it_better(tmp_path: Path) -> None:
    attack = MaskAttack(eps=0.15, steps=3)
    torch.manual_seed(0)
    data = WithMasks()
    images, labels, truth = data.data.tensors
    found = []
    for mask_attack in (None, attack):
        module = classifier(
            masks="predicted",
            trains="segmenter",
            mask_attack=mask_attack,
            optimizer=OptimizerSettings(name="adam", lr=0.02, weight_decay=0.0),
        )
        trainer(tmp_path, max_epochs=20).fit(module, data)
        module.eval()
        attacked = attack(module.network, images, labels, truth)
        with torch.no_grad():
            found.append(
                float(intersection_over_union(module.network.predict_masks(attacked)[:, 0], truth[:, 0]).mean())
            )
    assert found[1] > found[0] + 0.03


def test_the_segmenter_starts_before_a_classifier_that_was_trained_with_masks(tmp_path: Path) -> None:
    first = ForegroundClassifier("digits_cnn", 10, SHAPE, segmenter=SMALL)
    run = trainer(tmp_path)
    run.fit(first, WithMasks())
    run.save_checkpoint(tmp_path / "given.ckpt")
    second = ForegroundClassifier(
        "digits_cnn",
        10,
        SHAPE,
        masks="predicted",
        trains="segmenter",
        segmenter=SMALL,
        weights=str(tmp_path / "given.ckpt"),
    )
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.classifier.state_dict()[name], value)


# -- checkpoints, ranks, and mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["given", "predicted"])
def test_a_checkpoint_brings_all_along(tmp_path: Path, masks: Any) -> None:
    attack = MaskAttack(eps="8/255", steps=2) if masks == "predicted" else None
    module = ForegroundClassifier(
        "digits_cnn", 10, SHAPE, masks=masks, fill="mean", grow=1, segmenter=SMALL, mask_attack=attack
    )
    run = trainer(tmp_path)
    run.fit(module, WithMasks())
    run.save_checkpoint(tmp_path / "m.ckpt")
    again = ForegroundClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    assert again.mask_attack == attack
    assert (again.masks, again.fill, again.grow, again.attack_pixels) == (masks, "mean", 1, module.attack_pixels)
    images = samples(6)[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(images), module.eval()(images))


@pytest.mark.parametrize(
    "settings",
    [
        {"fill": "noise", "objective": PGDAdversarial(attack=ATTACK)},
        {"masks": "predicted", "mask_attack": MaskAttack(eps=0.1, steps=2)},
    ],
)
def test_one_process_and_two_agree(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Without BatchNorm, whose statistics are each rank's own."""
    torch.set_num_threads(1)
    found = []
    for devices in (1, 2):
        module = classifier(**settings)
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Identity())
        run = trainer(tmp_path, devices=devices, precision="64-true")
        run.fit(module, WithMasks())
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert found[0].keys() == found[1].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.real_data
def test_on_real_objects(real_data: Path, tmp_path: Path) -> None:
    """Crops of COCO with their masks, from a folder: cut out in training, and attacked on the object alone."""
    data = MaskedImageFolder(
        str(real_data / "coco_objects"), image_size=32, test_size=0.3, val_size=0.1, batch_size=16, num_workers=0
    )
    seen = Seen()
    module = ForegroundClassifier(
        "small_cnn", data.num_classes, (3, 32, 32), objective=PGDAdversarial(attack=ATTACK), segmenter=SMALL
    )
    run = trainer(tmp_path, seen, limit_train_batches=3, use_distributed_sampler=True)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    assert 0 <= float(run.callback_metrics["test/acc"]) <= 1
    for batch in seen.batches:
        outside = (~batch.mask).expand_as(batch.images)
        assert 0.02 < float(batch.mask.float().mean()) < 0.98
        assert (batch.images[outside] == 0).all()
        changed = ATTACK(module.network, batch.images, batch.labels, mask=batch.mask) != batch.images
        assert changed.any()
        assert not changed[outside].any()


def test_noise_keys_are_tied_to_the_seed() -> None:
    images, _, masks = samples(4)
    one, two = (classifier(fill="noise", seed=seed).cut_out(images, masks)[0] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert mix_seed(0) != mix_seed(1)


@pytest.mark.parametrize("settings", [{}, {"masks": "missing", "attack_pixels": "foreground"}, {"masks": "predicted"}])
def test_data_without_masks_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="masks, and the batches are"):
        trainer(tmp_path).fit(classifier(**settings), WithMasks(masks=False))


def test_masks_that_do_not_fit() -> None:
    module = classifier()
    images, labels, masks = samples(4)
    for wrong, message in (
        (masks[..., 1:], "do not fit images"),
        (masks[:3], "do not fit images"),
        (masks.float() * 0.5, "nothing between"),
    ):
        with pytest.raises(UserError, match=message):
            module.on_after_batch_transfer((images, labels, wrong), 0)
    assert module.on_after_batch_transfer((images, labels, masks[:, 0].float()), 0).mask.dtype == torch.bool


def test_empty_and_full_masks() -> None:
    module = classifier(objective=PGDAdversarial(attack=ATTACK))
    images, labels, masks = samples(4)
    shown = module.on_after_batch_transfer((images, labels, torch.ones_like(masks)), 0)
    assert torch.equal(shown.images, images)
    shown = module.on_after_batch_transfer((images, labels, torch.zeros_like(masks)), 0)
    assert (shown.images == 0).all()
    assert torch.equal(ATTACK(module.network, shown.images, labels, mask=shown.mask), shown.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "some"}, "choose given, predicted or missing"),
        ({"fill": "grey"}, "choose black, mean or noise"),
        ({"grow": 0.5}, "whole number of pixels"),
        ({"attack_pixels": "mask"}, "choose foreground or image"),
        ({"segmentation_weight": 0.0}, "a positive number"),
        ({"trains": "all"}, "choose both, classifier or segmenter"),
        ({"trains": "segmenter"}, "where masks are predicted"),
        ({"mask_attack": MaskAttack()}, "a segmenter that learns"),
        ({"masks": "predicted", "trains": "classifier", "mask_attack": MaskAttack()}, "a segmenter that learns"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classifier(**settings)
    with pytest.raises(UserError, match=r"segmenter\.name"):
        SegmenterSettings(name="vnet")  # type: ignore[arg-type]
