"""Runs of SLURM jobs: a job that is requeued goes on in its own folder, and in no other's."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_robust.cli.checkpoints import said
from lightning_robust.errors import UserError

_LARGEST_STEP = 2**31  # above are SLURM's names for the batch script itself


def job() -> str | None:
    """Name of this job's run, ``slurm_<job>`` (``slurm_<job>_<step>`` from its second step on); ``None`` outside a job.

    Shells that a job opens for its user to work in count as outside, as they do for Lightning.
    """
    number = os.environ.get("SLURM_JOB_ID")
    if not number or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    step = os.environ.get("SLURM_STEP_ID", "")
    return f"slurm_{number}_{step}" if step.isdigit() and 0 < int(step) < _LARGEST_STEP else f"slurm_{number}"


def requeued() -> bool:
    """Whether SLURM has started this job before."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return job() is not None and count.isdigit() and int(count) > 0


def in_job(words: list[str], name: str) -> list[str]:
    """A training in a job is kept under the job's name; requeued, it goes on from its newest checkpoint.

    Every process of the job reads the same words, and so agrees on the folder.

    Args:
        words: the command and its options, with configs as paths.
        name: name of the run where the user gives none.

    Raises:
        UserError: if the job has trained a run of this name already.
    """
    version = job()
    if version is None or words[0] not in ("fit", "train"):
        return words
    home = Path(said(words, ("run", "root")) or "runs") / (said(words, ("run", "name")) or name)
    given = said(words, ("run", "version"))
    out = list(words)
    if given is None:
        first = not any(os.environ.get(key, "0") != "0" for key in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
        if first and not requeued() and (home / version).exists():
            raise UserError(
                f"the run folder {home / version} exists: this job has trained a run of this name already; give each "
                "a --run.version or a --run.name of its own"
            )
        out.append(f"--run.version={version}")
    if requeued():
        folder = home / (given or version)
        # what Lightning saves as it requeues, and what the run itself saves
        kept = [*folder.glob("hpc_ckpt_*.ckpt"), *folder.glob("checkpoints/last.ckpt")]
        if kept:  # also above the file that the run began from
            out.append(f"--ckpt_path={max(kept, key=lambda file: file.stat().st_mtime)}")
    return out
