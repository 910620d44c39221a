"""Weights from files: read safely, find the network's entries in them, and say readably what does not fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models.normalization import Normalized

#: Keys under which training scripts nest the state dict of a network, the most telling first.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params")

#: Attributes behind which DataParallel, torch.compile, Lightning modules and normalising wrappers keep a network.
_WRAPPERS = ("module", "_orig_mod", "network", "classifier", "model", "net")

_LEADING_WRAPPERS = re.compile(rf"^(?:(?:{'|'.join(_WRAPPERS)})\.)*")

_NAMED = 3  # how many entries of each kind an error message names


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file or checkpoint onto the CPU without running code from it.

    Args:
        path: a file of ``torch.save`` (read with ``weights_only=True``) or one ending in ``.safetensors``. A state
            dict nested under ``state_dict``, ``model``, ``net`` and the like is found.

    Returns:
        The tensors by the names that the file gives them.

    Raises:
        UserError: when the file is missing, broken, holds pickled code, or holds no state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no weights file {str(file)!r}: give the path of a state dict or checkpoint.")
    loaded = _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)
    return _state_dict_in(loaded, file)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a weights file into a network, all of it or nothing.

    Wrappers' prefixes (``module.``, ``_orig_mod.``, ``network.``, ``model.``, ``net.``, also several) are stripped,
    so checkpoints of DataParallel, torch.compile and this package's Lightning modules load as they are. Entries
    beside the network's prefix, such as a teacher's or a metric's, are left out with a warning. Files of before
    PyTorch 0.4.1 lack ``num_batches_tracked``; it then keeps its value.

    Args:
        network: changed in place; a :class:`Normalized` is looked through.
        path: see :func:`read_state_dict`.

    Raises:
        UserError: when the file cannot be read, or its names or shapes do not fit; the message counts and names
            what is missing, unexpected or of another shape.
    """
    while isinstance(network, Normalized):
        network = network.network
    entries = {name.replace("._orig_mod.", "."): value for name, value in read_state_dict(path).items()}
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    prefix = _best_prefix(entries, wanted)
    found = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    require_fit(found, wanted, f"weights {str(path)!r} do not fit the network")
    left_out = [name for name in entries if not name.startswith(prefix)]
    if left_out:
        warnings.warn(
            f"weights {str(path)!r}: took the entries under {prefix!r} and left out {_some(left_out)}.",
            stacklevel=2,
        )
    # strict=False only lets num_batches_tracked be absent: everything else was compared above.
    network.load_state_dict(found, strict=False)


def _load_torch(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"weights {str(file)!r} hold pickled code ({code[1]}), which is not run for safety: "
                "save the network's state_dict() alone and give that file."
            ) from error
        raise _unreadable(file, error) from error
    except Exception as error:  # an unpickler fed with damaged bytes raises nearly any exception there is
        raise _unreadable(file, error) from error


def _load_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return UserError(
        f"weights {str(file)!r} cannot be read{reason}: the file is broken, cut short, or no file of torch.save or "
        "safetensors; fetch or save it again."
    )


def _state_dict_in(loaded: object, file: Path) -> dict[str, Tensor]:
    where = ""
    while isinstance(loaded, Mapping):
        container = next((key for key in _CONTAINERS if isinstance(loaded.get(key), Mapping)), None)
        if container is None:
            break
        loaded, where = loaded[container], container
    tensors: dict[str, Tensor] = {}
    if isinstance(loaded, Mapping):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        content = f"a {type(loaded).__name__}"
        if isinstance(loaded, Mapping):
            content += f" of {_some([f'{key} ({type(value).__name__})' for key, value in loaded.items()])}"
        raise UserError(
            f"weights {str(file)!r} hold no state dict but {content}{f' under {where!r}' if where else ''}: "
            "save the network's state_dict() and give that file."
        )
    return tensors


def _best_prefix(entries: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> str:
    """The chain of wrappers under which most of the wanted entries lie; of several equal ones, the file's first."""
    prefixes = {"": None}  # a dict keeps the file's order
    for name in entries:
        chain = _LEADING_WRAPPERS.match(name)
        parts = chain[0].split(".")[:-1] if chain else []
        prefixes |= {"".join(f"{part}." for part in parts[: n + 1]): None for n in range(len(parts))}

    def matches(prefix: str) -> tuple[int, int]:
        names = [name for name in wanted if prefix + name in entries]
        return sum(entries[prefix + name].shape == wanted[name] for name in names), len(names)

    best = max(prefixes, key=matches)
    if matches(best) == (0, 0):  # nothing fits: at least name the entries without what all of them are wrapped in
        return max((p for p in prefixes if all(name.startswith(p) for name in entries)), key=len)
    return best


def require_fit(found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], what: str) -> None:
    """Compare a state dict with the names and shapes that a module has.

    Args:
        found: entries of a file or checkpoint.
        wanted: name to shape of the module's own entries.
        what: beginning of the message, for example "weights 'a.pth' do not fit the network".

    Raises:
        UserError: counting and naming what is missing, unexpected or of another shape.
    """
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    if not (missing or unexpected or reshaped):
        return
    shapes = [f"{name} is {_shape(found[name].shape)}, not {_shape(wanted[name])}" for name in reshaped]
    parts = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    message = f"{what}: {', '.join(parts)}."
    if not (missing or unexpected) and (head := _head_difference(found, wanted, reshaped)):
        layer, theirs, ours = head
        message += (
            f" Only the classification head {layer!r} differs: the file is for {theirs} classes, the network has "
            f"{ours}; set num_classes to {theirs}."
        )
    raise UserError(message)


def _head_difference(
    found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], reshaped: list[str]
) -> tuple[str, int, int] | None:
    """Layer name, the file's and the network's number of classes, when the last layer's outputs alone differ."""
    layer = list(wanted)[-1].rpartition(".")[0]
    ours = {wanted[name][0] for name in reshaped if wanted[name]}
    theirs = {found[name].shape[0] for name in reshaped if found[name].shape}
    same_inputs = all(found[name].shape[1:] == wanted[name][1:] for name in reshaped)
    in_one_layer = all(name.rpartition(".")[0] == layer for name in reshaped)
    if in_one_layer and same_inputs and len(ours) == len(theirs) == 1:
        return layer, theirs.pop(), ours.pop()
    return None


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
