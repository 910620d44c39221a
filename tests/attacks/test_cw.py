"""CW in L2, L∞ and L0: the promise, its account, other implementations, and what it was made to break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Run, Setting, Trained, evaluate, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import EOT, accelerate
from lightning_robust.attacks.base import AttackResult, Problem
from lightning_robust.attacks.cw import CW
from lightning_robust.attacks.cw_hinge import Hinge
from lightning_robust.attacks.fab import FAB
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(3), 1)
COSTLY = {"compiled model", "DDP-wrapped model", "under bf16 autocast"}
QUICK = {"steps": 8, "binary_search_steps": 2, "initial_const": 1, "lr": 0.05}
NORMS = ("l2", "linf", "l0")


def bind(attack: CW, setting: Setting, **options: Any) -> Run:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        return attack.run(model, images, labels, targets=targets, mask=setting.mask, **options).images

    return run


CASES = {
    "l2": ("l2", torch.inf, False, None, 0.0),
    "l2-targeted-mask": ("l2", torch.inf, True, MASK, 0.0),
    "l2-budget-targeted": ("l2", 0.8, True, None, 0.0),
    "l2-confidence-mask": ("l2", torch.inf, False, MASK, 0.005),
    "linf": ("linf", torch.inf, False, None, 0.0),
    "linf-targeted-mask": ("linf", torch.inf, True, MASK, 0.0),
    "linf-budget-mask": ("linf", 0.1, False, MASK, 0.0),
    "l0": ("l0", torch.inf, False, None, 0.0),
    "l0-targeted-mask": ("l0", torch.inf, True, MASK, 0.0),
    "l0-budget": ("l0", 48, False, None, 0.0),
}


@pytest.mark.parametrize(("norm", "eps", "targeted", "mask", "confidence"), CASES.values(), ids=CASES)
def test_promise(norm: str, eps: float, targeted: bool, mask: Tensor | None, confidence: float) -> None:
    setting = Setting(norm, eps, mask, targeted)
    attack = CW(norm=norm, confidence=confidence, eps=None if eps == torch.inf else eps, **QUICK)
    broken = {}
    for name, check in CHECKS.items():
        if name in COSTLY:
            continue
        try:
            check(bind(attack, setting), setting)
        except AssertionError as error:
            broken[name] = str(error)
    assert not broken


@pytest.mark.parametrize("check", sorted(COSTLY))
@pytest.mark.parametrize("norm", NORMS)
def test_promise_around_the_model(norm: str, check: str) -> None:
    setting = Setting(norm, torch.inf, MASK)
    CHECKS[check](bind(CW(norm=norm, **QUICK), setting), setting)


# -- what is found -----------------------------------------------------------------------------------------------------


def mean_norm(result: AttackResult, norm: str) -> float:
    assert result.success.all()
    return float(result.norms[norm].mean())


@pytest.mark.parametrize("targeted", [False, True])
def test_l2_is_no_larger_than_foolboxs(digits: Trained, targeted: bool) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, images, labels = digits.model, digits.images[:100], digits.labels[:100]
    targets = (labels + 3) % 10
    settings = {"steps": 100, "binary_search_steps": 5, "initial_const": 0.1}
    theirs = foolbox.attacks.L2CarliniWagnerAttack(stepsize=0.01, **settings)
    criterion = foolbox.criteria.TargetedMisclassification(targets) if targeted else foolbox.Misclassification(labels)
    found = theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), images, criterion, epsilons=None)[1]
    reached = evaluate(model, found).argmax(1) == targets if targeted else evaluate(model, found).argmax(1) != labels
    result = CW(**settings).run(model, images, labels, targets=targets if targeted else None)
    assert result.success.all()
    both = reached & result.success
    size = (found - images).flatten(1).norm(dim=1)
    assert both.double().mean() > 0.5  # targeted, foolbox reaches about half of the targets within these steps
    assert float(result.norms["l2"][both].mean()) <= 1.02 * float(size[both].mean())


def test_l2_is_no_larger_than_torchattacks_at_its_constant(digits: Trained) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = digits.model, digits.images[:100], digits.labels[:100]
    found = torchattacks.CW(model, c=1, steps=100, lr=0.01)(images, labels)
    reached = evaluate(model, found).argmax(1) != labels
    result = CW(steps=100, binary_search_steps=1, initial_const=1).run(model, images, labels)
    assert bool((result.success | ~reached).all())
    size = (found - images).flatten(1).norm(dim=1)
    assert float(result.norms["l2"][reached].mean()) < float(size[reached].mean())


def _by_the_book(model: nn.Module, image: Tensor, label: Tensor, steps: int, rounds: int, const: float) -> float:
    """The L2 attack as the paper has it, one image at a time, without an end of a round before its last step."""
    start = (0.999999 * (2 * image - 1)).atanh()
    low, high, best = 0.0, float("inf"), float("inf")
    for _ in range(rounds):
        at = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([at], lr=0.01)
        found = False
        for _ in range(steps):
            point = (at.tanh() + 1) / 2
            logits = model(point)
            other = logits.scatter(1, label[:, None], -torch.inf).amax(1)
            hinge = (logits.gather(1, label[:, None])[:, 0] - other).clamp_min(0)
            norm = (point - image).square().sum()
            if int(logits.argmax(1)) != int(label):
                found, best = True, min(best, float(norm) ** 0.5)
            optimizer.zero_grad()
            (norm + const * hinge.sum()).backward()
            optimizer.step()
        low, high = (low, const) if found else (const, high)
        const = 10 * const if high == float("inf") else (low + high) / 2
    return best


def test_l2_finds_what_the_attack_by_the_book_finds(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:6], digits.labels[:6]
    book = [_by_the_book(model, images[i : i + 1], labels[i : i + 1], 200, 5, 0.1) for i in range(6)]
    settings = {"steps": 200, "binary_search_steps": 5, "initial_const": 0.1}
    result = CW(**settings).run(model, images, labels)
    assert mean_norm(result, "l2") <= 1.01 * float(np.mean(book))
    # black pixels move here and hardly there, so that it may find less, but not by far
    assert mean_norm(result, "l2") >= 0.7 * float(np.mean(book))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_is_near_what_fab_finds(digits: Trained, norm: str) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    fab = FAB(norm=norm, steps=60).run(model, images, labels)
    result = CW(norm=norm, steps=300, initial_const=0.01).run(model, images, labels)
    assert mean_norm(result, norm) <= {"l2": 1.02, "linf": 1.1}[norm] * mean_norm(fab, norm)


def _greedy(model: nn.Module, image: Tensor, label: int) -> int:
    """Fewest pixels by setting, one after the other, whichever pixel to black or white lowers the lead of the label."""
    image = image.clone()
    for count in range(image.numel()):
        if int(evaluate(model, image[None]).argmax(1)) != label:
            return count
        tries = image.expand(2 * image.numel(), *image.shape).clone()
        flat = tries.flatten(1)
        places = torch.arange(image.numel()).repeat(2)
        flat[torch.arange(len(flat)), places] = (torch.arange(len(flat)) >= image.numel()).float()
        logits = evaluate(model, flat.view_as(tries))
        lead = logits.clone().index_fill(1, torch.tensor(label), -torch.inf).amax(1) - logits[:, label]
        image = flat.view_as(tries)[int(lead.argmax())]
    return image.numel()


def test_l0_is_about_as_few_as_a_greedy_search_finds(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:30], digits.labels[:30]
    greedy = np.mean([_greedy(model, image, int(label)) for image, label in zip(images, labels, strict=True)])
    result = CW(norm="l0", steps=200).run(model, images, labels)
    assert mean_norm(result, "l0") <= 1.4 * float(greedy)  # which looks at every pixel in turn


def test_l0_counts_a_pixel_of_three_channels_once() -> None:
    model = make_model()
    images, labels = make_batch(model)
    result = CW(norm="l0", steps=60).run(model, images, labels)
    assert result.success.all()
    changed = (result.images != images).any(1).flatten(1).sum(1)
    assert torch.equal(result.norms["l0"].long(), changed)
    assert int(changed.max()) < 16
    assert bool(((result.images != images).flatten(1).sum(1) > changed).any())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_confidence_is_a_lead_that_success_has(digits: Trained, norm: str, targeted: bool) -> None:
    model, images, labels = digits.model, digits.images[:40], digits.labels[:40]
    right = evaluate(model, images).argmax(1) == labels
    images, labels = images[right], labels[right]
    targets = (labels + 1) % 10
    sizes = []
    for kappa in (0.0, 2.0):
        attack = CW(norm=norm, confidence=kappa, steps=100, binary_search_steps=5, initial_const=0.1)
        result = attack.run(model, images, labels, targets=targets if targeted else None)
        assert result.success.double().mean() > 0.95
        logits = evaluate(model, result.images)[result.success]
        goal = (targets if targeted else labels)[result.success, None]
        lead = logits.scatter(1, goal, -torch.inf).amax(1) - logits.gather(1, goal)[:, 0]
        assert float((-lead if targeted else lead).min()) >= kappa - 1e-4
        sizes.append(float(result.norms[norm][result.success].mean()))
    assert sizes[1] > sizes[0]


def test_success_is_what_the_model_says_and_failure_changes_nothing(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    for attack in (CW(steps=3, binary_search_steps=1), CW(steps=60, binary_search_steps=3), CW(eps=0.4, steps=60)):
        result = attack.run(model, images, labels)
        assert torch.equal(evaluate(model, result.images).argmax(1) != labels, result.success)
        assert torch.equal(result.images[~result.success], images[~result.success])
    within = result.success
    assert 0.1 < float(within.double().mean()) < 0.95
    assert float(result.norms["l2"][within].max()) <= 0.4 + 1e-6


def test_a_budget_is_kept_to_and_saves_steps(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    settings = {"steps": 100, "binary_search_steps": 5, "initial_const": 0.1}
    free = CW(**settings).run(model, images, labels)
    bound = float(free.norms["l2"].median())
    held = CW(eps=bound, **settings).run(model, images, labels)
    assert float((held.success == (free.norms["l2"] <= bound)).double().mean()) > 0.9
    assert int(held.queries.sum()) < 0.9 * int(free.queries.sum())


# -- what it was made to break -----------------------------------------------------------------------------------------


class _Scaled(nn.Module):
    """Logits a hundred times as large, as distillation at temperature 100 leaves them, and a log_softmax."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return (100 * self.inner(images)).log_softmax(1)


