"""OnePixel: the promise, the paper's algorithm, exhaustive search and SciPy as oracles, accounting, going on."""

from __future__ import annotations

import copy
import itertools
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Run, Setting, Trained, evaluate, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import Attack, accelerate
from lightning_robust.attacks.adaptive import EOT
from lightning_robust.attacks.differential_evolution import children
from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.attacks.one_pixel import OnePixel
from lightning_robust.attacks.one_pixel_evolution import Evolution
from lightning_robust.attacks.pixel_goal import PixelRuns
from lightning_robust.attacks.randomness import normal, uniform
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(3), 1)  # the three columns on the left
COSTLY = {"compiled model", "DDP-wrapped model", "under bf16 autocast", "as before after an exception"}
SMALL: dict[str, Any] = {"population": 12, "generations": 4}


def bind(attack: Attack, setting: Setting, **options: Any) -> Run:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        return attack(model, images, labels, targets=targets, mask=setting.mask, **options)

    return run


def by_stand_in(attack: Attack, setting: Setting) -> Run:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        options = {"targets": targets, "mask": setting.mask, "stand_in": accelerate(model)}
        return attack.run(model, images, labels, **options).images

    return run


@pytest.mark.parametrize(
    ("pixels", "targeted", "masked", "stop"),
    list(itertools.product((1, 3), (False, True), (False, True), ("confidence", "label"))),
)
def test_promise(pixels: int, targeted: bool, masked: bool, stop: Any) -> None:
    setting = Setting("l0", pixels, MASK if masked else None, targeted)
    run = bind(OnePixel(pixels=pixels, stop=stop, **SMALL), setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.parametrize("bounds", ["clip", "reflect", "resample"])
@pytest.mark.parametrize("strategy", ["best1", "rand2", "best2", "current_to_best1", "rand_to_best1"])
def test_promise_of_the_other_settings(bounds: Any, strategy: Any) -> None:
    setting = Setting("l0", 2, MASK)
    attack = OnePixel(pixels=2, bounds=bounds, strategy=strategy, crossover=0.8, eight_bit=False, max_batch=5, **SMALL)
    for name in ("result in ball, box and mask", "independent of the batch", "repeatable"):
        CHECKS[name](bind(attack, setting), setting)


@pytest.mark.parametrize("check", sorted(COSTLY))
def test_promise_around_the_model(check: str) -> None:
    setting = Setting("l0", 1)
    CHECKS[check](bind(OnePixel(**SMALL), setting), setting)


def test_promise_with_a_stand_in() -> None:
    setting = Setting("l0", 2, MASK)
    run = by_stand_in(OnePixel(pixels=2, **SMALL), setting)
    for name, check in CHECKS.items():
        if name != "compiled model":
            check(run, setting)


# -- the algorithm ---------------------------------------------------------------------------------------------------


def written(image: Tensor, vector: Tensor, pixels: int) -> Tensor:
    """The image (C, H, W) with a candidate's pixels, by the definition."""
    channels, height, width = image.shape
    image = image.clone()
    across, down, colours = vector[:pixels], vector[pixels : 2 * pixels], vector[2 * pixels :].view(pixels, channels)
    for pixel in range(pixels):
        x = min(width - 1, int(min(max(float(across[pixel]), 0.0), 1.0) * width))
        y = min(height - 1, int(min(max(float(down[pixel]), 0.0), 1.0) * height))
        image[:, y, x] = (colours[pixel].clamp(0, 1) * 255).round() / 255
    return image


def paper(attack: OnePixel, model: nn.Module, image: Tensor, label: int, key: Tensor) -> tuple[Tensor, int]:
    """One image, one candidate at a time, every candidate evaluated: the evolution as the paper describes it."""
    size, dims = attack.population, attack.pixels * (2 + image.shape[0])

    def true_probability(vector: Tensor) -> float:
        with torch.no_grad():
            return float(model(written(image, vector, attack.pixels)[None]).softmax(1)[0, label])

    places = uniform(key, (1, size, 2 * attack.pixels), image.dtype, 0)[0]
    colours = (128 + 127 * normal(key, (1, size, dims - 2 * attack.pixels), image.dtype, 1)[0]) / 255
    population = [torch.cat(parts) for parts in zip(places, colours, strict=True)]
    values = [true_probability(vector) for vector in population]
    for generation in range(attack.generations + 1):
        if generation > 0:
            fitness = -torch.tensor(values, dtype=torch.float64)[None]
            settings = {name: getattr(attack, name) for name in ("strategy", "f", "crossover", "bounds")}
            born = children(torch.stack(population)[None], fitness, key, generation, **settings)[0]
            for place, child in enumerate(born):
                value = true_probability(child)
                if value <= values[place]:
                    population[place], values[place] = child, value
        if min(values) < attack.true_confidence:
            break
    best = min(range(size), key=lambda place: values[place])
    return written(image, population[best], attack.pixels), generation


@pytest.mark.parametrize("pixels", [1, 2])
def test_the_batch_evolves_as_one_image_alone_does_in_a_plain_loop(pixels: int, digits: Trained) -> None:
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:8].double(), digits.labels[:8]
    attack = OnePixel(pixels=pixels, population=20, generations=8)
    result = attack.run(model, images, labels)
    problem = attack._problem(model, images, labels, None, None, None)
    stopped = 0
    for row in range(len(images)):
        image, generations = paper(attack, model, images[row], int(labels[row]), problem.keys[row : row + 1])
        assert torch.equal(result.images[row], image)
        assert result.iterations[row] == generations
        stopped += generations < 8
    assert stopped > 0 or pixels == 1


