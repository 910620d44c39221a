"""The command ``audit``: every kind of model, any data, a defense; the status for CI; one sentence for a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_robust.cli.audit as command
from lightning_robust.audit import BUDGETS
from lightning_robust.batch import Batch
from lightning_robust.cli import main
from lightning_robust.cli.audit_models import FixedBatch, normalization_in, shown
from lightning_robust.errors import UserError
from lightning_robust.models import create_network
from lightning_robust.modules import ForegroundClassifier

Program = Callable[..., Any]

TINY = {
    "probes": 80,
    "sample": 80,
    "steps": 4,
    "apgd_steps": 4,
    "restarts": 2,
    "more_steps": 10,
    "eps_steps": 3,
    "directions": 1,
    "noise": 5,
    "queries": 10,
    "adaptive_steps": 5,
    "eot_samples": 3,
}
DATA = ("--data", "Digits", "--images", "90", "--eps", "0.1")

MODULE = """
import torch
from torch import nn
from lightning_robust.models import create_network

def network():
    return create_network("digits_cnn", 10, (1, 8, 8), weights={weights!r})

class Spoilt(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images):
        return self.network((images * 4).round() / 4)

ready = network().eval()
number = 7
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that classifies most digits."""
    from lightning_robust.datamodules import Digits

    torch.manual_seed(0)
    network = create_network("digits_cnn", 10, (1, 8, 8))
    dataset = Digits().dataset("train")
    batch = dataset.__getitems__(range(len(dataset)))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(4):
        for rows in torch.randperm(len(batch.images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch.images[rows]), batch.labels[rows]).backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(network.network.state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets, much shorter."""
    import dataclasses

    for name, budget in BUDGETS.items():
        monkeypatch.setitem(BUDGETS, name, dataclasses.replace(budget, autoattack=False, **TINY))


@pytest.fixture
def run(folder: Path, weights: Path) -> Path:
    """A run's folder with its config and a checkpoint."""
    main(["fit", "--config", "quick.yaml", "--model.weights", str(weights), "--trainer.max_steps", "1",
          "--model.optimizer.lr", "1e-9", "--model.objective", "Natural"])  # fmt: skip
    return folder / "runs" / "quick" / "version_0"


