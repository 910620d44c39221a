"""Weights from files: what loads, and what the errors say."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models import Normalized, create_network, load_weights, read_state_dict

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """State dict of a network whose numbers are none of the initial ones."""
    network = create_network("resnet20", 10, SHAPE).network
    return {
        name: value + 1 if value.dtype == torch.int64 else torch.rand_like(value)
        for name, value in network.state_dict().items()
    }


def assert_holds(model: Normalized, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, state[name]), name


PREFIXES = ["", "module.", "network.", "model.", "net.", "_orig_mod."]
CHAINS = ["network.network.", "model.module.", "_orig_mod.module.network."]


@pytest.mark.parametrize("prefix", PREFIXES + CHAINS)
@pytest.mark.parametrize("container", [None, "state_dict", "model", "net", "model_state_dict"])
def test_nested_and_wrapped_state_dicts(
    trained: dict[str, torch.Tensor], tmp_path: Path, prefix: str, container: str | None
) -> None:
    state = {prefix + name: value for name, value in trained.items()}
    torch.save({container: state, "epoch": 7} if container else state, tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_network("resnet20", 10, SHAPE, weights=tmp_path / "w.pth")
    assert_holds(model, trained)


def test_safetensors(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({f"module.{name}": value for name, value in trained.items()}, tmp_path / "w.safetensors")
    assert_holds(create_network("resnet20", 10, SHAPE, weights=str(tmp_path / "w.safetensors")), trained)


def test_parts_compiled_on_their_own(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {f"network.{name.replace('layer1.', 'layer1._orig_mod.')}": value for name, value in trained.items()}
    torch.save(state, tmp_path / "w.pth")
    assert_holds(create_network("resnet20", 10, SHAPE, weights=tmp_path / "w.pth"), trained)


@pytest.mark.parametrize("compiled", [False, True])
def test_lightning_checkpoint(tmp_path: Path, compiled: bool) -> None:
    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"eps": 0.03})
            network = create_network("resnet20", 10, SHAPE, mean="cifar10")
            self.network = torch.compile(network) if compiled else network

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = create_network("resnet20", 10, SHAPE, mean="cifar10", weights=tmp_path / "last.ckpt")
    assert_holds(model, (module.network._orig_mod if compiled else module.network).network.state_dict())


def test_entries_beside_the_network_are_left_out_with_a_warning(
    trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = {f"teacher.network.{name}": torch.zeros_like(value) for name, value in trained.items()}
    state |= {f"network.network.{name}": value for name, value in trained.items()}
    torch.save({"state_dict": state}, tmp_path / "distilled.ckpt")
    with pytest.warns(UserWarning, match=r"'network\.network\.' and left out teacher\.network\.conv1\.weight"):
        model = create_network("resnet20", 10, SHAPE, weights=tmp_path / "distilled.ckpt")
    assert_holds(model, trained)


def test_a_network_whose_own_names_look_like_wrappers(tmp_path: Path) -> None:
    network = nn.ModuleDict({"model": nn.Linear(2, 3), "net": nn.Linear(3, 2)})
    state = {name: torch.rand_like(value) for name, value in network.state_dict().items()}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    load_weights(Normalized(network), tmp_path / "w.pth")
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


def test_counters_that_old_files_lack_keep_their_value(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {name: value for name, value in trained.items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    model = create_network("resnet20", 10, SHAPE, weights=tmp_path / "old.th")
    assert model.network.bn1.num_batches_tracked == 0
    assert torch.equal(model.network.bn1.running_var, trained["bn1.running_var"])


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(UserError, match=f"no weights file .*{path.name}"):
            create_network("resnet20", 10, SHAPE, weights=path)


def test_pickled_code_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"pickled code \(torch\.nn\.modules\.container\.Sequential\)"):
        read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", [".pth", ".th", ".safetensors"])
def test_any_cut_or_damage_is_a_user_error(trained: dict[str, torch.Tensor], tmp_path: Path, suffix: str) -> None:
    whole, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    state = {name: value for name, value in trained.items() if name.startswith("bn1")}
    if suffix == ".safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=suffix == ".pth")
    content = whole.read_bytes()
    draw = random.Random(0)
    for length in [0, 1, len(content) - 1, *draw.sample(range(len(content)), 20)]:
        damaged.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"damaged.*(cannot be read|hold no state dict|hold pickled code)"):
            read_state_dict(damaged)
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(8):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        damaged.write_bytes(changed)
        try:
            state = read_state_dict(damaged)
        except UserError:
            continue
        assert all(isinstance(value, torch.Tensor) for value in state.values())  # damage inside a tensor's numbers


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_are_no_weights(tmp_path: Path, content: bytes) -> None:
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"w{suffix}").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_state_dict(tmp_path / f"w{suffix}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a list"),
        ({"epoch": 3, "loss": 0.1}, r"epoch \(int\), loss \(float\)"),
        ({"state_dict": [{"w": torch.zeros(1)}]}, r"state_dict \(list\)"),
        ({"state_dict": {}}, "under 'state_dict'"),
        (torch.zeros(3), "a Tensor"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "w.pt")


def test_numpy_archives_are_no_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(tmp_path / "w.npz")


def test_the_difference_is_counted_and_named(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = dict(trained)
    for name in ("bn1.bias", "linear.bias"):
        del state[name]
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    network = create_network("resnet20", 10, SHAPE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(network, tmp_path / "w.pth")
    text = str(error.value)
    assert "2 missing (bn1.bias, linear.bias)" in text
    assert "5 unexpected (extra.0, extra.1, extra.2 and 2 more)" in text
    assert "1 of another shape (conv1.weight is 16×1×3×3, not 16×3×3×3)" in text
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_wholly_different_network_is_named_without_its_wrapper(tmp_path: Path) -> None:
    other = create_network("lenet5", 10, SHAPE).network.state_dict()
    torch.save({f"module.{name}": value for name, value in other.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected \(feature_extractor\.conv1\.weight"):
        create_network("resnet20", 10, SHAPE, weights=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet20", "torchvision/squeezenet1_1", "timm/test_resnet", "small_cnn"])
def test_a_head_for_other_classes_is_named_as_such(tmp_path: Path, name: str) -> None:
    shape = (3, 64, 64)
    torch.save(create_network(name, 100, shape).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"head .* for 100 classes, the network has 10; set num_classes to 100"):
        create_network(name, 10, shape, weights=tmp_path / "w.pth")


def test_another_stem_is_not_taken_for_a_head(tmp_path: Path) -> None:
    torch.save(create_network("resnet20", 10, (1, 16, 16)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        create_network("resnet20", 10, SHAPE, weights=tmp_path / "w.pth")
    assert "16×1×3×3, not 16×3×3×3" in str(error.value)
    assert "head" not in str(error.value)