@pytest.mark.parametrize("strategy", ["rand1", "best1", "current_to_best1"])
def test_more_pixels_fool_more(strategy: Any, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    rates = [
        int(
            OnePixel(pixels=d, strategy=strategy, population=60, generations=15)
            .run(model, images, labels)
            .success.sum()
        )
        for d in (1, 2, 4)
    ]
    assert rates[0] < rates[1] < rates[2]


# -- what it asks, and of what ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that pass through, how many are different, and the most at once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images, self.most = inner, 0, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        self.most = max(self.most, len(images))
        self.different.update(image.numpy().tobytes() for image in images.detach())
        return self.inner(images)


@pytest.mark.parametrize("stop", ["confidence", "label"])
@pytest.mark.parametrize("targeted", [False, True])
def test_queries_are_the_points_at_which_the_model_was_asked(stop: Any, targeted: bool, digits: Trained) -> None:
    images, labels = digits.images[:16].clone(), digits.labels[:16]
    model = Counting(digits.model)
    attack = OnePixel(population=40, generations=10, stop=stop, max_batch=33)
    targets = (labels + 1) % 10 if targeted else None
    result = attack.run(model, images, labels, targets=targets, rounding=False)
    assert int(result.queries.sum()) == model.images
    assert model.most <= 33
    full = 1 + 40 * (1 + result.iterations)
    assert bool((result.queries <= full).all())
    assert result.queries.sum() < full.sum()  # candidates that are alike are asked about once
    # nothing is asked about twice, but what was met long ago, and the clean image where a candidate leaves it as it is
    assert len(model.different) >= 0.9 * model.images


def test_what_is_misclassified_costs_one_pass_or_none() -> None:
    model = Counting(make_model())
    images, labels = make_batch(model.inner)
    labels = (labels + 1) % CLASSES
    result = OnePixel(**SMALL).run(model, images, labels, rounding=False)
    assert model.images == len(images)
    assert result.success.all()
    assert not result.iterations.any()
    assert torch.equal(result.images, images)
    model.images = 0
    known = evaluate(model.inner, images)
    model.images = 0
    OnePixel(**SMALL).run(model, images, labels, rounding=False, clean_logits=known)
    assert model.images == 0


def test_a_callable_outside_of_torch_will_do(digits: Trained) -> None:
    images, labels = digits.images[:12], digits.labels[:12]
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)

    def logits(batch: Tensor) -> Tensor:
        assert not batch.requires_grad
        return torch.from_numpy(np.tanh(batch.numpy().reshape(len(batch), 64)) @ weights)

    attack = OnePixel(pixels=2, population=30, generations=10, stop="label")
    labels = logits(images).argmax(1)
    result = attack.run(logits, images, labels)
    assert int(result.success.sum()) > 0
    assert torch.equal(result.success, logits(result.images).argmax(1) != labels)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("targeted", [False, True])
