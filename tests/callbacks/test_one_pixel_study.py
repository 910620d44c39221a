"""The one-pixel study: equal to attacks by hand, on any number of devices, and after it was killed."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD
from lightning_robust.attacks.one_pixel import OnePixel
from lightning_robust.attacks.one_pixel_evolution import Evolution
from lightning_robust.callbacks.one_pixel_report import print_rates, published
from lightning_robust.callbacks.one_pixel_runs import Runs
from lightning_robust.callbacks.one_pixel_study import OnePixelStudy
from lightning_robust.callbacks.one_pixel_unfinished import Unfinished, fingerprint
from lightning_robust.errors import UserError

Make = Callable[..., Any]
SMALL = {"population": 12, "generations": 5, "stop": "label"}
ATTACKS = {"pixels1": OnePixel(**SMALL), "pixels3": OnePixel(pixels=3, **SMALL)}


def measured(run: Any) -> dict[str, float]:
    return {
        name.removeprefix("test/one_pixel/"): float(value)
        for name, value in run.callback_metrics.items()
        if "one_pixel" in name
    }


def table(tmp_path: Path, name: str, version: int = 0) -> list[dict[str, str]]:
    with (tmp_path / "runs" / "run" / f"version_{version}" / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_all_targets_equal_runs_by_hand(model: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any) -> None:
    limit = 12
    run = trainer(OnePixelStudy(ATTACKS, limit_images=limit), logger=True, precision="64-true")
    run.test(model(), digits(eval_batch_size=5), verbose=False)
    found = measured(run)
    module, dataset = model().double().eval(), digits().dataset("test")
    for name, attack in ATTACKS.items():
        reached: list[int] = []
        sure: list[float] = []
        any_change, runs = 0, 0
        for index in range(limit):  # image by image, target by target
            image, label = dataset[index]
            image = image[None].double()
            if int(module(image).argmax()) != label:
                continue
            hits, changes = 0, False
            for target in range(10):
                if target == label:
                    continue
                result = attack.run(module, image, torch.tensor([label]), targets=torch.tensor([target]))
                with torch.no_grad():
                    probabilities = module(result.images).softmax(1)[0]
                hits += bool(result.success)
                changes |= int(probabilities.argmax()) != label
                sure += [float(probabilities[target])] if result.success else []
                runs += 1
            reached.append(hits)
            any_change += changes
        wanted = {
            "success_rate_targeted": sum(reached) / runs,
            "success_rate_nontargeted": sum(hits > 0 for hits in reached) / len(reached),
            "success_rate_any_change": any_change / len(reached),
            "confidence": sum(sure) / len(sure),
            "mean_classes_reached": sum(reached) / len(reached),
        }
        assert {what: found[f"{name}/{what}"] for what in wanted} == pytest.approx(wanted)
        rows = [row for row in table(tmp_path, "one_pixel_classes_reached_test") if row["attack"] == name]
        assert [int(row["images"]) for row in rows] == [reached.count(number) for number in range(10)]
        assert len(table(tmp_path, f"one_pixel_{name}_runs_test")) == runs
    assert 0 < found["pixels1/success_rate_targeted"] < found["pixels3/success_rate_targeted"] < 1
    figures = {path.name for path in (tmp_path / "runs" / "run" / "version_0" / "figures").iterdir()}
    each = {f"one_pixel_{name}_{what}_test.png" for name in ATTACKS for what in ("examples", "pairs")}
    assert figures == {"one_pixel_classes_reached_test.png", *each}
    said = capsys.readouterr().out
    assert "One-pixel study (test)" in said
    assert f"{100 * found['pixels1/success_rate_targeted']:.2f} %" in said
    assert "paper" not in said  # digits are not like the paper's images


def test_tables_say_what_was_changed(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    data = digits()
    attack = ATTACKS["pixels3"]
    study = OnePixelStudy({"pixels3": attack}, acceleration="none")
    run = trainer(study, logger=True)
    run.test(model(), data, verbose=False)
    module, dataset = model().eval(), data.dataset("test")
    rows = table(tmp_path, "one_pixel_pixels3_runs_test")
    assert [int(row["image"]) for row in rows] == sorted(int(row["image"]) for row in rows)
    checked = 0
    for row in rows:
        image, label = dataset[int(row["image"])]
        assert (row["true_class"], row["clean_prediction"]) == (str(label), str(label))
        adversarial = image.clone()
        for slot in (1, 2, 3):
            if row[f"row_{slot}"]:
                at = int(row[f"row_{slot}"]), int(row[f"column_{slot}"])
                assert float(row[f"before_{slot}"]) == pytest.approx(float(image[0, *at]) * 255, rel=1e-3)
                adversarial[0, *at] = float(row[f"after_{slot}"]) / 255
        with torch.no_grad():
            probabilities = module(adversarial[None]).softmax(1)[0]
        # the table rounds colours of 255ths to four digits, which is exact for 8-bit colours
        assert int(probabilities.argmax()) == int(row["prediction"])
        assert float(probabilities[int(row["target"])]) == pytest.approx(float(row["confidence"]), abs=1e-4)
        assert (row["success"] == "True") == (row["prediction"] == row["target"])
        checked += row["success"] == "True"
    assert checked > 5
    pairs = table(tmp_path, "one_pixel_pixels3_pairs_test")
    assert sum(int(pair["successes"]) for pair in pairs) == checked
    assert sum(int(pair["attempts"]) for pair in pairs) == len(rows)
    (summary,) = table(tmp_path, "one_pixel_test")
    low, rate, high = (float(summary[f"success_rate_targeted{end}"]) for end in ("_low", "", "_high"))
    assert rate == pytest.approx(checked / len(rows))
    assert low < rate < high


def test_without_targets_equals_runs_by_hand(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(OnePixelStudy(ATTACKS, targeted=False), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    found = measured(run)
    module, dataset = model().double().eval(), digits().dataset("test")
    batch = dataset.__getitems__(range(len(dataset)))
    images, labels = batch.images.double(), batch.labels
    right = module(images).argmax(1) == labels
    for name, attack in ATTACKS.items():
        result = attack.run(module, images[right], labels[right])
        probabilities = module(result.images).softmax(1).detach()
        wrong = probabilities.argmax(1) != labels[right]
        assert found[f"{name}/success_rate_nontargeted"] == pytest.approx(float(wrong.double().mean()))
        assert found[f"{name}/confidence"] == pytest.approx(float(probabilities.max(1).values[wrong].mean()))
        assert found[f"{name}/mean_generations"] == pytest.approx(float(result.iterations.double().mean()))
        assert f"{name}/success_rate_targeted" not in found
        rows = table(tmp_path, f"one_pixel_{name}_runs_test")
        assert [row["target"] for row in rows] == [""] * int(right.sum())
        assert sum(int(row["successes"]) for row in table(tmp_path, f"one_pixel_{name}_pairs_test")) == wrong.sum()
    assert not (tmp_path / "runs" / "run" / "version_0" / "tables" / "one_pixel_classes_reached_test.csv").exists()


def test_misclassified_images_count_as_the_formulas_say(model: Make, trainer: Make, digits: Make) -> None:
    attacks = {"pixels1": OnePixel(population=8, generations=1, stop="label")}
    module = model().double()
    dataset = digits().dataset("test")
    batch = dataset.__getitems__(range(len(dataset)))
    wrong = int((module.eval()(batch.images.double()).argmax(1) != batch.labels).sum())
    assert wrong > 0
    rates = {}
    for only_correct in (True, False):
        run = trainer(OnePixelStudy(attacks, only_correct=only_correct), precision="64-true")
        run.test(model(), digits(), verbose=False)
        rates[only_correct] = measured(run)["pixels1/success_rate_nontargeted"]
    count = len(dataset)
    assert rates[False] * count == pytest.approx(rates[True] * (count - wrong) + wrong)


@pytest.mark.parametrize("limit", [1, 7, 13, 500])
def test_limit_is_of_the_first_images(model: Make, trainer: Make, digits: Make, tmp_path: Path, limit: int) -> None:
    attacks = {"pixels1": OnePixel(population=4, generations=1)}
    run = trainer(OnePixelStudy(attacks, limit_images=limit, only_correct=False, targeted=False), logger=True)
    run.test(model(), digits(), verbose=False)
    numbers = [int(row["image"]) for row in table(tmp_path, "one_pixel_pixels1_runs_test")]
    assert numbers == list(range(min(limit, 23)))


def test_two_devices_measure_the_same(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    attacks = {"pixels1": OnePixel(**SMALL)}
    found = []
    for version, devices in enumerate((1, 2)):
        study = OnePixelStudy(attacks, limit_images=15)
        run = trainer(study, logger=True, devices=devices, precision="64-true")
        run.test(model(), digits(eval_batch_size=4), verbose=False)
        tables = ("one_pixel_test", "one_pixel_pixels1_runs_test", "one_pixel_pixels1_pairs_test")
        found.append((measured(run), [table(tmp_path, name, version) for name in tables]))
    (one, tables), (two, others) = found
    assert one == pytest.approx(two, rel=1e-12)
    assert not list((tmp_path / "runs" / "run").glob("unfinished*"))
    for some, same in zip(tables, others, strict=True):
        for row, other in zip(some, same, strict=True):
            exact = [{k: v for k, v in each.items() if "." not in v} for each in (row, other)]
            assert exact[0] == exact[1]


# -- killed and gone on ------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What ends a study before its time."""


