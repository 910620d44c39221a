"""The audit in a test run: what it writes and logs, the same on two processes as on one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust.audit import AuditResult, audit
from lightning_robust.audit import run as audit_run
from lightning_robust.callbacks import Audit
from lightning_robust.defenses import PixelShift
from lightning_robust.errors import UserError

Make = Callable[..., Any]


def short(**settings: Any) -> Audit:
    """An audit that takes a second or two."""
    callback = Audit(**{"eps": 0.1, **settings})
    callback.budget = dataclasses.replace(
        callback.budget, probes=20, steps=4, apgd_steps=4, restarts=2, more_steps=8, eps_steps=3, noise=5, queries=10
    )
    return callback


def measured(run: Any) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if "/audit" in name}


def test_writes_logs_and_prints(
    model: Make, digits: Make, trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = short()
    run = trainer(callback, logger=True)
    run.test(model(), datamodule=digits(), verbose=False)
    folder = tmp_path / "runs" / "run" / "version_0"
    plain = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert (plain["version"], plain["images"], plain["budget"], plain["data"]) == (1, 23, "quick", "Digits")
    assert plain["model"].startswith("ImageClassifier")
    logged = measured(run)
    assert logged == {
        "test/audit/robust_acc": plain["robust_accuracy"],
        "test/audit/clean_acc": plain["clean_accuracy"],
        "test/audit/trusted": 0.0,  # 23 images
        "test/audit/flagged": 0.0,
    }
    assert plain["verdict"] == "not_enough_evidence"
    assert {file.name for file in (folder / "figures").iterdir()} == {
        "audit_attacks_test.png",
        "audit_eps_test.png",
        "audit_landscape_test.png",
    }
    table = (folder / "tables" / "audit_test.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 1 + len(plain["checks"])
    out = capsys.readouterr().out
    assert plain["sentence"] in out
    assert "NOT ENOUGH EVIDENCE" in out


def test_is_the_audit_of_the_same_images(model: Make, digits: Make, trainer: Make) -> None:
    callback, data, module = short(limit_images=15), digits(), model()
    trainer(callback).test(module, datamodule=data, verbose=False)
    batch = data.dataset("test").__getitems__(range(15))
    alone = audit(module.eval(), batch.images, batch.labels, eps=0.1, budget=callback.budget)
    assert callback.result is not None
    assert without_times(callback.result) == without_times(alone)


def without_times(result: AuditResult) -> Any:
    plain = result.to_plain()
    for key in ("seconds", "estimate", "model", "data", "landscape"):
        plain.pop(key)
    for entry in [*plain["checks"], *plain["attacks"]]:
        entry.pop("seconds")
        entry.pop("text", None)  # names sizes of gradients to their last digits
    return plain


def test_two_processes_find_what_one_finds(model: Make, digits: Make, trainer: Make, tmp_path: Path) -> None:
    one = trainer(short(limit_images=20))
    one.test(model(), datamodule=digits(), verbose=False)
    two = trainer(short(limit_images=20), devices=2, logger=True)
    two.test(model(), datamodule=digits(), verbose=False)
    assert measured(one) == measured(two)
    plain = json.loads((tmp_path / "runs" / "run" / "version_0" / "audit.json").read_text(encoding="utf-8"))
    assert plain["images"] == 20
    assert plain["robust_accuracy"] == measured(one)["test/audit/robust_acc"]
    callback = next(callback for callback in one.callbacks if isinstance(callback, Audit))
    assert callback.result is not None
    assert [check["outcome"] for check in plain["checks"]] == [check.outcome for check in callback.result.checks]
    assert [attack["name"] for attack in plain["attacks"]] == [attack.name for attack in callback.result.attacks]
    assert [attack["robust_accuracy"] for attack in plain["attacks"]] == [
        attack.robust_accuracy for attack in callback.result.attacks
    ]


def test_a_mistake_that_one_process_meets_ends_all(model: Make, digits: Make, trainer: Make) -> None:
    data, module = digits(), model()
    marked = float(data.dataset("test").__getitems__([1]).images.sum())

    def breaks(_: nn.Module, given: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        return torch.where((given[0].flatten(1).sum(1) == marked)[:, None], torch.nan, logits)

    module.register_forward_hook(breaks)
    with pytest.raises(Exception, match="the model gave NaN for clean images"):
        trainer(short(limit_images=20), devices=2).test(module, datamodule=data, verbose=False)


def test_a_defense_is_audited_around_the_model(model: Make, digits: Make, trainer: Make) -> None:
    callback = short(defense=PixelShift(), eps=0.02)
    trainer(callback).test(model(), datamodule=digits(), verbose=False)
    assert callback.result is not None
    assert "randomness" in callback.result.flagged
    assert callback.result.model.endswith("PixelShift")


def test_two_audits_have_names_of_their_own(model: Make, digits: Make, trainer: Make, tmp_path: Path) -> None:
    run = trainer(short(limit_images=10), short(limit_images=10, name="small"), logger=True)
    run.test(model(), datamodule=digits(), verbose=False)
    folder = tmp_path / "runs" / "run" / "version_0"
    assert (folder / "audit.json").is_file()
    assert (folder / "audit_small.json").is_file()
    assert "test/audit_small/robust_acc" in run.callback_metrics
    with pytest.raises(UserError, match="two of them"):
        trainer(short(), short()).test(model(), datamodule=digits(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": 0}, "nothing to audit"),
        ({"budget": "much"}, "choose one of quick, standard, full"),
        ({"limit_images": 0}, "at least one image"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"name": "a/b"}, "cannot be a name"),
    ],
)
def test_bad_settings(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Audit(**settings)


def test_the_budget_says_how_many_images() -> None:
    assert Audit().limit_images == 500
    assert Audit(budget="standard").limit_images == 1000


def test_a_module_under_test_keeps_its_modes(model: Make, digits: Make, trainer: Make) -> None:
    module = model()
    module.network.append(nn.Identity().train())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(short(limit_images=10)).test(module, datamodule=digits(), verbose=False)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_was_found_before_the_end_is_kept(
    model: Make, digits: Make, trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(audit_run, "attack_adaptively", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(short(limit_images=10), logger=True).test(model(), datamodule=digits(), verbose=False)
    (file,) = tmp_path.rglob("audit.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["verdict"] != "trusted"
    assert "out of memory" in kept["checks"][-1]["text"]
