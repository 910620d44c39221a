"""Detection scores: equal to torchmetrics' own areas and to sums by hand, in any order and split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, BinaryROC

from lightning_robust.errors import UserError
from lightning_robust.metrics.detection import DetectionScores, SystemAccuracy, auroc, roc

MUTANTS = 50


def counts(count: int, share: float, seed: int) -> Tensor:
    draws = torch.rand(count, MUTANTS, generator=torch.Generator().manual_seed(seed))
    return (draws < share * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed + 1))).sum(1)


def filled(parts: int = 1) -> tuple[DetectionScores, Tensor, Tensor]:
    scores = DetectionScores(["normal", "wrong", "fgsm"], MUTANTS)
    normal, attacked = counts(90, 0.3, 0), counts(70, 0.8, 2)
    for kind, values in (("normal", normal), ("fgsm", attacked)):
        for part in values.chunk(parts):
            scores.update(kind, part, part > 10, part % 3 != 0, part + 1)
    return scores, normal, attacked


@pytest.mark.parametrize("parts", [1, 4])
def test_equals_torchmetrics_and_sums_by_hand(parts: int) -> None:
    scores, normal, attacked = filled(parts)
    found = scores.compute()
    target = torch.tensor([0] * len(normal) + [1] * len(attacked))
    values = torch.cat([normal, attacked]).double() / MUTANTS
    assert float(found["fgsm"].auroc) == pytest.approx(float(BinaryAUROC()(values, target)), abs=1e-6)
    assert float(found["normal"].auroc) == 0.5
    for kind, of in (("normal", normal), ("fgsm", attacked)):
        kappa = of.double() / MUTANTS
        assert int(found[kind].images) == len(of)
        assert float(found[kind].kappa) == pytest.approx(float(kappa.mean()))
        assert float(found[kind].kappa_interval) == pytest.approx(1.96 * float(kappa.std()) / math.sqrt(len(of)))
        assert float(found[kind].flagged) == pytest.approx(float((of > 10).double().mean()))
        assert float(found[kind].undecided) == pytest.approx(float((of % 3 == 0).double().mean()))
        assert float(found[kind].mutants) == pytest.approx(float((of + 1).double().mean()))
    assert int(found["wrong"].images) == 0
    assert all(math.isnan(float(value)) for value in found["wrong"][1:])


def test_roc_equals_torchmetrics() -> None:
    scores, normal, attacked = filled()
    histograms = scores.counts()
    false, true = roc(histograms["normal"], histograms["fgsm"])
    target = torch.tensor([0] * len(normal) + [1] * len(attacked))
    theirs = BinaryROC()(torch.cat([normal, attacked]).double() / MUTANTS, target)
    mine = {(round(float(x), 6), round(float(y), 6)) for x, y in zip(false, true, strict=True)}
    assert mine == {(round(float(x), 6), round(float(y), 6)) for x, y in zip(theirs[0], theirs[1], strict=True)}
    area = float(torch.trapezoid(true, false))
    assert area == pytest.approx(float(auroc(histograms["normal"], histograms["fgsm"])))


def test_resets_and_merges() -> None:
    whole, *_ = filled()
    scores, *_ = filled()
    scores.reset()
    assert int(scores.counts()["normal"].sum()) == 0
    normal, attacked = counts(90, 0.3, 0), counts(70, 0.8, 2)
    scores.update("fgsm", attacked, attacked > 10, attacked % 3 != 0, attacked + 1)
    scores.update("normal", normal, normal > 10, normal % 3 != 0, normal + 1)
    for kind in ("normal", "fgsm"):
        assert scores.compute()[kind] == whole.compute()[kind]


def test_system_accuracy_by_hand() -> None:
    system = SystemAccuracy(["clean", "fgsm"])
    system.update(
        "clean", torch.tensor([True, True, True, False, False]), torch.tensor([False, True, False, True, False])
    )
    system.update("fgsm", torch.tensor([False, False]), torch.tensor([True, True]))
    system.update("fgsm", torch.tensor([False, True]), torch.tensor([False, False]))
    found = system.compute()
    assert [float(value) for value in found["clean"]] == pytest.approx([0.4, 0.4, 0.2])
    assert [float(value) for value in found["fgsm"]] == pytest.approx([0.25, 0.5, 0.25])
    system.reset()
    assert math.isnan(float(system.compute()["clean"].right))


@pytest.mark.parametrize(
    ("kinds", "mutants", "said"),
    [(["fgsm"], 5, "'normal' among"), (["normal", "normal"], 5, "each once"), (["normal"], 0, "at least one mutant")],
)
def test_refuses(kinds: list[str], mutants: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DetectionScores(kinds, mutants)


def test_refuses_what_does_not_fit() -> None:
    scores = DetectionScores(["normal"], 4)
    yes, one = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int64)
    with pytest.raises(UserError, match="none of normal"):
        scores.update("fgsm", one, yes, yes, one)
    with pytest.raises(UserError, match="one value an image"):
        scores.update("normal", one, yes[:1], yes, one)
    with pytest.raises(UserError, match="5 of 4"):
        scores.update("normal", 5 * one, yes, yes, one)
