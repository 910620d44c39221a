from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.objectives import AWP, TRADES, Natural


def test_shift_by_hand(net, batch):
    images, labels = batch
    twin = copy.deepcopy(net)
    gradients = torch.autograd.grad(F.cross_entropy(twin(images), labels), [twin.conv.weight, twin.head.weight])
    restore = AWP(gamma=0.02).perturb_weights(net, lambda model: F.cross_entropy(model(images), labels))
    for moved, weight, gradient in zip(
        [net.conv.weight, net.head.weight], [twin.conv.weight, twin.head.weight], gradients, strict=True
    ):
        torch.testing.assert_close(moved, weight + 0.02 * weight.norm() * gradient / gradient.norm())
    for name in ("conv.bias", "norm.weight", "norm.bias", "head.bias"):
        assert torch.equal(net.get_parameter(name), twin.get_parameter(name))
    restore()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_additional_pass_leaves_no_trace(net, batch):
    images, labels = batch
    net.drop.p = 0.5
    net.norm.register_buffer("empty", None)
    buffers = {name: (value, value.clone()) for name, value in net.named_buffers()}
    random_state = torch.get_rng_state()
    restore = AWP().perturb_weights(net, lambda model: F.cross_entropy(model(images), labels))
    for name, value in net.named_buffers():
        assert value is buffers[name][0]
        assert torch.equal(value, buffers[name][1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.parameters())
    restore()


def test_backward_at_the_shifted_weights_and_exact_restore(net, batch):
    images, labels = batch
    before = [p.detach().clone() for p in net.parameters()]
    output = Natural(awp=AWP(gamma=0.05))(net, images, labels, seed=0)
    assert not torch.equal(net.conv.weight, before[0])
    output.loss.backward()  # raises if autograd sees weights changed since the forward pass
    shifted = copy.deepcopy(net)
    shifted.norm.reset_running_stats()
    shifted.zero_grad()
    F.cross_entropy(shifted(images), labels).backward()
    for p, q in zip(net.parameters(), shifted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    output.restore()
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), before, strict=True))
    with torch.no_grad():
        net.conv.weight.add_(1)
    output.restore()  # a second call must not undo the optimizer's step
    assert torch.equal(net.conv.weight, before[0] + 1)


def test_the_shift_raises_the_loss(net, batch):
    images, labels = batch
    for objective in (Natural(awp=AWP(gamma=0.02)), TRADES(steps=2, awp=AWP(gamma=0.02))):
        plain = type(objective)(**{**vars(objective), "awp": None})
        shifted = objective(net, images, labels, seed=0)
        shifted.restore()
        assert shifted.loss > plain(net, images, labels, seed=0).loss


def test_autocast_uses_the_shifted_weights(net, batch):
    images, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = Natural()(net, images, labels, seed=0)
        shifted = Natural(awp=AWP(gamma=0.2))(net, images, labels, seed=0)
        assert shifted.loss > plain.loss + 0.1  # weights that autocast had kept would give the same loss
        shifted.restore()
        again = Natural()(net, images, labels, seed=0)
    assert torch.equal(again.loss, plain.loss)


def test_warm_up(net, batch):
    objective = Natural(awp=AWP(warmup_epochs=2))
    assert objective(net, *batch, seed=0, epoch=1).restore is None
    output = objective(net, *batch, seed=0, epoch=2)
    assert output.restore is not None
    output.restore()


def test_frozen_and_unused_weights_stay(net, batch):
    images, labels = batch
    net.conv.requires_grad_(False)
    net.spare = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    restore = AWP().perturb_weights(net, lambda model: F.cross_entropy(model(images), labels))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.weight"}
    restore()


def test_a_gradient_that_overflows_leaves_its_weight(net):
    before = net.conv.weight.detach().clone()
    restore = AWP().perturb_weights(net, lambda model: model.conv.weight.sum() * 1e38)
    assert torch.equal(net.conv.weight, before)
    restore()


def test_weights_come_back_when_the_loss_fails(net, batch):
    def fails(module, arguments):
        if net.passes == 1:
            raise RuntimeError("out of memory")

    net.register_forward_pre_hook(fails)
    before = net.head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        Natural(awp=AWP())(net, *batch, seed=0)
    assert torch.equal(net.head.weight, before)


def test_errors(net, batch):
    for settings in ({"gamma": 0}, {"gamma": -1}, {"gamma": 2}, {"warmup_epochs": -1}):
        with pytest.raises(UserError, match="AWP"):
            AWP(**settings)
    with pytest.raises(UserError, match="unfreeze"):
        AWP().perturb_weights(net.requires_grad_(False), lambda model: model(batch[0]).sum())
    with pytest.raises(UserError, match=r"nn\.Module"):
        AWP().perturb_weights(lambda images: images, lambda model: model(batch[0]).sum())


# -- two processes -----------------------------------------------------------------------------------------------------


def make_net() -> nn.Module:
    torch.manual_seed(0)
    # no BatchNorm: its batch statistics are a rank's own, with or without AWP
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double().train()


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    objective = TRADES(steps=2, awp=AWP(gamma=0.05))
    inner = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    shifts = []
    for step in range(3):
        optimizer.zero_grad()
        # the wrapper's forward is called once, as Lightning does: the objective gets what is inside
        output = _Step(net, objective)(images, labels, step)
        shifts.append(inner[0].weight.detach().clone())
        output.loss.backward()
        output.restore()
        optimizer.step()
    return [p.detach().clone() for p in inner.parameters()] + shifts


class _Step:
    """Runs the objective inside the distributed wrapper's forward, the way Lightning's strategy does."""

    def __init__(self, net: nn.Module, objective: TRADES) -> None:
        self.net, self.objective = net, objective

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, step: int):
        if not isinstance(self.net, nn.parallel.DistributedDataParallel):
            return self.objective(self.net, images, labels, seed=step)
        inner = self.net.module
        kept = {}
        original = inner.forward

        def training_step(images, labels):
            inner.forward = original
            kept["output"] = self.objective(inner, images, labels, seed=step)
            return kept["output"].loss

        inner.forward = training_step
        self.net(images, labels)
        return kept["output"]


def worker(rank: int, store: str, images: torch.Tensor, labels: torch.Tensor, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(make_net())
    torch.save(train(net, images[rank::2], labels[rank::2]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(batch, tmp_path):
    images, labels = batch[0].double(), batch[1]
    alone = train(make_net(), images, labels)
    mp.start_processes(worker, (str(tmp_path / "store"), images, labels, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)
