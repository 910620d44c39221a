"""What ``--ckpt_path`` means: which file, which run it goes on in, and what its run's config no longer needs."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_robust.cli.sources import sources
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger


def said(words: list[str], path: tuple[str, ...]) -> str | None:
    """What the user said of a setting, as it is written; ``None`` if nothing, or null.

    Args:
        words: the command and its options, with configs as paths; later ones win.
        path: the setting's name in parts, without ``init_args``.
    """
    value = None
    for source in sources(words):
        rest = path if not source.path else () if _plain(source.path) == path else None
        node = None if rest is None else at(source.node, rest)
        if node is not None:
            value = None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    return value


def typed(words: list[str], path: tuple[str, ...]) -> bool:
    """Whether a setting stands on the command line itself."""
    return any(_plain(source.path) == path for source in sources(words) if source.path)


def _plain(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in path if part != "init_args")


def at(node: yaml.Node, path: Iterable[str]) -> yaml.Node | None:
    """The node of a setting in a config, whether or not its class writes ``init_args`` around it."""
    for name in path:
        found = _entry(node, name)
        if found is None:
            inner = _entry(node, "init_args")
            found = None if inner is None else _entry(inner, name)
        if found is None:
            return None
        node = found
    return node


def _entry(node: yaml.Node, name: str) -> yaml.Node | None:
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in entries if key.value == name), None)


def resolve_last(words: list[str], name: str) -> list[str]:
    """Put the file that ``last`` means, and the run it lies in, into the words, so that every process reads the same.

    Each process of a run would otherwise look for itself, and only rank zero knows the run's folder.

    Args:
        words: the command and its options, with configs as paths.
        name: name of the run where the user gives none.

    Raises:
        UserError: if there is no checkpoint to go on from.
    """
    if said(words, ("ckpt_path",)) != "last":
        return words
    root = said(words, ("run", "root")) or "runs"
    name = said(words, ("run", "name")) or name
    version = said(words, ("run", "version"))
    home = Path(root) / name
    if version is None and home.is_dir():
        version = RunLogger._newest(home)
    file = home / str(version) / "checkpoints" / "last.ckpt"
    if not file.is_file():
        where = home if version is None else home / str(version)
        kind = "no run below" if version is None else "the run"
        raise UserError(
            f"--ckpt_path last: {kind} {where} has {'a' if version is None else 'no'} checkpoint to go on from; leave "
            "--ckpt_path out to start"
        )
    given = {"--run.root": root, "--run.name": name, "--run.version": version or "", "--ckpt_path": str(file)}
    return [*words, *(f"{key}={value}" for key, value in given.items())]


def goes_on_in(checkpoint: Any, folder: Path) -> bool:
    """Whether a run in this folder goes on in it: its checkpoint lies there."""
    if not isinstance(checkpoint, str) or "://" in checkpoint:
        return False
    return Path(checkpoint).resolve().parent == (folder / "checkpoints").resolve()


def without_sources(words: list[str], checkpoint: dict[str, Any] | None) -> list[str]:
    """Leave out the weights that a checkpoint takes the place of: their file and hub need not be at hand.

    What the user typed stands. The normalization that pretrained weights bring is then that of the checkpoint; one that
    does not tell it (of an earlier version) still needs the hub.

    Args:
        words: the command and its options, with configs as paths.
        checkpoint: what the file given as ``--ckpt_path`` holds.
    """
    if checkpoint is None:
        return words
    out = list(words)
    if said(words, ("model", "weights")) is not None and not typed(words, ("model", "weights")):
        out.append("--model.weights=null")
    pretrained = (said(words, ("model", "pretrained")) or "false").lower() in ("true", "yes", "on")
    if pretrained and not typed(words, ("model", "pretrained")):
        known = said(words, ("model", "normalization"))
        kept = (checkpoint.get("hyper_parameters") or {}).get("normalization")
        if known is None and kept is not None:
            out.append(f"--model.normalization={kept if isinstance(kept, str) else json.dumps(kept)}")
        if known is not None or kept is not None:
            out.append("--model.pretrained=false")
    if said(words, ("model", "prm_weights")) is not None and not typed(words, ("model", "prm_weights")):
        out.append("--model.prm_weights=null")
        kept = (checkpoint.get("hyper_parameters") or {}).get("prm")
        if kept is not None and said(words, ("model", "prm")) is None:  # they came from that file
            out.append(f"--model.prm={json.dumps(kept)}")
    return out


def read_checkpoint(given: str | None) -> dict[str, Any] | None:
    """What a checkpoint holds, read without running code from it; ``None`` where ``--ckpt_path`` is no file.

    One that cannot be used is refused here, before data and model are made.

    Raises:
        UserError: for a file that is missing, broken, or no checkpoint of a run.
    """
    if given == "best":
        raise UserError("--ckpt_path best: only a training run knows its best; give the file, or last for the newest")
    if given is None or given in ("hpc", "registry") or "://" in given:
        return None
    path = Path(given)
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"--ckpt_path {given} is a folder: give the file in it, such as checkpoints/last.ckpt")
        raise UserError(f"--ckpt_path {given}: there is no such file; runs keep theirs in <run folder>/checkpoints/")
    archive = zipfile.is_zipfile(path)  # files from before PyTorch 1.6 are none, and cannot be mapped into memory
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch.load raises nearly everything for a file that is not one of its own
        unsafe = isinstance(error, pickle.UnpicklingError) and (archive or "Unsupported global" in str(error))
        reason = "it holds more than numbers and plain data, which is not loaded" if unsafe else "broken or cut short"
        raise UserError(f"--ckpt_path {given} cannot be read as a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"--ckpt_path {given} is not a checkpoint of a run: for a plain file of weights use --model.weights {given}"
        )
    return checkpoint
