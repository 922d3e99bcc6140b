"""Weights that another program trained, put into one of our networks."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prune_cli.errors import UserError

SAFETENSORS = ".safetensors"
NESTED = ("state_dict", "model_state_dict", "model", "net", "network")  # where training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (16 digits) of names and values. Not of the file, in which torch.save writes the file's own name."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Copy the weights from the file `path` into the model, by name where the names are the model's, else by
    order and shape.

    Raises UserError: they are not the model's, naming the first that does not fit; the model is unchanged.
    """
    theirs = {name: t for name, t in weights.items() if not _counts_batches(name)}
    ours = {name: t for name, t in model.state_dict().items() if not _counts_batches(name)}
    if theirs.keys() == ours.keys():
        pairs = [(name, name) for name in ours]
    elif path.endswith(SAFETENSORS):
        stranger = next((name for name in theirs if name not in ours), None) or next(n for n in ours if n not in theirs)
        raise UserError(
            f"model.checkpoint={path}: {stranger} is not in both the file and the network, and a {SAFETENSORS} file "
            "keeps no order by which other names could be matched; save it with torch.save"
        )
    else:
        pairs = list(zip_longest(theirs, ours))
    for number, (their, our) in enumerate(pairs, 1):
        elsewhere = their != our and their in ours  # a name of ours goes to no other tensor of ours
        if their is None or our is None or elsewhere or not _fits(their, theirs[their], our, ours[our]):
            raise UserError(
                f"model.checkpoint={path}: its tensor {number} of {len(theirs)}, {_shown(their, theirs)}, does "
                f"not fit the network's {_shown(our, ours)}; choose the model that was trained"
            )
    with torch.no_grad():
        for their, our in pairs:
            ours[our].copy_(theirs[their])


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a state dict in a .safetensors file or one of torch.save (.pth, .pt, .t7, .tar), which
    may lie under a key of a larger dictionary. Nothing in the file is run.

    Raises UserError: no such file, or no tensors in it that can be read so.
    """
    if not Path(path).is_file():
        raise UserError(f"model.checkpoint={path}: there is no such file")
    try:
        loaded = load_file(path) if path.endswith(SAFETENSORS) else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as problem:
        refused = re.search(r"GLOBAL (\S+)", str(problem))
        reason = f"holds a {refused[1]}, and only tensors are loaded" if refused else "is damaged or holds no tensors"
        raise UserError(f"model.checkpoint={path}: {reason}; save the network's state_dict() alone") from problem
    weights = _state_dict(loaded)
    if not weights:
        raise UserError(f"model.checkpoint={path}: holds no state dict, neither as it is nor under {', '.join(NESTED)}")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return weights


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    inner = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)), None)
    if inner is not None:
        return _state_dict(inner)
    return {name: t for name, t in loaded.items() if isinstance(t, Tensor)}


def _fits(their: str, theirs: Tensor, our: str, ours: Tensor) -> bool:
    """Of one shape and, where both say what they are (a batch norm's weight is as long as its mean), of one kind."""
    kinds = {name.rpartition(".")[2] for name in (their, our)}
    known = {"weight", "bias", "running_mean", "running_var"}
    return theirs.shape == ours.shape and (len(kinds) == 1 or not kinds <= known)


def _counts_batches(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # decides nothing, and old checkpoints have none


def _shown(name: str | None, tensors: Mapping[str, Tensor]) -> str:
    return "none" if name is None else f"{name} {tuple(tensors[name].shape)}"

