"""What the user said, piece by piece, with the file and line where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_robust.errors import UserError

_VALUELESS = ("--print_config", "-h", "--help")


@dataclass(frozen=True)
class Source:
    """One config file, or one option of the command line.

    Args:
        node: its settings or its value, as YAML nodes, which know their lines.
        file: the config file; empty for an option.
        path: the option's dotted name in parts; empty for a file.
        append: whether the option adds to a list (``--trainer.callbacks+=NAME``).
    """

    node: yaml.Node
    file: str = ""
    path: tuple[str, ...] = ()
    append: bool = False

    def place(self, node: yaml.Node) -> str:
        """Where a node of this source stands, as the beginning of a message."""
        return f"{self.file}, line {node.start_mark.line + 1}: " if self.file else f"--{'.'.join(self.path)}: "


def sources(words: list[str]) -> Iterator[Source]:
    """The config files and options of a command line, in their order: later ones win.

    Args:
        words: the command and its options, with configs as paths.

    Raises:
        UserError: for a config that is not one (:func:`read_config`).
    """
    index = 1
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--") or word.startswith(_VALUELESS):
            continue
        name, equals, value = word.partition("=")
        if not equals:
            if index == len(words) or words[index].startswith("--"):
                continue
            value = words[index]
            index += 1
        if name == "--config":
            yield Source(read_config(Path(value)), file=value)
            continue
        yield Source(_value(value), path=tuple(name[2:].removesuffix("+").split(".")), append=name.endswith("+"))


def read_config(file: Path) -> yaml.MappingNode:
    """The settings of a config file, with their lines.

    Raises:
        UserError: for a file that is not readable, no YAML, empty, not made of settings, or that has a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file: a config is YAML") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        inside = f" ({error.context}" + (f", line {error.context_mark.line + 1}" if error.context_mark else "") + ")"
        tab = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{file}{line}: no valid YAML: {error.problem}{inside if error.context else ''}{tab}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        raise UserError(f"{file} is empty: a config has settings such as `trainer: {{max_epochs: 3}}`")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{file} holds {kind}: a config has settings such as `trainer: {{max_epochs: 3}}`")
    _prepare(node, str(file), yaml.SafeLoader(""))
    return node


def _prepare(node: yaml.Node, file: str, loader: yaml.SafeLoader) -> None:
    """Refuse keys that stand twice (YAML would silently keep the last), and put in what ``<<`` refers to."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"{file}, line {line}: {key.value!r} stands in line {seen[key.value]} already")
            seen[str(key.value)] = line
        loader.flatten_mapping(node)
        for _, value in node.value:
            _prepare(value, file, loader)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _prepare(value, file, loader)


def _value(text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    return node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:str", text)