def audited(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def test_a_checkpoint_brings_its_class_and_its_data(program: Program, run: Path) -> None:
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    done = program("audit", "--ckpt", str(checkpoint), "--eps", "0.1", "--images", "90", "--data.limit", "null")
    assert done.status == 0, done.err + done.out
    plain = audited(run)
    assert (plain["verdict"], plain["data"], plain["images"]) == ("trusted", "Digits (test)", 90)
    assert plain["model"] == f"ImageClassifier (digits_cnn), {checkpoint.name}"
    assert plain["sentence"] in done.out
    assert f"{plain['robust_accuracy']:.1%}".replace("%", " %") in (run / "report.html").read_text(encoding="utf-8")
    assert "at most about" in done.out
    assert (run / "figures" / "audit_attacks.png").is_file()
    assert (run / "tables" / "audit.csv").is_file()


def test_a_checkpoint_of_a_natural_run_is_told_its_low_robustness(program: Program, run: Path) -> None:
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    program("audit", "--ckpt", str(checkpoint), "--eps", "0.3", "--images", "90", "--data.limit", "null")
    plain = audited(run)
    assert plain["robust_accuracy"] < 0.2 < 0.85 < plain["clean_accuracy"]


def test_a_defense_around_a_checkpoint_gets_a_folder_of_its_own(program: Program, run: Path) -> None:
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    done = program("audit", "--ckpt", str(checkpoint), "--eps", "0.05", "--images", "90", "--data.limit", "null",
                   "--defense", "PixelShift", "--defense.shifts", "9")  # fmt: skip
    assert done.status == 3, done.err
    assert not (run / "audit.json").exists()
    (file,) = (run.parent.parent).glob("audit_*/version_0/audit.json")
    plain = audited(file.parent)
    assert plain["verdict"] == "masked"
    assert plain["model"].endswith("+ PixelShift")
    assert "randomness" in [check["name"] for check in plain["checks"] if check["outcome"] == "flag"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_with_weights(program: Program, weights: Path, folder: Path, wrapped: bool) -> None:
    if wrapped:  # as RobustBench's files are: a prefix, and the normalisation beside it
        entries = {f"module.model.{name}": value for name, value in torch.load(weights).items()}
        entries |= {"module.normalize.mean": torch.zeros(1, 1, 1, 1), "module.normalize.std": torch.ones(1, 1, 1, 1)}
        weights = folder / "robustbench.pt"
        torch.save({"state_dict": entries}, weights)
    done = program("audit", "--network", "digits_cnn", "--weights", str(weights), *DATA, "--output", "here")
    assert done.status == 0, done.err + done.out
    assert audited(folder / "here")["clean_accuracy"] > 0.85


def test_a_network_of_timm_with_weights(program: Program, folder: Path) -> None:
    torch.manual_seed(0)
    network = create_network("timm/test_resnet.r160_in1k", 10, (3, 64, 64))
    torch.save(network.network.state_dict(), folder / "timm.pth")
    make_images(folder)
    done = program("audit", "--network", "timm/test_resnet.r160_in1k", "--weights", "timm.pth", "--data", "Arrays",
                   "--data.test", "images.npz", "--data.num_classes", "10", "--images", "20")  # fmt: skip
    assert done.status in (3, 4), done.err  # it has learnt nothing
    assert "no better than always naming" in done.out


def make_images(folder: Path, side: int = 64) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (20, side, side, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(20) % 10)


@pytest.mark.parametrize("fixed", [False, True])
def test_an_exported_program(program: Program, weights: Path, folder: Path, fixed: bool) -> None:
    network = create_network("digits_cnn", 10, (1, 8, 8), weights=weights).eval()
    images = torch.rand(7 if fixed else 2, 1, 8, 8)
    shapes = None if fixed else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), folder / "net.pt2")
    done = program("audit", "--program", "net.pt2", *DATA, "--output", "here")
    assert done.status == 0, done.err + done.out
    assert audited(folder / "here")["clean_accuracy"] > 0.85


@pytest.mark.parametrize(("name", "status"), [("network", 0), ("ready", 0), ("Spoilt", 3)])
def test_a_module_by_its_import_path(program: Program, weights: Path, folder: Path, name: str, status: int) -> None:
    (folder / "mine.py").write_text(MODULE.format(weights=str(weights)), encoding="utf-8")
    done = program("audit", "--module", f"mine.py:{name}", *DATA, "--output", "here")
    assert done.status == status, done.err + done.out
    plain = audited(folder / "here")
    assert plain["model"] == f"mine.py:{name}"
    if name == "Spoilt":
        assert "quantised_input" in [check["name"] for check in plain["checks"] if check["outcome"] == "flag"]
        assert "FLAG" in done.out


def test_too_few_images_end_with_a_status_of_their_own(program: Program, weights: Path) -> None:
    done = program("audit", "--network", "digits_cnn", "--weights", str(weights), *DATA, "--images", "30")
    assert done.status == 4
    assert "NOT ENOUGH EVIDENCE" in done.out


def test_the_images_are_drawn_by_the_seed(program: Program, weights: Path, folder: Path) -> None:
    found = []
    for seed in ("0", "0", "1"):
        program("audit", "--network", "digits_cnn", "--weights", str(weights), *DATA, "--images", "40", "--seed", seed,
                "--output", f"seed{len(found)}")  # fmt: skip
        plain = audited(folder / f"seed{len(found)}")
        found.append((plain["clean_accuracy"], plain["robust_accuracy"], plain["checks"][1]["figure"]))
    assert found[0] == found[1] != found[2]