@pytest.mark.parametrize("norm", NORMS)
def test_logits_of_a_distilled_network_do_not_help(digits: Trained, norm: str) -> None:
    images, labels = digits.images[:40], digits.labels[:40]
    attack = CW(norm=norm, steps=150, binary_search_steps=7)
    plain = mean_norm(attack.run(digits.model, images, labels), norm)
    scaled = mean_norm(attack.run(_Scaled(digits.model).eval(), images, labels), norm)
    assert scaled <= 1.15 * plain


class _Noisy(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images + 0.05 * torch.randn_like(images))


@pytest.mark.parametrize("norm", NORMS)
def test_goes_by_the_mean_of_a_random_model(digits: Trained, norm: str) -> None:
    images, labels = digits.images[:20], digits.labels[:20]
    model = _Noisy(digits.model).eval()
    attack = EOT(attack=CW(norm=norm, confidence=1, steps=40, binary_search_steps=3, initial_const=1), samples=5)
    result = attack.run(model, images, labels)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        votes = torch.stack([model(result.images).argmax(1) != labels for _ in range(20)]).double().mean(0)
    assert float(votes.mean()) > 0.6


# -- its account -------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that pass through, those with gradient, and how many are different."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images, self.with_gradient = inner, 0, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        self.with_gradient += len(images) * images.requires_grad
        self.different.update(image.numpy().tobytes() for image in images.detach())
        return self.inner(images)


