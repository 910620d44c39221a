from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_robust.attacks import PGD
from lightning_robust.attacks.kl_pgd import KLPGD, NormalStartPGD
from lightning_robust.attacks.randomness import image_keys, mix_seed, normal
from lightning_robust.errors import UserError


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)).train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6,))


def start_of(images: torch.Tensor, seed: int, eps: float) -> torch.Tensor:
    noise = 0.001 * normal(image_keys(images, mix_seed(seed)), images.shape, images.dtype)
    return (images + noise.clamp(-eps, eps)).clamp(0, 1)


def plain_loop(model, images, loss, eps, step, steps, seed):
    """The published loop, written down once more without any of the package's machinery."""
    model.eval()
    points = start_of(images, seed, eps)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(points)), points)
        points = points.detach() + step * gradient.sign()
        points = points.clamp(images - eps, images + eps).clamp(0, 1)
    model.train()
    return points


def test_klpgd_follows_the_published_loop(model, batch):
    images, labels = batch
    attack = KLPGD(eps=0.031, step_size=0.007, steps=5, stop_at_success=False, seed=3)
    model.eval()
    clean = model(images).softmax(1).detach()
    expected = plain_loop(
        model, images, lambda z: F.kl_div(z.log_softmax(1), clean, reduction="sum"), 0.031, 0.007, 5, seed=3
    )
    torch.testing.assert_close(attack(model, images, labels), expected)


def test_normal_start_pgd_follows_the_published_loop(model, batch):
    images, labels = batch
    attack = NormalStartPGD(eps=0.031, step_size=0.007, steps=5, stop_at_success=False)
    expected = plain_loop(model, images, lambda z: F.cross_entropy(z, labels, reduction="sum"), 0.031, 0.007, 5, seed=0)
    torch.testing.assert_close(attack(model, images, labels), expected)


def test_start_has_the_asked_deviation_and_stays_in_the_ball(model):
    images, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(flat[1].weight)  # no gradient: the result is the start
    wide = KLPGD(eps=0.5, steps=1, sigma=0.01, stop_at_success=False)(flat, images, labels) - images
    assert 0.009 < wide.std() < 0.011
    narrow = KLPGD(eps=0.001, steps=1, sigma=0.01, stop_at_success=False)(flat, images, labels) - images
    assert narrow.abs().max() <= 0.001 + 1e-6


def test_divergence_rises_and_labels_play_no_part(model, batch):
    images, labels = batch
    attack = KLPGD(eps="8/255", step_size="2/255", stop_at_success=False)
    adversarial = attack(model, images, labels)
    assert torch.equal(adversarial, attack(model, images, (labels + 1) % 5))
    model.eval()
    clean = model(images).softmax(1)

    def divergence(points):
        return F.kl_div(model(points).log_softmax(1), clean, reduction="none").sum(1)

    assert (divergence(adversarial) > divergence(start_of(images, 0, 8 / 255))).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("stop", [True, False])
def test_promise(model, batch, norm, stop):
    images, labels = batch
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    eps = {"linf": 0.05, "l2": 0.5, "l1": 5.0}[norm]
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    attack = KLPGD(eps=eps, norm=norm, steps=3, stop_at_success=stop)
    result = attack.run(model, images, labels, mask=mask)
    assert result.norms[norm].max() <= eps + 1e-6
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert torch.equal(result.images[..., 4:], images[..., 4:])
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    if stop:
        model.eval()
        wrong = model(images).argmax(1) != labels
        assert torch.equal(result.images[wrong], images[wrong])
        assert torch.equal(result.success, model(result.images).argmax(1) != labels)


def test_independent_of_the_batch_and_repeatable(model, batch):
    images, labels = batch
    attack = KLPGD(steps=3, stop_at_success=False)
    together = attack(model, images, labels)
    torch.testing.assert_close(attack(model, images[2:3], labels[2:3]), together[2:3], rtol=0, atol=1e-6)
    assert torch.equal(attack(model, images, labels), together)
    assert not torch.equal(attack(model, images, labels, seed=1), together)


def test_queries_count_the_clean_pass(model, batch):
    images, labels = batch
    attack = KLPGD(steps=3, stop_at_success=False)
    with torch.no_grad():
        logits = model.eval()(images)
    assert attack.run(model, images, labels).queries.tolist() == [4] * 6
    assert attack.run(model, images, labels, clean_logits=logits).queries.tolist() == [3] * 6


def test_autocast_and_inference_mode(model, batch):
    images, labels = batch
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = KLPGD(steps=2)(model, images, labels)
    assert adversarial.dtype == torch.float32
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ce"}, "one loss 'kl'"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"random_start": False}, "starts from noise"),
        ({"restarts": 2}, "restarts=2"),
        ({"steps": 0}, "KLPGD: steps=0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        KLPGD(**settings)


def test_targets_are_refused(model, batch):
    images, labels = batch
    with pytest.raises(UserError, match="cannot aim at targets"):
        KLPGD()(model, images, labels, targets=(labels + 1) % 5)


def test_settings_survive_a_copy():
    attack = KLPGD(eps="4/255", steps=7)
    assert attack.replace(steps=7) == attack
    assert attack.loss == "kl"
    assert isinstance(attack, PGD)
