"""Objectives and attacks as plain data, as configs and checkpoints hold them.

``{"class_path": "lightning_robust.objectives.TRADES", "init_args": {"beta": 6.0, ...}}`` is what the command line reads
and what ``torch.load(..., weights_only=True)`` lets through.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

from lightning_robust.attacks import Attack
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective

_KINDS = (Objective, Attack, AWP)


def to_config(obj: Objective | Attack | AWP) -> dict[str, Any]:
    """An objective, attack or AWP as strings, numbers, booleans, ``None``, lists and dicts only.

    Args:
        obj: a dataclass of one of these kinds, of ours or of your own, that can be imported.

    Raises:
        UserError: if it is of another kind, cannot be imported by name, or holds a value that is not plain data.

    Example:
        >>> from lightning_robust.objectives import Natural
        >>> to_config(Natural())
        {'class_path': 'lightning_robust.objectives.Natural', 'init_args': {'label_smoothing': 0.0, 'awp': None}}
    """
    if not isinstance(obj, _KINDS) or not dataclasses.is_dataclass(obj):
        raise UserError(
            f"{obj!r} cannot be written to a config: give an objective, an attack or AWP that is a dataclass"
        )
    name = type(obj).__name__
    return {
        "class_path": _class_path(type(obj)),
        "init_args": {
            setting.name: _plain(getattr(obj, setting.name), f"{name}.{setting.name}")
            for setting in dataclasses.fields(obj)
            if setting.init
        },
    }


def from_config(config: Any) -> Any:
    """The inverse of :func:`to_config`; what is no config (an objective, ``None``, a number) passes through.

    Args:
        config: ``{"class_path": ..., "init_args": {...}}``, nested where settings are objects themselves.

    Raises:
        UserError: for a class that does not exist or is neither objective, attack nor AWP, and for settings that the
            class does not have.

    Example:
        >>> from_config({"class_path": "lightning_robust.attacks.FGSM", "init_args": {"eps": "4/255"}}).eps
        '4/255'
    """
    if isinstance(config, list):
        return [from_config(value) for value in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {key: from_config(value) for key, value in config.items()}
    unknown = set(config) - {"class_path", "init_args"}
    if unknown:
        raise UserError(f"a config of a class has class_path and init_args, not {', '.join(sorted(map(str, unknown)))}")
    cls = _find_class(config["class_path"])
    settings = {name: from_config(value) for name, value in (config.get("init_args") or {}).items()}
    if isinstance(settings.get("awp"), dict):  # as the command line writes it: awp: {gamma: 0.01}
        settings["awp"] = from_config({"class_path": _class_path(AWP), "init_args": settings["awp"]})
    names = [setting.name for setting in dataclasses.fields(cls) if setting.init]
    for name in settings:
        if name not in names:
            raise UserError(f"{cls.__name__} has no setting {name!r}: it has {', '.join(names)}")
    return cls(**settings)


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, _KINDS):
        return to_config(value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, name) for key, item in value.items()}
    raise UserError(
        f"{name}={value!r} cannot be written to a config: settings are text, numbers, true or false, lists and "
        "dicts of these, attacks and AWP"
    )


def _class_path(cls: type) -> str:
    """The shortest module path that exports the class, which is where users import it from."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts) + 1):
        module = ".".join(parts[:length])
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    raise UserError(f"{cls.__qualname__} cannot be imported by name: define it at the top level of a module")


def _find_class(class_path: Any) -> Any:
    module, dot, name = class_path.rpartition(".") if isinstance(class_path, str) else ("", "", "")
    cls = None
    if dot:
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ImportError:
            cls = None
    if cls is None:
        raise UserError(
            f"class_path={class_path!r} does not exist: write the full path, such as lightning_robust.objectives.TRADES"
        )
    # A checkpoint must not be able to call anything else that is installed.
    if not (isinstance(cls, type) and issubclass(cls, _KINDS) and dataclasses.is_dataclass(cls)):
        raise UserError(f"class_path={class_path!r} is neither an objective nor an attack nor AWP")
    return cls
