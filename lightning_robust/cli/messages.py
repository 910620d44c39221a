"""Short messages for the user's mistakes, said once."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_robust.errors import UserError

if TYPE_CHECKING:
    import yaml

    from lightning_robust.cli.sources import Source

RUN_KEY = "LIGHTNING_ROBUST_RUN"
"""Environment variable that the processes of one run share, so that one of them speaks for all."""

_OURS = "lightning_robust.errors.UserError: "
_SPOKEN_FOR = 60.0  # seconds
_MARKERS = "lightning-robust-{}.said"


def users_mistake(error: BaseException | None) -> str | None:
    """The user's mistake behind an exception, if that is what it is.

    Libraries wrap what a constructor raises, a data loader's worker and a forked rank send only their traceback's text:
    its last line is the message.
    """
    while error is not None:
        text = str(error)
        if _OURS in text:
            # what a worker or rank raised; a worker's is raised again under its own class
            return text.rpartition(_OURS)[2].strip()
        if isinstance(error, UserError):
            return text
        if type(error).__name__ == "MisconfigurationException":
            # Lightning's own word for "you set this wrongly"; its class is not imported here, as it costs seconds
            return _first_sentences(text)
        error = error.__cause__ or error.__context__
    return None


def report(error: str) -> None:
    """Print a mistake, once for all processes of a run."""
    if _first_to_speak():
        print(f"lightning-robust: error: {error}", file=sys.stderr)


def spoken() -> bool:
    """Whether another process of this run has just told the user what is wrong."""
    marker = _marker()
    return marker is not None and marker.exists() and time.time() - marker.stat().st_mtime < _SPOKEN_FOR


def _first_to_speak() -> bool:
    marker = _marker()
    if marker is None:
        return True
    if spoken():
        return False
    try:
        for other in marker.parent.glob(_MARKERS.format("*")):
            if time.time() - other.stat().st_mtime > _SPOKEN_FOR:
                other.unlink(missing_ok=True)
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # no folder for temporary files: better twice than never
        return True
    return True


def _marker() -> Path | None:
    """A file that the first process of a run on several devices makes before it speaks."""
    key = os.environ.get(RUN_KEY)
    if key is None:
        # processes that something else started: torchrun, srun
        if not any(os.environ.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS")):
            return None
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
        key = f"{os.getppid()}-{'-'.join(os.environ.get(name, '') for name in names)}"
    owner = os.getuid() if hasattr(os, "getuid") else ""
    name = hashlib.sha1(f"{owner}-{key}".encode(), usedforsecurity=False).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / _MARKERS.format(name)


def shorten(message: str, options: Iterable[str], nearest: Callable[[str, Iterable[str]], str]) -> str:
    """Turn jsonargparse's page of attempts into a line, where the mistake was not found otherwise.

    Args:
        message: what jsonargparse says.
        options: dotted names that the parser knows.
        nearest: gives the end of a message about a wrong name.
    """
    if "are required" in message:
        missing = " and ".join(f"--{name}" for name in ("model", "data") if re.search(rf"\b{name}\b", message))
        return (
            f"missing: {missing or message}: give a config with --config NAME (`lightning-robust configs` lists the "
            "shipped ones), or --model ImageClassifier and --data Digits"
        )
    if unrecognized := re.search(r"[Uu]nrecognized arguments?: (.*)", message):
        name = unrecognized[1].split()[0]
        if not name.startswith("-"):
            return f"{name!r} is no option: options begin with --, as --trainer.max_epochs 3"
        return f"there is no option {name.split('=')[0]}{nearest(name.split('=')[0].lstrip('-'), options)}"
    if lacking := re.search(r"argument (\S+): expected (?:one|at least one) argument", message):
        return f"{lacking[1].split('/')[-1]} needs a value"
    # the innermost reasons, without types and values
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    told = [line for line in lines if not line.startswith(("Subtypes:", "Given value", "Errors:", "Does not validate"))]
    return "; ".join(dict.fromkeys(told))[:300] or message[:300]


def located(message: str, said: Iterable[Source]) -> str:
    """A class's message about a value with the place where that value stands, if there is one such place.

    Args:
        message: names the value as ``name=value`` or in quotes.
        said: config files and options.
    """
    named = [(match[1], match[2].strip("'\"")) for match in re.finditer(r"\b(\w+)=('[^']*'|[^\s,;:)]+)", message)]
    quoted = [("", match[1]) for match in re.finditer(r"'([^'\s]+)'", message)]
    for source in reversed(list(said)):
        name = source.path[-1] if source.path else ""
        places = [
            source.place(node)
            for key, node in _leaves(source.node, name)
            if any(wanted in ("", key) and _same(str(node.value), value) for wanted, value in named or quoted)
        ]
        if len(set(places)) == 1:
            return places[0] + message
        if places:  # of several equal values, nobody can tell which
            return message
    return message


def _leaves(node: yaml.Node, name: str) -> Iterator[tuple[str, yaml.Node]]:
    for child in node.value if isinstance(node.value, list) else ():
        if isinstance(child, tuple):  # an entry of a mapping
            yield from _leaves(child[1], str(child[0].value))
        else:
            yield from _leaves(child, name)
    if not isinstance(node.value, list):
        yield name, node


def _same(text: str, value: str) -> bool:
    try:
        return float(text) == float(value)
    except ValueError:
        return text == value


def _first_sentences(text: str) -> str:
    return " ".join(text.split())[:300]
