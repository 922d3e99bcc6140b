"""The tensors in a file that another program saved. Nothing in the file is run."""

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prune_cli.errors import UserError
from prune_cli.external_files import inflates, unreadable

SAFETENSORS = ".safetensors"
NESTED = ("state_dict", "model_state_dict", "model", "net", "network")  # where training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
MOST, DEEPEST = 100_000, 100  # modules of a network, and inside each other: no honest file has more
SLACK, RATIO = 2**26, 100  # bytes, and times a file's size, that its tensors may take in memory (where it is sparse)


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a state dict in a .safetensors file or one of torch.save (.pth, .pt, .t7, .tar), or of a whole
    network in the latter; they may lie under a key of a larger dictionary. Sparse and quantized ones are unpacked.

    Raises UserError: no file that can be read, or no tensors in it.
    """
    if problem := unreadable(path):
        raise UserError(f"model.checkpoint={path}: {problem}")
    try:
        weights = _state_dict(load_file(path) if path.endswith(SAFETENSORS) else _loaded(path), set())
    except Exception as problem:  # whatever the parsers trip over, and what only a forged file holds
        raise UserError(f"model.checkpoint={path}: {_why(problem)}; save the network's state_dict() alone") from problem
    if not weights:
        raise UserError(f"model.checkpoint={path}: holds no state dict, neither as it is nor under {', '.join(NESTED)}")
    _check(weights, path)
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return {name: _plain(tensor) for name, tensor in weights.items()}


class _Refused(Exception):
    """Carries why nothing is read, as the predicate of a sentence."""


class Inert:
    """Takes the place of all objects in a file that are no tensors, whatever their class: keeps their state, runs
    nothing of them."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _loaded(path: str) -> Any:
    """What torch.save has saved, with every object that is not known to be harmless made an `Inert`."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise _Refused("is a TorchScript program, of which nothing is run")
    if inflates(path):
        raise _Refused("says that it unpacks to more than its own size, which nothing does that torch.save writes")
    harmless = torch.serialization.safe_globals([(Inert, name) for name in _others(path)])
    # Without the check, a sparse tensor whose indices lie outside its shape is a segmentation fault.
    with warnings.catch_warnings(), harmless, torch.sparse.check_sparse_tensor_invariants():
        warnings.simplefilter("ignore")  # about older forms
        return torch.load(path, "cpu", weights_only=True)


def _others(path: str) -> list[str]:
    """The classes and functions that the file names, besides those of tensors."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the form of torch before 1.6, which is not looked through: torch refuses what it names
        return []


def _why(problem: Exception) -> str:
    if isinstance(problem, _Refused):
        return str(problem)
    refused = re.search(r"GLOBAL (\S+)", str(problem))
    return f"holds a {refused[1]}, and only tensors are loaded" if refused else "is damaged or holds no tensors"


def _state_dict(loaded: Any, seen: set[int]) -> dict[str, Tensor]:
    """The tensors of the first of NESTED that holds any; else those in the mapping itself, or, where these are only
    counters, in that of its mappings which holds the most. seen: the mappings that were looked into already."""
    if isinstance(loaded, Inert):
        return _of_network(loaded)
    if not isinstance(loaded, Mapping) or id(loaded) in seen:
        return {}
    seen.add(id(loaded))
    inner = {key: value for key, value in loaded.items() if isinstance(key, str)}
    for key in NESTED:
        if found := _state_dict(inner.get(key), seen):
            return found
    own = {name: value for name, value in inner.items() if isinstance(value, Tensor) and not value.is_nested}
    if any(tensor.numel() > 1 for tensor in own.values()):
        return own
    return max([own, *(_state_dict(value, seen) for value in inner.values())], key=len)


def _of_network(network: Inert) -> dict[str, Tensor]:
    """What state_dict() of a pickled nn.Module would give; nothing for other objects."""
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", network, ())]
    for _ in range(MOST):
        if not waiting:
            return tensors
        prefix, module, above = waiting.pop()
        state = module.state if isinstance(module, Inert) else None
        if not isinstance(state, Mapping) or id(module) in above or len(above) > DEEPEST:
            continue
        passing = state.get("_non_persistent_buffers_set") or ()
        for name, value in [*_items(state.get("_parameters")), *_items(state.get("_buffers"))]:
            if isinstance(value, Tensor) and name not in passing:
                tensors[prefix + name] = value
        children = reversed(_items(state.get("_modules")))
        waiting += [(f"{prefix}{name}.", child, (*above, id(module))) for name, child in children]
    return {}


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in mapping.items() if isinstance(k, str)] if isinstance(mapping, Mapping) else []


def _check(weights: Mapping[str, Tensor], path: str) -> None:
    """Raises UserError: tensors without values, or that would take far more memory than the file."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    if empty := next((name for name, tensor in weights.items() if tensor.is_meta), None):
        raise UserError(f"model.checkpoint={path}: {empty} has no values, only a shape (torch's device meta)")
    if sum(sizes.values()) > SLACK + RATIO * os.path.getsize(path):
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"model.checkpoint={path}: its tensors take {sum(sizes.values()) / 2**30:.1f} GiB, {largest} the most, "
            f"more than {RATIO} times the file; save the network's state_dict() alone"
        )


def _plain(tensor: Tensor) -> Tensor:
    """The same values, neither sparse nor quantized nor to be trained."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor.resolve_conj().resolve_neg()