@pytest.mark.parametrize("known", [False, True], ids=["", "clean logits known"])
@pytest.mark.parametrize("norm", NORMS)
def test_queries_are_the_points_at_which_the_model_was_asked(digits: Trained, norm: str, known: bool) -> None:
    images, labels = digits.images[:16], digits.labels[:16]
    labels = torch.where(torch.arange(16) % 4 == 0, (labels + 1) % 10, labels)
    model = Counting(digits.model)
    logits = evaluate(digits.model, images) if known else None
    attack = CW(norm=norm, steps=30, binary_search_steps=3, initial_const=1)
    result = attack.run(model, images, labels, rounding=False, clean_logits=logits)
    queries = int(result.queries.sum())
    assert len(model.different) <= queries <= model.images <= 1.5 * queries
    wrong = evaluate(digits.model, images).argmax(1) != labels
    assert bool((result.queries[wrong] == (0 if known else 1)).all())
    assert not result.iterations[wrong].any()
    if norm == "l2":
        assert int(result.iterations.max()) <= 3 * 30
        # the clean image is looked at once, and each way back takes six
        assert int(result.queries.max()) <= 1 + 3 * 29 + 6


def test_a_hit_is_not_passed_back_through() -> None:
    """At a constant far too large nearly all points of the search are hits: few need a gradient, many no pass."""
    model = Counting(make_model().eval())
    images, labels = make_batch(model.inner, 16)
    attack = CW(steps=40, binary_search_steps=1, initial_const=100, abort_early=False)
    result = attack.run(model, images, labels, rounding=False)
    assert result.success.all()
    steps = int(result.iterations.sum())
    assert steps == 16 * 40
    assert model.images < 1.15 * int(result.queries.sum())
    assert model.images < 0.6 * steps
    assert model.with_gradient < 0.3 * steps


