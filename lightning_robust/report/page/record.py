"""What a run's folder holds, whatever state the run is in: what cannot be read is said and never stops the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_robust.errors import UserError
from lightning_robust.report.page.audit import Audit, parse_audit
from lightning_robust.report.page.files import (
    Rows,
    mapping,
    named_numbers,
    read_file,
    row_numbers,
    table_rows,
    yaml_mapping,
)
from lightning_robust.report.page.pictures import Picture, find_pictures
from lightning_robust.report.page.settings import flatten
from lightning_robust.report.seeds import SEEDS_FILE, Seeds, Spread, read_seeds

_SIGNS = ("config.yaml", "results.json", "metrics.csv", "environment.json", SEEDS_FILE)


@dataclass
class Run:
    """A run, or several that differ in their seed, as far as its folder tells.

    Attributes:
        folder: where it lies.
        name: what it is called on the page; :func:`name_apart` makes the names of several differ.
        settings: dotted name to value of every setting; empty where ``config.yaml`` is missing.
        results: final name to number, of seeds their mean.
        epochs: rows of ``metrics.csv``, name to number.
        tables: name to rows, from ``tables/*.csv``.
        pictures: the figures.
        environment: ``environment.json``: command, versions, devices, status.
        audits: name to verdict; that of ``audit.json`` has no name.
        spreads: of seeds: name to mean and deviation.
        members: of seeds: the runs that count.
        wanted: of seeds: how many runs there were to be.
        missing: a sentence for everything that one would look for and that is not there or not readable.
    """

    folder: Path
    name: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    tables: dict[str, Rows] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    members: list[Run] = field(default_factory=list)
    wanted: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """One of "finished", "running", "interrupted" and "failed"; "unknown" without ``environment.json``."""
        told = str(self.environment.get("status", "unknown"))
        return told if told in ("finished", "running", "interrupted", "failed") else "unknown"

    @property
    def counted(self) -> str:
        """Over how many seeds a mean is taken."""
        done = len(self.members)
        return f"{done} seeds" if done == self.wanted else f"{done} of {self.wanted} seeds"

    @property
    def max_epochs(self) -> int | None:
        """How many epochs were to be trained; ``None`` for an evaluation, or where the settings do not tell."""
        told = self.settings.get("trainer.max_epochs", "")
        return int(told) if told.isdigit() and self._trains() else None

    def _trains(self) -> bool:
        stages = self.environment.get("stages")
        if isinstance(stages, list) and stages:
            return "fit" in stages
        return bool(self.epochs) or any(name.startswith("train/") for name in self.results)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of a group of seeds."""
    if any((folder / name).is_file() for name in _SIGNS):
        return True
    return bool(_audit_files(folder)) or any((folder / "figures").glob("*.png"))


def _audit_files(folder: Path) -> dict[str, Path]:
    """The audits of a run by name: ``audit.json``, and ``audit_<name>.json`` of callbacks with a name."""
    named = {file.stem.removeprefix("audit_"): file for file in sorted(folder.glob("audit_?*.json"))}
    return {name: file for name, file in {"": folder / "audit.json", **named}.items() if file.is_file()}


def find_runs(given: Sequence[str | Path]) -> list[Path]:
    """The folders that are meant: runs themselves, files in them, and folders of runs, each of them once.

    Raises:
        UserError: for what does not exist, and for a folder in which there is no run.
    """
    found: dict[Path, Path] = {}
    for word in given:
        path = Path(word)
        if not path.exists():
            raise UserError(
                f"report: there is no folder {path}: give the folder of a run, such as runs/quickstart/version_0"
            )
        if path.is_file():  # results.json, checkpoints/last.ckpt
            path = next((folder for folder in list(path.parents)[:2] if is_run(folder)), path)
        below = [path] if is_run(path) else _below(path)
        if not below:
            raise UserError(
                f"report: {path} is no run's folder and holds none: a run's folder has config.yaml or results.json, "
                "such as runs/quickstart/version_0"
            )
        found.update((folder.resolve(), folder) for folder in below)
    return list(found.values())


def _below(path: Path) -> list[Path]:
    """The runs in a folder, or in its folders."""
    for pattern in ("*", "*/*") if path.is_dir() else ():
        found = [folder for folder in path.glob(pattern) if folder.is_dir() and is_run(folder)]
        if found:
            return sorted(found, key=_version)
    return []


