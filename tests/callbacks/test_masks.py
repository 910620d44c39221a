"""Every callback that attacks takes the mask of the batch: nothing outside it moves, and 1 and 2 processes agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_robust.attacks import (
    APGD,
    CW,
    FGSM,
    JSMA,
    PGD,
    Attack,
    AutoAttack,
    DeepFool,
    OnePixel,
    RandomNoise,
    Square,
)
from lightning_robust.callbacks import (
    AdversarialAccuracy,
    CatastrophicOverfitting,
    DistillationStudy,
    ForegroundStudy,
    GrayBoxTable,
    InputGradientMap,
    MaskedPGD,
    MutationDetection,
    OnePixelStudy,
    PixelIoU,
    RobustnessCurve,
)
from lightning_robust.datamodules import Digits
from lightning_robust.datamodules.dataset import ImageDataset
from lightning_robust.datamodules.masks import MaskedTensorSource
from lightning_robust.defenses import Binarization
from lightning_robust.detectors import ImageMutation, MutationTestingDetector
from lightning_robust.errors import UserError
from lightning_robust.metrics import intersection_over_union
from lightning_robust.models import ForegroundNetwork, MaskAttack, create_segmenter
from lightning_robust.modules import ForegroundClassifier, ImageClassifier, OptimizerSettings, SegmenterSettings
from lightning_robust.objectives import FastFGSM

Make = Callable[..., Any]
PGD_ = PGD(eps=0.3, steps=4)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )


def module_of(weights: dict[str, Tensor], **settings: Any) -> ForegroundClassifier:
    net = network()
    net.load_state_dict(weights)
    torch.manual_seed(3)
    settings = {"segmenter": SegmenterSettings(width=4, depth=2), "optimizer": OptimizerSettings(lr=0.01)} | settings
    return ForegroundClassifier(net, 10, (1, 8, 8), **settings)


class MaskedDigits(pl.LightningDataModule):
    """23 test digits with masks of a frame's inside, batches of 10; ranks get every second one."""

    has_val = True

    def __init__(self, masks: bool = True) -> None:
        super().__init__()
        samples = Digits().dataset("test").__getitems__(range(40))
        inside = torch.zeros(40, 1, 8, 8, dtype=torch.bool)
        inside[..., 1:7, 2:6] = True
        inside[::3, :, 0] = True  # not all alike
        self.images, self.labels, self.masks = samples.images, samples.labels, inside
        self.with_masks = masks

    def _loader(self, count: int) -> DataLoader[Any]:
        trainer = self.trainer
        rows = range(trainer.global_rank, count, trainer.world_size)
        parts = (self.images, self.labels, self.masks) if self.with_masks else (self.images, self.labels)
        return DataLoader(Subset(TensorDataset(*parts), rows), batch_size=10)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(40)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(23)

    val_dataloader = test_dataloader

    def dataset(self, split: str) -> ImageDataset:
        images = (self.images * 255).round().to(torch.uint8)
        labels = self.labels.numpy()
        return ImageDataset(MaskedTensorSource(images, labels, self.masks, None), torch.arange(40).numpy(), labels)


class Watched:
    """Counts the attacks that run, and how many of them have a mask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.masked = 0
        perturb = Attack._problem

        def watched(attack: Attack, *given: Any) -> Any:
            problem = perturb(attack, *given)
            self.runs += 1
            self.masked += problem.mask is not None
            return problem

        monkeypatch.setattr(Attack, "_problem", watched)


FLAT = {
    "adversarial_accuracy": lambda: AdversarialAccuracy({"pgd": PGD_, "cw": CW(steps=3, binary_search_steps=1)}),
    "robustness_curve": lambda: RobustnessCurve([0.0, 0.1, 0.3], attack=PGD(steps=3)),
    "masked_pgd": lambda: MaskedPGD(PGD_, [0.25, 0.5], attack_within_mask=True),
    "gray_box": lambda: GrayBoxTable({"pgd": PGD_}, {"binarization": Binarization()}, limit_images=None),
    "one_pixel": lambda: OnePixelStudy({"one": OnePixel(population=4, generations=2)}, limit_images=7),
    "distillation": lambda: DistillationStudy(1.0, limit_images=5, max_features=4, pgd_steps=2, cw_steps=2),
    "mutation": lambda: MutationDetection(
        {"pgd": PGD_}, detectors={"image": MutationTestingDetector(ImageMutation(), cap=4)}, limit_images=6
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_callbacks_attack_within_the_mask(
    name: str, weights: dict[str, Tensor], trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a module sees the foreground every attack has the mask, where it sees the image none but masked PGD has."""
    watched = Watched(monkeypatch)
    run = trainer(FLAT[name]())
    run.test(module_of(weights), MaskedDigits(), verbose=False)
    assert watched.runs > 0
    assert watched.masked == watched.runs
    watched.runs = watched.masked = 0
    run = trainer(FLAT[name]())
    run.test(module_of(weights, masks="missing"), MaskedDigits(), verbose=False)
    assert watched.runs > 0
    assert (watched.masked == 0) == (name != "masked_pgd")