@pytest.fixture
def advances(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts the generations that are made; raises when ``until`` of them are."""
    told: dict[str, Any] = {"made": 0, "until": math.inf}
    original = Evolution.advance

    def advance(self: Evolution, state: Any, generations: Any = None) -> None:
        if told["made"] >= told["until"]:
            raise Killed
        before = state.generation
        original(self, state, generations)
        told["made"] += state.generation - before

    monkeypatch.setattr(Evolution, "advance", advance)
    return told


LONG = {"pixels1": OnePixel(population=8, generations=9, seed=3)}


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("until", [4, 14, 26])
def test_a_killed_study_goes_on(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, advances: dict[str, Any], targeted: bool, until: int
) -> None:
    """Batches that were finished are not attacked again, and the one under way goes on from its last checkpoint."""

    def study() -> Any:
        run = trainer(OnePixelStudy(LONG, targeted=targeted, checkpoint_every=2), logger=True)
        run.test(model(), digits(), verbose=False)
        return measured(run)

    wanted = study()
    whole, advances["made"], advances["until"] = advances["made"], 0, until
    assert whole == 27  # three batches of nine generations: nothing is sure enough to stop
    with pytest.raises(Killed):
        study()
    home = tmp_path / "runs" / "run"
    kept = sorted((home / "unfinished_one_pixel").iterdir())
    assert [path.suffix for path in kept] == [".pt"] * min(until // 9 + 1, 3)
    made, advances["until"] = advances["made"], math.inf
    assert study() == wanted
    assert advances["made"] == whole, f"{made} generations were made before, none is made twice"
    assert not (home / "unfinished_one_pixel").exists()
    names = ("one_pixel_test", "one_pixel_pixels1_runs_test")
    assert [table(tmp_path, name, 2) for name in names] == [table(tmp_path, name, 0) for name in names]


def test_other_weights_settings_and_data_start_anew(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, advances: dict[str, Any]
) -> None:
    def study(module: Any, attack: OnePixel, **settings: Any) -> float:
        study = OnePixelStudy({"pixels1": attack}, resume_folder=str(tmp_path / "kept"), targeted=False)
        run = trainer(study)
        run.test(module, digits(**settings), verbose=False)
        return measured(run)["pixels1/mean_queries"]

    advances["until"] = 9
    with pytest.raises(Killed):
        study(model(), LONG["pixels1"])
    advances["until"] = math.inf
    other = model()
    with torch.no_grad():
        next(other.network.parameters()).mul_(1.01)
    for module, attack, settings in (
        (other, LONG["pixels1"], {}),
        (model(), LONG["pixels1"].replace(seed=4), {}),
        (model(), LONG["pixels1"], {"eval_batch_size": 5}),
    ):
        advances["made"] = 0
        study(module, attack, **settings)
        assert advances["made"] >= 27
    advances["made"] = 0
    study(model(), LONG["pixels1"])
    assert advances["made"] == 18  # the first batch was finished before


def test_nothing_is_kept_where_it_is_not_wanted(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    monkeypatch.setattr(Unfinished, "save", lambda self, key, found: saved.append(key))
    for settings, run in (
        ({"checkpoint_every": 0}, {"logger": True}),
        ({}, {}),  # no run's folder
        ({}, {"logger": True, "fast_dev_run": True}),
    ):
        study = OnePixelStudy({"pixels1": OnePixel(population=4, generations=1)}, targeted=False, **settings)
        trainer(study, **run).test(model(), digits(), verbose=False)
    assert not saved


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    files = Unfinished(tmp_path / "kept")
    assert files.load("a") is None
    files.folder.mkdir()
    for content in (b"", b"no torch file", b"PK\x03\x04"):
        (files.folder / "a.pt").write_bytes(content)
        with pytest.warns(UserWarning, match=r"a\.pt cannot be read, its batch is attacked anew"):
            assert files.load("a") is None
    for content in ({"runs": {"labels": torch.zeros(2)}}, [1]):
        torch.save(content, files.folder / "a.pt")
        with pytest.warns(UserWarning, match="cannot be read"):
            assert files.load("a") is None
    files.remove()
    assert not files.folder.exists()


def test_fingerprints_tell_apart_what_matters() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    images = torch.rand(2, 2)
    base = fingerprint(network, images, OnePixel())
    assert base == fingerprint(network, images.clone(), OnePixel())
    network[1].running_mean += 1
    others = {
        fingerprint(network, images, OnePixel()),
        fingerprint(network, images.double(), OnePixel()),
        fingerprint(network, images.view(4), OnePixel()),
        fingerprint(network, images, OnePixel(pixels=2)),
        fingerprint(nn.Sequential(*network, nn.ReLU()), images, OnePixel()),
    }
    assert len(others | {base}) == 6


# -- parts -------------------------------------------------------------------------------------------------------------


def test_runs_give_back_the_images_that_they_were_made_of() -> None:
    clean = torch.rand(2, 3, 4, 5)
    image = torch.tensor([0, 0, 1])
    adversarial = clean[image].clone()
    adversarial[0, :, 1, 4] = 1.0
    adversarial[0, 2, 3, 0] = 0.0  # one channel
    adversarial[2, :, 0, 0] = 0.5  # the second run changes nothing
    values: dict[str, Tensor] = {
        name: torch.zeros(3) for name in ("predicted", "confidence", "generations", "queries", "target")
    }
    batch: dict[str, Tensor] = {name: torch.zeros(2) for name in ("number", "labels", "clean_predicted")}
    runs = Runs.of(clean=clean, adversarial=adversarial, pixels=2, image=image, **values, **batch)
    assert runs.places.tolist() == [[[1, 4], [3, 0]], [[-1, -1], [-1, -1]], [[0, 0], [-1, -1]]]
    assert torch.equal(runs.written(clean, torch.arange(3)), adversarial)
    assert torch.equal(runs.written(clean, torch.tensor([2, 0])), adversarial[[2, 0]])


def test_the_papers_rates_stand_beside_images_like_its_own(model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    module = model()
    numbers = [str(number) for number in range(10)]
    assert published(module, numbers) == []
    module.image_shape = (3, 32, 32)
    assert published(module, [f"digit {number}" for number in range(10)]) == []  # SVHN's, say
    (cifar,) = published(module, numbers)
    assert [cifar] == published(module, ["airplane", "frog"])
    assert (cifar["success_rate_nontargeted"], cifar["confidence"]) == (0.6797, 0.7403)
    module.image_shape, module.num_classes = (3, 227, 227), 1000
    (imagenet,) = published(module, numbers)
    assert (imagenet["success_rate_nontargeted"], imagenet["confidence"]) == (0.1604, 0.2291)
    print_rates("test", [{"attack": "pixels1", "pixels": 1, "images": 3, "success_rate_targeted": 0.5}, cifar])
    said = capsys.readouterr().out
    assert all(word in said for word in ("50.00 %", "67.97 %", "74.03 %", "paper: Kaggle CIFAR-10", "–"))


def test_bad_settings_are_refused(model: Make, trainer: Make, digits: Make) -> None:
    attacks = {"pixels1": OnePixel(population=4, generations=1)}
    for match, settings in {
        "name at least one attack": {"attacks": {}},
        "'a/b' cannot be a name": {"attacks": {"a/b": OnePixel()}},
        "limit_images=0": {"limit_images": 0},
        "choose exact, bf16 or none": {"acceleration": "fast"},
        "are 0 or more": {"checkpoint_every": -1},
        "p is a PGD": {"attacks": {"p": PGD(eps=0.1)}},
        "set outputs of p to logits": {"attacks": {"p": OnePixel(outputs="probabilities")}},
    }.items():
        with pytest.raises(UserError, match=match):
            OnePixelStudy(**{"attacks": attacks, **settings})
    run = trainer(OnePixelStudy(attacks), OnePixelStudy(attacks))
    with pytest.raises(UserError, match="two of them log under the name 'one_pixel'"):
        run.test(model(), digits(), verbose=False)
