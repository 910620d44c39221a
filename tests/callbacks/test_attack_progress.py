"""The bar says which attack runs and how far it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
from rich.console import Console

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import AdversarialAccuracy, AttackProgress, AttackSchedule, RobustnessCurve
from lightning_robust.errors import UserError
from lightning_robust.objectives import FastFGSM, PGDAdversarial

Make = Callable[..., Any]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal that keeps what is drawn on it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr("pytorch_lightning.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr("rich.get_console", lambda: console)
    monkeypatch.setattr("pytorch_lightning.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    return console


@pytest.mark.parametrize("function", ["test", "validate", "fit"])
def test_names_the_attack_and_its_step(
    model: Make, trainer: Make, digits: Make, screen: Console, function: str
) -> None:
    bar = AttackProgress()
    bar.refresh = lambda hard=False: bar.progress.refresh()  # each change is drawn, and not ten a second
    pgd = PGD(eps=0.3, steps=7, stop_at_success=False)
    callbacks = [bar, AdversarialAccuracy({"strong": pgd}), RobustnessCurve([0.1], attack=pgd, name="curve")]
    run = trainer(*callbacks)
    after: list[str] = []

    class After(pl.Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            after.extend(task.description for task in bar.progress.tasks if task.visible)

        on_validation_batch_end = on_test_batch_end

    run.callbacks.append(After())
    words = {} if function == "fit" else {"verbose": False}
    getattr(run, function)(model(), digits(), **words)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    name = {"test": "Testing", "validate": "Validation", "fit": "Validation"}[function]
    assert f"{name} · strong 7/7" in shown
    assert after
    assert name in after
    assert not [text for text in after if "·" in text]  # the name is gone when the attack is done
    if function != "fit":
        assert f"{name} · curve ε=0.1 7/7" in shown


def test_no_bar_no_harm(model: Make, trainer: Make, digits: Make) -> None:
    run = trainer(AttackProgress(), AdversarialAccuracy({"a": FGSM()}), enable_progress_bar=True)
    run.progress_bar_callback.disable()
    run.test(model(), digits(), verbose=False)
    assert "test/robust_acc/a" in run.callback_metrics


class TestAttackSchedule:
    def test_budget_rises_and_is_given_back(self, model: Make, trainer: Make, digits: Make) -> None:
        budgets: list[float] = []

        class Spy(pl.Callback):
            def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Any) -> None:
                budgets.append(module.objective.threat_model.radius)

        objective = PGDAdversarial(attack=PGD(eps=0.2, steps=2, step_size=0.1))
        module = model(objective=objective)
        run = trainer(AttackSchedule(warmup_epochs=2, start=0.5), Spy(), max_epochs=3)
        run.fit(module, digits(batch_size=24))
        assert budgets == pytest.approx([0.1, 0.125, 0.15, 0.175, 0.2, 0.2])
        assert module.objective == objective
        assert float(run.callback_metrics["train/eps"]) == pytest.approx(0.2)

    def test_given_back_after_a_failure(self, model: Make, trainer: Make, digits: Make) -> None:
        class Fail(pl.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                raise InterruptedError

        module = model(objective=FastFGSM(eps=0.1))
        with pytest.raises(InterruptedError):
            trainer(AttackSchedule(), Fail()).fit(module, digits())
        assert module.objective == FastFGSM(eps=0.1)

    def test_natural_training_has_no_budget(self, model: Make, trainer: Make, digits: Make) -> None:
        with pytest.raises(UserError, match="no budget to raise"):
            trainer(AttackSchedule()).fit(model(), digits())
        with pytest.raises(UserError, match="start=2"):
            AttackSchedule(start=2)