def test_probabilities_serve_as_well_as_logits(targeted: bool, digits: Trained) -> None:
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:20].double(), digits.labels[:20]
    targets = (labels + 1) % 10 if targeted else None
    attack = OnePixel(population=30, generations=8)
    expected = attack.run(model, images, labels, targets=targets)
    softmax = nn.Sequential(model, nn.Softmax(1))
    options = {"targets": targets, "clean_logits": evaluate(softmax, images)}
    result = attack.replace(outputs="probabilities").run(softmax, images, labels, **options)
    assert torch.equal(result.success, expected.success)
    assert float((result.images == expected.images).flatten(1).all(1).double().mean()) > 0.9
    assert torch.equal(evaluate(softmax, result.images).argmax(1) != labels, result.success) or targeted


def test_logits_given_as_probabilities_are_refused(digits: Trained) -> None:
    attack = OnePixel(outputs="probabilities", **SMALL)
    with pytest.raises(UserError, match="outputs='logits'"):
        attack(digits.model, digits.images[:3], digits.labels[:3])
    with pytest.warns(UserWarning, match="probabilities"):
        OnePixel(**SMALL)(nn.Sequential(digits.model, nn.Softmax(1)), digits.images[:3], digits.labels[:3])


def test_the_best_candidate_of_a_saturated_network_is_found(digits: Trained) -> None:
    """Probabilities that are 0 and 1 in float32 still have an order in log-odds."""
    images, labels = digits.images[:30], digits.labels[:30]
    attack = OnePixel(population=40, generations=12)

    class Loud(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 1000 * digits.model(images)

    quiet, loud = (attack.run(model, images, labels) for model in (digits.model, Loud()))
    assert loud.success.sum() >= quiet.success.sum() > 0


def test_a_later_nan_is_refused(digits: Trained) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = digits.model(images)
            return logits.masked_fill((images[:, 0, 2, 2] > 0.9)[:, None], torch.nan)

    images = digits.images[:8] * 0.8
    with pytest.raises(UserError, match="NaN") as caught:
        OnePixel(population=60, generations=20)(Broken(), images, evaluate(digits.model, images).argmax(1))
    assert caught.value.non_finite


def test_both_ways_of_stopping(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    settings = {"pixels": 2, "population": 40, "generations": 15}
    label = OnePixel(stop="label", **settings).run(model, images, labels)
    sure = OnePixel(**settings).run(model, images, labels)
    probability = evaluate(model, sure.images).softmax(1).gather(1, labels[:, None])[:, 0]
    searched = evaluate(model, images).argmax(1) == labels
    early = searched & (sure.iterations < 15)
    assert early.any()
    assert (probability[early] < 0.05).all()
    assert (label.iterations <= sure.iterations).all()
    assert label.queries.sum() < sure.queries.sum()
    # what has flipped on the way counts for stop="label"; the fittest candidate alone counts in the paper
    assert not (sure.success & ~label.success).any()
    targets = (labels + 1) % 10
    aimed = OnePixel(**settings).run(model, images, labels, targets=targets)
    probability = evaluate(model, aimed.images).softmax(1).gather(1, targets[:, None])[:, 0]
    early = (aimed.iterations < 15) & (aimed.norms["l0"] > 0)
    assert early.any()
    assert (probability[early] > 0.9).all()
    assert torch.equal(aimed.success, evaluate(model, aimed.images).argmax(1) == targets)


def test_colours_of_eight_bits_outlive_a_file(digits: Trained) -> None:
    model, labels = digits.model, digits.labels[:60]
    images = (digits.images[:60] * 255).round() / 255
    attack = OnePixel(pixels=2, population=40, generations=10, stop="label")
    result = attack.run(model, images, labels)
    assert result.success.any()
    assert torch.equal(result.success, result.success_8bit)
    assert torch.equal((result.images * 255).round() / 255, result.images)
    exact = attack.replace(eight_bit=False).run(model, images, labels)
    assert not torch.equal((exact.images * 255).round() / 255, exact.images)


# -- masks, targets, bad input ---------------------------------------------------------------------------------------


def test_every_pixel_of_a_mask_is_drawn_alike_and_no_other(digits: Trained) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(2, 8, 8, generator=generator) < 0.3).float()
    masks[0, 3] = 0  # a row without any
    seen = torch.zeros(2, 8, 8)

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            for image in images:
                which = int((image - 0.5).abs().flatten().median() > 0.2)  # the second image is a darker one
                seen[which] += (image[0] != (0.1 if which else 0.5)).float()
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 3).float()

    images = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    attack = OnePixel(population=8000, generations=1, outputs="probabilities")
    attack(Watching(), images, torch.zeros(2, dtype=torch.int64), mask=masks)
    assert torch.equal(seen > 0, masks > 0)
    for each, mask in zip(seen, masks, strict=True):
        hits = each[mask > 0]
        assert hits.min() > 0.5 * hits.mean()


