"""The detection study equals attacks and detectors by hand, on any number of devices; predictions that refuse."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from lightning_robust.attacks import CW, EOT, FGSM, JSMA, PGD, DeepFool, Transfer
from lightning_robust.callbacks import DetectAdversarial, MutationDetection, PredictionWriter
from lightning_robust.callbacks.mutation_detection_report import published
from lightning_robust.detectors import ImageMutation, ModelMutation, Mutants, MutationTestingDetector
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier

Make = Callable[..., Any]
ATTACKS = {"fgsm": FGSM(eps=0.15), "deepfool": DeepFool()}
ADAPTIVE = {
    "cw_confident": CW(confidence=1, steps=15, binary_search_steps=2, initial_const=1),
    "aimed": EOT(attack=PGD(eps=0.2, steps=3, stop_at_success=False), samples=3),
}
MUTANTS = 20


def detectors(**settings: Any) -> dict[str, MutationTestingDetector]:
    settings = {"cap": 40, **settings}
    return {
        "nai": MutationTestingDetector(ModelMutation(operator="nai", rate=0.1, min_accuracy=0.6), **settings),
        "noise": MutationTestingDetector(ImageMutation(operator="noise", strength=0.1), **settings),
    }


def study(**settings: Any) -> MutationDetection:
    given = {"attacks": ATTACKS, "detectors": detectors(), "adaptive": ADAPTIVE, "kappa_mutants": MUTANTS}
    return MutationDetection(**{**given, "limit_images": 13, "calibration_images": 20, **settings})


def measured(run: Any) -> dict[str, float]:
    start = "test/detection/"
    return {
        name.removeprefix(start): float(value) for name, value in run.callback_metrics.items() if name.startswith(start)
    }


def table(tmp_path: Path, name: str, version: int = 0) -> list[dict[str, str]]:
    with (tmp_path / "runs" / "run" / f"version_{version}" / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_equals_attacks_and_detectors_by_hand(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any
) -> None:
    run = trainer(study(), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    found, module, data = measured(run), model().double().eval(), digits()
    val, test = data.dataset("val"), data.dataset("test")
    calibrate = val.__getitems__([round(20 / 19 * number) for number in range(20)])
    batch = test.__getitems__(range(len(test)))
    images, labels = batch.images.double(), batch.labels
    right = module(images).argmax(1) == labels
    clean, truth = images[:13][right[:13]], labels[:13][right[:13]]
    assert int((~right).sum()) > 0
    for name, detector in detectors().items():
        detector.calibrate(module, calibrate.images.double(), calibrate.labels)
        assert found[f"{name}/kappa_nor"] == pytest.approx(detector.calibrated.kappa_nor)
        assert found[f"{name}/threshold"] == pytest.approx(detector.test.threshold)
        shown: dict[str, Tensor] = {"normal": clean, "wrong": images[~right]}
        for kind, attack in {**ATTACKS, **ADAPTIVE}.items():
            result = attack.run(Mutants(module, detector) if kind == "aimed" else module, clean, truth)
            shown[kind] = result.images[result.success]
            run_name = f"aimed_{name}" if kind == "aimed" else kind
            assert found[f"success_rate/{run_name}"] == pytest.approx(float(result.success.double().mean()))
        normal = detector.sensitivity(module, clean, MUTANTS)
        for kind, of in shown.items():
            assert len(of), kind
            decision = detector.decide(module, of)
            kappa = detector.sensitivity(module, of, MUTANTS)
            flagged = float(decision.adversarial.double().mean())
            what = "false_alarm_rate" if kind in ("normal", "wrong") else "detection_rate"
            wanted = {
                "kappa": float(kappa.mean()),
                what: flagged,
                "mutants": float(decision.mutants.double().mean()),
                "undecided": float((~decision.decided).double().mean()),
            }
            if kind != "normal":
                scores, target = torch.cat([normal, kappa]), torch.tensor([0] * len(normal) + [1] * len(kappa))
                wanted["auroc"] = float(BinaryAUROC()(scores, target))
            if kind == "normal":
                accepted = ~decision.adversarial
                wanted["system_acc"] = float(accepted.double().sum()) / 13
            elif kind != "wrong":
                wanted["system_acc"] = 1 - float((~decision.adversarial).double().sum()) / len(clean)
            assert {w: found[f"{name}/{kind}/{w}"] for w in wanted} == pytest.approx(wanted, abs=1e-6), (name, kind)
    rows = table(tmp_path, "detection_test")
    assert {(row["detector"], row["kind"]) for row in rows} == {
        (name, kind) for name in detectors() for kind in ("normal", "wrong", *ATTACKS, *ADAPTIVE)
    }
    counts = table(tmp_path, "detection_kappa_test")
    for row in rows:
        mine = [each for each in counts if (each["detector"], each["kind"]) == (row["detector"], row["kind"])]
        images_of = sum(int(each["images"]) for each in mine)
        assert images_of == int(row["images"])
        mean = sum(int(each["changes"]) * int(each["images"]) for each in mine) / MUTANTS / images_of
        assert mean == pytest.approx(float(row["kappa"]))
    figures = {path.name for path in (tmp_path / "runs" / "run" / "version_0" / "figures").iterdir()}
    assert figures == {f"detection_{name}_{what}_test.png" for name in detectors() for what in ("roc", "kappa")}
    said = capsys.readouterr().out
    assert "Mutation-testing detection (test), nai: model NAI 10 %" in said
    assert "README" not in said  # digits are not like the paper's images


def test_same_on_any_number_of_devices_and_batch_size(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    found, tables = [], []
    for version, (devices, size) in enumerate(((1, 23), (1, 4), (2, 5))):
        run = trainer(study(), devices=devices, logger=True, precision="64-true")
        run.test(model(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run))
        tables.append([table(tmp_path, name, version) for name in ("detection_test", "detection_kappa_test")])
    assert len(found[0]) > 40
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)
    assert all(other[1] == tables[0][1] for other in tables[1:])


def test_a_rank_without_wanted_images(model: Make, trainer: Make, digits: Make) -> None:
    found = []
    for devices in (1, 2):
        run = trainer(study(limit_images=1, adaptive=None), devices=devices, precision="64-true")
        run.test(model(), digits(), verbose=False)
        found.append(measured(run))
    assert found[1] == pytest.approx(found[0], abs=1e-9)


def test_measures_in_test_alone(model: Make, trainer: Make, digits: Make) -> None:
    run = trainer(study())
    run.validate(model(), digits(), verbose=False)
    run.fit(model(), digits())
    assert not [name for name in run.callback_metrics if "detection" in name]


def test_calibrated_detectors_are_used_as_they_are(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    module, given = model().eval(), detectors()
    batch = digits().dataset("val").__getitems__(range(21))
    for detector in given.values():
        detector.calibrate(module, batch.images, batch.labels)
    kappa = {name: detector.calibrated.kappa_nor for name, detector in given.items()}
    run = trainer(study(detectors=given, adaptive=None), logger=True)
    run.test(module, digits(val_size=0), verbose=False)
    found = measured(run)
    folder = tmp_path / "runs" / "run" / "version_0" / "detectors"
    for name in given:
        assert found[f"{name}/kappa_nor"] == kappa[name]
        assert MutationTestingDetector.load(folder / f"{name}.pt", module).calibrated.kappa_nor == kappa[name]
    torch.manual_seed(1)
    other = model()
    with torch.no_grad():
        other.network[0].weight.mul_(1.1)
    with pytest.raises(UserError, match="another model"):
        trainer(study(detectors=given, adaptive=None)).test(other, digits(), verbose=False)


def test_predictions_that_refuse(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    module, (detector, _) = model().eval(), detectors().values()
    batch = digits().dataset("val").__getitems__(range(21))
    detector.calibrate(module, batch.images, batch.labels)
    path = str(detector.save(tmp_path / "nai.pt"))
    test = digits().dataset("test")
    images = test.__getitems__(range(len(test))).images
    wanted = detector.decide(module, images)
    for version, devices in enumerate((1, 2)):
        run = trainer(DetectAdversarial(path), PredictionWriter(), devices=devices, logger=True)
        run.predict(module, digits(), return_predictions=False)
        rows = table(tmp_path, "predictions", version)
        assert [int(row["predicted"]) for row in rows] == wanted.predicted.tolist()
        refused = [int(row["verdict"]) == -1 for row in rows]
        assert refused == wanted.adversarial.tolist()
        assert [int(row["mutants"]) for row in rows] == wanted.mutants.tolist()
        assert [float(row["kappa"]) for row in rows] == pytest.approx(wanted.kappa.tolist())
        assert any(refused)
        assert not all(refused)


def test_predicting_with_the_detector_of_another_model(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    module, (detector, _) = model().eval(), detectors().values()
    batch = digits().dataset("val").__getitems__(range(21))
    detector.calibrate(module, batch.images, batch.labels)
    path = str(detector.save(tmp_path / "nai.pt"))
    with torch.no_grad():
        module.network[0].weight.mul_(1.1)
    with pytest.raises(UserError, match="another model"):
        trainer(DetectAdversarial(path)).predict(module, digits())


def test_quotes_the_readme_for_its_data_and_attacks() -> None:
    mnist = ImageClassifier("lenet5", 10, (1, 28, 28))
    cifar = ImageClassifier("small_cnn", 10, (3, 32, 32))
    nai = MutationTestingDetector(ModelMutation(operator="nai"))
    ns = MutationTestingDetector(ModelMutation(operator="ns"))
    assert published(mnist, nai, FGSM(eps=0.35)) == 0.9647
    assert published(mnist, ns, JSMA()) == 0.9960
    assert published(cifar, ns, DeepFool()) == 0.9502
    assert published(cifar, nai, Transfer(attack=FGSM(), surrogate=mnist)) == 0.8707
    assert published(cifar, nai, CW()) == 0.9264
    assert published(mnist, nai, PGD()) is None  # not among theirs
    assert published(mnist, nai, None) is None
    assert published(mnist, MutationTestingDetector(ImageMutation()), FGSM()) is None
    assert published(ImageClassifier("digits_cnn", 10, (1, 8, 8)), nai, FGSM()) is None
    assert published(ImageClassifier("small_cnn", 5, (3, 32, 32)), nai, FGSM()) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attacks": {}}, "at least one attack"),
        ({"detectors": {}}, "one detector"),
        ({"attacks": {"a/b": FGSM()}}, "cannot be a name"),
        ({"attacks": {"wrong": FGSM()}}, "'wrong' is taken"),
        ({"adaptive": {"fgsm": FGSM()}}, "'fgsm' is taken"),
        ({"limit_images": 0}, "limit_images=0"),
        ({"calibration_images": 0}, "calibration_images=0"),
        ({"kappa_mutants": 0}, "kappa_mutants=0"),
        ({"acceleration": "fast"}, "choose exact"),
    ],
)
def test_refuses(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        study(**settings)


def test_refuses_data_without_validation_images(model: Make, trainer: Make, digits: Make) -> None:
    with pytest.raises(UserError, match="calibrates its detectors on validation images"):
        trainer(study()).test(model(), digits(val_size=0), verbose=False)


def test_refuses_two_of_one_name(model: Make, trainer: Make, digits: Make) -> None:
    with pytest.raises(UserError, match="under the name 'detection'"):
        trainer(study(), study()).test(model(), digits(), verbose=False)
