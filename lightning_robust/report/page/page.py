"""Puts the page together: what stands in each section, within the size that is allowed, and the template."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lightning_robust import __version__
from lightning_robust.errors import UserError
from lightning_robust.report.atomic import atomic_file
from lightning_robust.report.page import compare
from lightning_robust.report.page.pictures import Embedded, choose, embed
from lightning_robust.report.page.plots import table_charts, training_charts
from lightning_robust.report.page.record import Run, name_apart, read_run
from lightning_robust.report.page.settings import repetitions, split
from lightning_robust.report.page.tables import PageTable, page_table
from lightning_robust.report.page.verdicts import audit_groups
from lightning_robust.report.page.words import STAGES, number
from lightning_robust.report.secrets import mask_command, mask_value

MARK = '<meta name="generator" content="lightning-robust report">'
"""Stands in every page, so that no other file is written over."""

_BUDGET = 4_900_000  # bytes of a page; a megabyte being 10^6
_ROOM = 60_000  # of that, for the words on what was left out
_TEMPLATES = Path(__file__).parent / "templates"
_FIRST = ("model", "data", "seed_everything", "trainer")
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_HEADINGS = {
    "sweeps": "λ sweeps",
    "heatmaps": "Heatmaps",
    "examples": "Examples",
    "curves": "Curves over ε",
    "verdicts": "Figures of the audit",
    "figures": "Further figures",
}


@dataclass
class _Gallery:
    """Figures of one kind: a row for each figure, with that of each run that has it."""

    heading: str
    rows: list[list[tuple[Run, Embedded]]] = field(default_factory=list)

    def halves(self) -> list[tuple[str, list[list[tuple[Run, Embedded]]]]]:
        """Those made at the end, and those made while training."""
        training = [row for row in self.rows if row[0][1].picture.epoch is not None]
        return [("", [row for row in self.rows if row not in training]), ("While training", training)]


def write_page(folders: Sequence[str | Path], out: str | Path, *, budget: int = _BUDGET) -> Path:
    """Make a page of runs and write it atomically.

    Args:
        folders: of runs, or of groups of seeds; the first is what others are compared with.
        out: the file; one that is there is only written over if it is such a page.
        budget: largest size in bytes; what does not fit is left out, and the page says so.

    Returns:
        The path written.

    Raises:
        UserError: for a file that is something else, or that cannot be written.
    """
    out = Path(out)
    try:
        if out.is_dir():
            raise UserError(f"report: {out} is a folder: name the page's file, such as {out / 'report.html'}")
        if out.exists() and MARK.encode() not in out.read_bytes()[:2000]:
            raise UserError(f"report: {out} exists and is no page of this program: choose another file with --out")
        text = render_page([read_run(folder) for folder in folders], budget=budget)
        with atomic_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report: {out} cannot be written: {error.strerror or error}") from None
    return out


def render_page(runs: Sequence[Run], *, budget: int = _BUDGET, made: datetime | None = None) -> str:
    """The page as text.

    Args:
        runs: what :func:`~lightning_robust.report.page.read_run` tells; the first is what others are compared with.
        budget: largest size in bytes.
        made: time to name; now.

    Raises:
        UserError: without a run.
    """
    runs = list(runs)
    if not runs:
        raise UserError("report: no run to show")
    name_apart(runs)
    left_out: list[str] = []
    context: dict[str, Any] = {
        "runs": runs,
        "made": made or datetime.now(UTC),
        "version": __version__,
        "title": f"Robustness of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        "audits": audit_groups(runs),
        "headline": compare.rows(runs, compare.headline_names(runs)),
        "attacked": any("robust_acc" in name for name in compare.all_names(runs)),
        "numbers": compare.rows(runs, compare.all_names(runs)),
        "over_seeds": compare.over_seeds(runs) if repetitions([run.settings for run in runs]) else [],
        "facts": _facts(runs),
        "tables": _tables(runs, left_out),
        "training": training_charts(runs),
        "over": table_charts(runs),
        "left_out": left_out,
        "missing": [(run, list(run.missing)) for run in runs],
        "galleries": {},
        **_settings(runs),
    }
    without = len(_render(context).encode())
    shown, others = choose([picture for run in runs for picture in run.pictures])
    folders = {id(picture): run for run in runs for picture in run.pictures}
    left_out += [
        f"{_of(folders[id(picture)], runs)}{picture.caption}: other epochs of it are shown; figures/{picture.path.name}"
        for picture in others
    ]
    # a figure made while training comes after all those of the end
    shown.sort(key=lambda picture: picture.epoch is not None)
    pictures, dropped, broken = embed(shown, max(0, budget - without - _ROOM))
    left_out += [
        f"{_of(folders[id(picture)], runs)}{picture.caption}: the page would grow too large; "
        f"figures/{picture.path.name}"
        for picture in dropped
    ]
    for picture, reason in broken.items():
        context["missing"][runs.index(folders[id(picture)])][1].append(
            f"figures/{picture.path.name} is broken and left out: {reason}"
        )
    context["galleries"] = _galleries(runs, pictures, folders)
    return _render(context)


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _galleries(runs: Sequence[Run], pictures: Sequence[Embedded], owners: dict[int, Run]) -> dict[str, _Gallery]:
    out: dict[str, _Gallery] = {}
    rows: dict[tuple[str, str], list[tuple[Run, Embedded]]] = {}
    for shown in pictures:
        rows.setdefault((shown.picture.section, shown.picture.key), []).append((owners[id(shown.picture)], shown))
    order = [id(picture) for run in runs for picture in run.pictures]
    for section, heading in _HEADINGS.items():
        found = [row for (where, _), row in rows.items() if where == section]
        found.sort(key=lambda row: order.index(id(row[0][1].picture)))
        if found:
            out[section] = _Gallery(heading, found)
    return out


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    known = [run.settings for run in runs]
    apart, shared = split(known) if len(runs) > 1 else ([], list(known[0]))
    values = {name: next(one[name] for one in known if name in one) for name in shared}

    def place(name: str) -> int:
        head = name.partition(".")[0]
        return _FIRST.index(head) if head in _FIRST else len(_FIRST)

    apart.sort(key=place)
    return {
        # secrets are hidden here and not before, so that runs which differ in one are said to differ
        "settings_apart": [(name, [_shown(name, one.get(name)) for one in known]) for name in apart],
        "settings_shared": [
            (name, mask_value(name, values[name])) for name in sorted(shared, key=place) if values[name] != ""
        ],
        "settings_null": sum(value == "" for value in values.values()),
    }


def _shown(name: str, value: str | None) -> str | None:
    return None if value is None else mask_value(name, value)


def _tables(runs: Sequence[Run], left_out: list[str]) -> list[tuple[str, list[tuple[Run, PageTable]]]]:
    """Each table's name in words, and that of each run that has it."""
    out = []
    for name in dict.fromkeys(name for run in runs for name in run.tables):
        having = []
        for run in runs:
            if name not in run.tables or name in _audit_tables(run):
                continue
            table, rest = page_table(name, run.tables[name])
            having.append((run, table))
            if rest:
                left_out.append(f"{_of(run, runs)}{rest} further rows of tables/{name}.csv")
        if having:
            out.append((having[0][1].title, having))
    return out


