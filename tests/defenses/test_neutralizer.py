"""The neutralizer: what is blanked, whose blob, and three kinds of attacker on a planted weakness."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import EOT, FGSM, PGD
from lightning_robust.defenses import Neutralizer, attack_neutralized
from lightning_robust.defenses.neutralizer import Reading, attack_readings
from lightning_robust.errors import UserError
from lightning_robust.regions import Blobs, save_blobs

MASKS = torch.zeros(2, 8, 8, dtype=torch.bool)
MASKS[0, :2], MASKS[1, :, :3] = True, True
BLOBS = Blobs(MASKS, torch.tensor([0.0, 1.0]), ("a", "b"))


class Planted(nn.Module):
    """Two classes told apart by the lower half; a strong response to the upper two rows that blanking turns off.

    Its sine is 0 at 0, 1/2 and 1, and steep there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        evidence = (images[:, 0, 4:] - 0.5).mean((1, 2))
        trap = torch.sin(2 * math.pi * images[:, 0, :2]).mean(2)
        score = self.scale * (evidence + 5 * (trap[:, 0] - trap[:, 1]))  # also from 0 on it can go both ways
        return torch.stack([-score, score], 1)


def planted_images() -> tuple[Tensor, Tensor]:
    labels = torch.arange(10) % 2
    images = torch.full((10, 1, 8, 8), 0.5)
    images[:, :, 4:] += (0.3 * (2 * labels - 1)).view(-1, 1, 1, 1) + 0.05 * torch.randn(10, 1, 4, 8)
    return images.clamp(0, 1), labels


def test_a_blob_over_the_planted_weakness_gives_the_clean_score_back() -> None:
    images, labels = planted_images()
    model = Planted().eval()
    upper = torch.zeros(8, 8, dtype=torch.bool)
    upper[:2] = True
    defense = Neutralizer(model, blobs=Blobs(upper.expand(2, -1, -1).clone(), torch.zeros(2)))
    for attack in (FGSM(eps=0.1), PGD(eps=0.1, steps=10)):
        assert (model(images).argmax(1) == labels).all()  # score_clean
        assert attack.run(model, images, labels).success.all()  # score_adv
        assert (defense(images).argmax(1) == labels).all()  # score_mod
        for case in (
            defense,
            defense.of_class(0),
            Neutralizer(model, blobs=Blobs(upper[None], torch.zeros(1))).of_class(0),
        ):
            # who may write into the blob wins all the same: the network is as weak from a blank blob
            assert not attack_neutralized(case, attack, images, labels, "write")[1].any()
            held, right = attack_neutralized(case, attack, images, labels, "held")
            assert right.all()
            assert (held[:, :, :2] != 0).any()  # he wrote, and it was wiped
            adversarial, right = attack_neutralized(case, attack, images, labels, "adaptive")
            assert right.all()
            if isinstance(attack, FGSM):  # a random start writes there, too
                assert torch.equal(adversarial[:, :, :2], images[:, :, :2])  # he knows that it is of no use
            assert ((adversarial - images).abs() <= 0.1 + 1e-6).all()


def test_whose_blob() -> None:
    images = torch.full((4, 1, 8, 8), 0.5)
    images[:2, :, 4:], images[2:, :, 4:] = 0.2, 0.8
    model = Planted().eval()
    predicted = Neutralizer(model, blobs=BLOBS)
    assert torch.equal(predicted.blank(images), MASKS[torch.tensor([0, 0, 1, 1])])
    blanked = predicted.transform(images)
    assert (blanked[:2, :, :2] == 0).all()
    assert (blanked[2:, :, :, :3] == 1).all()
    assert torch.equal(blanked[:2, :, 2:], images[:2, :, 2:])
    assert torch.equal(blanked[2:, :, :, 3:], images[2:, :, :, 3:])
    pair = Neutralizer(model, blobs=BLOBS, blob_of="pair")
    assert torch.equal(pair.blank(images)[0], MASKS.any(0))
    assert (pair.transform(images)[:, :, :, :3] == 1).all()  # where two overlap, the last class's fill
    assert (pair.transform(images)[:, :, :2, 3:] == 0).all()
    known = predicted.of_class(1)
    assert (known.transform(images)[:, :, :, :3] == 1).all()
    assert torch.equal(known.blank(images)[0], MASKS[1])
    assert predicted._class is None
    assert predicted.model is known.model