def _version(folder: Path) -> tuple[str, int, str]:
    head, _, tail = folder.name.rpartition("_")
    return (str(folder.parent), int(tail), head) if tail.isdigit() else (str(folder.parent), -1, folder.name)


def name_apart(runs: Sequence[Run]) -> None:
    """Call each run by the end of its path, two parts or as many as tell all of them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for length in range(2, max(map(len, paths), default=2) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    for run, name in zip(runs, names, strict=True):
        run.name = name


def read_run(folder: str | Path) -> Run:
    """Read what is there.

    Args:
        folder: of a run, or of a group of seeds.
    """
    folder = Path(folder)
    run = Run(folder, name="/".join(folder.resolve().parts[-2:]))
    say = run.missing.append
    run.environment = read_file(folder / "environment.json", mapping, say, optional=True) or {}
    audits = _audit_files(folder)
    # `audit` of a model that was not trained here leaves nothing but its own files
    alone = bool(audits) and not (folder / "environment.json").is_file()
    absent = "config.yaml is missing: the settings are not known"
    config = read_file(folder / "config.yaml", yaml_mapping, say, absent=absent, optional=alone)
    run.settings = flatten(config or {})
    # in the order of the settings, where the first is what others are compared with
    given = [value for name, value in run.settings.items() if name.startswith("trainer.callbacks.Audit")]
    for name, file in sorted(audits.items(), key=lambda one: given.index(one[0]) if one[0] in given else -1):
        audit = read_file(file, parse_audit, say)
        if audit is not None:
            run.audits[name] = audit
    run.pictures = find_pictures(folder)
    for file in sorted((folder / "tables").glob("*.csv")):
        rows = read_file(file, table_rows, say, optional=True)
        if rows is not None:
            run.tables[file.stem] = rows
    seeds = read_file(folder / SEEDS_FILE, read_seeds, say, optional=True)
    if seeds is not None:
        _read_members(run, seeds)
    else:
        absent = "results.json is missing: nothing was measured to the end"
        run.results = read_file(folder / "results.json", named_numbers, say, absent=absent, optional=alone) or {}
        lines = read_file(folder / "metrics.csv", table_rows, say, optional=True) or []
        run.epochs = [row_numbers(line) for line in lines]
    run.missing += _unfinished(run)
    return run


def _read_members(run: Run, seeds: Seeds) -> None:
    """A group: means and deviations in place of results, and the members' settings, curves and figures."""
    run.spreads = seeds.spreads
    run.results = {name: spread.mean for name, spread in seeds.spreads.items()}
    run.wanted = len(seeds.seeds)
    for place in seeds.runs:
        if place in seeds.failed:
            continue
        # a name, and no way out of the group's folder or back to it
        if Path(place).name == place and place != ".." and is_run(run.folder / place):
            member = read_run(run.folder / place)
            member.name = place
            run.members.append(member)
            run.missing += [f"{place}: {sentence}" for sentence in member.missing]
        else:
            run.missing.append(f"{place}: the folder of this repetition is missing")
    run.missing += [f"{place}: {reason}" for place, reason in seeds.failed.items()]
    first = next((member for member in run.members if member.settings), None)
    if first is not None and not run.settings:
        run.missing = [line for line in run.missing if not line.startswith("config.yaml is missing")]
        run.settings = {**first.settings, "seed_everything": ", ".join(map(str, seeds.seeds))}
    run.environment = {**(first.environment if first else {}), **run.environment}
    drawn = next((member for member in run.members if member.pictures), None)
    if drawn is not None and not run.pictures:
        run.pictures = [picture.of(drawn.name) for picture in drawn.pictures]


def _unfinished(run: Run) -> list[str]:
    """What a run that did not come to its end lacks."""
    out = []
    error = str(run.environment.get("error") or "").strip()
    if run.status == "failed":
        out.append(f"the run failed{f' ({error})' if error else ''}: what it had found until then is shown")
    elif run.status == "interrupted":
        out.append("the run was interrupted: what it had found until then is shown; --ckpt_path last goes on with it")
    elif run.status == "running":
        out.append("the run was still running when this page was made, or it was killed")
    if run.members:
        return out
    wanted, done = run.max_epochs, len(run.epochs)
    if wanted and done < wanted and run.status != "finished":
        out.append(f"{done} of {wanted} epochs are there")
    if run.results and not any(name.startswith("test/") for name in run.results):
        out.append("there are no test results: the numbers are those of the validation images")
    return out
