"""The gray-box table: equal to attacks by hand, on any number of devices, and nothing is lost when it is stopped."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust.attacks import CW, EOT, FGSM, JSMA, PGD, Attack, OnePixel, OptMargin, ThreatModel, Transfer
from lightning_robust.attacks.base import Outcome, Problem
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.callbacks import AttackProgress, GrayBoxTable
from lightning_robust.callbacks.gray_box_report import Plan, fallen, rows
from lightning_robust.defenses import Defense, PixelShift, Randomization, RegionBased
from lightning_robust.errors import UserError
from lightning_robust.modules import PRMClassifier, PRMSettings

Make = Callable[..., Any]
ATTACKS = {
    "pgd": PGD(eps=0.08, steps=4),
    "one_pixel": OnePixel(pixels=3, population=8, generations=3, stop="label"),
    "l2": PGD(eps=0.6, norm="l2", steps=3),
}
MARGIN = OptMargin(radius=0.05, surrogates=3, steps=20, binary_search_steps=2, initial_const=1.0, eps=1.5)


def defenses() -> dict[str, dict[str, Any]]:
    return {
        "defenses": {
            "region": RegionBased(radius=0.05, votes=9, gradient_votes=3, seed=5),
            "vote": PixelShift(mode="vote"),
            "resize": Randomization(sizes=(8, 11), pad_to=11, resize_back=True),
        },
        "prm_defenses": {"shift": PixelShift(seed=3)},
    }


@pytest.fixture
def manipulated(model: Make) -> Make:
    """Make a module of the digits' classifier behind a small manipulator."""

    def make(**settings: Any) -> PRMClassifier:
        torch.manual_seed(1)
        settings = {"prm": PRMSettings(width=4, depth=2, skip=True), "lam": 0.5, **settings}
        return PRMClassifier(model().network, num_classes=10, image_shape=(1, 8, 8), **settings)

    return make


def measured(run: Any, stage: str = "test") -> dict[str, float]:
    starts = tuple(f"{stage}/{root}/" for root in ("gray_box", "white_box", "adaptive"))
    return {
        name.removeprefix(f"{stage}/"): float(value)
        for name, value in run.callback_metrics.items()
        if name.startswith(starts)
    }


def by_hand(module: Any, dataset: Any, count: int, samples: int) -> dict[str, float]:
    """Image by image: attack, then ask each defense."""
    module = module.double().eval()
    base, whole, given = module.network.classifier, module.network, defenses()
    protected = {name: defense.around(base) for name, defense in given["defenses"].items()}
    protected |= {name: defense.around(whole) for name, defense in given["prm_defenses"].items()}
    judges: dict[str, nn.Module] = {"none": base, "prm": whole}
    for name, defense in protected.items():
        judges[name] = defense.with_seed(mix_seed(defense.seed, 1)) if defense.random else defense
    to_the_end = {
        name: attack.replace(stop_at_success=False) if isinstance(attack, PGD) else attack
        for name, attack in ATTACKS.items()
    }
    right: dict[str, list[bool]] = {}
    for index in range(count):
        image, label = dataset[index]
        image, labels = image[None].double(), torch.tensor([label])
        here: dict[str, bool] = {}

        def ask(cell: str, judge: str, images: Any, labels: Any = labels, here: Any = here) -> None:
            here[f"{cell}"] = bool(judges[judge](images).argmax() == labels)

        for judge in judges:
            ask(f"gray_box/clean/{judge}", judge, image)
        for name, attack in to_the_end.items():
            made = attack(base, image, labels)
            for judge in judges:
                ask(f"gray_box/transfer-from-base/{judge}/{name}", judge, made)
            made = attack(whole, image, labels)
            for judge in ("prm", "shift"):
                ask(f"gray_box/prm-known-shift-unknown/{judge}/{name}", judge, made)
        for judge, defense in protected.items():
            for name in ("pgd", "l2"):
                attack = to_the_end[name] if defense.random else ATTACKS[name]
                ask(f"white_box/{judge}/{name}", judge, attack(defense, image, labels))
                attack = EOT(attack=attack, samples=samples) if defense.random else attack
                ask(f"adaptive/{judge}/{name}", judge, attack(defense, image, labels))
                here[f"adaptive/{judge}/{name}"] &= here[f"white_box/{judge}/{name}"]
            asking = ATTACKS["one_pixel"]  # asks the model, never its gradient: the mean of the draws, until it is sure
            if defense.random:
                asking = EOT(attack=asking.replace(stop="confidence"), samples=samples)
            ask(f"adaptive/{judge}/one_pixel", judge, asking(defense, image, labels))
        ask("adaptive/region/optmargin", "region", MARGIN(base, image, labels))
        starts = [
            f"{reading}/{judge}/"
            for reading in ("gray_box/transfer-from-base", "gray_box/prm-known-shift-unknown", "white_box", "adaptive")
            for judge in judges
        ]
        for start in starts:
            cells = [value for cell, value in here.items() if cell.startswith(start)]
            if cells:
                here[f"{start}worst_case"] = all(cells)
        for cell, value in here.items():
            right.setdefault(cell, []).append(value)
    return {cell: sum(values) / count for cell, values in right.items()}


