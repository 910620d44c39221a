"""A run's folder: one run each, proven writable before training, kept over a resume."""

from __future__ import annotations

import csv
import errno
import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_versions_count_up(tmp_path: Path) -> None:
    loggers = [RunLogger(str(tmp_path), "run") for _ in range(3)]
    assert [logger.version for logger in loggers] == ["version_0", "version_1", "version_2"]
    assert loggers[1].log_dir == str(tmp_path / "run" / "version_1")
    assert sorted(path.name for path in loggers[1].folder.iterdir()) == ["checkpoints", "figures", "tables"]
    (tmp_path / "run" / "version_7").mkdir()
    (tmp_path / "run" / "notes").mkdir()
    assert RunLogger(str(tmp_path), "run").version == "version_8"
    assert RunLogger(str(tmp_path), "other").version == "version_0"


def claim(folder: str, start: multiprocessing.Barrier, told: multiprocessing.Queue) -> None:  # type: ignore[valid-type]
    start.wait()  # type: ignore[attr-defined]
    told.put([RunLogger(folder, "run").version for _ in range(20)])  # type: ignore[attr-defined]


def test_runs_started_at_once_get_different_folders(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(4), context.Queue()
    processes = [context.Process(target=claim, args=(str(tmp_path), start, told)) for _ in range(4)]
    for process in processes:
        process.start()
    versions = [version for _ in processes for version in told.get(timeout=60)]
    for process in processes:
        process.join()
    assert len(set(versions)) == 80


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    RunLogger(str(tmp_path), "run", "mine").prepare()
    with pytest.raises(UserError, match=r"run/mine exists: choose another --run\.version.*--ckpt_path last"):
        RunLogger(str(tmp_path), "run", "mine").prepare()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \((Not a directory|File exists)\).*--run\.root"):
        RunLogger(str(tmp_path / "file"), "run").prepare()

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write anywhere: a test by permissions would not do
    with pytest.raises(UserError, match="Permission denied"):
        RunLogger(str(tmp_path), "run").prepare()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(UserError, match=r"only 1 MiB are free where the run folder .*version_0 is"):
        RunLogger(str(tmp_path), "run").prepare()


def test_a_row_an_epoch(tmp_path: Path) -> None:
    logger = RunLogger(str(tmp_path), "run")
    logger.log_metrics({"val/acc": torch.tensor(0.1, dtype=torch.float64), "epoch": 0}, step=4)
    logger.log_metrics({"train/loss": 2.5, "epoch": 0}, step=5)
    logger.log_metrics({"val/acc": 0.2, "val/robust_acc/pgd": 1 / 3, "epoch": 1}, step=9)
    logger.log_metrics({"test/acc": 0.9, "epoch": 2}, step=9)  # results.json holds it
    logger.save()
    assert rows(logger.folder) == [
        {"epoch": "0", "step": "5", "val/acc": "0.1", "train/loss": "2.5", "val/robust_acc/pgd": ""},
        {"epoch": "1", "step": "9", "val/acc": "0.2", "train/loss": "", "val/robust_acc/pgd": str(1 / 3)},
    ]
    logger.finalize("success")
    assert [path.name for path in logger.folder.glob(".*")] == []


def test_resume_goes_on_in_the_newest_run_with_a_checkpoint(tmp_path: Path) -> None:
    first, second = RunLogger(str(tmp_path), "run"), RunLogger(str(tmp_path), "run")
    with pytest.raises(UserError, match=r"no run below .* has a checkpoint"):
        RunLogger(str(tmp_path), "run", resume=True).prepare()
    first.log_metrics({"val/acc": 0.1, "val/pgd": 1e-7, "epoch": 0}, step=4)
    first.log_metrics({"train/acc": 0.7, "epoch": 1}, step=9)
    first.save()
    (first.folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    second.prepare()  # never got as far as a checkpoint
    before = (first.folder / "metrics.csv").read_text()

    resumed = RunLogger(str(tmp_path), "run", resume=True)
    assert resumed.version == "version_0"
    resumed.save()
    assert (resumed.folder / "metrics.csv").read_text() == before  # to the digit
    resumed.log_metrics({"val/acc": 0.3, "epoch": 1}, step=9)
    resumed.log_metrics({"val/acc": 0.4, "epoch": 2}, step=14)
    resumed.save()
    assert [(row["epoch"], row["val/acc"], row["train/acc"]) for row in rows(resumed.folder)] == [
        ("0", "0.1", ""),
        ("1", "0.3", "0.7"),
        ("2", "0.4", ""),
    ]
    named = RunLogger(str(tmp_path), "run", "version_1", resume=True)
    assert named.version == "version_1"


def test_all_ranks_go_on_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    first, second = RunLogger(str(tmp_path), "run"), RunLogger(str(tmp_path), "run")
    for logger in (first, second):
        logger.prepare()
    (second.folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    zero = RunLogger(str(tmp_path), "run", resume=True)
    assert zero.version == "version_1"
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    other = RunLogger(str(tmp_path), "run", resume=True)
    assert other.version == "version_1"
    assert other.folder == zero.folder
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="has a checkpoint to go on from"):
        _ = RunLogger(str(tmp_path / "new"), "run", resume=True).version


def test_other_ranks_touch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = RunLogger(str(tmp_path / "new"), "run")
    logger.prepare()
    logger.log_metrics({"val/acc": 1.0, "epoch": 0}, step=0)
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "new").exists()