def test_the_attacker_may_change_whose_blob_it_is() -> None:
    """The blob of the predicted class hangs on what the attacker hands in."""
    images, labels = planted_images()
    defense = Neutralizer(Planted().eval(), blobs=BLOBS)
    adversarial, right = attack_neutralized(defense, FGSM(eps=0.1), images, labels, "held")
    changed = defense.blank(adversarial) != defense.blank(images)
    assert changed.flatten(1).any(1).all()
    assert not right.all()
    # the gradient does not see which blob is taken: who knows that changes the prediction by the bare classifier's
    through = FGSM(eps=0.1).run(defense, images, labels).success
    assert not through.all()
    assert (~attack_neutralized(defense, FGSM(eps=0.1), images, labels, "adaptive")[1]).sum() > through.sum()


def test_what_readings_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = planted_images()
    readings: tuple[Reading, ...] = ("write", "held", "adaptive")
    attack, run = PGD(eps=0.1, steps=3), PGD.run
    for blob_of in ("predicted", "pair"):
        defense = Neutralizer(Planted().eval(), blobs=BLOBS, blob_of=blob_of)
        expected = {reading: attack_neutralized(defense, attack, images, labels, reading) for reading in readings}
        bare = attack.run(defense.protected(), images, labels, rounding=False).images
        attacked: list[nn.Module] = []

        def counted(
            self: PGD, model: nn.Module, *given: Tensor, attacked: list[nn.Module] = attacked, **more: bool
        ) -> object:
            attacked.append(model)
            return run(self, model, *given, **more)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(PGD, "run", counted)
            found = attack_readings(defense, attack, images, labels, readings, bare=bare)
        assert attacked == [defense.protected(), defense]  # S_mod for both of write and held; through the defense
        for reading in readings:
            assert torch.equal(found[reading][0], expected[reading][0])
            assert torch.equal(found[reading][1], expected[reading][1])


def test_it_keeps_the_contract_of_a_defense(tmp_path: Path) -> None:
    images, labels = planted_images()
    model = Planted().eval()
    settings = Neutralizer(blobs=save_blobs(tmp_path / "blobs.npz", BLOBS), blob_of="pair")
    with pytest.raises(UserError, match=r"Neutralizer has no classifier.*around\(model\)"):
        settings(images)
    defense = settings.around(model)
    assert settings.model is None
    assert defense.model is model
    assert list(defense.state_dict()) == ["model.scale"]  # blobs are settings
    assert not defense.random
    assert defense.draws(5) == [defense]
    assert defense.with_seed(3).seed == 3
    expected = defense(images)
    for other in (copy.deepcopy(defense), pickle.loads(pickle.dumps(defense))):
        assert torch.equal(other(images), expected)
    assert defense.double().masks.dtype == torch.bool
    defense.float()
    points = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defense(points)[:, 0].sum(), points)
    assert (gradient[:, 0][defense.blank(images)] == 0).all()
    assert (gradient != 0).any()
    assert "blob_of='pair'" in repr(defense)
    assert "class 1" in repr(defense.of_class(1))
    averaged = EOT(attack=FGSM(eps=0.1), samples=4).run(defense, images, labels)
    assert torch.equal(averaged.images, FGSM(eps=0.1, stop_at_success=False)(defense, images, labels))
    with torch.inference_mode():  # as in Lightning's test, copies and all
        inside = settings.around(model).of_class(0)
        FGSM(eps=0.1).run(inside, images.clone(), labels.clone())
    FGSM(eps=0.1).run(inside, images, labels)
    model.train()
    attack_neutralized(defense, FGSM(eps=0.1), images, labels, "adaptive")
    assert model.training


def test_bad_input(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(UserError, match=r"blob_of='known': choose predicted or pair .*of_class"):
        Neutralizer(blobs=BLOBS, blob_of="known")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="do not exist"):
        Neutralizer(blobs=tmp_path / "none.npz")
    with pytest.raises(UserError, match="blobs of 8×8 pixels and images of 9×8"):
        Neutralizer(Planted(), blobs=BLOBS)(torch.rand(2, 1, 9, 8))
    three = Blobs(MASKS[[0, 1, 0]], torch.zeros(3))
    with pytest.raises(UserError, match="blobs of 3 classes and a network of 2"):
        Neutralizer(Planted(), blobs=three)(images)
    with pytest.raises(UserError, match="class 2: the blobs are of the classes 0 to 1"):
        Neutralizer(Planted(), blobs=BLOBS).of_class(2)
    with pytest.raises(UserError, match="reading='white': choose write, held or adaptive"):
        attack_neutralized(Neutralizer(Planted(), blobs=BLOBS), FGSM(), images, torch.tensor([0, 1]), "white")  # type: ignore[arg-type]