def callback(**settings: Any) -> GrayBoxTable:
    settings = {
        "eot_samples": 4,
        "further_adaptive": {"region": MARGIN},
        "limit_images": 7,
        **defenses(),
        **settings,
    }
    return GrayBoxTable(ATTACKS, **settings)


def test_equals_attacks_by_hand(manipulated: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any) -> None:
    run = trainer(callback(), logger=True, precision="64-true")
    run.test(manipulated(), digits(eval_batch_size=3), verbose=False)
    found, wanted = measured(run), by_hand(manipulated(), digits().dataset("test"), 7, 4)
    down = {name.rpartition("/")[2]: found.pop(name) for name in list(found) if "/falls/" in name}
    assert found == pytest.approx(wanted)
    # the numbers are not trivial
    assert 0 < found["gray_box/transfer-from-base/none/l2"] < found["gray_box/transfer-from-base/none/pgd"] < 1
    assert found["gray_box/transfer-from-base/vote/pgd"] > found["adaptive/vote/pgd"]

    folder = tmp_path / "runs" / "run" / "version_0"
    with (folder / "tables" / "gray_box_test.csv").open() as file:
        table = {(row["defense"], row["attack"]): row for row in csv.DictReader(file)}
    assert len(table) == 6 * 4 + 1  # three attacks and the worst case for each row, and one further attack
    row = table["shift", "pgd"]
    clean, attacked = wanted["gray_box/clean/none"], wanted["gray_box/transfer-from-base/none/pgd"]
    defended = wanted["gray_box/transfer-from-base/shift/pgd"]
    assert float(row["transfer_from_base"]) == pytest.approx(defended)
    assert float(row["transfer_from_base_defense_rate"]) == pytest.approx(1 - (clean - defended) / (clean - attacked))
    clean, attacked = wanted["gray_box/clean/prm"], wanted["gray_box/prm-known-shift-unknown/prm/pgd"]
    defended = wanted["gray_box/prm-known-shift-unknown/shift/pgd"]
    rate = float(row["prm_known_shift_unknown_defense_rate"])
    assert rate == pytest.approx(1 - (clean - defended) / (clean - attacked))
    assert float(row["white_box"]) == pytest.approx(wanted["white_box/shift/pgd"])
    assert float(row["adaptive"]) == pytest.approx(wanted["adaptive/shift/pgd"])
    assert row["budget"] == "linf ε = 0.08"
    assert float(table["none", "pgd"]["white_box"]) == pytest.approx(wanted["gray_box/transfer-from-base/none/pgd"])
    assert table["region", "one_pixel"]["white_box"] == "" != table["region", "one_pixel"]["adaptive"]
    for (defense, name), row in table.items():
        if row["adaptive"]:
            gray = [row[column] for column in ("transfer_from_base", "prm_known_shift_unknown") if row[column]]
            if name == "optmargin":
                gray = [table["region", "worst_case"]["transfer_from_base"]]
            best = max(map(float, gray))
            assert row["falls"] == str(float(row["adaptive"]) < best / 2), (defense, name)
        else:
            assert row["falls"] == ""
    for defense in ("region", "vote", "resize", "shift"):
        marks = [row["falls"] == "True" for (judge, _), row in table.items() if judge == defense]
        assert down[defense] == any(marks)
    assert (folder / "figures" / "gray_box_test.png").is_file()
    assert not (folder / "tables" / "gray_box_test_partial.csv").exists()
    printed = capsys.readouterr().out
    assert "What the gray-box table takes, at most" in printed
    assert "Accuracy of defenses, 7 images (test)" in printed
    assert "FALLS" in printed


