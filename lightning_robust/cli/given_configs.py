"""The configs of a command line: found, checked, and what a run is called after them."""

from __future__ import annotations

from pathlib import Path

from lightning_robust.cli.checkpoints import at, said
from lightning_robust.cli.configs import FOLDER, resolve
from lightning_robust.cli.sources import read_config, sources
from lightning_robust.errors import UserError

FROM_DATA = ("num_classes", "image_shape")
"""What the model takes from the data."""


def with_configs(words: list[str]) -> list[str]:
    """Names of shipped configs become paths.

    Raises:
        UserError: for what is no config.
    """
    out: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word not in ("--config", "-c") and not word.startswith("--config="):
            out.append(word)
            continue
        name = word.partition("=")[2]
        if "=" not in word and index < len(words) and not words[index].startswith("--"):
            name = words[index]
            index += 1
        if not name:
            raise UserError("--config needs a name or a file; `lightning-robust configs` lists the shipped ones")
        out += ["--config", str(resolve(name))]
    for file in _configs(out):
        read_config(Path(file))  # what is no config is told before anything heavier is done
    return out


def with_runs_config(words: list[str]) -> list[str]:
    """A checkpoint brings its run's config, unless a config that is given says what the model or the data is."""
    checkpoint = said(words, ("ckpt_path",))
    given = [read_config(Path(file)) for file in _configs(words)]
    if checkpoint is None or any(at(config, (key,)) for config in given for key in ("model", "data")):
        return words
    folder = Path(checkpoint).parent
    # that of a requeued job lies in the run's folder, every other one in checkpoints/
    beside = (folder if Path(checkpoint).name.startswith("hpc_ckpt_") else folder.parent) / "config.yaml"
    return [words[0], "--config", str(beside), *words[1:]] if beside.is_file() else words


def _configs(words: list[str]) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words[:-1]) if word == "--config"]


def run_name(words: list[str]) -> str:
    """What a run is called: its last config's name, of a shipped one with its folder, of a file its stem.

    ``trainer/…`` names no run.
    """
    names = []
    for file in _configs(words):
        path = Path(file).resolve()
        inside = path.is_relative_to(FOLDER)
        names.append("_".join(path.relative_to(FOLDER).with_suffix("").parts) if inside else path.stem)
    return next((name for name in reversed(names) if not name.startswith("trainer_")), "run")


def check_linked(words: list[str]) -> None:
    """What the model takes from the data cannot be set: it would be ignored without a word.

    Raises:
        UserError: where it is.
    """
    for source in sources(words):
        for name in FROM_DATA:
            node = source.node if source.path else None
            if source.path and (source.path[0], source.path[-1]) != ("model", name):
                continue
            if not source.path:
                node = at(source.node, ("model", name))
            if node is not None:
                raise UserError(
                    f"{source.place(node)}{name} of the model is read from the data: leave it out (data.classes makes "
                    "a sub-problem, data.image_size resizes)"
                )