NET = ("--network", "digits_cnn", "--weights", "{weights}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "Digits"), "which model?"),
        ((*NET, "--ckpt", "x.ckpt", "--data", "Digits"), "--ckpt and --network was given"),
        (NET, "which data?"),
        (("--ckpt", "none.ckpt", "--data", "Digits"), "--ckpt none.ckpt: there is no such file"),
        (("--ckpt", "none.ckpt"), "its data is not known: give --data NAME"),
        (("--ckpt", "{weights}", "--data", "Digits"), "is not a checkpoint of a run"),
        (("--network", "digits_cnn", "--data", "Digits"), "random weights"),
        (("--network", "digits_cn", "--weights", "{weights}", "--data", "Digits"), "did you mean digits_cnn"),
        ((*NET, "--data", "Digit"), "Digits"),
        ((*NET, "--data", "Digits", "--defense", "PixelShif"), "PixelShift"),
        ((*NET, "--data", "Digits", "--defense", "PixelShift", "--defense.shifts", "7"), "shifts"),
        ((*NET, "--data", "Digits", "--eps", "8"), "did you mean 8/255"),
        ((*NET, "--data", "Digits", "--eps", "much"), "is not a number"),
        ((*NET, "--data", "Digits", "--budget", "fast"), "choose one of quick, standard, full"),
        ((*NET, "--data", "Digits", "--split", "tests"), "choose train, val or test"),
        ((*NET, "--data", "Digits", "--images", "0"), "--images 0"),
        ((*NET, "--data", "Digits", "--device", "abacus"), "--device abacus cannot be used here"),
        ((*NET, "--data", "Digits", "--surrogate", "none.ckpt"), "--surrogate none.ckpt: there is no such file"),
        ((*NET, "--data", "Digits", "--images", "5", "--output", "{weights}/below"), "cannot be written"),
        ((*NET, "--data", "Digits", "--imagse", "5"), "did you mean images"),
        (("--module", "mine", "--data", "Digits"), "package.module:name"),
        (("--module", "no_such_package:name", "--data", "Digits"), "cannot be imported"),
        (("--module", "json:loads", "--data", "Digits"), "cannot be called without arguments"),
        (("--module", "json:nothing", "--data", "Digits"), "json has no nothing"),
        (("--module", "json:loads", "--data", "Digits", "--norm", "l0"), "--norm l0: choose linf, l2 or l1"),
        (("--module", "json:__name__", "--data", "Digits"), "an nn.Module"),
        (("--program", "none.pt2", "--data", "Digits"), "there is no such file"),
        (("--program", "{weights}", "--data", "Digits"), "cannot be read as an exported program"),
    ],
)
def test_mistakes_are_one_sentence(program: Program, weights: Path, words: tuple[str, ...], told: str) -> None:
    error = program("audit", *(word.format(weights=weights) for word in words)).error
    assert told in error


def test_a_model_of_another_input_size(program: Program, weights: Path, folder: Path, run: Path) -> None:
    make_images(folder)
    data = ("--data", "Arrays", "--data.test", "images.npz")
    checkpoint = str(next((run / "checkpoints").glob("*.ckpt")))
    assert "was made for images of 1×8×8" in program("audit", "--ckpt", checkpoint, *data).error
    network = create_network("digits_cnn", 10, (1, 8, 8), weights=weights).eval()
    torch.export.save(torch.export.export(network, (torch.rand(2, 1, 8, 8),)), folder / "net.pt2")
    assert "takes images of 1×8×8" in program("audit", "--program", "net.pt2", *data).error


def test_a_checkpoint_of_other_classes(program: Program, run: Path) -> None:
    checkpoint = str(next((run / "checkpoints").glob("*.ckpt")))
    assert (
        "has 10 classes and Digits has 3" in program("audit", "--ckpt", checkpoint, "--data.classes", "[1,2,3]").error
    )


def test_a_classifier_of_foregrounds_is_shown_foregrounds() -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    masks = torch.rand(6, 1, 8, 8) > 0.5
    module = ForegroundClassifier("digits_cnn", 10, (1, 8, 8), masks="given").eval()
    cut = shown(module, Batch(images, labels, masks))
    torch.testing.assert_close(cut.images, images * masks, rtol=0, atol=0)
    assert torch.equal(cut.labels, labels)
    with pytest.raises(UserError, match="needs masks"):
        shown(module, Batch(images, labels))
    whole = ForegroundClassifier("digits_cnn", 10, (1, 8, 8), masks="missing").eval()
    assert torch.equal(shown(whole, Batch(images, labels, masks)).images, images)
    assert torch.equal(shown(nn.Flatten(), Batch(images, labels, masks)).images, images)


