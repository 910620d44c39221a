"""A small network that learns to answer as the model does, to make images on that may fool the model, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks.context import attacking
from lightning_robust.attacks.randomness import ball, image_keys, mix_seed
from lightning_robust.audit.subject import Subject

LEAST_AGREEMENT = 0.6
"""Share of the images on which a surrogate must agree with the model for its attacks to be worth trying."""

EPOCHS = 40
_IMAGES = 2000  # that are learnt from at most
_BATCH = 64
_SIDE = 64  # larger images are looked at from afar


def train_surrogate(subject: Subject) -> tuple[nn.Module, float]:
    """Train a small network on the model's answers to the audited images and to noisy ones around them.

    Substitute training (Papernot et al., arXiv 1602.02697) by an attacker who has the very images that he is to
    attack: it is no honest black box, and need not be one, since every image that fools counts.

    Returns:
        the network in eval mode, and the share of the images on which it agrees with the model.
    """
    images = subject.share.gather(subject.images)[:_IMAGES].to(subject.images.device)
    norm, eps = subject.threat_model.ball, subject.threat_model.radius
    answers = subject.answers(images).argmax(1)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(mix_seed(subject.seed, 0x50) % 2**63)
        network = _network(images.shape[1], max(images.shape[2:]), subject.classes).to(images.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        batches = -(-len(images) // _BATCH) * EPOCHS
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=batches)
        keys = image_keys(images, subject.seed)
        for epoch in range(EPOCHS):
            subject.told("surrogate", epoch / EPOCHS)
            # every other epoch as they are; the model's answer to a noisy image is the model's, not the label
            points, targets = images, answers
            if epoch % 2:
                points = (images + ball(keys, images.shape, images.dtype, norm, eps, stream=epoch)).clamp(0, 1)
                targets = subject.answers(points).argmax(1)
            for rows in torch.randperm(len(images)).to(images.device).split(_BATCH):
                optimizer.zero_grad()
                F.cross_entropy(network(points[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
    network.eval()
    with attacking(network) as lent, torch.no_grad():
        same: Tensor = lent(images).argmax(1) == answers
    return network, float(same.double().mean())


def _network(channels: int, side: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(_SIDE) if side > _SIDE else nn.Identity(),
        nn.Conv2d(channels, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