def test_the_hinge_and_its_gradient_are_what_autograd_says() -> None:
    model = make_model(torch.float64).eval()
    images, labels = make_batch(model, 8, torch.float64)
    keys = torch.zeros(8, dtype=torch.int64)
    hinge = Hinge(Problem(model=model, images=images, labels=labels, targets=None, mask=None, keys=keys), 0.1)
    rows = torch.tensor([0, 2, 3, 5, 7])
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(30):  # another point each time: what will be a hit is guessed wrongly, too
        noise = torch.rand(5, *SHAPE, generator=generator, dtype=torch.float64)
        points = noise.requires_grad_()
        logits = model(points)
        true = logits.gather(1, labels[rows, None])[:, 0]
        lead = logits.scatter(1, labels[rows, None], -torch.inf).amax(1) - true
        (gradient,) = torch.autograd.grad((0.1 - lead).clamp_min(0).sum(), points)
        value, slope, hit = hinge(points.detach(), rows)
        torch.testing.assert_close(value, 0.1 - lead.detach())  # of a hit: minus the room there is
        torch.testing.assert_close(slope, gradient)
        assert torch.equal(hit, lead >= 0.1)
        hits += int(hit.sum())
    assert 10 < hits < 140


def test_images_that_are_done_leave(digits: Trained) -> None:
    """Without an early end all images take all steps; with it most take far fewer, for about the same result."""
    model, images, labels = digits.model, digits.images[:40], digits.labels[:40]
    settings = {"steps": 200, "binary_search_steps": 5, "initial_const": 0.1}
    early = CW(**settings).run(model, images, labels)
    late = CW(abort_early=False, **settings).run(model, images, labels)
    assert int(late.iterations.max()) == 1000
    assert int(early.iterations.sum()) < 0.75 * int(late.iterations.sum())
    assert mean_norm(early, "l2") <= 1.03 * mean_norm(late, "l2")


