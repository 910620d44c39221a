"""The detector: decisions equal the definition mutant by mutant, states save and load, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_robust.attacks import EOT, FGSM, PGD, DeepFool
from lightning_robust.attacks.adaptive import Randomized
from lightning_robust.detectors import (
    DetectingClassifier,
    ImageMutation,
    ModelMutation,
    Mutants,
    MutationTestingDetector,
    SequentialTest,
    fingerprint,
)
from lightning_robust.errors import UserError

MUTATIONS = {
    "nai": ModelMutation(operator="nai", rate=0.05),
    "gf": ModelMutation(operator="gf", rate=0.05),
    "ws": ModelMutation(operator="ws", rate=0.05),
    "noise": ImageMutation(operator="noise", strength=0.15),
    "shift": ImageMutation(operator="shift"),
}


def detector(name: str = "nai", **settings: Any) -> MutationTestingDetector:
    return MutationTestingDetector(MUTATIONS[name], **{"cap": 60, **settings})


def label_changes(model: nn.Module, mutation: Any, chosen: Any, image: Tensor) -> list[bool]:
    """One image, one mutant at a time."""
    label, changed = int(model(image[None]).argmax()), []
    state = dict(model.named_parameters())
    for number in chosen:
        if isinstance(mutation, ModelMutation):
            weights = {name: change.applied(state[name]) for name, change in mutation.draw(model, number).items()}
            logits = functional_call(model, weights, (image[None],))
        else:
            logits = model(mutation.mutants(image[None], [number])[0])
        changed.append(int(logits.argmax()) != label)
    return changed


@pytest.mark.parametrize("name", MUTATIONS)
def test_equals_the_definition_one_by_one(trained: Any, name: str) -> None:
    model = trained.model
    made = detector(name)
    found = made.calibrate(model, trained.images[:150], trained.labels[:150])
    images = torch.cat(
        [trained.test_images[:12], PGD(eps=0.2)(model, trained.test_images[:8], trained.test_labels[:8])]
    )
    decision = made.decide(model, images, at_least=40)
    test = made.test
    with torch.no_grad():
        for row, image in enumerate(images):
            changed = label_changes(model, made.mutation, found.chosen, image)
            state = test.begin(1)
            test.update(state, torch.tensor([changed]))
            assert int(decision.mutants[row]) == int(state.mutants)
            assert int(decision.changes[row]) == int(state.changes)
            assert bool(decision.adversarial[row]) == (int(state.verdict) > 0)
            assert bool(decision.decided[row]) == (int(state.verdict) != 0)
            assert int(decision.all_changes[row]) == sum(changed[:40])
            assert float(decision.kappa[row]) == int(state.changes) / int(state.mutants)
        kappa = made.sensitivity(model, images, 40)
        assert torch.equal(kappa, decision.all_changes.double() / 40)
        assert decision.predicted.tolist() == model(images).argmax(1).tolist()


@pytest.mark.parametrize("name", ["nai", "noise"])
def test_calibration_is_mean_and_interval(trained: Any, name: str) -> None:
    model = trained.model
    made = detector(name, mutants=30)
    found = made.calibrate(model, trained.images[:80], trained.labels[:80])
    right = model(trained.images[:80]).argmax(1) == trained.labels[:80]
    with torch.no_grad():
        shares = torch.tensor(
            [
                sum(label_changes(model, made.mutation, found.chosen[:30], image)) / 30
                for image in trained.images[:80][right]
            ]
        ).double()
    assert found.images == int(right.sum())
    assert found.kappa_nor == pytest.approx(float(shares.mean()))
    assert found.interval == pytest.approx(2.5758 * float(shares.std()) / math.sqrt(len(shares)), rel=1e-4)
    assert found.accuracy == pytest.approx(float(right.double().mean()))


def test_thresholds_are_the_papers(trained: Any) -> None:
    batch = trained.model, trained.images[:150], trained.labels[:150]
    of_model = detector("nai")
    found = of_model.calibrate(*batch)
    threshold = found.kappa_nor + found.interval
    assert of_model.test == SequentialTest(threshold, 0.1 * threshold)
    of_images = detector("noise")
    kappa = of_images.calibrate(*batch).kappa_nor
    assert of_images.test.threshold == pytest.approx(1.2 * kappa)
    assert of_images.test.half_width == pytest.approx(0.2 * kappa)
    other = detector("nai", rule="times", mu=1.5, half_width=0.25, alpha=0.01, beta=0.1)
    kappa = other.calibrate(*batch).kappa_nor
    assert other.test == SequentialTest(1.5 * kappa, 0.25 * 1.5 * kappa, 0.01, 0.1)


def test_only_accurate_mutants_are_used(trained: Any) -> None:
    model, images, labels = trained.model, trained.images[:200], trained.labels[:200]
    made = MutationTestingDetector(ModelMutation(operator="nai", rate=0.12), cap=25)
    found = made.calibrate(model, images, labels)
    assert found.drawn > len(found.chosen) == 25
    lowest = round(0.9 * found.accuracy, 2)
    state = dict(model.named_parameters())
    accurate = []
    with torch.no_grad():
        for number in range(found.chosen[-1] + 1):
            patch = made.mutation.draw(model, number)
            weights = {name: change.applied(state[name]) for name, change in patch.items()}
            accuracy = float((functional_call(model, weights, (images,)).argmax(1) == labels).double().mean())
            accurate += [number] if round(accuracy, 2) >= lowest else []
    assert list(found.chosen) == accurate


def test_detects_images_at_the_boundary(trained: Any) -> None:
    model = trained.model
    made = detector("nai", cap=100)
    made.calibrate(model, trained.images, trained.labels)
    right = model(trained.test_images).argmax(1) == trained.test_labels
    images, labels = trained.test_images[right], trained.test_labels[right]
    attacked = DeepFool().run(model, images, labels)
    normal = made.sensitivity(model, images)
    near = made.sensitivity(model, attacked.images[attacked.success])
    assert float(near.median()) > 5 * made.calibrated.kappa_nor
    above = (near[:, None] > normal).double() + 0.5 * (near[:, None] == normal).double()
    assert float(above.mean()) > 0.95
    assert float(made.decide(model, attacked.images[attacked.success]).adversarial.double().mean()) > 0.9
    assert float(made.decide(model, images).adversarial.double().mean()) < 0.3


@pytest.mark.parametrize("name", ["nai", "noise"])
def test_same_on_any_batch_and_chunk(trained: Any, name: str) -> None:
    model = copy.deepcopy(trained.model).double()
    images, labels = trained.images[:150].double(), trained.labels[:150]
    test_images = trained.test_images[:30].double()
    found = []
    for chunk, size in ((512, 30), (7, 30), (64, 4), (512, 1)):
        made = detector(name, chunk=chunk)
        kappa = made.calibrate(model, images, labels).kappa_nor
        parts = [made.decide(model, part, at_least=50) for part in test_images.split(size)]
        found.append((kappa, [torch.cat(column).tolist() for column in zip(*parts, strict=True)]))
    assert all(other == found[0] for other in found[1:])
    assert len(set(found[0][1][3])) > 1  # numbers of mutants that differ


def test_model_is_lent(trained: Any) -> None:
    """In training mode, with gradients, under inference mode: as it was afterwards, and the decision the same."""
    made = detector("gf")
    made.calibrate(trained.model, trained.images[:100], trained.labels[:100])
    wanted = made.decide(trained.model, trained.test_images[:5])
    model = copy.deepcopy(trained.model).train()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with torch.inference_mode():
        found = made.decide(model, trained.test_images[:5])
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert found.mutants.tolist() == wanted.mutants.tolist()
    assert found.changes.tolist() == wanted.changes.tolist()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nai", "noise"])
def test_saves_and_loads(trained: Any, name: str, tmp_path: Path) -> None:
    made = detector(name, mu=1.3, alpha=0.02, half_width=0.2)
    made.calibrate(trained.model, trained.images[:100], trained.labels[:100])
    path = made.save(tmp_path / "deep" / "d.pt")
    torch.load(path, weights_only=True)
    again = MutationTestingDetector.load(path, trained.model)
    assert (again.mutation, again.calibration, again.test, again.cap) == (
        made.mutation,
        made.calibration,
        made.test,
        made.cap,
    )
    one, two = (each.decide(trained.model, trained.test_images[:6]) for each in (made, again))
    assert torch.equal(one.changes, two.changes)
    assert torch.equal(one.adversarial, two.adversarial)


def test_refuses_another_model(trained: Any, tmp_path: Path) -> None:
    made = detector()
    made.calibrate(trained.model, trained.images[:100], trained.labels[:100])
    path = made.save(tmp_path / "d.pt")
    other = copy.deepcopy(trained.model)
    made.require(other)  # equal weights are the same model
    MutationTestingDetector.load(path, nn.Sequential(other))  # and a wrapper around it, too
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    for call in (
        lambda: MutationTestingDetector.load(path, other),
        lambda: made.decide(other, trained.test_images[:2]),
        lambda: DetectingClassifier(other, made),
        lambda: Mutants(other, made),
    ):
        with pytest.raises(UserError, match="calibrated for another model"):
            call()
    moved = copy.deepcopy(trained.model)
    moved[1].running_mean.add_(0.01)  # a buffer
    with pytest.raises(UserError, match="calibrated for another model"):
        made.require(moved)


def test_refuses_weights_that_changed_since(trained: Any) -> None:
    model = copy.deepcopy(trained.model)
    made = detector()
    made.calibrate(model, trained.images[:100], trained.labels[:100])
    made.decide(model, trained.test_images[:2])
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    with pytest.raises(UserError, match="changed since"):
        made.decide(model, trained.test_images[:2])


def test_fingerprint_is_of_values(trained: Any) -> None:
    mark = fingerprint(trained.model)
    assert fingerprint(copy.deepcopy(trained.model).double()) == mark
    assert fingerprint(nn.Sequential(trained.model)) == mark
    assert fingerprint(nn.Sequential(trained.model, nn.Linear(10, 10))) != mark


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rubbish", "cannot be read"),
        ({"state_dict": {}}, "no state of a MutationTestingDetector"),
        ({"mutation_testing_detector": 99}, "format 99"),
        ({"mutation_testing_detector": 1, "mutation": {"class": "Other"}}, "damaged"),
        (print, "cannot be read"),
    ],
)
def test_refuses_other_files(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=said):
        MutationTestingDetector.load(path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        MutationTestingDetector.load(tmp_path / "none.pt")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "mean"}, "choose auto"),
        ({"mu": 1.0}, "mu=1.0"),
        ({"half_width": 1.0}, "half_width=1.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"level": 1.0}, "level=1.0"),
        ({"cap": 0}, "cap=0"),
        ({"cap": 10, "mutants": 20}, "mutants=20"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        detector(**settings)


def test_refuses_to_decide_before_the_calibration(trained: Any) -> None:
    with pytest.raises(UserError, match="not calibrated"):
        detector().decide(trained.model, trained.test_images)


def test_refuses_a_kappa_of_zero(trained: Any) -> None:
    made = MutationTestingDetector(ImageMutation(operator="light", strength=1e-3), cap=5)
    with pytest.raises(UserError, match="κ_nor is 0"):
        made.calibrate(trained.model, trained.images[:20], trained.labels[:20])
    assert made.calibration is None


def test_refuses_a_kappa_above_one_over_mu(trained: Any) -> None:
    made = MutationTestingDetector(ImageMutation(operator="noise", strength=1.0), mu=3, cap=30)
    with pytest.raises(UserError, match="no share below 1"):
        made.calibrate(trained.model, trained.images[:60], trained.labels[:60])
    made = MutationTestingDetector(ModelMutation(operator="gf", rate=1.0, min_accuracy=0), half_width=0.5, cap=20)
    with pytest.raises(UserError, match="no share below 1"):
        made.calibrate(trained.model, trained.images[:60], trained.labels[:60])


def test_says_when_no_mutant_is_accurate_enough(trained: Any) -> None:
    made = MutationTestingDetector(ModelMutation(operator="gf", rate=1.0, tries=40))
    with pytest.raises(UserError, match=r"40 mutants in a row.*lower the rate"):
        made.calibrate(trained.model, trained.images[:60], trained.labels[:60])


def test_refuses_a_model_that_is_never_right(trained: Any) -> None:
    wrong = (trained.model(trained.images[:20]).argmax(1) + 1) % 10
    with pytest.raises(UserError, match="classifies 0 of 20"):
        detector().calibrate(trained.model, trained.images[:20], wrong)


def test_refuses_more_mutants_than_there_are(trained: Any) -> None:
    made = detector()
    made.calibrate(trained.model, trained.images[:100], trained.labels[:100])
    with pytest.raises(UserError, match="raise its cap"):
        made.decide(trained.model, trained.test_images[:1], at_least=61)
    with pytest.raises(UserError, match="raise its cap"):
        made.sensitivity(trained.model, trained.test_images[:1], 61)


# -- wrapper and attacker ----------------------------------------------------------------------------------------------


def test_classifies_or_refuses(trained: Any) -> None:
    made = detector(cap=100)
    made.calibrate(trained.model, trained.images, trained.labels)
    door = DetectingClassifier(trained.model, made).eval()
    attacked = DeepFool()(trained.model, trained.test_images[:20], trained.test_labels[:20])
    images = torch.cat([trained.test_images[:20], attacked])
    assert torch.equal(door(images), trained.model(images))
    verdict, found = door.decide(images), made.decide(trained.model, images)
    assert torch.equal(verdict.label == -1, found.adversarial)
    assert torch.equal(verdict.label[~found.adversarial], found.predicted[~found.adversarial])
    assert int((verdict.label[20:] == -1).sum()) > 15 > int((verdict.label[:20] == -1).sum())
    assert torch.equal(verdict.kappa, found.kappa)
    assert torch.equal(verdict.mutants, found.mutants)
    # what is given back is free of the model's graph, and the wrapper's weights are the model's
    assert not verdict.kappa.requires_grad
    assert set(door.state_dict()) == {f"model.{name}" for name in trained.model.state_dict()}


@pytest.mark.parametrize("name", ["nai", "noise"])
def test_attacker_who_knows_the_mutants(trained: Any, name: str) -> None:
    """His images fool the model, and fewer of them are detected than those of the same attack without that goal."""
    made = detector(name, cap=100)
    made.calibrate(trained.model, trained.images, trained.labels)
    images, labels = trained.test_images[:40], trained.test_labels[:40]
    view = Mutants(trained.model, made)
    assert isinstance(view, Randomized)
    assert torch.equal(view(images), trained.model(images))
    assert len(view.draws(6)) == 6
    adaptive = EOT(attack=PGD(eps=0.3, steps=10, stop_at_success=False), samples=6)
    found = adaptive.run(view, images, labels)
    rates = []
    for result in (
        found,
        FGSM(eps=0.3).run(trained.model, images, labels),
        DeepFool().run(trained.model, images, labels),
    ):
        assert int(result.success.sum()) > 10
        rates.append(float(made.decide(trained.model, result.images[result.success]).adversarial.double().mean()))
    assert rates[0] < rates[2]
    again = EOT(attack=PGD(eps=0.3, steps=10, stop_at_success=False), samples=6)
    parts = torch.cat([again(view, images[part], labels[part]) for part in (slice(0, 13), slice(13, 40))])
    assert float((parts - found.images).abs().max()) < 1e-3 or float((parts != found.images).double().mean()) < 0.01