@pytest.mark.parametrize("function", ["test", "validate"])
def test_the_same_on_any_number_of_devices_and_batch_size(
    manipulated: Make, trainer: Make, digits: Make, function: str
) -> None:
    found = []
    for devices, size in ((1, 23), (1, 3), (2, 2)):
        run = trainer(callback(acceleration="exact"), devices=devices, precision="64-true")
        getattr(run, function)(manipulated(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run, "val" if function == "validate" else "test"))
    assert len(found[0]) > 40
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_without_a_manipulator(model: Make, trainer: Make, digits: Make) -> None:
    run = trainer(GrayBoxTable({"pgd": ATTACKS["pgd"]}, {"vote": PixelShift(mode="vote")}), precision="64-true")
    run.test(model(), digits(), verbose=False)
    assert measured(run).keys() == {
        "gray_box/clean/none",
        "gray_box/clean/vote",
        "gray_box/transfer-from-base/none/pgd",
        "gray_box/transfer-from-base/vote/pgd",
        "white_box/vote/pgd",
        "adaptive/vote/pgd",
        "gray_box/falls/vote",
    }
    with pytest.raises(UserError, match=r"prm_defenses protect .* ImageClassifier has none"):
        trainer(callback()).test(model(), digits(), verbose=False)


def test_another_base_is_what_the_attacker_knows(manipulated: Make, model: Make, trainer: Make, digits: Make) -> None:
    torch.manual_seed(4)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    run = trainer(callback(base=other, limit_images=None), precision="64-true")
    run.test(manipulated(), digits(), verbose=False)
    found = measured(run)
    dataset = digits().dataset("test")
    with torch.no_grad():
        right = [int(other(dataset[index][0][None].double()).argmax()) == dataset[index][1] for index in range(23)]
    assert found["gray_box/clean/none"] == pytest.approx(sum(right) / 23)
    assert found["gray_box/clean/none"] < 0.5 < found["gray_box/clean/prm"]


@dataclass(frozen=True, kw_only=True)
class Fails(Attack):
    """Blackens one batch, and fails on the next."""

    calls: list[int]
    seed: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel("linf", 1)

    def perturb(self, problem: Problem) -> Outcome:
        self.calls.append(1)
        if len(self.calls) == 4:  # on two networks a batch: the second batch, on the second
            raise InterruptedError
        zeros = torch.zeros_like(problem.labels)
        return Outcome(torch.zeros_like(problem.images), zeros, zeros)