def _audit_tables(run: Run) -> set[str]:
    """The tables of a run whose content stands in the section of the audit."""
    names = [f"audit_{name}" if name else "audit" for name in run.audits]
    return {f"{name}{stage}" for name in names for stage in ("", "_test", "_val")}


# -- what was run ------------------------------------------------------------------------------------------------------

_WORDS = {
    "finished": "finished",
    "running": "not finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "unknown": "not recorded",
}


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """What was run, in words: name, a text for each run, and whether they differ."""
    facts: dict[str, list[str]] = {}
    for number_of, run in enumerate(runs):
        for name, text in _facts_of(run):
            facts.setdefault(name, [""] * len(runs))[number_of] = text
    # no two runs begin at once or take as long
    return [
        (name, texts, len(set(texts)) > 1 and name not in ("Started", "Time"))
        for name, texts in facts.items()
        if any(texts)
    ]


def _facts_of(run: Run) -> list[tuple[str, str]]:
    told, settings = run.environment, run.settings
    devices = told.get("devices") if isinstance(told.get("devices"), dict) else {}
    versions = told.get("versions") if isinstance(told.get("versions"), dict) else {}
    command = told.get("command")
    counts = "/".join(map(str, dict.fromkeys(len(one.epochs) for one in run.members or [run])))
    trained = f"{counts} of {run.max_epochs}" if run.max_epochs else counts.removeprefix("0")
    seed = settings.get("seed_everything", "")
    seconds = [value for name, value in run.results.items() if name.startswith("time/") and math.isfinite(value)]
    return [
        ("State", _WORDS[run.status]),
        ("Command", shlex.join(mask_command([str(word) for word in command])) if isinstance(command, list) else ""),
        ("Model", _joined(settings, "model", "model.network")),
        ("Objective", _joined(settings, "model.objective", "model.objective.attack")),
        ("Data", settings.get("data", "")),
        ("Seed", seed),
        ("Epochs", trained),
        ("Time", f"{sum(seconds):,.0f} s" + (" (mean)" if run.members else "") if seconds else ""),
        ("Started", _time(str(told.get("started") or ""))),
        ("Devices", _devices(devices or {})),
        ("Precision", str((devices or {}).get("precision") or "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (versions or {}).items())),
        ("System", str(told.get("system") or "")),
    ]


def _time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:  # none, or written by something else: as it is
        return text


def _joined(settings: dict[str, str], *names: str) -> str:
    return ", ".join(settings[name] for name in names if settings.get(name))


def _devices(devices: dict[str, Any]) -> str:
    names = devices.get("names")
    kinds = ", ".join(dict.fromkeys(map(str, names))) if isinstance(names, list) else ""
    count = devices.get("count")
    parts = [f"{count} × {kinds}" if count and kinds else kinds or str(count or "")]
    if count not in (None, 1) and devices.get("strategy"):
        parts.append(str(devices["strategy"]))
    return ", ".join(filter(None, parts))


# -- the template ------------------------------------------------------------------------------------------------------


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = lambda value: "–" if value is None or math.isnan(value) else number(value)
    environment.filters["percent"] = lambda value: "–" if math.isnan(value) else f"{100 * value:.1f} %"
    environment.filters["capitalize_first"] = _sentence
    environment.globals["stage_words"] = STAGES
    environment.filters["stop"] = lambda text: text if text.endswith((".", "!", "?")) else f"{text}."
    environment.filters["seconds"] = lambda value: "–" if math.isnan(value) else f"{value:,.1f}"
    environment.filters["plain"] = lambda value: "" if value is None or not math.isfinite(value) else repr(float(value))
    return environment


def _sentence(text: str) -> str:
    """With a capital, unless the first word is a file's or a run's name."""
    return text if set("./_") & set(text.partition(" ")[0].rstrip(".:")) else text[:1].upper() + text[1:]


def _render(context: dict[str, Any]) -> str:
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    # by these the browser runs our script and no other one, and asks nothing of any network
    hashes = {name: _sha256(text) for name, text in (("style_hash", style), ("script_hash", script))}
    page = _environment().get_template("page.html.j2")
    text = page.render(**context, **hashes, style=style, script=script, mark=MARK)
    # names may hold what no page may: control characters, and bytes of a file's name that are no text
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
