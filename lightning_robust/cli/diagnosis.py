"""Finds the user's mistake after the parser has refused: walks what was said beside what the classes take.

The parser's own message lists every attempt at every type of a union. This names the one key that is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lightning_robust.cli.sources import Source

_Path = tuple[str, ...]
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SPEC = ("class_path", "init_args", "dict_kwargs")
_FEW = 12


class _MistakeError(Exception):
    """A mistake was found: its message."""


def diagnose(said: Iterable[Source], roots: dict[str, Any]) -> str | None:
    """The first mistake in what the user said, or ``None`` if every key, class, choice and type is right.

    Args:
        said: config files and options.
        roots: settings of the top level and their types.
    """
    walk = _Walk(roots)
    try:
        for source in said:
            walk.source(source)
    except _MistakeError as mistake:
        return str(mistake)
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: what was probably meant, or what there is if that is little."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    close = close or [other for other in names if min(len(name), len(other)) > 2 and (name in other or other in name)]
    if close:
        return f": did you mean {close[0]}?"
    return f": choose from {', '.join(names)}" if 0 < len(names) <= _FEW else ""


def subclasses(base: type) -> list[type]:
    """All classes below a base that have been imported, itself included."""
    found: dict[type, None] = {base: None}
    child: type
    for child in base.__subclasses__():
        found.update(dict.fromkeys(subclasses(child)))
    return list(found)


def parameters(cls: type) -> dict[str, Any]:
    """Name and type of every setting of a class; through ``**kwargs`` also those of its bases."""
    if dataclasses.is_dataclass(cls):
        hints = _hints(cls)
        return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls) if field.init}
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        init = vars(base)["__init__"]
        hints = _hints(init)
        signature = list(inspect.signature(init).parameters.values())[1:]
        for parameter in signature:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
            break
    return found


def _hints(owner: Any) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except (NameError, TypeError):  # names that only a type checker imports: nothing is known then
        return {}


class _Walk:
    def __init__(self, roots: dict[str, Any]) -> None:
        self.roots = roots
        self.chosen: dict[_Path, type] = {}  # class of each object, by where it is

    def source(self, said: Source) -> None:
        if not said.path:
            assert isinstance(said.node, yaml.MappingNode)
            self._settings(said.node, self.roots, "", (), said)
            return
        known: dict[Any, Any] = {**self.roots, "config": Any}
        owner, wanted = "", None
        path: _Path = ()
        for part in said.path:
            if part in ("init_args", "dict_kwargs"):
                continue
            if part == "class_path":
                break
            if part not in known and None not in known:
                self._unknown(part, known, owner, said, said.node)
            wanted = known[part] if part in known else known[None]
            path = (*path, part)
            known, owner = self._children(wanted, path)
        if said.append:
            wanted = Union[tuple(_elements(wanted))] if _elements(wanted) else Any  # noqa: UP007 - a variable's union
        self._check(said.node, wanted, path, said)

    # -- what there may be ---------------------------------------------------------------------------------------------

    def _children(self, wanted: Any, path: _Path) -> tuple[dict[Any, Any], str]:
        """Settings below a type, and the name of what has them; the key ``None`` stands for any name."""
        members = _members(wanted)
        classes = _classes(members) or [c for e in _elements(wanted) for c in _classes(_members(e))]
        if path in self.chosen:
            return parameters(self.chosen[path]), self.chosen[path].__name__
        if classes:
            known: dict[Any, Any] = {}
            for cls in (sub for base in classes for sub in ([base] if _direct(base) else subclasses(base))):
                known = parameters(cls) | known
            return known, path[-1] if _direct(classes[0]) else ""
        values = _dict_values(members)
        return ({None: values}, "") if values is not None or not _plain(members) else ({}, path[-1])

    # -- walking -------------------------------------------------------------------------------------------------------

    def _settings(self, node: yaml.MappingNode, known: dict[Any, Any], owner: str, path: _Path, said: Source) -> None:
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                self._unknown(name, known, owner, said, key)
            self._check(value, known[name], (*path, name), said)

    def _unknown(self, name: str, known: dict[Any, Any], owner: str, said: Source, node: yaml.Node) -> None:
        names = [key for key in known if key is not None]
        what = f"{owner} has no setting" if owner else "there is no setting"
        raise _MistakeError(f"{said.place(node)}{what} {name!r}{nearest(name, names)}")

    def _check(self, node: yaml.Node, wanted: Any, path: _Path, said: Source) -> None:
        members = _members(wanted)
        classes = _classes(members)
        if isinstance(node, yaml.MappingNode):
            if classes:
                self._object(node, classes, path, said)
            elif (values := _dict_values(members)) is not None:
                for key, value in node.value:
                    self._check(value, values, (*path, str(key.value)), said)
            elif _plain(members):
                self._wrong("a group of settings", members, path, said, node)
        elif isinstance(node, yaml.SequenceNode):
            elements = _elements(wanted)
            if elements:
                for value in node.value:
                    self._check(value, Union[tuple(elements)], path, said)  # noqa: UP007 - a variable's union
            elif _plain(members) or (classes and _only(members, classes)):
                self._wrong("a list", members, path, said, node)
        elif classes and _only(members, classes):
            if not (type(None) in members and _is_null(node)):
                self._resolve(node, classes, path, said)
        elif _plain(members) and not any(_fits(node, member) for member in members):
            self._wrong(repr(str(node.value)[:80]), members, path, said, node)

    def _object(self, node: yaml.MappingNode, classes: list[type], path: _Path, said: Source) -> None:
        entries = {str(key.value): (key, value) for key, value in node.value}
        if not set(entries) & set(_SPEC):
            known, owner = self._children(Union[tuple(classes)], path)  # noqa: UP007 - a variable's union
            self._settings(node, known, owner, path, said)
            return
        for name, (key, _) in entries.items():
            if name not in _SPEC:
                near = difflib.get_close_matches(name, _SPEC, n=1)
                hint = f"did you mean {near[0]}?" if near else "settings of a class stand under init_args"
                raise _MistakeError(f"{said.place(key)}{'.'.join(path)} has no entry {name!r}: {hint}")
        if "class_path" in entries:
            self._resolve(entries["class_path"][1], classes, path, said)
        given = entries.get("init_args", (None, None))[1]
        if isinstance(given, yaml.MappingNode):
            known, owner = self._children(Union[tuple(classes)], path)  # noqa: UP007 - a variable's union
            self._settings(given, known, owner, path, said)

    def _resolve(self, node: yaml.Node, classes: list[type], path: _Path, said: Source) -> None:
        """Note the class that a name stands for."""
        name = str(node.value)
        allowed = {cls.__name__: cls for base in classes for cls in subclasses(base)}
        found = _imported(name) if "." in name else allowed.get(name)
        if found is None:
            abstract = [cls.__name__ for cls in allowed.values() if inspect.isabstract(cls)]
            kind = " or ".join(sorted(cls.__name__ for cls in classes))
            names = [known for known in allowed if known not in abstract and not known.startswith("_")]
            raise _MistakeError(
                f"{said.place(node)}{_prefix(path, said)}there is no {kind} {name!r}"
                f"{nearest(name.rpartition('.')[2], names)}"
            )
        for key in [key for key in self.chosen if key[: len(path)] == path]:
            del self.chosen[key]
        self.chosen[path] = found

    def _wrong(self, given: str, members: list[Any], path: _Path, said: Source, node: yaml.Node) -> None:
        literals = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
        choices = [str(value) for value in literals if not isinstance(value, bool)]  # false is how YAML reads off
        kinds = [_SCALARS[member] for member in members if member in _SCALARS]
        place = f"{said.place(node)}{_prefix(path, said)}{given} is not "
        if choices:
            names = list(dict.fromkeys(choices))
            close = difflib.get_close_matches(given.strip("'"), names, n=1, cutoff=0.5)
            raise _MistakeError(
                f"{place}one of {', '.join([*names, *kinds])}{f': did you mean {close[0]}?' if close else ''}"
            )
        raise _MistakeError(f"{place}{' or '.join(kinds)}")


def _prefix(path: _Path, said: Source) -> str:
    """The key, where the place does not name it already."""
    return "" if said.path == path else f"{'.'.join(path)}: "


def _members(wanted: Any) -> list[Any]:
    if get_origin(wanted) in (Union, types.UnionType):
        return [member for part in get_args(wanted) for member in _members(part)]
    return [wanted]


def _classes(members: list[Any]) -> list[type]:
    """Those types that are made of settings."""
    plain = ("builtins", "typing", "pathlib", "datetime", "collections.abc", "enum", "types")
    return [m for m in members if inspect.isclass(m) and get_origin(m) is None and m.__module__ not in plain]


def _direct(cls: type) -> bool:
    """Whether settings are given without a class name: there is nothing to choose."""
    return len(subclasses(cls)) == 1


def _only(members: list[Any], classes: list[type]) -> bool:
    return all(member in classes or member is type(None) for member in members)


def _plain(members: list[Any]) -> bool:
    """Whether a type is made of numbers, texts and choices alone, so that a value can be judged here."""
    return all(m in _SCALARS or m is type(None) or get_origin(m) is Literal for m in members)


def _elements(wanted: Any) -> list[Any]:
    found: list[Any] = []
    for member in _members(wanted):
        origin = get_origin(member)
        if inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, dict):
            found += [argument for argument in get_args(member) if argument is not Ellipsis]
    return found


def _dict_values(members: list[Any]) -> Any:
    for member in members:
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def _imported(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
    return found if inspect.isclass(found) else None


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null" or str(node.value) in ("null", "~", "")


def _fits(node: yaml.Node, member: Any) -> bool:
    text = str(node.value)
    if member is type(None):
        return _is_null(node)
    if get_origin(member) is Literal:
        off = any(value is False for value in get_args(member)) and text.lower() in ("false", "no", "off")
        return off or text in [str(value) for value in get_args(member)]
    if member is bool:
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    if member in (int, float):
        try:
            member(text.replace("_", ""))
        except ValueError:
            return False
    return True
