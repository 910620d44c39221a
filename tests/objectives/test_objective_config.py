from __future__ import annotations

import json
from dataclasses import dataclass

import jsonargparse
import pytest
import torch
import yaml

from lightning_robust.attacks import APGD, FGSM, PGD, External
from lightning_robust.attacks.kl_pgd import KLPGD
from lightning_robust.errors import UserError
from lightning_robust.objectives import (
    AWP,
    MART,
    TRADES,
    FastFGSM,
    Natural,
    Objective,
    PGDAdversarial,
    from_config,
    to_config,
)

EXAMPLES = [
    Natural(label_smoothing=0.1),
    Natural(awp=AWP(gamma=0.01, warmup_epochs=3)),
    PGDAdversarial(),
    PGDAdversarial(attack=APGD(eps="4/255", steps=20), clean_weight=0.5),
    PGDAdversarial(attack=FGSM(eps=0.5, norm="l2"), stop_at_success=True, awp=AWP()),
    FastFGSM(eps="4/255", drop=0.1),
    TRADES(beta=1.0, norm="l2", eps=0.5),
    MART(awp=AWP(gamma=0.02)),
    KLPGD(eps="4/255"),
    AWP(gamma=0.01),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_roundtrip_through_json_and_a_weights_only_checkpoint(example, tmp_path):
    config = to_config(example)
    assert from_config(config) == example
    assert from_config(json.loads(json.dumps(config))) == example
    torch.save({"hyper_parameters": {"objective": config}}, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert from_config(loaded["hyper_parameters"]["objective"]) == example


def test_paths_are_those_that_users_import_from():
    config = to_config(PGDAdversarial(awp=AWP()))
    assert config["class_path"] == "lightning_robust.objectives.PGDAdversarial"
    assert config["init_args"]["attack"]["class_path"] == "lightning_robust.attacks.PGD"
    assert config["init_args"]["awp"]["class_path"] == "lightning_robust.objectives.AWP"
    assert "threat_model" not in config["init_args"]["attack"]["init_args"]


def test_objects_pass_through():
    objective = TRADES()
    assert from_config(objective) is objective
    assert from_config(None) is None


def test_awp_as_the_command_line_writes_it():
    config = {"class_path": "lightning_robust.objectives.TRADES", "init_args": {"awp": {"gamma": 0.01}}}
    assert from_config(config) == TRADES(awp=AWP(gamma=0.01))


@dataclass(frozen=True, kw_only=True)
class Mine(Natural):
    """A user's own objective."""

    words: tuple[str, ...] = ("a", "b")


def test_own_classes_work():
    config = to_config(Mine(label_smoothing=0.2))
    assert config["class_path"] == f"{__name__}.Mine"
    assert config["init_args"]["words"] == ["a", "b"]
    assert from_config(config).label_smoothing == 0.2


def test_errors():
    @dataclass(frozen=True, kw_only=True)
    class Local(Natural):
        pass

    with pytest.raises(UserError, match="cannot be imported by name"):
        to_config(Local())
    with pytest.raises(UserError, match=r"External\.function"):
        to_config(PGDAdversarial(attack=External(function=lambda model, images, labels: images)))
    with pytest.raises(UserError, match="cannot be written"):
        to_config("TRADES")
    for path in ("TRADES", "lightning_robust.objectives.Nothing", "no.such.module.TRADES", 3):
        with pytest.raises(UserError, match="does not exist"):
            from_config({"class_path": path})
    for path in ("subprocess.Popen", "lightning_robust.attacks.ThreatModel", "lightning_robust.objectives.to_config"):
        with pytest.raises(UserError, match="neither an objective"):
            from_config({"class_path": path, "init_args": {}})
    with pytest.raises(UserError, match="no setting 'betta': it has beta"):
        from_config({"class_path": "lightning_robust.objectives.TRADES", "init_args": {"betta": 6}})
    with pytest.raises(UserError, match="not args"):
        from_config({"class_path": "lightning_robust.objectives.TRADES", "args": {"beta": 6}})


# -- the command line --------------------------------------------------------------------------------------------------


def parser() -> jsonargparse.ArgumentParser:
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--objective", type=Objective)
    return made


def parse(*arguments: str) -> Objective:
    made = parser()
    return made.instantiate_classes(made.parse_args([*arguments])).objective


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("cls", [Natural, PGDAdversarial, FastFGSM, TRADES, MART])
def test_short_names_and_defaults(cls):
    assert parse("--objective", cls.__name__) == cls()


@pytest.mark.parametrize("example", EXAMPLES[:8], ids=lambda example: type(example).__name__)
def test_what_to_config_writes_the_command_line_reads(example):
    assert parse("--objective", json.dumps(to_config(example))) == example


def test_yaml():
    text = """
    class_path: PGDAdversarial
    init_args:
      attack: {class_path: PGD, init_args: {eps: 4/255, steps: 7}}
      awp: {gamma: 0.01}
    """
    expected = PGDAdversarial(attack=PGD(eps="4/255", steps=7), awp=AWP(gamma=0.01))
    assert parse("--objective", json.dumps(yaml.safe_load(text))) == expected


def test_single_settings():
    assert parse("--objective", "TRADES", "--objective.beta=1", "--objective.eps=8/255") == TRADES(
        beta=1.0, eps="8/255"
    )
    assert parse("--objective=Natural", "--objective.awp.gamma=0.01") == Natural(awp=AWP(gamma=0.01))
    found = parse("--objective=PGDAdversarial", "--objective.attack=PGD", "--objective.attack.steps=3")
    assert found == PGDAdversarial(attack=PGD(steps=3))


def test_another_attack_inherits_nothing_from_the_default_one():
    found = parse("--objective=PGDAdversarial", "--objective.attack=FGSM", "--objective.attack.eps=2/255")
    assert found == PGDAdversarial(attack=FGSM(eps="2/255"))
    assert (found.attack.steps, found.attack.random_start) == (1, False)


def test_print_config_can_be_read_again():
    made = parser()
    text = made.dump(made.parse_args(["--objective=PGDAdversarial"]))
    assert made.instantiate_classes(made.parse_string(text)).objective == PGDAdversarial()


def test_an_objective_as_a_default():
    class Trainee:
        def __init__(self, objective: Objective = PGDAdversarial(attack=PGD(steps=3))) -> None:  # noqa: B008
            self.objective = objective

    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Trainee, "model")
    assert made.instantiate_classes(made.parse_args([])).model.objective == PGDAdversarial(attack=PGD(steps=3))


def test_wrong_values_are_refused():
    with pytest.raises(Exception, match="beta"):
        parse("--objective=TRADES", "--objective.beta=much")
    with pytest.raises(Exception, match="did you mean 8/255"):
        parse("--objective=TRADES", "--objective.eps=8")
