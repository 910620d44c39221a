"""Typos and bad values: one short message with the key, its place and the nearest right name; status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import QUICK, Program

# what stands in the YAML instead of what, the line of the mistake, and what the message says
IN_YAML = {
    "top key": ("trainer:\n", "trainr:\n", 11, "no setting 'trainr': did you mean trainer?"),
    "trainer key": ("max_epochs", "max_epoks", 13, "trainer has no setting 'max_epoks': did you mean max_epochs?"),
    "model key": ("network", "netwrok", 5, "ImageClassifier has no setting 'netwrok': did you mean network?"),
    "data key": ("limit", "limt", 10, "Digits has no setting 'limt': did you mean limit?"),
    "run key": ("wandb", "wanbd", 14, "run has no setting 'wanbd': did you mean wandb?"),
    "attack key": ("steps", "stepps", 9, "PGD has no setting 'stepps': did you mean steps?"),
    "objective class": ("PGDAdversarial", "PGDAdversrial", 7, "'PGDAdversrial': did you mean PGDAdversarial?"),
    "attack class": ("PGD,", "PDG,", 9, "model.objective.attack: there is no Attack 'PDG': did you mean PGD?"),
    "attack class by path": ("PGD,", "no.such.PDG,", 9, "there is no Attack 'no.such.PDG': did you mean PGD?"),
    "data class": ("Digits", "Digts", 10, "data: there is no ImageDataModule 'Digts': did you mean Digits?"),
    "spec key": ("init_args: {eps", "init_arg: {eps", 9, "has no entry 'init_arg': did you mean init_args?"),
    "attack type": ("steps: 2", "steps: many", 9, "model.objective.attack.steps: 'many' is not a whole number"),
    "attack type, whole": ("steps: 2", "steps: 2.5", 9, "model.objective.attack.steps: '2.5' is not a whole number"),
    "attack choice": ("steps: 2", "norm: l7", 9, "model.objective.attack.norm: 'l7' is not one of linf, l2, l1"),
    "trainer type": ("max_epochs: 1", "max_epochs: many", 13, "trainer.max_epochs: 'many' is not a whole number"),
    "trainer list": ("max_epochs: 1", "max_epochs: [1]", 13, "trainer.max_epochs: a list is not a whole number"),
    "trainer group": ("max_epochs: 1", "max_epochs: {a: 1}", 13, "trainer.max_epochs: a group of settings is not"),
    "data type": ("limit: 20", "batch_size: lots", 10, "data.batch_size: 'lots' is not a whole number"),
    "run choice": ('"off"', '"of"', 14, "run.wandb: 'of' is not one of auto, online, offline, off: did you mean off?"),
    "seed": ("model:\n", "seed_everything: abc\nmodel:\n", 2, "seed_everything: 'abc' is not true or false"),
    "optimizer key": ("network:", "optimizer: {rate: 1}\n    network:", 5, "optimizer has no setting 'rate': choose"),
    "optimizer choice": ("network:", "optimizer: {name: sdg}\n    network:", 5, "did you mean sgd?"),
    "optimizer type": (
        "network:",
        "optimizer: {lr: fast}\n    network:",
        5,
        "model.optimizer.lr: 'fast' is not",
    ),
    "optimizer value": ("network:", "optimizer: {lr: -1}\n    network:", 5, "optimizer: lr=-1.0 never learns"),
    "network": ("digits_cnn", "digit_cnn", 5, "'digit_cnn'; did you mean digits_cnn"),
    "eps": ("eps: 0.2", "eps: 8", 9, "eps=8.0 is larger than the pixel range [0, 1]: did you mean 8/255?"),
    "eps text": ("eps: 0.2", "eps: abc", 9, "eps='abc' is not a number"),
    "step size": ("steps: 2", "step_size: 0", 9, "step_size=0.0 never moves"),
    "accelerator": ("accelerator: cpu", "accelerator: cpuu", 12, "invalid accelerator name: `accelerator='cpuu'`"),
    "strategy": ("accelerator: cpu", "strategy: dpp", 12, "invalid strategy name: `strategy='dpp'`"),
    "linked": ("network:", "num_classes: 3\n    network:", 5, "num_classes of the model is read from the data"),
    "callback class": ("max_epochs: 1", "callbacks: [PixelIuO]", 13, "no Callback 'PixelIuO': did you mean PixelIoU?"),
    "callback key": (
        "max_epochs: 1",
        "callbacks:\n    - class_path: AdversarialAccuracy\n      init_args: {atacks: {a: {class_path: FGSM}}}",
        15,
        "AdversarialAccuracy has no setting 'atacks': did you mean attacks?",
    ),
    "class in a callback": (
        "max_epochs: 1",
        "callbacks:\n    - class_path: AdversarialAccuracy\n      init_args: {attacks: {a: {class_path: FSGM}}}",
        15,
        "trainer.callbacks.attacks.a: there is no Attack 'FSGM': did you mean FGSM?",
    ),
    "key in a callback's attack": (
        "max_epochs: 1",
        "callbacks:\n    - class_path: AdversarialAccuracy\n"
        "      init_args: {attacks: {a: {class_path: PGD, init_args: {stepsize: 1}}}}",
        15,
        "PGD has no setting 'stepsize': did you mean step_size?",
    ),
}


@pytest.mark.parametrize(("right", "wrong", "line", "told"), IN_YAML.values(), ids=IN_YAML)
def test_in_a_config(right: str, wrong: str, line: int, told: str, folder: Path, program: Program) -> None:
    assert right in QUICK
    (folder / "mine.yaml").write_text(QUICK.replace(right, wrong), encoding="utf-8")
    error = program("fit", "--config", "mine.yaml").error
    assert error.startswith(f"mine.yaml, line {line}: ")
    assert told in error
    assert not (folder / "runs").exists() or "cpuu" in wrong or "dpp" in wrong


ON_COMMAND_LINE = {
    "root": ("--traner.max_epochs 3", "--traner.max_epochs: there is no setting 'traner': did you mean trainer?"),
    "trainer": ("--trainer.max_epoks 3", "trainer has no setting 'max_epoks': did you mean max_epochs?"),
    "trainer, nothing near": ("--trainer.qqq 3", "--trainer.qqq: trainer has no setting 'qqq'"),
    "no abbreviation": ("--trainer.max_epoch 3", "trainer has no setting 'max_epoch': did you mean max_epochs?"),
    "no abbreviation of run": ("--run.nam x", "run has no setting 'nam': did you mean name?"),
    "no abbreviation of config": ("--conf quick.yaml", "there is no setting 'conf': did you mean config?"),
    "model": ("--model.netwrok lenet5", "ImageClassifier has no setting 'netwrok': did you mean network?"),
    "data": ("--data.batch 3", "Digits has no setting 'batch': did you mean batch_size?"),
    "data, with init_args": ("--data.init_args.batch 3", "Digits has no setting 'batch': did you mean batch_size?"),
    "attack": ("--model.objective.attack.stepz=3", "PGD has no setting 'stepz': did you mean steps?"),
    "optimizer": ("--model.optimizer.rate 1", "optimizer has no setting 'rate': choose from decay_norm_and_bias, lr"),
    "data class": ("--data Digts", "--data: there is no ImageDataModule 'Digts': did you mean Digits?"),
    "objective class": ("--model.objective Naturl", "there is no Objective 'Naturl': did you mean Natural?"),
    "callback class": ("--trainer.callbacks+=RobustnessCurv", "'RobustnessCurv': did you mean RobustnessCurve?"),
    "callback key": (
        "--trainer.callbacks+=RobustnessCurve --trainer.callbacks.epss 3",
        "RobustnessCurve has no setting 'epss': did you mean eps?",
    ),
    "type": ("--model.objective.attack.steps many", "--model.objective.attack.steps: 'many' is not a whole number"),
    "choice": ("--model.objective.attack.norm l8", "--model.objective.attack.norm: 'l8' is not one of linf, l2, l1"),
    "value": ("--model.objective.attack.eps 8", "--model.objective.attack.eps: eps=8.0 is larger"),
    "value in a list": ("--trainer.callbacks+=RobustnessCurve --trainer.callbacks.eps [0,8]", "eps=8.0 is larger"),
    "weights": ("--model.weights no.pt", "--model.weights: there is no weights file 'no.pt'"),
    "devices": ("--trainer.devices 0", "--trainer.devices: `Trainer(devices='0')` value is not a valid input"),
    "data path": ("--data MNIST --data.root nowhere", "MNIST was not found: run with --data.download true, or put"),
    "linked": ("--model.num_classes 3", "--model.num_classes: num_classes of the model is read from the data"),
    "stray word": ("stray", "'stray' is no option"),
    "no value": ("--trainer.max_epochs", "--trainer.max_epochs needs a value"),
    "no config": ("--config", "--config needs a name or a file"),
    "no config before an option": ("--config --trainer.max_epochs 3", "--config needs a name or a file"),
    "empty config name": ("--config=", "--config needs a name or a file"),
    "config name": (
        "--config quikstart",
        "--config quikstart: there is no such file and no shipped config of",
    ),
    "config folder": ("--config .", "--config . is a folder"),
    "checkpoint": ("--ckpt_path no.ckpt", "--ckpt_path no.ckpt: there is no such file"),
    "checkpoint folder": ("--ckpt_path .", "--ckpt_path . is a folder"),
    "checkpoint best": ("--ckpt_path best", "--ckpt_path best: only a training run knows its best"),
    "checkpoint last": ("--ckpt_path last", "no run below runs/quick has a checkpoint to go on from"),
    "run root": ("--run.root quick.yaml", "cannot be written"),
    "run root that not even the superuser may write": ("--run.root /proc/runs", "cannot be written"),
}


@pytest.mark.parametrize(("words", "told"), ON_COMMAND_LINE.values(), ids=ON_COMMAND_LINE)
def test_on_the_command_line(words: str, told: str, program: Program) -> None:
    assert told in program("fit", "--config", "quick.yaml", *words.split()).error


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "mine.yaml is empty"),
        (b"# nothing but a comment\n", "mine.yaml is empty"),
        (b"- a\n- b\n", "mine.yaml holds a list"),
        (b"just words\n", "mine.yaml holds a single value"),
        (b"\xac\x00\xff", "mine.yaml is not a text file"),
        (b"model: {network: a\ndata: b\n", "mine.yaml, line 2: no valid YAML: "),
        (b"model:\n\tnetwork: a\n", "mine.yaml, line 2: no valid YAML: "),
        (b"trainer: {max_epochs: 1}\ntrainer: {max_steps: 1}\n", "line 2: 'trainer' stands in line 1 already"),
    ],
    ids=["empty", "comment", "list", "words", "binary", "brace", "tab", "twice"],
)
def test_a_file_that_is_no_config(content: bytes, told: str, folder: Path, program: Program) -> None:
    (folder / "mine.yaml").write_bytes(content)
    assert told in program("fit", "--config", "mine.yaml").error


def test_an_anchor_and_a_merge_are_yaml_too(folder: Path, program: Program) -> None:
    (folder / "more.yaml").write_text("trainer: &base {max_epochs: 2}\n", encoding="utf-8")
    (folder / "mine.yaml").write_text(
        "run: {name: a}\ntrainer:\n  <<: {max_epochs: 2, max_stepz: 1}\n", encoding="utf-8"
    )
    result = program("fit", "--config", "quick.yaml", "--config", "more.yaml", "--print_config")
    assert (result.status, "max_epochs: 2" in result.out) == (0, True)
    error = program("fit", "--config", "quick.yaml", "--config", "mine.yaml").error
    assert error == "mine.yaml, line 3: trainer has no setting 'max_stepz': did you mean max_steps?"


def test_the_file_with_the_mistake_is_named_when_several_merge(folder: Path, program: Program) -> None:
    (folder / "second.yaml").write_text("model:\n  init_args:\n    objective:\n      init_args:\n        attak: 1\n")
    error = program("fit", "--config", "quick.yaml", "--config", "second.yaml").error
    assert error == "second.yaml, line 5: PGDAdversarial has no setting 'attak': did you mean attack?"


def test_nothing_given(program: Program) -> None:
    assert program("fit").error.startswith("missing: --model and --data: give a config with --config NAME")


def test_a_value_that_stands_twice_gets_no_wrong_place(folder: Path, program: Program) -> None:
    (folder / "mine.yaml").write_text(
        QUICK.replace("eps: 0.2", "eps: 8").replace(
            "max_epochs: 1",
            "callbacks:\n    - class_path: AdversarialAccuracy\n"
            "      init_args: {attacks: {a: {class_path: FGSM, init_args: {eps: 8}}}}",
        ),
        encoding="utf-8",
    )
    assert program("fit", "--config", "mine.yaml").error.startswith("eps=8.0 is larger than the pixel range")