BOTH = [*((name, "given") for name in FLAT), *itertools.product(("study", "map"), ("given", "predicted"))]


@pytest.mark.parametrize(("name", "masks"), BOTH)
def test_one_process_and_two_agree(name: str, masks: Any, weights: dict[str, Tensor], trainer: Make) -> None:
    make = (
        FLAT.get(name)
        or {
            "study": lambda: ForegroundStudy(PGD_, PGD(eps=0.3, steps=6), 7, [1]),
            "map": lambda: InputGradientMap(),
        }[name]
    )
    found = []
    for devices in (1, 2):
        extra = [PixelIoU(mask="batch", share=0.25)] if name == "map" else []
        run = trainer(make(), *extra, devices=devices, precision="64-true", use_distributed_sampler=False)
        run.test(module_of(weights, masks=masks, fill="noise"), MaskedDigits(), verbose=False)
        found.append({what: float(value) for what, value in run.callback_metrics.items()})
    assert len(found[0]) > 3 or name == "map"
    assert found[0] == pytest.approx(found[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("pixels", ["foreground", "image"])
def test_a_callback_may_say_where(
    pixels: Any, weights: dict[str, Tensor], trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    net = network()
    net.load_state_dict(weights)
    for module in (module_of(weights), ImageClassifier(net, 10, (1, 8, 8))):
        watched.runs = watched.masked = 0
        trainer(AdversarialAccuracy({"pgd": PGD_}, pixels=pixels)).test(module, MaskedDigits(), verbose=False)
        assert watched.runs > 0
        assert watched.masked == (watched.runs if pixels == "foreground" else 0)
    with pytest.raises(UserError, match="choose foreground or image"):
        AdversarialAccuracy({"pgd": PGD_}, pixels="mask")  # type: ignore[arg-type]


def test_the_foreground_of_data_without_masks_is_refused(weights: dict[str, Tensor], trainer: Make) -> None:
    net = network()
    with pytest.raises(UserError, match="the data gives no masks"):
        trainer(AdversarialAccuracy({"pgd": PGD_}, pixels="foreground")).test(
            ImageClassifier(net, 10, (1, 8, 8)), MaskedDigits(masks=False), verbose=False
        )


def test_single_step_training_is_watched_within_the_mask(
    weights: dict[str, Tensor], trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    module = module_of(weights, objective=FastFGSM(eps=0.1))
    run = trainer()
    run.fit(module, MaskedDigits())
    assert any(isinstance(callback, CatastrophicOverfitting) for callback in run.callbacks)
    assert watched.runs == 5
    assert watched.masked == 5


# -- every attack, through a predicted mask ----------------------------------------------------------------------------

ATTACKS = {
    "fgsm": FGSM(eps=0.2),
    "pgd": PGD(eps=0.2, steps=3),
    "pgd_l2": PGD(eps=1.0, norm="l2", steps=3),
    "pgd_l1": PGD(eps=4.0, norm="l1", steps=3),
    "apgd": APGD(eps=0.2, steps=5),
    "autoattack": AutoAttack(eps=0.2, version="custom", attacks=["apgd-ce", "fab-t", "square"]),
    "cw": CW(steps=4, binary_search_steps=2),
    "deepfool": DeepFool(steps=3),
    "jsma": JSMA(gamma=0.1),
    "one_pixel": OnePixel(pixels=2, population=8, generations=3),
    "square": Square(eps=0.2, queries=20),
    "noise": RandomNoise(eps=0.2),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_outside_the_mask_moves_through_a_predicted_mask(name: str, weights: dict[str, Tensor]) -> None:
    """And a mask stays with its image when others leave: alone an image gets what it gets in the batch."""
    net = network()
    net.load_state_dict(weights)
    torch.manual_seed(0)
    whole = ForegroundNetwork(net, create_segmenter("unet", (1, 8, 8), width=4, depth=2)).eval()
    data = MaskedDigits()
    with torch.no_grad():
        whole.segmenter.network.head.bias.add_(0.5)  # type: ignore[union-attr]
    images, labels, masks = data.images[:9], data.labels[:9], data.masks[:9].clone()
    masks[::2, :, :4] = False
    attack = ATTACKS[name]
    result = attack.run(whole, images, labels, mask=masks)
    changed = result.images != images
    assert not changed[~masks].any()
    assert changed.any()
    alone = [
        attack.run(whole, images[row : row + 1], labels[row : row + 1], mask=masks[row : row + 1]) for row in range(9)
    ]
    assert torch.allclose(torch.cat([each.images for each in alone]), result.images, atol=1e-4)


def test_the_study_by_hand(weights: dict[str, Tensor], trainer: Make, tmp_path: Path) -> None:
    """The cells of a classifier of cut-out images."""
    module, data = module_of(weights, masks="given"), MaskedDigits()
    run = trainer(ForegroundStudy(PGD_, PGD(eps=0.3, steps=6), 7, [1]), logger=True)
    run.test(module, data, verbose=False)
    found = {name.removeprefix("test/foreground/"): float(value) for name, value in run.callback_metrics.items()}
    images, labels, masks = (part[:23] for part in (data.images, data.labels, data.masks))
    module.eval()
    net = module.network

    def robust(shown: Tensor, mask: Tensor | None, attack: Attack = PGD_) -> float:
        return float((~attack.run(net, shown, labels[: len(shown)], mask=mask).success).double().mean())

    cut, _ = module.cut_out(images, masks)
    for name, shown, attackers in (
        ("whole", images, {"foreground": masks, "image": None}),
        ("given", cut, {"foreground": masks, "image": None}),
        ("dilated_1", *(lambda s, m: (s, {"foreground": m}))(*module.cut_out(images, masks, 1))),
        ("eroded_1", *(lambda s, m: (s, {"foreground": m}))(*module.cut_out(images, masks, -1))),
    ):
        with torch.no_grad():
            assert found[f"{name}/clean"] == pytest.approx(float((net(shown).argmax(1) == labels).double().mean()))
        for attacker, mask in attackers.items():
            assert found[f"{name}/{attacker}"] == pytest.approx(robust(shown, mask))
    assert found["strong"] == pytest.approx(robust(cut[:7], masks[:7], PGD(eps=0.3, steps=6)))
    assert found["given/image"] <= found["given/foreground"] + 1e-9
    assert (found["own_view"], found["adversarial"], found["images"]) == (1, 0, 23)
    assert found["gradient_inside"] > 0
    assert found["gradient_outside"] > 0
    table = (Path(run.logger.folder) / "tables" / "foreground_test.csv").read_text()  # type: ignore[union-attr]
    assert 'given,"PGD, linf ε = 0.3",foreground' in table


def test_the_study_of_predicted_masks(weights: dict[str, Tensor], trainer: Make) -> None:
    module = module_of(weights, masks="predicted")
    run = trainer(ForegroundStudy(PGD_, strong_images=0, radii=[]))
    run.test(module, MaskedDigits(), verbose=False)
    found = {name.removeprefix("test/foreground/"): float(value) for name, value in run.callback_metrics.items()}
    assert {f"predicted/{what}" for what in ("clean", "foreground", "image", "held", "masks")} <= found.keys()
    assert found["predicted/image"] <= found["predicted/clean"]
    assert found["own_view"] == 2
    data = MaskedDigits()
    images, labels, truth = data.images[:23], data.labels[:23], data.masks[:23]
    attacked = MaskAttack(eps=0.3, steps=20)(module.network.eval(), images, labels, truth)
    with torch.no_grad():
        right = [(module.network(x).argmax(1) == labels) for x in (images, attacked)]
        masks = [module.network.segmenter(x)[:, 0] > 0 for x in (images, attacked)]
    ious = [float(intersection_over_union(mask, truth[:, 0]).mean()) for mask in masks]
    assert found["predicted/masks"] == pytest.approx(float((right[0] & right[1]).double().mean()))
    assert (found["mask_iou"], found["mask_iou_attacked"]) == pytest.approx(ious, rel=1e-5)
    assert ious[1] < ious[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": [0]}, "by 1 pixel or more"),
        ({"strong_images": -1}, "0 leaves that attack out"),
        ({"attack": CW()}, "no budget for AutoAttack"),
        ({"acceleration": "fast"}, "choose exact, bf16 or none"),
        ({"name": "a/b"}, "cannot be a name"),
        ({"limit_images": 0}, "at least one image"),
    ],
)
def test_bad_settings_of_the_study(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ForegroundStudy(**settings)


def test_the_study_needs_masks(trainer: Make) -> None:
    with pytest.raises(UserError, match="ForegroundStudy needs masks"):
        trainer(ForegroundStudy(PGD_)).test(
            ImageClassifier(network(), 10, (1, 8, 8)), MaskedDigits(masks=False), verbose=False
        )
