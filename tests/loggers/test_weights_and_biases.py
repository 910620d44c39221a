"""Online where the user is logged in, else offline, and never a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_robust.loggers import wandb_logger
from lightning_robust.loggers.weights_and_biases import logged_in


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without account: no key, no netrc, no word in the environment."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def offline(folder: Path, mode: str = "auto") -> bool:
    logger = wandb_logger(folder, "run", "project", mode)
    assert logger is not None
    return bool(logger._offline)


def test_no_account_is_offline(nobody: Path) -> None:
    assert not logged_in()
    assert offline(nobody)


def test_logged_in_is_online(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody / "netrc").write_text("machine api.wandb.ai login user password " + 40 * "a")
    assert logged_in()
    assert not offline(nobody)
    assert offline(nobody, "offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert offline(nobody)
    assert not offline(nobody, "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # logged in there? no
    assert not logged_in()


def test_a_key_in_the_environment(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    assert logged_in()


def test_a_broken_netrc_is_nobodys(nobody: Path) -> None:
    for text in ("machine api.wandb.ai login user", "no netrc at all"):
        (nobody / "netrc").write_text(text)
        assert not logged_in()


def test_off(nobody: Path) -> None:
    assert wandb_logger(nobody, "run", "project", "off") is None
