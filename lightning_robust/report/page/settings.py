"""A run's settings as one flat table, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SEEDS = ("seed_everything", "model.seed", "data.seed")


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names to values; ``class_path`` and ``init_args`` are left out of the names, as on the command line.

    Example:
        >>> flatten({"model": {"class_path": "a.b.PRM", "init_args": {"lam": 0.9, "prm": None}}, "x": [1, 2]})
        {'model': 'PRM', 'model.lam': '0.9', 'model.prm': '', 'x': '[1, 2]'}
    """
    out: dict[str, str] = {}
    for name, value in config.items():
        _walk(str(name), value, out)
    return out


def _walk(name: str, value: Any, out: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        if "class_path" in value:
            out[name] = str(value["class_path"]).rpartition(".")[2]
            inner = value.get("init_args")
            for key, entry in (inner if isinstance(inner, Mapping) else {}).items():
                _walk(f"{name}.{key}", entry, out)
            return
        if not value:
            out[name] = "{}"
        for key, entry in value.items():
            _walk(f"{name}.{key}", entry, out)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        seen: dict[str, int] = {}
        for entry in value:
            label = str(entry.get("class_path", "")).rpartition(".")[2] if isinstance(entry, Mapping) else ""
            label = label or "entry"
            seen[label] = seen.get(label, 0) + 1
            _walk(f"{name}.{label}" + (f"#{seen[label]}" if seen[label] > 1 else ""), entry, out)
    else:
        out[name] = _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_text(entry) or "null" for entry in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def split(settings: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """Names of the settings in which runs differ, and of those that all share.

    Where a run is kept and logged (``run.…``) is no difference.
    """
    names = list(dict.fromkeys(name for one in settings for name in one))
    apart = [name for name in names if len({one.get(name) for one in settings}) > 1 and not name.startswith("run.")]
    return apart, [name for name in names if name not in apart]


def repetitions(settings: Sequence[Mapping[str, str]]) -> bool:
    """Whether runs differ in their seeds, and in nothing else."""
    if len(settings) < 2 or not all(settings):
        return False
    apart, _ = split(settings)
    return bool(apart) and all(name in _SEEDS for name in apart)
