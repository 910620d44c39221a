"""What a gray-box table counts, and what becomes of the counts: rows, numbers to log, and the figure's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_robust.attacks import JSMA, Attack
from lightning_robust.callbacks.measurement import budget
from lightning_robust.metrics.defense import defense_rate, falls
from lightning_robust.report import AccuracyMatrix, accuracy_matrices, print_table

TRANSFER, KNOWN, WHITE, ADAPTIVE = "transfer-from-base", "prm-known-shift-unknown", "white-box", "adaptive"
READINGS = (TRANSFER, KNOWN, WHITE, ADAPTIVE)
NONE, PRM = "none", "prm"  # rows of the models without a defense: the classifier alone, and behind the manipulator
WORST = "worst_case"

Counts = Mapping[str, tuple[int, int]]
"""Of each cell how many images were classified rightly, and how many there were."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which cells there are.

    Attributes:
        attacks: name to attack.
        defenses: names of the defenses around the classifier.
        prm_defenses: names of those around the classifier behind a manipulator.
        manipulated: whether there is a manipulator.
        white_box: names of the attacks that run on the defenses as they are.
        adaptive: names of the attacks that run on the defenses by EOT.
        further: defense to name to attack, those that were given for it.
    """

    attacks: dict[str, Attack]
    defenses: list[str]
    prm_defenses: list[str]
    manipulated: bool
    white_box: list[str]
    adaptive: list[str]
    further: dict[str, dict[str, Attack]] = field(default_factory=dict)

    @property
    def judges(self) -> list[str]:
        """Everything that is shown adversarial images of the classifier: a row each."""
        return [NONE, *([PRM] if self.manipulated else []), *self.protected]

    @property
    def protected(self) -> list[str]:
        """All defenses."""
        return [*self.defenses, *self.prm_defenses]

    def ran(self, reading: str, judge: str) -> dict[str, Attack]:
        """The attacks that a reading makes on one row."""
        if reading == TRANSFER:
            return self.attacks
        if reading == KNOWN:
            return self.attacks if judge == PRM or judge in self.prm_defenses else {}
        if judge in (NONE, PRM):
            return {}
        names = self.white_box if reading == WHITE else self.adaptive
        further = self.further.get(judge, {}) if reading == ADAPTIVE else {}
        return {name: self.attacks[name] for name in names} | further

    def counts_to_worst(self, reading: str, judge: str) -> list[str]:
        """The attacks whose worst case is taken: those with a budget, where they are two or more."""
        names = [name for name, attack in self.ran(reading, judge).items() if has_budget(attack)]
        return names if len(names) > 1 else []

    def cells(self) -> list[str]:
        """Names of all cells."""
        found = [f"clean/{judge}" for judge in self.judges]
        for reading in READINGS:
            for judge in self.judges:
                found += [f"{reading}/{judge}/{name}" for name in self.ran(reading, judge)]
                if self.counts_to_worst(reading, judge):
                    found.append(f"{reading}/{judge}/{WORST}")
        return found


def has_budget(attack: Attack) -> bool:
    """Whether an attack can fail for want of room: without a budget it wins in the end against any usual network."""
    # JSMA's share of the features is a budget that is only known with the images
    return attack.threat_model.bounded or isinstance(attack, JSMA)


def rows(plan: Plan, counts: Counts, partial: bool = False) -> list[dict[str, Any]]:
    """A row for each attack and defense, the models without one among them; ``None`` for what was not measured.

    Args:
        plan: which cells there are.
        counts: of them.
        partial: also say of how many images each number is.
    """

    def accuracy(cell: str) -> float | None:
        right, images = counts.get(cell, (0, 0))
        return right / images if images else None

    table: list[dict[str, Any]] = []
    for judge in plan.judges:
        named = plan.attacks | plan.further.get(judge, {})
        worst = [reading for reading in READINGS if f"{reading}/{judge}/{WORST}" in counts]
        for name in [*named, *([WORST] if worst else [])]:
            cells = {reading: f"{reading}/{judge}/{name}" for reading in READINGS}
            if judge in (NONE, PRM) and (name != WORST or set(plan.white_box) == set(plan.attacks)):
                # attacked by one who knows all there is to know; a worst case only where it is over the same attacks
                cells[WHITE] = cells[TRANSFER if judge == NONE else KNOWN]
            found = {reading: accuracy(cell) for reading, cell in cells.items()}
            row: dict[str, Any] = {
                "defense": judge,
                "attack": name,
                "budget": _budget(named[name]) if name in named else "",
                "images": counts[f"clean/{judge}"][1],
                "clean_acc": accuracy(f"clean/{judge}"),
            }
            for reading, source in ((TRANSFER, NONE), (KNOWN, PRM)):
                row[_column(reading)] = found[reading]
                rate = None
                if judge != source:
                    rate = _rate(accuracy(f"clean/{source}"), accuracy(f"{reading}/{source}/{name}"), found[reading])
                row[f"{_column(reading)}_defense_rate"] = rate
            row[_column(WHITE)], row[_column(ADAPTIVE)] = found[WHITE], found[ADAPTIVE]
            row["falls"] = _falls(plan, judge, name, found, accuracy)
            if partial:
                row |= {f"images_{_column(reading)}": counts.get(cell, (0, 0))[1] for reading, cell in cells.items()}
            table.append(row)
    return table


def _falls(plan: Plan, judge: str, name: str, found: Mapping[str, float | None], accuracy: Any) -> bool | None:
    """Whether the adaptive attack leaves less than half of what the gray-box attack did; the better of its readings."""
    adaptive = found[ADAPTIVE]
    further = plan.further.get(judge, {})
    attack = plan.attacks.get(name) or further.get(name)
    if adaptive is None or (attack is not None and not has_budget(attack)):
        return None
    grays = [found[reading] for reading in (TRANSFER, KNOWN)]
    if name in further:  # nobody made gray-box images with it: it is held against all of them together
        alone = next(iter(plan.attacks))
        last = WORST if plan.counts_to_worst(TRANSFER, judge) else alone
        grays = [accuracy(f"{reading}/{judge}/{last}") for reading in (TRANSFER, KNOWN)]
    known = [gray for gray in grays if gray is not None]
    return falls(max(known), adaptive) if known else None


def fallen(table: list[dict[str, Any]]) -> dict[str, bool]:
    """Of each defense, whether any adaptive attack marks it as fallen; without those that met none."""
    found: dict[str, bool] = {}
    for row in table:
        if row["falls"] is not None:
            found[row["defense"]] = found.get(row["defense"], False) or row["falls"]
    return found


def logged(plan: Plan, counts: Counts, suffix: str) -> dict[str, float]:
    """The numbers to log, by their names without the stage."""
    values: dict[str, float] = {}
    for cell, (right, images) in counts.items():
        start, _, rest = cell.partition("/")
        root = {"clean": "gray_box{}/clean", WHITE: "white_box{}", ADAPTIVE: "adaptive{}"}
        name = root.get(start, f"gray_box{{}}/{start}").format(suffix) + f"/{rest}"
        if images:
            values[name] = right / images
    for defense, down in fallen(rows(plan, counts)).items():
        values[f"gray_box{suffix}/falls/{defense}"] = float(down)
    return values


def draw(plan: Plan, table: list[dict[str, Any]], stage: str) -> Figure:
    """The readings as matrices of defenses and attacks, side by side."""
    titles = {
        TRANSFER: "gray-box: transfer-from-base\n(images made on the classifier alone)",
        KNOWN: "gray-box: prm-known-shift-unknown\n(images made on PRM + classifier, without a shift)",
        WHITE: "white-box\n(the attack on the defense as it is)",
        ADAPTIVE: "adaptive\n(the attack averages over what the defense draws)",
    }
    matrices = []
    for reading, title in titles.items():
        column = _column(reading)
        known = [row for row in table if row[column] is not None]
        if not known:
            continue
        names = list(dict.fromkeys(row["attack"] for row in known))
        names = [name for name in names if name != WORST] + [name for name in names if name == WORST]
        judges = list(dict.fromkeys(row["defense"] for row in known))
        values = np.full((len(judges), len(names)), np.nan)
        marks = np.zeros_like(values, dtype=bool)
        labels = {}
        for row in known:
            place = judges.index(row["defense"]), names.index(row["attack"])
            values[place] = row[column]
            marks[place] = reading == ADAPTIVE and bool(row["falls"])
            labels[row["defense"]] = f"{_words(row['defense'])}\nclean {100 * row['clean_acc']:.0f} %"
        matrices.append(
            AccuracyMatrix(
                title=title,
                rows=[labels[judge] for judge in judges],
                columns=[_words(name) for name in names],
                values=values,
                marks=marks,
            )
        )
    down = [_words(name) for name, is_down in fallen(table).items() if is_down]
    notes = ["falls: less than half is left of what the defense showed in the gray-box reading"] if down else []
    if any(np.isnan(matrix.values).any() for matrix in matrices):
        notes.append("–: not measured (white_box and adaptive name the attacks that are)")
    images = max(row["images"] for row in table)
    return accuracy_matrices(matrices, title=f"Accuracy of defenses, {images} images ({stage})", note="; ".join(notes))


def print_rows(table: list[dict[str, Any]], stage: str) -> None:
    """Print the table in words, and which defenses fall."""
    columns = {
        "clean": "clean_acc",
        TRANSFER: _column(TRANSFER),
        "rate": f"{_column(TRANSFER)}_defense_rate",
        KNOWN: _column(KNOWN),
        "rate ": f"{_column(KNOWN)}_defense_rate",
        WHITE: _column(WHITE),
        ADAPTIVE: _column(ADAPTIVE),
    }
    columns = {title: column for title, column in columns.items() if any(row[column] is not None for row in table)}
    shown = []
    for row in table:
        values = {title: _shown(row[column], "rate" in title) for title, column in columns.items()}
        # no word for what did not fall: this attack did not bring it down, and another one may
        mark = "FALLS" if row["falls"] else ""
        shown.append({"defense": row["defense"], "attack": row["attack"], **values, "": mark})
    images = max(row["images"] for row in table)
    print_table(f"Accuracy of defenses, {images} images ({stage})", shown)


def _shown(value: float | None, rate: bool) -> str | None:
    if value is None or value != value:  # NaN: a rate that is not defined
        return None
    return f"{value:.2f}" if rate else f"{100 * value:.1f} %"


def _budget(attack: Attack) -> str:
    if isinstance(attack, JSMA) and not attack.threat_model.bounded:
        return f"{attack.gamma:g} of all features"
    return budget(attack.threat_model)


def _rate(clean: float | None, attacked: float | None, defended: float | None) -> float | None:
    if clean is None or attacked is None or defended is None:
        return None
    return defense_rate(clean, attacked, defended)


def _column(reading: str) -> str:
    return reading.replace("-", "_")


def _words(name: str) -> str:
    return {NONE: "no defense", PRM: "PRM alone"}.get(name, name.replace("_", " "))
