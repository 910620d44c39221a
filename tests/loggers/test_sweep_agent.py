"""The commands that W&B's own agent makes of the shipped sweeps."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_robust.cli import main
from lightning_robust.cli.configs import sweeps


def command(template: list[str], values: dict[str, Any]) -> list[str]:
    """The words that an agent starts, as W&B fills them in; without the program."""
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(template)):
        macro = word[2:-1] if word.startswith("${") and word.endswith("}") else ""
        words += parts.get(macro, []) if macro else [word]
    assert words[0] == "lightning-robust"
    return words[1:]


def parsed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    out = yaml.safe_load(said.out)
    assert isinstance(out, dict)
    return out


@pytest.mark.parametrize("name", sweeps())
def test_what_an_agent_starts_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = yaml.safe_load(sweeps()[name].read_text(encoding="utf-8"))
    values = {parameter: (span["min"] + span["max"]) / 3 for parameter, span in told["parameters"].items()}
    dumped = yaml.safe_dump(parsed(command(told["command"], values), capsys))
    for parameter, value in values.items():
        assert f"{parameter.rpartition('.')[2]}: {value}\n" in dumped


def test_a_draw_near_zero_stays_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    told = yaml.safe_load(sweeps()["sweep/prm_lambda"].read_text(encoding="utf-8"))
    words = command(told["command"], {"model.lam": 5.3e-05})
    assert "--model.lam=5.3e-05" in words
    assert parsed(words, capsys)["model"]["init_args"]["lam"] == pytest.approx(5.3e-05)


def test_options_without_dashes_are_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    words = command(["lightning-robust", "train", "--config", "prm_digits", "${args_no_hyphens}"], {"model.lam": 0.5})
    assert words[-1] == "model.lam=0.5"
    with pytest.raises(SystemExit):
        main(words)
    assert "'model.lam=0.5' is no option: options begin with --" in capsys.readouterr().err