def test_a_mask_of_channels_leaves_the_others_alone() -> None:
    model = make_model()
    images, labels = make_batch(model)
    mask = torch.zeros(len(images), *SHAPE)
    mask[:, 1] = 1
    mask[3] = 0  # nothing may change here
    result = OnePixel(**SMALL).run(model, images, labels, mask=mask)
    assert torch.equal(result.images[:, [0, 2]], images[:, [0, 2]])
    assert torch.equal(result.images[3], images[3])
    assert not result.success[3]
    assert result.queries[3] == 1
    assert not torch.equal(result.images[:, 1], images[:, 1])


def test_one_mask_for_all_is_that_mask_for_each() -> None:
    model = make_model()
    images, labels = make_batch(model)
    attack = OnePixel(pixels=2, **SMALL)
    shared = attack(model, images, labels, mask=MASK)
    for mask in (MASK.expand(len(images), -1, -1), MASK.expand(1, 3, -1, -1), MASK.expand(len(images), 3, -1, -1)):
        assert torch.equal(attack(model, images, labels, mask=mask), shared)


def test_an_image_evolves_towards_each_target_in_its_own_way(digits: Trained) -> None:
    image, label = digits.images[:1], digits.labels[:1]
    targets = (label + torch.arange(1, 3)) % 10
    attack = OnePixel(population=12, generations=1)
    problem = attack._problem(digits.model, image.expand(2, -1, -1, -1), label.expand(2), targets, None, None)
    states = Evolution(attack, problem).start()
    assert not torch.equal(states.vectors[0], states.vectors[1])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"pixels": 0}, "pixels=0"),
        ({"population": 3}, "needs 4"),
        ({"population": 5, "strategy": "rand2"}, "needs 6"),
        ({"generations": 0}, "generations=0"),
        ({"strategy": "rand9"}, "strategy='rand9'"),
        ({"bounds": "wrap"}, "bounds='wrap'"),
        ({"stop": "never"}, "stop='never'"),
        ({"outputs": "scores"}, "outputs='scores'"),
        ({"target_confidence": 1.0}, "target_confidence=1.0"),
        ({"true_confidence": 0.0}, "true_confidence=0.0"),
        ({"max_batch": 0}, "max_batch=0"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OnePixel(**wrong)


def test_bad_input(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:4], digits.labels[:4]
    with pytest.raises(UserError, match="65 pixels are to change"):
        OnePixel(pixels=65)(model, images, labels)
    targets = labels.clone()
    targets[::2] = (labels[::2] + 1) % 10
    with pytest.raises(UserError, match="images 1, 3 are their labels"):
        OnePixel()(model, images, labels, targets=targets)
    for wrong in (1, int(labels.max())):
        with pytest.raises(UserError, match=f"num_classes={wrong}"):
            OnePixel().run_all_targets(model, images, labels, num_classes=wrong)
    for run in (partial(OnePixel().run_all_targets, num_classes=10), OnePixel().run_without_target):
        with pytest.raises(UserError, match="checkpoint_every=0"):
            run(model, images, labels, checkpoint_every=0)
    with pytest.raises(UserError, match="99999 classes each need about"):
        OnePixel().run_all_targets(model, images, labels, num_classes=100_000)


# -- going on, stand-ins, all targets --------------------------------------------------------------------------------


def same(ours: Any, theirs: Any) -> bool:
    return all(
        torch.equal(getattr(ours, each.name), getattr(theirs, each.name))
        for each in fields(ours)
        if isinstance(getattr(ours, each.name), Tensor)
    )


@pytest.mark.parametrize("stop_after", [0, 3, 7])
def test_a_saved_evolution_goes_on_where_it_stopped(stop_after: int, digits: Trained, tmp_path: Path) -> None:
    attack = OnePixel(pixels=2, population=30, generations=8)
    problem = attack._problem(digits.model, digits.images[:12], digits.labels[:12], None, None, None)
    evolution = Evolution(attack, problem)
    whole = evolution.start()
    evolution.advance(whole)
    state = evolution.start()
    evolution.advance(state, stop_after)
    assert state.generation == stop_after
    torch.save(state.state_dict(), tmp_path / "state.pt")
    again = EvolutionState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    evolution.advance(again)
    assert same(again, whole)
    assert torch.equal(evolution.outcome(again).images, attack.perturb(problem).images)


def test_a_state_of_something_else_is_refused(digits: Trained) -> None:
    attack = OnePixel(**SMALL)
    problem = attack._problem(digits.model, digits.images[:4], digits.labels[:4], None, None, None)
    state = Evolution(attack, problem).start()
    with pytest.raises(UserError, match="other settings"):
        Evolution(OnePixel(**SMALL, f=0.6), problem).advance(state)
    other = attack._problem(digits.model, digits.images[1:5], digits.labels[1:5], None, None, None)
    with pytest.raises(UserError, match="other images"):
        Evolution(attack, other).advance(state)
    # more generations, and another split into forward passes, are the same evolution
    Evolution(OnePixel(**{**SMALL, "generations": 6, "max_batch": 7}), problem).advance(state)
    assert state.generation == 6


class Shifted(nn.Module):
    """A stand-in that errs: it takes nearly anything for class 0."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images)
        return torch.cat([logits[:, :1] + self.by, logits[:, 1:]], 1)


@pytest.mark.parametrize("stop", ["confidence", "label"])
def test_the_model_has_the_last_word_over_a_stand_in(stop: Any, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:40], digits.labels[:40]
    attack = OnePixel(pixels=2, population=40, generations=10, stop=stop)
    plain = attack.run(model, images, labels)
    for by in (0.5, 20.0):
        told = Counting(model)
        result = attack.run(told, images, labels, stand_in=Shifted(model, by), rounding=False)
        assert torch.equal(result.success, evaluate(model, result.images).argmax(1) != labels)
        assert told.images < 0.2 * int(result.queries.sum())  # the model only confirms
        if by < 1:
            assert result.success.sum() >= 0.8 * plain.success.sum()
    exact = attack.run(model, images, labels, stand_in=copy.deepcopy(model))
    assert torch.equal(exact.images, plain.images)
    assert torch.equal(exact.iterations, plain.iterations)


def pairs_by_run(attack: OnePixel, digits: Trained, count: int) -> dict[tuple[int, int], tuple[bool, Tensor]]:
    found = {}
    for row in range(count):
        for target in range(10):
            label = digits.labels[row : row + 1]
            if target != int(label):
                aimed = torch.tensor([target])
                result = attack.run(digits.model.double(), digits.images[row : row + 1].double(), label, targets=aimed)
                found[row, target] = (bool(result.success), result.images[0])
    return found


def test_all_targets_are_what_each_target_alone_gives(digits: Trained) -> None:
    attack = OnePixel(pixels=2, population=20, generations=5)
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:6].double(), digits.labels[:6]
    told: list[tuple[int, int]] = []
    found = attack.run_all_targets(
        model, images, labels, num_classes=10, progress=lambda done, total: told.append((done, total))
    )
    assert isinstance(found, PixelRuns)
    assert told == [(done, 5) for done in range(1, 6)]
    assert len(found.index) == 6 * 9
    assert (found.target != labels[found.index]).all()
    expected = pairs_by_run(attack, Trained(model, images, labels), 6)
    for row, (index, target) in enumerate(zip(found.index.tolist(), found.target.tolist(), strict=True)):
        success, image = expected[index, target]
        assert success == bool(found.success[row])
        torch.testing.assert_close(found.images[row], image, rtol=0, atol=1e-9)
    probabilities = evaluate(model, found.images).softmax(1)
    torch.testing.assert_close(found.goal_probability, probabilities.gather(1, found.target[:, None])[:, 0])
    assert torch.equal(found.predicted, probabilities.argmax(1))
    assert torch.equal(found.success, found.predicted == found.target)
    assert found.success.any()
    assert not found.success.all()


@pytest.mark.parametrize("with_stand_in", [False, True])
def test_a_killed_study_goes_on_from_its_checkpoint(with_stand_in: bool, digits: Trained, tmp_path: Path) -> None:
    attack = OnePixel(pixels=2, population=20, generations=9, stop="label")
    stand_in = accelerate(digits.model, dtype=torch.bfloat16) if with_stand_in else None
    given = {"num_classes": 10, "checkpoint_every": 3, "stand_in": stand_in}
    what = digits.model, digits.images[:10], digits.labels[:10]
    whole = attack.run_all_targets(*what, **given)

    def keep(state: EvolutionState) -> None:
        torch.save(state.state_dict(), tmp_path / "state.pt")
        if state.generation == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack.run_all_targets(*what, checkpoint=keep, **given)
    for _ in range(2):  # the second time there is nothing left to do
        state = EvolutionState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        found = attack.run_all_targets(*what, state=state, checkpoint=keep, **given)
        assert same(found, whole)
    assert found.success.any()
    assert torch.equal(found.predicted, evaluate(digits.model, found.images).argmax(1))


def test_pairs_at_their_target_to_begin_with_are_not_searched(digits: Trained) -> None:
    model, images = digits.model, digits.images[:5]
    labels = (evaluate(model, images).argmax(1) + 1) % 10
    found = OnePixel(**SMALL).run_all_targets(model, images, labels, num_classes=10)
    there = ~found.changed
    assert there.sum() == 5
    assert torch.equal(found.target[there], (labels - 1) % 10)
    assert found.success[there].all()
    assert torch.equal(found.images[there], images)
    assert not found.queries[there].any()


def test_an_average_over_randomness_reaches_the_evolution(digits: Trained) -> None:
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return digits.model(images + 0.1 * torch.randn_like(images))

    images, labels = digits.images[:10], digits.labels[:10]
    attack = EOT(attack=OnePixel(pixels=3, population=20, generations=3), samples=4)
    result = attack.run(Noisy(), images, labels)
    assert result.norms["l0"].max() <= 3
    assert bool((result.queries % 4 == 0).all())


def test_a_run_without_target_that_can_go_on_is_a_run(digits: Trained) -> None:
    attack = OnePixel(pixels=2, population=20, generations=6, stop="label")
    images, labels = digits.images[:10], digits.labels[:10]
    plain = attack.run(digits.model, images, labels)
    kept: list[dict[str, Any]] = []
    found = attack.run_without_target(
        digits.model, images, labels, checkpoint=lambda state: kept.append(state.state_dict()), checkpoint_every=2
    )
    again = attack.run_without_target(
        digits.model, images, labels, state=EvolutionState.from_state_dict(kept[0]), checkpoint_every=2
    )
    assert same(found, again)
    assert torch.equal(found.images, plain.images)
    assert torch.equal(found.success, plain.success)
    assert torch.equal(found.queries, plain.queries)
    assert found.success.any()
    assert (found.target == -1).all()
    logits = evaluate(digits.model, found.images)
    assert torch.equal(found.success, logits.argmax(1) != labels)
    torch.testing.assert_close(found.goal_probability, logits.softmax(1).gather(1, labels[:, None])[:, 0])
