"""Signals during an evaluation: it ends at once, and keeps what it had counted under names that say so."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_robust.attacks import CW, FGSM, PGD
from lightning_robust.callbacks import AdversarialAccuracy, RobustnessCurve, RunResults

Make = Callable[..., Any]
ENDS = [(signal.SIGTERM, SIGTERMException), (signal.SIGINT, SystemExit)]  # Lightning ends with status 1 on Ctrl-C


class SignalAt(pl.Callback):
    """Sends a signal to its own process."""

    def __init__(self, number: signal.Signals, hook: str, batch: int = 0) -> None:
        self.number, self.hook, self.batch = number, hook, batch
        self.later: list[str] = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._send("on_test_epoch_start")

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self._send("on_test_batch_end", index)

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self._send("on_validation_batch_end", index)

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self._send("on_predict_batch_end", index)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._send("on_test_epoch_end")

    def _send(self, hook: str, batch: int = 0) -> None:
        if (hook, batch) == (self.hook, self.batch):
            os.kill(os.getpid(), self.number)
            self.later.append("went on")


@pytest.fixture
def handlers() -> Any:
    """Lightning lets Ctrl-C be ignored after the first."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "runs" / "run" / "version_0" / "results.json").read_text())


@pytest.mark.parametrize(("number", "raised"), ENDS)
@pytest.mark.parametrize(
    ("hook", "batch", "images"),
    [("on_test_batch_end", 0, 10), ("on_test_batch_end", 1, 20), ("on_test_epoch_start", 0, 0)],
)
def test_a_test_ends_at_once_and_keeps_what_it_counted(
    model: Make,
    trainer: Make,
    digits: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    handlers: dict[signal.Signals, Any],
    number: signal.Signals,
    raised: type[BaseException],
    hook: str,
    batch: int,
    images: int,
) -> None:
    attacks = {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=3)}
    sends = SignalAt(number, hook, batch)
    curve = RobustnessCurve([0, 0.1], attack=FGSM())
    run = trainer(AdversarialAccuracy(attacks), curve, sends, RunResults(), logger=True)
    with pytest.raises(raised):
        run.test(model(), digits())
    assert sends.later == []
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    found = results(tmp_path)
    assert not any(name.startswith("test/") for name in found)
    folder = tmp_path / "runs" / "run" / "version_0"
    assert "Interrupted: the evaluation ended early" in capsys.readouterr().err
    partial = {name: value for name, value in found.items() if name.startswith("test_partial/")}
    if images == 0:
        assert partial == {}
        return
    whole = trainer(AdversarialAccuracy(attacks), RobustnessCurve([0, 0.1], attack=FGSM()))
    # the same images alone: the first batches
    data = digits()
    data.setup("test")
    first = torch.utils.data.Subset(data.test_dataloader().dataset, range(images))
    loader = torch.utils.data.DataLoader(first, batch_size=10, collate_fn=data.test_dataloader().collate_fn)
    whole.test(model(), loader, verbose=False)
    wanted = {
        name.replace("test/", "test_partial/"): float(value)
        for name, value in whole.callback_metrics.items()
        if "robust_acc" in name or "success_rate" in name
    }
    assert partial == pytest.approx(wanted)
    with (folder / "tables" / "robust_accuracy_per_class_test_partial.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in attacks:
        assert sum(int(row["images"]) for row in rows if row["attack"] == name) == images


@pytest.mark.parametrize(("number", "raised"), ENDS)
def test_the_last_batch_and_what_comes_after_it_end_at_once_too(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, handlers: Any, number: signal.Signals, raised: Any
) -> None:
    """Lightning looks for SIGTERM after every batch but the last."""
    for version, (hook, batch) in enumerate([("on_test_batch_end", 2), ("on_test_epoch_end", 0)]):
        sends = SignalAt(number, hook, batch)
        run = trainer(AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}), sends, RunResults(), logger=True)
        with pytest.raises(raised):
            run.test(model(), digits())
        assert sends.later == []
        folder = tmp_path / "runs" / "run" / f"version_{version}"
        found = json.loads((folder / "results.json").read_text())
        # the first of them before the numbers of the whole set are published, the second after that
        assert ("test_partial/robust_acc/fgsm" in found) == (version == 0)
        assert ("test/robust_acc/fgsm" in found) == (version == 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("verb", "hook"), [("validate", "on_validation_batch_end"), ("predict", "on_predict_batch_end")]
)
def test_validate_and_predict_end_at_once(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, handlers: dict[signal.Signals, Any], verb: str, hook: str
) -> None:
    sends = SignalAt(signal.SIGTERM, hook, 2)  # the last batch
    run = trainer(AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}), sends, RunResults(), logger=True)
    with pytest.raises(SIGTERMException):
        getattr(run, verb)(model(), datamodule=digits())
    assert sends.later == []
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    assert ("val_partial/robust_acc/fgsm" in results(tmp_path)) == (verb == "validate")


def test_another_error_keeps_what_was_counted_too(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 1:
                raise ZeroDivisionError

    run = trainer(AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}), Fails(), RunResults(), logger=True)
    with pytest.raises(ZeroDivisionError):
        run.test(model(), digits())
    assert 0 <= results(tmp_path)["test_partial/robust_acc/fgsm"] <= 1


def test_a_whole_test_has_nothing_partial(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(AdversarialAccuracy({"fgsm": FGSM(eps=0.1)}), RunResults(), logger=True)
    run.test(model(), digits())
    assert "test/robust_acc/fgsm" in results(tmp_path)
    assert not any("partial" in name for name in results(tmp_path))


def test_an_attack_that_no_batch_has_been_through_has_nothing_to_say(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: Any
) -> None:
    original = PGD.run

    def run(attack: PGD, *given: Any, **options: Any) -> Any:
        if type(attack) is PGD:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(attack, *given, **options)

    monkeypatch.setattr(PGD, "run", run)
    attacks = {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=3), "cw": CW(steps=1)}
    curve = RobustnessCurve([0, 0.1, 0.2], attack=FGSM())
    stopped = trainer(AdversarialAccuracy(attacks), curve, RunResults(), logger=True)
    with pytest.raises(SIGTERMException):
        stopped.test(model(), digits())
    partial = {name for name in results(tmp_path) if name.startswith("test_partial/")}
    assert partial == {f"test_partial/{what}/fgsm" for what in ("robust_acc", "success_rate", "success_rate_8bit")}
