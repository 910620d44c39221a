"""The attack on predicted masks: the promise of every attack, and that it does what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError
from lightning_robust.metrics import intersection_over_union
from lightning_robust.models import ForegroundNetwork, MaskAttack, create_segmenter

ATTACK = MaskAttack(eps=0.2, steps=5)


@pytest.fixture(scope="module")
def trained() -> ForegroundNetwork:
    """A predictor that has learned which pixels of a digit are ink, before a classifier that knows nothing."""
    torch.manual_seed(0)
    segmenter = create_segmenter("unet", (1, 8, 8), width=4, depth=2)
    images, _, truth = samples(200)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(segmenter(images), truth.float()).backward()
        optimizer.step()
    return ForegroundNetwork(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), segmenter)


def samples(count: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    batch = Digits().dataset("test").__getitems__(range(count))
    return batch.images, batch.labels, batch.images > 0.5


def iou(network: ForegroundNetwork, images: Tensor, truth: Tensor) -> float:
    with torch.no_grad():
        return float(intersection_over_union(network.eval().segmenter(images)[:, 0] > 0, truth[:, 0]).mean())


def test_masks_are_misled_more_than_by_noise_and_by_an_attack_on_the_class(trained: ForegroundNetwork) -> None:
    images, labels, truth = samples()
    attacked = ATTACK(trained, images, labels, truth)
    noise = (images + 0.2 * (2 * torch.rand_like(images) - 1).sign()).clamp(0, 1)
    by_class = PGD(eps=0.2, steps=5, stop_at_success=False)(trained, images, labels)
    found = iou(trained, attacked, truth)
    assert iou(trained, images, truth) > 0.8
    assert found < iou(trained, noise, truth) - 0.1
    assert found < iou(trained, by_class, truth) - 0.1
    more = iou(trained, MaskAttack(eps=0.4, steps=5)(trained, images, labels, truth), truth)
    assert more < found - 0.1


@pytest.mark.parametrize("classification", [0.0, 2.0])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_the_promise(trained: ForegroundNetwork, norm: str, eps: float, classification: float) -> None:
    images, labels, truth = samples()
    trained.train()
    trained.zero_grad()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    random = torch.get_rng_state()
    attack = MaskAttack(eps=eps, norm=norm, steps=3, classification=classification)  # type: ignore[arg-type]
    allowed = torch.zeros_like(truth)
    allowed[..., 2:] = True
    with torch.inference_mode():
        found = attack(trained, images, labels, truth, mask=allowed)
    assert trained.training
    assert trained.segmenter.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in trained.parameters())
    assert torch.equal(random, torch.get_rng_state())
    delta = found - images
    size = delta.flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    assert bool((size <= eps + 1e-6).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert (delta != 0).any()
    assert not (delta != 0)[~allowed].any()
    alone = [
        attack(trained, images[i : i + 1], labels[i : i + 1], truth[i : i + 1], mask=allowed[i : i + 1])
        for i in range(4)
    ]
    assert torch.allclose(torch.cat(alone), found[:4], atol=1e-5)


def test_the_class_counts_where_it_is_weighed(trained: ForegroundNetwork) -> None:
    images, labels, truth = samples(100)

    def loss(attack: MaskAttack) -> float:
        with torch.no_grad():
            logits = trained.eval()(attack(trained, images, labels, truth))
        return float(nn.functional.cross_entropy(logits, labels))

    assert loss(MaskAttack(eps=0.1, classification=100.0)) > loss(MaskAttack(eps=0.1)) + 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"classification": -1.0}, "0 or more"),
        ({"eps": 8}, "pixel"),
        ({"norm": "l0"}, "norm"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskAttack(**settings)  # type: ignore[arg-type]


def test_masks_of_another_size(trained: ForegroundNetwork) -> None:
    images, labels, truth = samples(4)
    with pytest.raises(UserError, match=r"true masks of shape \(4, 1, 8, 7\)"):
        ATTACK(trained, images, labels, truth[..., 1:])