def test_as_a_callback_of_a_test_run(program: Program, weights: Path, folder: Path) -> None:
    done = program("test", "--config", "quick.yaml", "--model.weights", str(weights), "--data.limit", "null",
                   "--trainer.callbacks+=Audit", "--trainer.callbacks.eps=0.1", "--trainer.callbacks.limit_images=80",
                   "--trainer.callbacks.defense=PixelShift")  # fmt: skip
    assert done.status == 0, done.err
    plain = audited(folder / "runs" / "quick" / "version_0")
    assert (plain["images"], plain["verdict"]) == (80, "masked")
    results = json.loads((folder / "runs" / "quick" / "version_0" / "results.json").read_text(encoding="utf-8"))
    assert results["test/audit/robust_acc"] == plain["robust_accuracy"]
    assert plain["sentence"] in done.out


def test_help_names_the_status_words(program: Program) -> None:
    done = program("audit", "--help")
    assert done.status == 0
    assert "0 trusted, 3 masked, 4 not enough evidence" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("text", "told"), [("x = (", "SyntaxError"), ("x = 1\nx.y", r"\(broken_module.py, line 2\): AttributeError")]
)
def test_a_file_that_fails_as_it_is_imported(program: Program, folder: Path, text: str, told: str) -> None:
    (folder / "broken_module.py").write_text(text, encoding="utf-8")
    done = program("audit", "--module", "broken_module.py:network", *DATA)
    assert re.search(f"fails as it is imported.*{told}", done.error)


def test_the_normalization_of_a_file() -> None:
    values = {"mean": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), "std": torch.full((3,), 0.5)}
    means, stds = normalization_in({f"normalize.{name}": value for name, value in values.items()}) or ([], [])
    assert means == pytest.approx([0.1, 0.2, 0.3])
    assert stds == [0.5, 0.5, 0.5]
    assert normalization_in({"normalize.mean": values["mean"]}) is None
    assert normalization_in({"bn.running_mean": values["mean"], "bn.running_var": values["std"]}) is None


def test_a_program_of_a_fixed_batch_takes_any() -> None:
    class Eight(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) == 8
            return images.flatten(1)

    images = torch.rand(19, 1, 2, 2)
    assert torch.equal(FixedBatch(Eight(), 8)(images), images.flatten(1))


def test_a_broken_class_in_the_checkpoints_run_is_told(program: Program, run: Path) -> None:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("ImageClassifier", "ImageClassifer"), encoding="utf-8")
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    # the checkpoint itself says what made it
    assert program("audit", "--ckpt", str(checkpoint), "--eps", "0.1", "--images", "80").status in (0, 4)


def test_a_line_for_each_check_where_there_is_no_terminal(program: Program, weights: Path) -> None:
    done = program("audit", "--network", "digits_cnn", "--weights", str(weights), *DATA)
    assert done.out.count("\npass ") >= 15
    assert "Results: runs/audit_digits_cnn/version_0/audit.json" in done.out


def test_what_was_found_before_an_error_is_kept(folder: Path, weights: Path, program: Program) -> None:
    broken = (
        MODULE.format(weights=str(weights))
        + """
class Breaks(Spoilt):
    left = 45

    def forward(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.network(images)
"""
    )
    (folder / "breaks.py").write_text(broken)
    with pytest.raises(SystemExit) as end:
        main(["audit", "--module", "breaks.py:Breaks", *DATA, "--output", "out"])
    assert end.value.code == 130
    kept = audited(folder / "out")
    assert kept["verdict"] != "trusted"
    assert kept["checks"][-1]["name"] == "finished"
    assert len(kept["checks"]) > 3


def test_an_error_in_the_models_own_code_is_not_a_users_mistake(folder: Path) -> None:
    (folder / "mine.py").write_text("def network():\n    return 1 / 0\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        main(["audit", "--module", "mine.py:network", *DATA])


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True, raising=False)
    with command._progress() as (told, on_check):
        told("FGSM", 0.5)
        assert callable(on_check)
    assert issubclass(UserError, ValueError)
