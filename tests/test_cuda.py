"""What only a CUDA device shows: attacks, stand-ins and mixed-precision training there, against the CPU's results."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_robust.attacks import APGD, PGD, Attack, accelerate
from lightning_robust.callbacks import AdversarialAccuracy, InputGradientMap
from lightning_robust.datamodules import Digits
from lightning_robust.models import create_network
from lightning_robust.modules import ImageClassifier
from lightning_robust.objectives import PGDAdversarial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_network("digits_cnn", 10, (1, 8, 8)).eval()


@pytest.mark.parametrize(
    "attack",
    [PGD(eps=0.1, steps=5), PGD(eps=0.5, norm="l2", steps=5), PGD(eps=2.0, norm="l1", steps=5), APGD(eps=0.1, steps=8)],
    ids=["linf", "l2", "l1", "apgd"],
)
def test_an_attack_finds_on_the_gpu_what_it_finds_on_the_cpu(network: nn.Module, attack: Attack) -> None:
    images = torch.rand(32, 1, 8, 8, dtype=torch.float64)
    network = network.double()
    labels = network(images).argmax(1)
    here = attack.run(network, images, labels)
    there = attack.run(network.cuda(), images.cuda(), labels.cuda())
    assert there.images.is_cuda
    torch.testing.assert_close(there.images.cpu(), here.images, rtol=0, atol=1e-6)
    assert torch.equal(there.success.cpu(), here.success)
    assert torch.equal(there.iterations.cpu(), here.iterations)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_stand_in_follows_its_model_to_the_gpu(network: nn.Module, dtype: torch.dtype | None) -> None:
    network = network.cuda()
    fast = accelerate(network, dtype=dtype)
    images = torch.rand(16, 1, 8, 8, device="cuda")
    labels = network(images).argmax(1)
    torch.testing.assert_close(fast(images), network(images), rtol=0.05, atol=1e-4 if dtype is None else 0.1)
    result = PGD(eps=0.2, steps=10).run(network, images, labels, stand_in=fast)
    with torch.no_grad():
        assert torch.equal(result.success, network(result.images).argmax(1) != labels)
    assert float((result.images - images).abs().max()) <= 0.2 + 1e-6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_adversarial_training_in_mixed_precision(tmp_path: Path, precision: str) -> None:
    pl.seed_everything(0)
    data = Digits(batch_size=128)
    module = ImageClassifier(
        "digits_cnn", data.num_classes, data.image_shape, objective=PGDAdversarial(attack=PGD(eps=0.1, steps=3))
    )
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="gpu",
        devices=1,
        precision=precision,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        callbacks=[AdversarialAccuracy({"pgd": PGD(eps=0.1, steps=5)}), InputGradientMap()],
    )
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/acc"] > 0.8
    assert 0 < trainer.callback_metrics["val/robust_acc/pgd"] <= trainer.callback_metrics["val/acc"]
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