def test_progress_goes_up_to_the_end(digits: Trained) -> None:
    seen: list[tuple[int, int]] = []
    attack = CW(steps=10, binary_search_steps=2, abort_early=False)
    attack.run(digits.model, digits.images[:4], digits.labels[:4], progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {20}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "CW: norm='l1': choose one of l2, linf, l0"),
        ({"confidence": -1}, "CW: confidence=-1.*0 or more"),
        ({"confidence": float("nan")}, "CW: confidence=nan"),
        ({"steps": 0}, "CW: steps=0: at least one step"),
        ({"binary_search_steps": 0}, "CW: binary_search_steps=0: at least one round"),
        ({"lr": 0.0}, "CW: lr=0.0 never moves"),
        ({"initial_const": 0}, "CW: initial_const=0.*begin above 0"),
        ({"eps": "many"}, "eps='many' is not a number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CW(**settings)


class _Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([(images.flatten(1).sum(1) * 0).sqrt(), images.flatten(1).sum(1) * 0 - 1], dim=1)


def test_a_gradient_that_is_not_finite_is_no_robustness() -> None:
    with pytest.raises(UserError, match="gradient is NaN"):
        CW()(_Broken(), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))


# -- faster stand-ins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_stand_in_loses_no_success(digits: Trained, dtype: torch.dtype | None) -> None:
    """In bfloat16 points lie on the wrong side of the boundary, and such images are searched again on the model."""
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    settings = {"steps": 60, "binary_search_steps": 3, "initial_const": 1}
    plain = CW(**settings).run(model, images, labels)
    result = CW(**settings).run(model, images, labels, stand_in=accelerate(model, dtype=dtype))
    assert torch.equal(evaluate(model, result.images).argmax(1) != labels, result.success)
    assert bool((result.success | ~plain.success).all())
    assert mean_norm(result, "l2") <= 1.1 * mean_norm(plain, "l2")


# -- published networks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("cifar", {"steps": 100, "binary_search_steps": 5, "initial_const": 0.01}),
        ("mnist", {"steps": 300, "binary_search_steps": 6, "initial_const": 0.01}),
    ],
)
def test_on_published_networks_l2_is_no_larger_than_foolboxs(
    network: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, images, labels = request.getfixturevalue(network)
    theirs = foolbox.attacks.L2CarliniWagnerAttack(stepsize=0.01, **settings)
    found = theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=None)[1]
    reached = evaluate(model, found).argmax(1) != labels
    result = CW(**settings).run(model, images, labels)
    assert result.success[reached].all()  # so that the mean norm is over the same images, none of them unchanged
    size = (found - images).flatten(1).norm(dim=1)
    assert float(result.norms["l2"][reached].mean()) <= 1.02 * float(size[reached].mean())


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("network", ["cifar", "mnist"])
def test_on_published_networks_linf_is_near_what_fab_finds(network: str, request: pytest.FixtureRequest) -> None:
    model, images, labels = (
        part[:32] if isinstance(part, Tensor) else part for part in request.getfixturevalue(network)
    )
    fab = FAB(norm="linf").run(model, images, labels)
    result = CW(norm="linf", steps=300).run(model, images, labels)
    assert mean_norm(result, "linf") <= 1.2 * mean_norm(fab, "linf")


@pytest.mark.real_data
def test_bfloat16_loses_no_success_on_a_published_network(cifar: Trained) -> None:
    model, images, labels = cifar.model, cifar.images[:24], cifar.labels[:24]
    attack = CW(steps=50, binary_search_steps=1, initial_const=1)
    plain = attack.run(model, images, labels)
    result = attack.run(model, images, labels, stand_in=accelerate(model, dtype=torch.bfloat16))
    assert torch.equal(result.success, plain.success)
    assert torch.equal(evaluate(model, result.images).argmax(1) != labels, result.success)