def test_what_was_counted_is_kept_when_it_is_stopped(
    manipulated: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    table = GrayBoxTable({"black": Fails(calls=[])}, prm_defenses={"shift": PixelShift()}, white_box=[], adaptive=[])
    run = trainer(table, logger=True, precision="64-true")
    with pytest.raises(InterruptedError):
        run.test(manipulated(), digits(eval_batch_size=10), verbose=False)
    with (tmp_path / "runs" / "run" / "version_0" / "tables" / "gray_box_test_partial.csv").open() as file:
        found = {row["defense"]: row for row in csv.DictReader(file)}
    assert [found["shift"][f"images_{reading}"] for reading in ("transfer_from_base", "prm_known_shift_unknown")] == [
        "20",
        "10",
    ]
    black = sum(int(label) == int(found_label) for label, found_label in _black(manipulated(), digits()))
    assert float(found["none"]["transfer_from_base"]) == pytest.approx(black / 20)


def _black(module: Any, data: Any) -> list[tuple[int, int]]:
    module = module.double().eval()
    predicted = int(module.network.classifier(torch.zeros(1, 1, 8, 8).double()).argmax())
    return [(data.dataset("test")[index][1], predicted) for index in range(20)]


def test_progress_names_the_defense(manipulated: Make, trainer: Make, digits: Make) -> None:
    bar = AttackProgress()
    seen: list[str] = []
    bar.refresh = lambda hard=False: seen.extend(task.description for task in bar.progress.tasks if task.visible)
    pgd = PGD(eps=0.3, steps=3)
    table = GrayBoxTable({"pgd": pgd}, defenses={"shift": RegionBased(votes=3)}, limit_images=4)
    trainer(bar, table, enable_progress_bar=True).test(manipulated(), digits(), verbose=False)
    for text in ("pgd on none 3/3", "pgd on prm 3/3", "pgd on shift 3/3", "adaptive pgd on shift 3/3"):
        assert any(text in shown for shown in seen), text
    assert "·" not in seen[-1]


class TestRows:
    """The table from counts that are known."""

    ATTACKS = {"pgd": PGD(), "cw": CW(), "jsma": JSMA()}

    def plan(self, **settings: Any) -> Plan:
        return Plan(
            **{
                "attacks": self.ATTACKS,
                "defenses": ["d"],
                "prm_defenses": [],
                "manipulated": False,
                "white_box": [],
                "adaptive": ["pgd", "cw"],
                **settings,
            }
        )

    def test_falls_and_rates(self) -> None:
        plan = self.plan()
        counts = dict.fromkeys(plan.cells(), (0, 0)) | {
            "clean/none": (90, 100),
            "clean/d": (85, 100),
            "transfer-from-base/none/pgd": (0, 100),
            "transfer-from-base/d/pgd": (60, 100),
            "adaptive/d/pgd": (29, 100),
            "transfer-from-base/none/cw": (90, 100),
            "transfer-from-base/d/cw": (80, 100),
            "adaptive/d/cw": (0, 100),
        }
        found = {(row["defense"], row["attack"]): row for row in rows(plan, counts)}
        assert found["d", "pgd"]["transfer_from_base_defense_rate"] == pytest.approx(2 / 3)
        assert found["d", "pgd"]["falls"] is True
        assert math.isnan(found["d", "cw"]["transfer_from_base_defense_rate"])  # the attack took nothing
        assert found["d", "cw"]["falls"] is None  # an attack without a budget marks nothing
        assert found["d", "jsma"]["transfer_from_base"] is None
        assert fallen(rows(plan, counts)) == {"d": True}
        assert fallen(rows(plan, counts | {"adaptive/d/pgd": (30, 100)})) == {"d": False}  # just half is left

    def test_worst_case_is_of_attacks_with_a_budget(self) -> None:
        assert self.plan().counts_to_worst("transfer-from-base", "d") == ["pgd", "jsma"]
        assert self.plan().counts_to_worst("adaptive", "d") == []  # one alone is its own worst case
        assert self.plan(further={"d": {"m": OptMargin(eps=1)}}).counts_to_worst("adaptive", "d") == ["pgd", "m"]

    def test_a_partial_table_says_of_how_many_images(self) -> None:
        plan = self.plan()
        counts = dict.fromkeys(plan.cells(), (0, 0)) | {"clean/d": (3, 4), "transfer-from-base/d/pgd": (1, 2)}
        row = next(row for row in rows(plan, counts, partial=True) if (row["defense"], row["attack"]) == ("d", "pgd"))
        assert (row["images"], row["images_transfer_from_base"], row["images_adaptive"]) == (4, 2, 0)
        assert row["transfer_from_base"] == 0.5
        assert row["transfer_from_base_defense_rate"] is None  # the undefended model was not asked yet


def test_defaults() -> None:
    attacks: dict[str, Attack] = {"pgd": PGD(), "one": OnePixel(), "jsma": JSMA(), "cw": CW(eps=1)}
    table = GrayBoxTable(attacks, {"vote": PixelShift(mode="vote")})
    assert (table.white_box, table.adaptive) == (["pgd", "cw"], ["pgd", "one", "jsma", "cw"])
    assert GrayBoxTable(attacks, {"vote": PixelShift(mode="vote")}, white_box=["one"]).white_box == ["one"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attacks": {}}, "at least one attack and one defense"),
        ({"defenses": {}}, "at least one attack and one defense"),
        ({"prm_defenses": {"vote": PixelShift()}}, "two defenses are called 'vote'"),
        ({"attacks": {"worst_case": FGSM()}}, "'worst_case' cannot be a name"),
        ({"defenses": {"none": PixelShift()}}, "'none' cannot be a name"),
        ({"attacks": {"a/b": FGSM()}}, "'a/b' cannot be a name"),
        ({"white_box": ["cw"]}, "white_box names 'cw', which is not among"),
        ({"adaptive": ["other"]}, "adaptive names 'other', which cannot average over what a defense draws"),
        ({"further_adaptive": {"region": PGD()}}, "further_adaptive names 'region'"),
        ({"further_adaptive": {"vote": FGSM()}}, "would be called 'fgsm'"),
        ({"eot_samples": 0}, "eot_samples=0"),
        ({"acceleration": "fast"}, "choose exact, bf16 or none"),
        ({"limit_images": 0}, "limit_images=0"),
        ({"defenses": {"shift": PixelShift(seed=None)}}, "shift draws without a seed"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "attacks": {"fgsm": FGSM(), "other": Transfer(attack=FGSM(), surrogate=nn.Identity())},
        "defenses": {"vote": PixelShift(mode="vote")},
    }
    with pytest.raises(UserError, match=message):
        GrayBoxTable(**(given | settings))


def test_two_in_one_trainer(model: Make, trainer: Make, digits: Make) -> None:
    vote: dict[str, Defense] = {"vote": PixelShift(mode="vote")}
    with pytest.raises(UserError, match="two of them log under the name ''"):
        trainer(GrayBoxTable({"a": FGSM()}, vote), GrayBoxTable({"b": FGSM()}, vote)).test(
            model(), digits(), verbose=False
        )
    run = trainer(GrayBoxTable({"a": FGSM()}, vote), GrayBoxTable({"b": FGSM()}, vote, name="more"))
    run.test(model(), digits(), verbose=False)
    assert {"test/gray_box/transfer-from-base/vote/a", "test/gray_box_more/transfer-from-base/vote/b"} <= set(
        run.callback_metrics
    )
