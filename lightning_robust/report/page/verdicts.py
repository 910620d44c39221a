"""Audits as they stand on the page: of one run by name, of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_robust.report.page.audit import SEVERITY, VERDICTS, Audit, Check
from lightning_robust.report.page.record import Run
from lightning_robust.report.page.words import measure

_TONES = {"trusted": "pass", "masked": "flag", "not_enough_evidence": "unsure"}
_NUMBERS = (("test/audit/robust_acc", "robust_accuracy"), ("test/audit/clean_acc", "clean_accuracy"))


@dataclass(frozen=True)
class Column:
    """An audit and what it is called among those beside it."""

    label: str
    audit: Audit


@dataclass(frozen=True)
class Cell:
    """What one audit says.

    Args:
        text: as it is written.
        tone: "pass", "flag", "unsure", "skipped" or empty.
        difference: from the first audit, as it is written.
        way: "better", "worse" or empty, for the difference.
    """

    text: str
    tone: str = ""
    difference: str = ""
    way: str = ""


@dataclass(frozen=True)
class Row:
    """What all audits say of one thing."""

    label: str
    cells: tuple[Cell, ...]

    @property
    def differs(self) -> bool:
        """Whether they say different things."""
        return len({cell.text for cell in self.cells}) > 1


@dataclass(frozen=True)
class AuditGroup:
    """Audits that are compared.

    Args:
        name: of the audits; empty for those of one run, and for audits without a name.
        columns: the audits; the first is what others are compared with.
        without: runs that have no such audit.
    """

    name: str
    columns: tuple[Column, ...]
    without: tuple[str, ...] = ()

    def rows(self) -> list[Row]:
        """What is compared: the verdict, the numbers, and the checks that some have not passed, the worst first."""
        audits = [column.audit for column in self.columns]
        rows = [
            Row("Verdict", tuple(Cell(VERDICTS[audit.verdict], _TONES[audit.verdict]) for audit in audits)),
            *(Row(measure(name).label, _numbers(audits, name, attribute)) for name, attribute in _NUMBERS),
            Row("confidence interval", tuple(Cell(audit.interval_text) for audit in audits)),
            Row("threat model", tuple(Cell(audit.threat_text) for audit in audits)),
            Row("images", tuple(Cell(str(audit.images)) for audit in audits)),
        ]
        checks = self._checks()

        def severity(title: str) -> int:
            return min(SEVERITY.index(check.outcome) for check in checks[title] if check)

        for title in sorted((title for title in checks if title not in self.passed), key=severity):
            cells = (Cell(check.word, check.outcome) if check else Cell("–") for check in checks[title])
            rows.append(Row(title, tuple(cells)))
        return rows

    @property
    def passed(self) -> list[str]:
        """Titles of the checks that all have passed."""
        return [
            title
            for title, found in self._checks().items()
            if all(check is not None and check.outcome == "pass" for check in found)
        ]

    def _checks(self) -> dict[str, list[Check | None]]:
        """Title to the check of each audit."""
        outcomes = [{check.title: check for check in column.audit.checks} for column in self.columns]
        titles = dict.fromkeys(title for one in outcomes for title in one)
        return {title: [one.get(title) for one in outcomes] for title in titles}


def audit_groups(runs: Sequence[Run]) -> list[AuditGroup]:
    """All audits of one run in one group, or those of several runs by name; of seeds those of each.

    Args:
        runs: with names that tell them apart.
    """
    owners = [owner for run in runs for owner in _owners(run, several=len(runs) > 1)]
    having = [(label, run) for label, run in owners if run.audits]
    if len(owners) == 1:
        return [
            AuditGroup("", tuple(Column(name or "audit", audit) for name, audit in run.audits.items()))
            for _, run in having
        ]
    names = list(dict.fromkeys(name for _, run in having for name in run.audits))
    return [
        AuditGroup(
            name,
            tuple(Column(label, run.audits[name]) for label, run in having if name in run.audits),
            tuple(label for label, run in owners if name not in run.audits),
        )
        for name in names
    ]


def _owners(run: Run, several: bool) -> list[tuple[str, Run]]:
    if run.audits or not any(member.audits for member in run.members):
        return [(run.name, run)]
    return [(f"{run.name}/{member.name}" if several else member.name, member) for member in run.members]


def _numbers(audits: Sequence[Audit], name: str, attribute: str) -> tuple[Cell, ...]:
    """Numbers, with the difference from the first where both are of the same threat model.

    What a masked model is said to withstand is an upper bound: a larger one is not said to be better.
    """
    what = measure(name)
    first = audits[0]
    cells = []
    for audit in audits:
        value = float(getattr(audit, attribute))
        base = float(getattr(first, attribute)) if audit.threat_text == first.threat_text else None
        difference = what.difference(value, base)
        way = "" if not difference or base is None else "better" if value > base else "worse"
        larger = audit if way == "better" else first
        if attribute == "robust_accuracy" and larger.verdict == "masked":
            way = ""
        cells.append(Cell(what.text(value), "", difference, way))
    return tuple(cells)
