"""Configs, their merging, and the user's word against a checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pytorch_lightning.cli import LightningCLI

from lightning_robust.callbacks import InputGradientMap, PixelIoU
from lightning_robust.cli.run import RobustCLI

from .conftest import Program


def attack_of(cli: RobustCLI):
    return cli.model.objective.attack


@pytest.fixture
def checkpoint(program: Program) -> Path:
    """The last checkpoint of a short fit; its run is runs/quick/version_0."""
    assert program("fit", "--config", "quick.yaml").status == 0
    return next(Path("runs/quick/version_0/checkpoints").glob("*.ckpt"))


def test_eps_may_be_a_fraction(folder: Path, program: Program, made: list[RobustCLI]) -> None:
    (folder / "eps.yaml").write_text(
        "model: {init_args: {objective: {init_args: {attack: {init_args: {eps: 8/255}}}}}}\n", encoding="utf-8"
    )
    assert program("fit", "--config", "quick.yaml", "--config", "eps.yaml").status == 0
    assert program("fit", "--config", "quick.yaml", "--model.objective.attack.eps=4/255").status == 0
    assert [attack_of(cli).threat_model.radius for cli in made] == pytest.approx([8 / 255, 4 / 255])


def test_later_wins(folder: Path, program: Program, made: list[RobustCLI]) -> None:
    (folder / "more.yaml").write_text("trainer: {max_epochs: 5}\n", encoding="utf-8")
    program("fit", "--config", "quick.yaml", "--config=more.yaml")
    program("fit", "--config", "more.yaml", "--config", "quick.yaml")
    program("fit", "--trainer.max_epochs", "7", "--config", "quick.yaml", "--config", "more.yaml")
    program("fit", "--config", "quick.yaml", "--config", "more.yaml", "--trainer.max_epochs", "7")
    assert [cli.trainer.max_epochs for cli in made] == [5, 1, 5, 7]


def test_callbacks_are_appended(folder: Path, program: Program, made: list[RobustCLI]) -> None:
    (folder / "map.yaml").write_text("trainer: {callbacks: [InputGradientMap]}\n", encoding="utf-8")
    given = ("--trainer.callbacks+=PixelIoU", "--trainer.callbacks.stride=4")
    assert program("fit", "--config", "quick.yaml", "--config", "map.yaml", *given).status == 0
    callbacks = made[0].trainer.callbacks
    assert any(isinstance(callback, InputGradientMap) for callback in callbacks)
    assert [callback.stride for callback in callbacks if isinstance(callback, PixelIoU)] == [4]


def test_a_shipped_config_by_name_and_the_model_from_the_data(program: Program, made: list[RobustCLI]) -> None:
    words = ("--data.classes", "[3, 8]", "--run.wandb", "off")
    assert program("fit", "--config", "quickstart", "--model.objective", "Natural", *words).status == 0
    assert program("fit", "--config", "quickstart.yaml", *words).status == 0
    assert made[0].model.objective.attack is None
    assert (made[1].model.num_classes, made[1].model.image_shape) == (2, (1, 8, 8))
    assert Path("runs/quickstart/version_1").is_dir()


def test_a_run_is_named_after_what_is_run(folder: Path, program: Program, made: list[RobustCLI]) -> None:
    given = ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--run.wandb", "off")
    assert program("fit", "--config", "quickstart", "--config", "trainer/multi_gpu", *given).status == 0
    assert program("fit", "--config", "quickstart", "--config", "quick.yaml").status == 0
    assert program("fit", "--config", "quick.yaml", "--run.name", "mine", "--run.version", "a").status == 0
    assert {str(path) for path in Path("runs").glob("*/*")} == {
        "runs/quickstart/version_0",
        "runs/quick/version_0",
        "runs/mine/a",
    }


def test_print_config_is_a_config(folder: Path, program: Program, made: list[RobustCLI]) -> None:
    result = program("fit", "--config", "quick.yaml", "--trainer.max_epochs", "3", "--print_config")
    assert result.status == 0
    assert result.err == ""
    assert yaml.safe_load(result.out)["trainer"]["max_epochs"] == 3
    (folder / "printed.yaml").write_text(result.out, encoding="utf-8")
    assert program("fit", "--config", "printed.yaml").status == 0
    assert made[0].trainer.max_epochs == 3
    assert attack_of(made[0]).steps == 2


def test_lightning_still_has_the_hook_that_we_override() -> None:
    # From 2.6.4 on it overwrites the user's settings with those of the checkpoint.
    assert callable(LightningCLI._parse_ckpt_path)
    assert RobustCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path


def test_the_users_word_beats_the_checkpoints(checkpoint: Path, program: Program, ran: list[RobustCLI]) -> None:
    words = ("--ckpt_path", str(checkpoint), "--config", "quick.yaml", "--model.objective.attack.steps=50")
    assert program("test", *words).status == 0
    assert attack_of(ran[0]).steps == 50
    assert ran[0].trainer.lightning_module.objective.attack.steps == 50
    # the checkpoint itself was made with 2
    assert program("test", "--ckpt_path", str(checkpoint)).status == 0
    assert attack_of(ran[1]).steps == 2


def test_a_checkpoint_brings_its_runs_config(checkpoint: Path, program: Program, ran: list[RobustCLI]) -> None:
    result = program("test", "--ckpt_path", str(checkpoint))
    assert result.status == 0, result.err
    assert ran[0].model.hparams["network"] == "digits_cnn"
    # the run goes on under its name, in a folder of its own
    assert Path("runs/quick/version_1/results.json").is_file()
    assert "clean accuracy" in result.out


def test_evaluating_random_weights_is_said(program: Program, checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="test of a network with random weights"):
        assert program("test", "--config", "quick.yaml").status == 0
    assert "random weights" not in program("test", "--ckpt_path", str(checkpoint)).err
