"""EOT, BPDA, temperature and transfer: each undoes the defense that it is made against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from conformance import CHECKS, Setting, Trained
from test_conformance import COSTLY, bind
from torch import Tensor, nn

from lightning_robust.attacks import BPDA, EOT, PGD, Randomized, Temperature, Transfer
from lightning_robust.attacks.base import Problem
from lightning_robust.attacks.losses import cross_entropy, scaled_cross_entropy
from lightning_robust.errors import UserError


class Shifted(nn.Module):
    """A classifier behind a random shift of one pixel, drawn from torch's global generator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        row, column = (int(v) for v in torch.randint(-1, 2, (2,)))
        return self.model(images.roll((row, column), (2, 3)))


class Enumerated(Shifted):
    """The same, saying what its nine outcomes are."""

    def draws(self, samples: int) -> Sequence[Callable[[Tensor], Tensor]]:
        shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
        return [lambda images, by=by: self.model(images.roll(by, (2, 3))) for by in shifts[:samples]]


class Noisy(nn.Module):
    """Adds noise from torch's generator to its input."""

    def __init__(self, inner: nn.Module, scale: float = 0.2) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images + self.scale * torch.randn_like(images))


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Cross-entropy over all nine shifts: what an attacker wants to raise who does not know the draw."""
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    with torch.no_grad():
        return float(torch.stack([cross_entropy(model(images.roll(by, (2, 3))), labels) for by in shifts]).mean())


@pytest.mark.parametrize("defense", [Shifted, Enumerated])
def test_eot_raises_the_expected_loss_more_than_an_attack_on_the_model_alone_does(
    digits: Trained, defense: Callable[[nn.Module], nn.Module]
) -> None:
    images, labels = digits.images[:64], digits.labels[:64]
    attack = PGD(eps=0.15, steps=10, random_start=False, stop_at_success=False)
    plain = mean_loss(digits.model, attack(digits.model, images, labels), labels)
    found = EOT(attack=attack, samples=9)(defense(digits.model), images, labels)
    assert float((found - images).abs().max()) <= 0.15 + 1e-6
    assert mean_loss(digits.model, found, labels) > 1.3 * plain


def test_the_average_is_over_exactly_the_draws(digits: Trained) -> None:
    images, labels = digits.images[:5].double(), digits.labels[:5]
    model = Enumerated(digits.model).double()
    assert isinstance(model, Randomized)
    rows = torch.arange(5)
    problem = Problem(
        model, images, labels, None, None, torch.zeros(5, dtype=torch.int64), draws=lambda: model.draws(9)
    )
    value, gradient, logits = problem.loss_and_gradient(images, rows, lambda z, r: cross_entropy(z, labels[r]))
    single = [
        Problem(draw, images, labels, None, None, problem.keys).loss_and_gradient(
            images, rows, lambda z, r: cross_entropy(z, labels[r])
        )
        for draw in model.draws(9)
    ]
    torch.testing.assert_close(value, torch.stack([s[0] for s in single]).mean(0))
    torch.testing.assert_close(gradient, torch.stack([s[1] for s in single]).mean(0))
    torch.testing.assert_close(logits.exp(), torch.stack([s[2].softmax(1) for s in single]).mean(0))
    digits.model.float()


def test_eot_counts_its_queries_and_leaves_the_random_state(digits: Trained) -> None:
    images, labels = digits.images[:4], digits.labels[:4]
    attack = PGD(eps=0.05, steps=3, random_start=False, stop_at_success=False)
    before = torch.get_rng_state()
    found = EOT(attack=attack, samples=5).run(Noisy(digits.model), images, labels, rounding=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = EOT(attack=attack, samples=5).run(Noisy(digits.model), images, labels, rounding=False)
    assert torch.equal(found.images, again.images)
    assert torch.equal(found.success, again.success)  # also the verdict's one draw is of the seed
    assert found.queries.tolist() == [15] * 4


def test_eot_goes_on_past_the_boundary_of_the_mean(digits: Trained) -> None:
    """Where it stopped there, half of the draws would still get the image right."""
    images, labels, model = digits.images[:64], digits.labels[:64], Noisy(digits.model)
    attack = PGD(eps=0.12, steps=20, random_start=False)
    assert attack.stop_at_success
    found = EOT(attack=attack, samples=16)(model, images, labels)
    stopped = EOT(attack=attack.replace(stop_at_success=False), samples=16)(model, images, labels)
    assert torch.equal(found, stopped)

    def fooled(x: Tensor) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float(torch.stack([model(x).argmax(1) != labels for _ in range(50)]).double().mean())

    assert fooled(found) > fooled(attack(digits.model, images, labels)) + 0.1


def test_transfer_goes_on_past_the_surrogates_boundary(digits: Trained) -> None:
    images, labels = digits.images[:8], digits.labels[:8]
    attack = PGD(eps=0.15, steps=5, random_start=False)
    found = Transfer(attack=attack, surrogate=digits.model)(Noisy(digits.model, 0), images, labels)
    assert torch.equal(found, attack.replace(stop_at_success=False)(digits.model, images, labels))
    both = Transfer(attack=EOT(attack=attack), surrogate=digits.model).to_the_end()
    assert both.attack.attack.stop_at_success is False


def test_settings_reach_the_inner_attack() -> None:
    attack = EOT(attack=PGD(eps="8/255", steps=4)).replace(eps="4/255", samples=7)
    assert attack.threat_model.radius == 4 / 255
    assert (attack.samples, attack.attack.steps) == (7, 4)


@pytest.mark.parametrize("stop", [False, True])
def test_wrapped_attacks_keep_the_promise(digits: Trained, stop: bool) -> None:
    inner = PGD(eps=0.05, steps=3, stop_at_success=stop)
    broken = {}
    for name, check in CHECKS.items():
        if name in COSTLY:
            continue
        try:
            check(bind(EOT(attack=inner, samples=2), Setting(stop_at_success=stop, eps=0.05)), Setting(eps=0.05))
        except AssertionError as error:
            broken[name] = str(error)
    # it goes on to the last step
    assert set(broken) <= {"misclassified images unchanged", "initial success not lost"}, broken


def test_bpda_is_the_operation_forward_and_the_surrogate_backward() -> None:
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    coarse = BPDA(lambda x: (x * 3).round() / 3)
    assert torch.equal(coarse(images), (images * 3).round() / 3)
    (gradient,) = torch.autograd.grad((coarse(images) * 2).sum(), images)
    assert torch.equal(gradient, torch.full_like(images, 2))
    squared = BPDA(lambda x: (x * 3).round() / 3, surrogate=lambda x: x.square())
    (gradient,) = torch.autograd.grad(squared(images).sum(), images)
    torch.testing.assert_close(gradient, 2 * images.detach())
    with torch.no_grad():
        assert torch.equal(coarse(images), (images * 3).round() / 3)


def test_bpda_sees_through_a_rounding_that_hides_the_gradient(digits: Trained) -> None:
    images, labels = digits.images[:64], digits.labels[:64]

    def coarse(x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return digits.model(coarse(x))

    attack = PGD(eps=0.2, steps=20, random_start=False)
    hidden = attack.run(Hidden(), images, labels).success
    through = Transfer(attack=attack, surrogate=nn.Sequential(BPDA(coarse), digits.model)).run(Hidden(), images, labels)
    assert float(hidden.float().mean()) < 0.2  # round has a gradient of zero
    assert float(through.success.float().mean()) > float(hidden.float().mean()) + 0.4


def test_bpda_refuses_a_surrogate_of_another_shape() -> None:
    wrong = BPDA(lambda x: x, surrogate=lambda x: x[:, :, :2])
    with pytest.raises(UserError, match="alike"):
        wrong(torch.rand(1, 1, 4, 4, requires_grad=True))


def test_scaled_losses_attack_a_net_whose_softmax_is_saturated(digits: Trained) -> None:
    images, labels = digits.images[:64], digits.labels[:64]
    loud = Temperature(digits.model, 1e-3)  # logits a thousand times as large, as training at T = 1000 makes them
    with torch.no_grad():
        right = (digits.model(images).argmax(1) == labels).float().mean()
        assert torch.equal(loud(images).argmax(1), digits.model(images).argmax(1))

    def robust(model: nn.Module, loss: str) -> float:
        attack = PGD(eps=0.12, steps=20, random_start=False, loss=loss)
        return 1 - float(attack.run(model, images, labels).success.float().mean())

    quiet = robust(digits.model, "ce")
    assert robust(loud, "ce") > quiet + 0.2  # gradient masking: it looks robust
    assert robust(loud, "ce_scaled") <= quiet + 0.05
    assert robust(loud, "dlr") <= quiet + 0.05
    assert robust(Temperature(loud, 1000), "ce") == pytest.approx(quiet, abs=0.02)
    assert quiet < float(right)


def test_scaled_cross_entropy_does_not_depend_on_the_scale_of_logits() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    for scale in (1e-3, 1.0, 1e4):
        torch.testing.assert_close(
            scaled_cross_entropy(logits * scale, labels), scaled_cross_entropy(logits, labels), rtol=1e-9, atol=1e-9
        )
    spread = logits.amax(1) - logits.amin(1)
    torch.testing.assert_close(
        scaled_cross_entropy(logits, labels), cross_entropy(logits * (10 / spread)[:, None], labels)
    )
    assert scaled_cross_entropy(torch.zeros(2, 5), labels[:2]).tolist() == pytest.approx([math.log(5)] * 2)


def test_transfer_asks_the_model_under_test_once(digits: Trained) -> None:
    images, labels = digits.images[:16], digits.labels[:16].clone()
    with torch.no_grad():
        labels[0] = (digits.model(images[:1]).argmax(1) + 1) % 10  # wrong already
    calls = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        return digits.model(x)

    attack = PGD(eps=0.15, steps=10, random_start=False)
    result = Transfer(attack=attack, surrogate=digits.model).run(counting, images, labels, rounding=False)
    assert calls == [16, 16]  # clean, and the judgement
    assert result.queries.tolist() == [1] * 16
    assert torch.equal(result.images[0], images[0])
    direct = attack.replace(stop_at_success=False)(digits.model, images[1:], labels[1:])
    torch.testing.assert_close(result.images[1:], direct)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EOT(attack=PGD(), samples=0), "samples=0"),
        (lambda: Temperature(nn.Identity(), 0), "temperature=0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_probabilities_are_warned_of_once_they_are_attacked(digits: Trained) -> None:
    ends_in_softmax = nn.Sequential(digits.model, nn.Softmax(1))
    with pytest.warns(UserWarning, match="look like probabilities"):
        PGD(eps=0.1, steps=2)(ends_in_softmax, digits.images[:3], digits.labels[:3])
