"""The shipped sweeps: what an agent of W&B would run parses, and the metric is one that is logged."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_robust.cli import main
from lightning_robust.cli.configs import shipped, sweeps

SWEEPS = sweeps()


def sweep(name: str) -> dict[str, Any]:
    told = yaml.safe_load(SWEEPS[name].read_text(encoding="utf-8"))
    assert isinstance(told, dict)
    return told


def command(told: dict[str, Any], end: str) -> list[str]:
    """The words of an agent, with each parameter at one end of its range."""
    given = [f"--{name}={values[end]}" for name, values in told["parameters"].items()]
    words = [word for word in told["command"] if word != "${env}"]
    assert words[0] == "lightning-robust"
    place = words.index("${args}")
    return [*words[1:place], *given, *words[place + 1 :]]


def agents_words(template: list[str], values: dict[str, Any]) -> list[str]:
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


def test_every_file_is_found() -> None:
    assert set(SWEEPS) == {"sweep/trades_beta", "sweep/eps_schedule", "sweep/prm_lambda"}
    assert not set(SWEEPS) & set(shipped())


@pytest.mark.parametrize("end", ["min", "max"])
@pytest.mark.parametrize("name", SWEEPS)
def test_its_arguments_parse_and_reach_what_they_name(name: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = sweep(name)
    config = parsed(command(told, end), capsys)
    for parameter, values in told["parameters"].items():
        node: Any = config
        for part in parameter.split("."):
            if isinstance(node, list):  # the callback that was added last
                node = node[-1]
            node = node.get("init_args", node) if "class_path" in node else node
            node = node[part]
        assert node == pytest.approx(values[end])


@pytest.mark.parametrize("name", SWEEPS)
def test_its_metric_is_logged_while_training(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = sweep(name)
    assert told["method"] == "bayes"
    head, attack = told["metric"]["name"].rsplit("/", 1)
    assert (head, told["metric"]["goal"]) == ("best/val/robust_acc", "maximize")
    callbacks = parsed(command(told, "min"), capsys)["trainer"]["callbacks"]
    settings = [one["init_args"] for one in callbacks if one["class_path"].endswith(".AdversarialAccuracy")]
    assert attack in {one for setting in settings for one in setting["fit_attacks"] or setting["attacks"]}


@pytest.mark.parametrize("name", SWEEPS)
def test_its_first_lines_say_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = SWEEPS[name].read_text(encoding="utf-8")
    assert f"lightning-robust configs {name} > sweep.yaml\n#   wandb sweep sweep.yaml\n#   wandb agent" in text
    main(["configs", name])
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit):
        main(["train", "--config", name])
    assert f"--config {name} is a sweep: `lightning-robust configs {name} > sweep.yaml`" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWEEPS)
def test_what_an_agent_starts_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = yaml.safe_load(SWEEPS[name].read_text(encoding="utf-8"))
    values = {parameter: (span["min"] + span["max"]) / 3 for parameter, span in told["parameters"].items()}
    dumped = yaml.safe_dump(parsed(agents_words(told["command"], values), capsys))
    for parameter, value in values.items():
        assert f"{parameter.rpartition('.')[2]}: {value}\n" in dumped


def test_a_draw_near_zero_stays_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    told = yaml.safe_load(SWEEPS["sweep/prm_lambda"].read_text(encoding="utf-8"))
    words = agents_words(told["command"], {"model.lam": 5.3e-05})
    assert "--model.lam=5.3e-05" in words
    assert parsed(words, capsys)["model"]["init_args"]["lam"] == pytest.approx(5.3e-05)


def test_options_without_dashes_are_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    words = agents_words(
        ["lightning-robust", "train", "--config", "prm_digits", "${args_no_hyphens}"], {"model.lam": 0.5}
    )
    assert words[-1] == "model.lam=0.5"
    with pytest.raises(SystemExit):
        main(words)
    assert "'model.lam=0.5' is no option: options begin with --" in capsys.readouterr().err
