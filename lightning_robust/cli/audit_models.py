"""The models that an audit takes: checkpoints, networks by name, exported programs, modules by import path."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_robust.modules as modules
from lightning_robust.batch import Batch, as_batch
from lightning_robust.cli.audit_options import Given, run_config
from lightning_robust.cli.checkpoints import read_checkpoint
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.errors import UserError
from lightning_robust.models import create_network, normalization_of
from lightning_robust.models.normalization import Normalized
from lightning_robust.models.weights import read_state_dict
from lightning_robust.modules import ForegroundClassifier, ImageClassifier

# what wrappers that normalise call their numbers
_MEANS, _STDS = ("mean", "mu", "means"), ("std", "sigma", "stds", "sd")


def load_model(given: Given, data: ImageDataModule) -> tuple[nn.Module, str]:
    """The model, and what to call it.

    Raises:
        UserError: for files, names and paths that cannot be used, and models that do not fit the data.
    """
    if given.ckpt is not None:
        model, name = checkpoint_model(given.ckpt, data)
    elif given.network is not None:
        return _named(given, data).eval(), given.network
    elif given.program is not None:
        model, name = _exported(given.program, data), Path(given.program).stem
    else:
        model, name = _imported(str(given.module)), str(given.module)
    if given.normalization is not None:
        training = model.training
        model = Normalized(model, *normalization_of(given.normalization))
        model.training = training
    return model, name


def shown(model: nn.Module, batch: Batch) -> Batch:
    """What ``model`` gets to see of a batch: images cut out by their masks, if it is a classifier of foregrounds.

    Attackers may then change every pixel of what is shown, the blanked ones too.

    Raises:
        UserError: for a batch without the masks that are needed.
    """
    for part in model.modules():
        if isinstance(part, ForegroundClassifier):
            given = tuple(tensor for tensor in batch if tensor is not None)
            return as_batch(part.on_after_batch_transfer(given, 0))
    return batch


def evaluating(model: nn.Module) -> nn.Module:
    """The model in eval mode; an exported program refuses to be told, since its mode is what it was exported in."""
    for part in model.modules():
        part.training = False
    return model


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_model(path: str, data: ImageDataModule) -> tuple[nn.Module, str]:
    """The module of a checkpoint, in eval mode, and what to call it.

    Raises:
        UserError: for a file that cannot be used, and one that does not fit the data.
    """
    if path in ("last", "best"):
        raise UserError(f"--ckpt {path}: give the file, such as runs/NAME/version_0/checkpoints/last.ckpt")
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(str(error).replace("--ckpt_path", "--ckpt").replace("--model.weights", "--weights")) from None
    if checkpoint is None:
        raise UserError(f"--ckpt {path}: give a file on this machine")
    cls = _class_of(path, checkpoint)
    module = cls.load_from_checkpoint(path, map_location="cpu").eval()
    shape, classes = tuple(module.image_shape), int(module.num_classes)
    if shape != tuple(data.image_shape):
        theirs, ours = ("×".join(map(str, sizes)) for sizes in (shape, data.image_shape))
        raise UserError(
            f"--ckpt {path} was made for images of {theirs}, and {type(data).__name__} has {ours}: "
            f"--data.image_size {shape[1]} resizes, or give the data that it was trained on"
        )
    if classes != data.num_classes:
        raise UserError(
            f"--ckpt {path} has {classes} classes and {type(data).__name__} has {data.num_classes}: give the data that "
            "it was trained on (--data.classes chooses some)"
        )
    name = f"{cls.__name__} ({module.hparams.get('network') or type(module.network).__name__})"
    # a network alone is what attacks need; a subclass may do more around it
    plain = cls.forward is ImageClassifier.forward and not issubclass(cls, ForegroundClassifier)
    return (module.network.eval() if plain else module), name


def _class_of(path: str, checkpoint: dict[str, Any]) -> type[ImageClassifier]:
    config = run_config(path) or {}
    model = config.get("model")
    named = str(model.get("class_path", "")) if isinstance(model, dict) else ""
    noted = str((checkpoint.get("lightning_robust") or {}).get("class") or "")
    if named and named.rpartition(".")[2] in ("", noted or named.rpartition(".")[2]):
        package, _, attribute = named.rpartition(".")
        try:
            found = getattr(importlib.import_module(package) if package else modules, attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"the class {named} of the checkpoint's run cannot be imported: {error}") from None
    else:
        found = getattr(modules, noted or "ImageClassifier", None)
    if not (isinstance(found, type) and issubclass(found, ImageClassifier)):
        raise UserError(
            f"--ckpt {path} was made by {noted or named}, which is no class of this program: give the module with "
            "--module package.module:name"
        )
    return found


# -- networks by name --------------------------------------------------------------------------------------------------


def _named(given: Given, data: ImageDataModule) -> nn.Module:
    mean: list[float] | str | None = given.normalization
    std: list[float] | None = None
    if given.weights is not None and mean is None:
        brought = normalization_in(read_state_dict(given.weights))
        if brought is not None:
            mean, std = brought
    return create_network(
        str(given.network),
        data.num_classes,
        data.image_shape,
        pretrained=given.pretrained,
        weights=given.weights,
        mean=mean,
        std=std,
        **given.network_args,
    )


def normalization_in(entries: dict[str, Tensor]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that a normalising wrapper has left in a state dict, as RobustBench's do.

    Args:
        entries: of the state dict.

    Returns:
        one number a channel each; ``None`` if there are none, or not of both.
    """

    def found(names: tuple[str, ...]) -> list[float] | None:
        for key, value in entries.items():
            if key.rpartition(".")[2] in names and value.is_floating_point() and value.numel() in (1, 3):
                return [float(number) for number in value.flatten()]
        return None

    means, stds = found(_MEANS), found(_STDS)
    if means is None or stds is None or len(means) != len(stds) or min(stds) <= 0:
        return None
    return means, stds


