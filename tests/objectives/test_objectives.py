"""What holds for every objective."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_robust.attacks import APGD, FGSM, PGD, accelerate
from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.projection import norms
from lightning_robust.errors import UserError
from lightning_robust.objectives import (
    AWP,
    MART,
    TRADES,
    CatastrophicOverfitting,
    FastFGSM,
    Natural,
    Objective,
    Perturbed,
    PGDAdversarial,
)

PGD3 = PGD(eps="8/255", step_size="4/255", steps=3)
ALL = {
    "natural": Natural(label_smoothing=0.1),
    "pgd": PGDAdversarial(attack=PGD3),
    "pgd+clean": PGDAdversarial(attack=PGD3, clean_weight=0.5),
    "apgd": PGDAdversarial(attack=APGD(norm="l2", eps=0.5, steps=3)),
    "fast": FastFGSM(),
    "trades": TRADES(steps=3),
    "mart": MART(steps=3),
}
TRAIN_FORWARDS = {"natural": 1, "pgd": 1, "pgd+clean": 2, "apgd": 1, "fast": 1, "trades": 2, "mart": 2}
every_objective = pytest.mark.parametrize("name", ALL)


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_natural_formula(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    output = Natural(label_smoothing=0.2)(net, images, labels, seed=0)
    logits = twin(images)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, label_smoothing=0.2))
    torch.testing.assert_close(output.logits, logits.detach())
    assert output.images_adv is None
    assert output.clean_gradient is None
    assert output.restore is None


def test_pgd_formula(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    output = PGDAdversarial(attack=PGD3, clean_weight=0.25, label_smoothing=0.1)(net, images, labels, seed=5)
    moved = PGD3.replace(stop_at_success=False)(twin, images, labels, seed=5)
    assert torch.equal(output.images_adv, moved)
    clean, logits = twin(images), twin(moved)
    expected = 0.75 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected = expected + 0.25 * F.cross_entropy(clean, labels, label_smoothing=0.1)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, logits.detach())
    torch.testing.assert_close(output.clean_logits, clean.detach())


def test_fast_formula(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    output = FastFGSM(eps="4/255")(net, images, labels, seed=5)
    step = FGSM(eps="4/255", step_size=5 / 255, random_start=True, stop_at_success=False)
    moved = step(twin, images, labels, seed=5)
    torch.testing.assert_close(output.images_adv, moved)
    torch.testing.assert_close(output.loss, F.cross_entropy(twin(moved), labels))


def test_trades_formula(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    output = TRADES(beta=3.0, steps=2)(net, images, labels, seed=5)
    clean, logits = twin(images), twin(output.images_adv)
    divergence = F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(clean, labels) + 3.0 * divergence
    torch.testing.assert_close(output.loss, expected)
    gradients = torch.autograd.grad(output.loss, list(net.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(twin.parameters())), rtol=1e-4, atol=1e-6)


def test_mart_formula(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    output = MART(beta=3.0, steps=2)(net, images, labels, seed=5)
    clean, logits = twin(images), twin(output.images_adv)
    p, q = clean.softmax(1), logits.softmax(1)
    rows = []
    for row, label in enumerate(labels.tolist()):
        wrong = max(q[row, k] for k in range(3) if k != label)
        divergence = sum(p[row, k] * (p[row, k] / q[row, k]).log() for k in range(3))
        rows.append(-q[row, label].log() - (1.0001 - wrong).log() + 3.0 * divergence * (1 - p[row, label]))
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(output.loss, expected)
    gradients = torch.autograd.grad(output.loss, list(net.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(twin.parameters())), rtol=1e-3, atol=1e-5)


# -- the contract ------------------------------------------------------------------------------------------------------


@every_objective
def test_output_shapes(net, batch, name):
    images, labels = batch
    output = ALL[name](net, images, labels, seed=0)
    assert output.loss.shape == ()
    assert output.logits.shape == (8, 3)
    assert not output.logits.requires_grad
    if ALL[name].attack is None:
        assert ALL[name].threat_model is None
        assert output.images_adv is None
    else:
        assert not output.images_adv.requires_grad
        moved = norms(output.images_adv - images, ALL[name].threat_model.norm).max()
        assert 0 < moved <= ALL[name].threat_model.radius + 1e-6


@every_objective
def test_perturb_leaves_the_network_alone(net, batch, name):
    images, labels = batch
    net.norm.eval()  # a layer that the user froze
    before, random_state, given = state_of(net), torch.get_rng_state(), images.clone()
    ALL[name].perturb(net, images, labels, seed=0)
    assert [m.training for m in (net, net.conv, net.norm, net.head)] == [True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, given)


@pytest.mark.parametrize("awp", [None, AWP(gamma=0.01)])
@every_objective
def test_statistics_move_by_the_train_forwards_alone(net, batch, name, awp):
    images, labels = batch
    objective = type(ALL[name])(**{**vars(ALL[name]), "awp": awp})
    ALL[name](net, images, labels, seed=0)
    assert net.norm.num_batches_tracked == TRAIN_FORWARDS[name]
    output = objective(net, images, labels, seed=1)
    assert net.norm.num_batches_tracked == 2 * TRAIN_FORWARDS[name]
    if output.restore is not None:
        output.restore()


@every_objective
def test_backward_reaches_every_parameter(net, batch, name):
    images, labels = batch
    ALL[name](net, images, labels, seed=0).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n != "conv.bias")


@every_objective
def test_a_step_lowers_the_loss(net, batch, name):
    images, labels = batch
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    perturbed = ALL[name].perturb(net, images, labels, seed=0)
    before = ALL[name].loss(net, images, labels, perturbed)
    before.loss.backward()
    optimizer.step()
    assert ALL[name].loss(net, images, labels, perturbed).loss < before.loss


@every_objective
def test_same_seed_same_step_and_another_seed_another(net, batch, name):
    images, labels = batch
    first, second, other = (ALL[name](copy.deepcopy(net), images, labels, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.loss, second.loss)
    if ALL[name].attack is not None:
        assert torch.equal(first.images_adv, second.images_adv)
        assert not torch.equal(first.images_adv, other.images_adv)


@pytest.mark.parametrize("name", [name for name in ALL if name != "natural"])
def test_images_do_not_depend_on_their_neighbours(net, batch, name):
    images, labels = batch
    together = ALL[name].perturb(net, images, labels, seed=1).images
    order = torch.tensor([5, 2])
    apart = ALL[name].perturb(net, images[order], labels[order], seed=1).images
    torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != "natural"])
def test_mask_is_kept(net, batch, name):
    images, labels = batch
    mask = torch.zeros(8, 1, 8, 8)
    mask[:, :, :3] = 1
    output = ALL[name](net, images, labels, seed=0, mask=mask)
    assert torch.equal(output.images_adv[:, :, 3:], images[:, :, 3:])
    assert not torch.equal(output.images_adv[:, :, :3], images[:, :, :3])


@every_objective
def test_autocast(net, batch, name):
    images, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ALL[name](net, images, labels, seed=0)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    if output.images_adv is not None:
        assert output.images_adv.dtype == torch.float32
        assert (
            norms(output.images_adv - images, ALL[name].threat_model.norm).max() <= ALL[name].threat_model.radius + 1e-6
        )


@pytest.mark.parametrize("name", [name for name in ALL if name != "natural"])
def test_the_attack_runs_on_the_stand_in_and_the_loss_on_the_network(net, batch, name):
    images, labels = batch
    net(images)  # statistics that folding has something to do with
    stand_in = accelerate(net)
    net.passes = 0
    output = ALL[name](net, images, labels, seed=0, stand_in=stand_in)
    assert net.passes == TRAIN_FORWARDS[name]
    assert output.loss.requires_grad


@every_objective
def test_no_grad_is_fine(net, batch, name):
    images, labels = batch
    objective = type(ALL[name])(**{**vars(ALL[name]), "awp": AWP()})
    with torch.no_grad():
        output = objective(net.eval(), images, labels, seed=0)
    assert output.restore is None
    assert not output.loss.requires_grad


@pytest.mark.parametrize("name", [name for name in ALL if name != "natural"])
def test_loss_without_images_says_so(net, batch, name):
    with pytest.raises(UserError, match="perturb"):
        ALL[name].loss(net, *batch, Perturbed())


# -- settings of single objectives -------------------------------------------------------------------------------------


def test_default_attack_is_madrys():
    attack = PGDAdversarial().attack
    assert attack == PGD(eps="8/255", step_size="2/255", steps=10, stop_at_success=False)


def test_the_objective_decides_when_the_attack_stops(net, batch):
    images, labels = batch
    assert PGDAdversarial(attack=PGD(stop_at_success=True)).attack.stop_at_success is False
    lazy = PGDAdversarial(attack=PGD3, stop_at_success=True)
    wrong = net.eval()(images).argmax(1) != labels
    assert wrong.any()
    moved = lazy.perturb(net, images, labels, seed=0).images
    assert torch.equal(moved[wrong], images[wrong])
    eager = PGDAdversarial(attack=PGD3).perturb(net, images, labels, seed=0).images
    assert (eager != images).flatten(1).any(1).all()


def test_clean_gradient_is_free_and_right(net, batch):
    images, labels = batch
    net(images)
    objective = PGDAdversarial(attack=FGSM(eps="8/255", steps=2))
    net.passes = 0
    output = objective(net, images, labels, seed=0)
    assert net.passes == 2 + 1
    net.eval()
    points = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(net(points), labels, reduction="sum"), points)
    # the statistics have moved by the train forward since: take the gradient at those before
    fresh = PGDAdversarial(attack=FGSM(eps="8/255")).perturb(net, images, labels, seed=0)
    torch.testing.assert_close(fresh.clean_gradient, expected)
    assert output.clean_gradient.shape == images.shape


@pytest.mark.parametrize(
    ("attack", "mask"),
    [(PGD3, None), (FGSM(loss="margin"), None), (FGSM(), torch.ones(8, 8))],
    ids=["random start", "another loss", "mask"],
)
def test_no_clean_gradient_where_it_would_be_another_one(net, batch, attack: Attack, mask):
    assert PGDAdversarial(attack=attack).perturb(net, *batch, seed=0, mask=mask).clean_gradient is None


def test_fast_step_and_check_attack():
    fast = FastFGSM(eps="8/255")
    assert fast.attack.length == pytest.approx(10 / 255)
    assert fast.attack.random_start
    assert FastFGSM(step_size="7/255").attack.length == pytest.approx(7 / 255)
    assert (fast.check_attack.steps, fast.check_attack.length) == (5, pytest.approx(2 / 255))


def test_catastrophic_overfitting():
    alarm = CatastrophicOverfitting(drop=0.2)
    assert [alarm.update(value) for value in (0.1, 0.5, 0.31, 0.05)] == [False, False, False, True]
    resumed = CatastrophicOverfitting(drop=0.2)
    resumed.load_state_dict({"last": 0.5})
    assert resumed.update(0.2)
    assert resumed.state_dict() == {"last": 0.2}
    with pytest.raises(UserError, match=r"robust_accuracy=31"):
        alarm.update(31)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Natural(label_smoothing=1.0), "Natural: label_smoothing=1.0"),
        (lambda: PGDAdversarial(clean_weight=-0.1), "clean_weight=-0.1"),
        (lambda: PGDAdversarial(attack="pgd"), "attack='pgd' is not an attack"),
        (lambda: FastFGSM(drop=20), "drop=20"),
        (lambda: FastFGSM(eps=8), "did you mean 8/255"),
        (lambda: FastFGSM(eps=0), "eps=0"),
        (lambda: FastFGSM(norm="l3"), "norm='l3'"),
        (lambda: TRADES(beta=-1), "TRADES: beta=-1"),
        (lambda: TRADES(steps=0), "steps=0"),
        (lambda: MART(beta=float("nan")), "MART: beta=nan"),
        (lambda: MART(step_size=0), "step_size=0"),
    ],
)
def test_bad_settings_are_refused_at_once(make, message):
    with pytest.raises(UserError, match=message):
        make()


# -- it makes networks robust ------------------------------------------------------------------------------------------


def two_classes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A strong weak-signal set: many faint pixels tell the classes apart, and so does one plain one.

    The sum of the faint pixels is the better feature on clean images and is worth nothing once each can be moved by ε;
    the plain pixel errs now and then and survives the attack.
    """
    labels = torch.randint(0, 2, (count,), generator=generator)
    sign = (2 * labels - 1).float()[:, None]
    faint = 0.5 + 0.03 * sign + 0.05 * torch.randn(count, 63, generator=generator)
    honest = torch.where(torch.rand(count, 1, generator=generator) < 0.9, sign, -sign)
    images = torch.cat([0.5 + 0.4 * honest, faint], 1).clamp(0, 1)
    return images.view(count, 1, 8, 8), labels


def robust_accuracy(objective: Objective) -> float:
    generator = torch.Generator().manual_seed(0)
    images, labels = two_classes(512, generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(200):
        rows = torch.randint(0, 512, (64,), generator=generator)
        output = objective(net, images[rows], labels[rows], seed=step)
        optimizer.zero_grad()
        output.loss.backward()
        if output.restore is not None:
            output.restore()
        optimizer.step()
    images, labels = two_classes(256, generator)
    result = PGD(eps=0.1, steps=10).run(net, images, labels, rounding=False)
    return 1 - result.success.float().mean().item()


def test_adversarial_training_raises_robust_accuracy():
    natural = robust_accuracy(Natural())
    attack = PGD(eps=0.1, step_size=0.03, steps=5)
    for objective in (
        PGDAdversarial(attack=attack),
        PGDAdversarial(attack=attack, awp=AWP(gamma=0.01)),
        FastFGSM(eps=0.1),
        TRADES(eps=0.1, step_size=0.03, steps=5),
        MART(eps=0.1, step_size=0.03, steps=5),
    ):
        assert robust_accuracy(objective) > natural + 0.3, objective
