"""``lightning-robust train --seeds 3``: the same training with other seeds, and what all of them say together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_robust.cli.checkpoints import said, typed
from lightning_robust.cli.diagnosis import parameters, subclasses
from lightning_robust.cli.given_configs import run_name, with_configs
from lightning_robust.cli.slurm import job
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger
from lightning_robust.modules import ImageClassifier
from lightning_robust.report import write_json
from lightning_robust.report.page import write_page
from lightning_robust.report.page.words import measure
from lightning_robust.report.secrets import mask_command
from lightning_robust.report.seeds import Spread, write_seeds

_MOST = 100


def train_seeds(words: list[str]) -> None:
    """Run ``train`` once for each seed, each in a process of its own, and aggregate.

    The group is a folder ``<root>/<name>/<version>/`` that holds a run's folder ``seed_<s>/`` for each seed s, and the
    means and deviations: ``results.json``, ``seeds.json``, ``tables/`` and ``report.html``. A repetition that fails
    costs the others nothing. Seeds set the first weights, random starts and dropout; the data's own seed, that of the
    splits and the order, stays.

    Args:
        words: ``train``, ``--seeds N`` (seeds from ``seed_everything`` on) or ``--seeds 0,7,42``, and options.

    Raises:
        UserError: for seeds that are none, and for what cannot be repeated.
        SystemExit: with the status of the first repetition that failed.
    """
    given, rest = split_seeds(words)
    rest = with_configs(rest)
    seeds = _seeds(given, said(rest, ("seed_everything",)))
    if any(word.partition("=")[0] in ("-h", "--help", "--print_config") for word in rest):
        from lightning_robust.cli.run import run

        run(rest)
        return
    if said(rest, ("ckpt_path",)) is not None:
        raise UserError(
            "--seeds with --ckpt_path: each repetition starts anew; go on with a single one by --run.version "
            "<version>/seed_<s> --ckpt_path last"
        )
    if any(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "RANK")) or (
        job() is not None and os.environ.get("SLURM_NTASKS", "1") != "1"
    ):
        raise UserError(
            "--seeds starts its own processes: under torchrun or srun start one run for each seed with "
            "--seed_everything <s>, and compare them with `lightning-robust report RUN RUN …`"
        )
    root, name = said(rest, ("run", "root")) or "runs", said(rest, ("run", "name")) or run_name(rest)
    if "fast_dev_run" in " ".join(rest) and (said(rest, ("trainer", "fast_dev_run")) or "false") not in ("false", "0"):
        raise UserError("--seeds with fast_dev_run: that keeps nothing to aggregate; leave --seeds out")
    logger = RunLogger(root, name, said(rest, ("run", "version")))
    logger.prepare()
    group, version = logger.folder, logger.version
    (group / "checkpoints").rmdir()  # the repetitions have theirs
    write_json(group / "environment.json", {"version": 1, "command": ["lightning-robust", *mask_command(words)]})
    status = _run_all(rest, seeds, name, version, group)
    if status:
        raise SystemExit(status)


def split_seeds(words: list[str]) -> tuple[str | None, list[str]]:
    """What is said of ``--seeds``, and the other words."""
    given, rest, index = None, [], 0
    while index < len(words):
        word = words[index]
        index += 1
        name, equals, value = word.partition("=")
        if name != "--seeds":
            rest.append(word)
            continue
        if not equals:
            value = words[index] if index < len(words) and not words[index].startswith("--") else ""
            index += bool(value)
        given = value
    return given, rest


def _seeds(given: str | None, first: str | None) -> list[int]:
    text = (given or "").strip().strip("[]")
    listed = [part.strip() for part in text.split(",") if part.strip()]
    if not listed or not all(part.isdigit() for part in listed):
        raise UserError(
            f"--seeds {given or ''}: give a number of repetitions, as 3, or the seeds themselves, as 0,7,42"
        )
    if len(listed) > 1 or "," in text:
        seeds = [int(part) for part in listed]
        if len(set(seeds)) != len(seeds):
            raise UserError(f"--seeds {given}: a seed stands twice, which would repeat the same run")
    else:
        start = int(first) if first is not None and first.isdigit() else 0
        seeds = list(range(start, start + int(listed[0])))
    if not 1 <= len(seeds) <= _MOST:
        raise UserError(f"--seeds {given}: give 1 to {_MOST} repetitions")
    return seeds


# -- the repetitions ---------------------------------------------------------------------------------------------------


def _run_all(words: list[str], seeds: list[int], name: str, version: str, group: Path) -> int:
    own = _has_seed(words) and not typed(words, ("model", "seed"))
    runs = [f"seed_{seed}" for seed in seeds]
    failed: dict[str, str] = {}
    status = 0
    for number, (seed, run) in enumerate(zip(seeds, runs, strict=True), 1):
        print(f"Seed {seed} ({number} of {len(seeds)})", flush=True)
        given = [f"--seed_everything={seed}", f"--run.name={name}", f"--run.version={version}/{run}"]
        given += [f"--model.seed={seed}"] if own else []
        given += [] if said(words, ("run", "group")) else [f"--run.group={name}/{version}"]
        ended = _run_one([*words, *given])
        if ended:
            failed[run] = f"this repetition ended with status {ended} and does not count"
            status = status or ended
        if ended in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            failed |= dict.fromkeys(runs[number:], "this repetition was not begun")
            break
        if ended and number == 1:  # a mistake in the settings is one of every seed
            failed |= dict.fromkeys(runs[1:], "not begun, since the first repetition failed")
            break
        # after each: what is there counts, whatever happens to the rest
        _aggregate(group, seeds, runs, {**failed, **dict.fromkeys(runs[number:], "not done yet")})
    done = [run for run in runs if run not in failed]
    if not done:
        _tidy(group)
        return status
    spreads = _aggregate(group, seeds, runs, failed)
    _tell(group, spreads, len(done), len(runs))
    return status


def _run_one(words: list[str]) -> int:
    """Run a command as a process; a signal to end this program is passed on to it."""
    process = subprocess.Popen([sys.executable, "-m", "lightning_robust", *words])

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # Ctrl-C reaches both processes by itself: the other one saves and leaves, and this one waits for it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, pass_on)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _aggregate(group: Path, seeds: list[int], runs: list[str], failed: Mapping[str, str]) -> dict[str, Spread]:
    there = [run for run in runs if (group / run).is_dir() or run in failed]
    return write_seeds(group, seeds, there, failed)


def _tell(group: Path, spreads: Mapping[str, Spread], done: int, wanted: int) -> None:
    console = Console()
    console.print(seeds_table(spreads, done))
    if done < wanted:
        console.print(f"{wanted - done} of {wanted} repetitions failed or were not begun, and do not count")
    console.print(f"Run folder: {group}", soft_wrap=True)
    try:
        console.print(f"Page: {write_page([group], group / 'report.html')}", soft_wrap=True)
    except Exception as error:  # whatever it is: the results are worth more than the page
        rank_zero_warn(
            f"the page was not made ({type(error).__name__}: {error}); the results are in {group}, and "
            f"`lightning-robust report {group}` tries again"
        )


def seeds_table(spreads: Mapping[str, Spread], runs: int) -> Table:
    """Mean ± deviation of what a test found, for a terminal.

    Args:
        spreads: name to spread.
        runs: how many repetitions count.
    """
    table = Table(title=f"Results (test), mean ± standard deviation of {runs} seeds")
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, spread in spreads.items():
        what = measure(name)
        if what.stage == "test" and what.label != name.partition("/")[2] and "8 bits" not in what.label:
            table.add_row(what.label, what.text(spread.mean, spread.deviation))
    return table


def _has_seed(words: list[str]) -> bool:
    """Whether the module has a seed of its own, as ours have; of a user's class one looks."""
    kind = said(words, ("model", "class_path")) or said(words, ("model",)) or ""
    known = {cls.__name__: cls for cls in subclasses(ImageClassifier)}
    found = known.get(kind.rpartition(".")[2])
    return found is not None and "seed" in parameters(found)


def _tidy(group: Path) -> None:
    """Take back a group's folder in which nothing was kept."""
    if not any(group.glob("seed_*")):
        (group / "environment.json").unlink(missing_ok=True)
    for part in ("figures", "tables", "."):
        folder = group / part
        if folder.is_dir() and not any(folder.iterdir()):
            folder.resolve().rmdir()