# -- exported programs -------------------------------------------------------------------------------------------------


class FixedBatch(nn.Module):
    """A program that takes so many images at a time and no others.

    Args:
        program: the program's module.
        size: images that it takes.
    """

    def __init__(self, program: nn.Module, size: int) -> None:
        super().__init__()
        self.program, self.size = program, size

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` of any N to logits; the last part is filled up with copies of its first image."""
        parts = []
        for part in images.split(self.size):
            missing = self.size - len(part)
            filled = torch.cat([part, part[:1].expand(missing, *part.shape[1:])]) if missing else part
            parts.append(self.program(filled)[: len(part)])
        return torch.cat(parts)


def _exported(path: str, data: ImageDataModule) -> nn.Module:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--program {path}: there is no such file; torch.export.save writes one")
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # it logs a traceback of its first attempt
        program = torch.export.load(file)
    except Exception as error:  # damaged bytes raise nearly any exception there is
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--program {path} cannot be read as an exported program (.pt2): {reason}") from None
    finally:
        logging.disable(level)
    users = set(program.graph_signature.user_inputs)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
        raise UserError(f"--program {path} takes no single batch of images (N, C, H, W), which an audit needs")
    batch, *sizes = inputs[0].shape
    wanted = data.image_shape
    if any(isinstance(size, int) and size != own for size, own in zip(sizes, wanted, strict=True)):
        theirs, ours = ("×".join(map(str, shape)) for shape in (sizes, wanted))
        raise UserError(
            f"--program {path} takes images of {theirs}, and {type(data).__name__} has {ours}: --data.image_size "
            f"{sizes[1]} resizes"
        )
    module = program.module()
    return evaluating(FixedBatch(module, batch) if isinstance(batch, int) else module)


# -- modules by import path --------------------------------------------------------------------------------------------


def _imported(path: str) -> nn.Module:
    """A module; what is made here is put into eval mode, and what exists already stays as it is."""
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"--module {path}: write it as package.module:name or file.py:name")
    try:
        found: Any = _python(place)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise UserError(f"--module {path}: {place} has no {name}") from None
    if isinstance(found, nn.Module):
        return found
    if callable(found):
        try:
            made = found()
        except TypeError as error:
            raise UserError(f"--module {path}: it cannot be called without arguments: {error}") from None
        if isinstance(made, nn.Module):
            return made.eval()
        found = made
    raise UserError(f"--module {path} gives a {type(found).__name__}: an nn.Module, or what makes one, is needed")


def _python(place: str) -> Any:
    if place.endswith(".py"):
        file = Path(place)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--module: there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever stands in the user's file
            raise _broken(place, error) from error
        return module
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the working folder, as python -m would find it
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise UserError(f"--module: {place} cannot be imported: {error}") from None
    except Exception as error:
        raise _broken(place, error) from error


def _broken(place: str, error: Exception) -> UserError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(last.filename).name}, line {last.lineno})"
    return UserError(f"--module: {place} fails as it is imported{where}: {type(error).__name__}: {error}")
