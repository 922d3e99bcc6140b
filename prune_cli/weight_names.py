"""Whose tensor is whose: the names in a file of weights, read as the names of a network."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# What DataParallel, torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a part.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class View(NamedTuple):
    """The tensors of a file under names that may be a network's, and what was done to make them."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def views(weights: Mapping[str, Tensor]) -> Iterator[View]:
    """The names as they are; with weights that torch computes put together; and without wrappers."""
    yield View(dict(weights))
    tensors, masked = _masked(weights)
    tensors, normed = _normed(tensors)
    made = View(tensors, tuple(
        f"{what}: {len(names)} of the checkpoint's tensors ({listed(names)})."
        for names, what in ((masked, "Multiplied with their masks, as torch.nn.utils.prune does"),
                            (normed, "Computed from direction and length, as weight_norm does"))
        if names
    ))  # fmt: skip
    yield made
    bare = {".".join(part for part in name.split(".") if part not in WRAPPERS): t for name, t in tensors.items()}
    yield View(bare, made.notes)


def prefixes(view: Mapping[str, Tensor], groups: list[list[str]]) -> list[str]:
    """What may stand before the network's names so that they are all in the view: the empty string, or something
    that ends in a dot. groups: the network's names, those of one tensor together, of which one suffices."""
    if not groups:
        return [""]
    found = {name.removesuffix(own) for own in groups[0] for name in view if name.endswith(own)}
    return sorted(
        prefix for prefix in found
        if prefix[-1:] in ("", ".") and all(any(prefix + own in view for own in group) for group in groups)
    )  # fmt: skip


def further_layers(view: Mapping[str, Tensor], used: set[str]) -> Iterator[str]:
    """Names in the view that differ from used ones in numbers only: layers of a deeper network, of which those that
    are used would be a part that computes nothing."""
    kinds = {re.sub(r"\d+", "#", name) for name in used}
    return (name for name in view if name not in used and re.sub(r"\d+", "#", name) in kinds)


def listed(names: list[str], most: int = 3) -> str:
    """The first of them, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_computed(name: str) -> bool:
    """Whether the tensor is one that a weight is computed from, by a parametrization or by spectral_norm."""
    return "parametrizations" in name.split(".") or name.endswith("weight_orig")


def _masked(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """With X for X_orig and X_mask, in X_orig's place; and the names of these X."""
    bases = [name.removesuffix("_orig") for name in weights if name.endswith("_orig")]
    masked = [base for base in bases if _same_shape(weights[f"{base}_orig"], weights.get(f"{base}_mask"))]
    made = {f"{base}_orig": (base, weights[f"{base}_orig"] * weights[f"{base}_mask"]) for base in masked}
    return _replaced(weights, made, {f"{base}_mask" for base in masked}), masked


def _normed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """With what weight_norm computes from a length and a direction, in the place of the length; and its names."""
    made, gone = {}, set()
    for name, length in weights.items():
        if name.endswith("_g"):
            direction, whole = f"{name[:-1]}v", name[:-2]
        elif found := re.fullmatch(r"(|.*\.)parametrizations\.(\w+)\.original0", name):
            direction, whole = f"{name[:-1]}1", found[1] + found[2]
        else:
            continue
        if (axes := _norm_axes(length, weights.get(direction))) is not None:
            v = weights[direction]
            made[name] = whole, v * (length / torch.linalg.vector_norm(v, dim=axes, keepdim=True).view(length.shape))
            gone.add(direction)
    return _replaced(weights, made, gone), [name for name, _ in made.values()]


def _norm_axes(length: Tensor, direction: Tensor | None) -> tuple[int, ...] | None:
    """The axes that a norm of `direction` has gone over when it is of the shape of `length`: all, or all but one."""
    if direction is None or length.ndim not in (0, direction.ndim):
        return None
    kept = [axis for axis, size in enumerate(length.shape) if size > 1]
    if len(kept) > 1 or any(length.shape[axis] != direction.shape[axis] for axis in kept):
        return None
    return tuple(axis for axis in range(direction.ndim) if axis not in kept)


def _same_shape(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape


def _replaced(
    weights: Mapping[str, Tensor], made: Mapping[str, tuple[str, Tensor]], gone: set[str]
) -> dict[str, Tensor]:
    return dict(made.get(name, (name, tensor)) for name, tensor in weights.items() if name not in gone)
