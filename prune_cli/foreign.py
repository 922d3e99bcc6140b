"""Weights that another program trained, put into one of our networks."""

import hashlib
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn

from prune_cli.errors import UserError
from prune_cli.weight_files import SAFETENSORS
from prune_cli.weight_files import read_weights as read_weights
from prune_cli.weight_names import View, further_layers, is_computed, listed, prefixes, views

COUNTERS = {"num_batches_tracked", "n_averaged"}  # of batches and of averaged networks: they decide nothing


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (16 digits) of names and values. Not of the file, in which torch.save writes the file's own name."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode(errors="surrogatepass"))
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> tuple[str, ...]:
    """Copy the weights from the file `path` into the model: by name where all of the model's are there, as they are
    or behind one common prefix; else by order and shape. Returns what a user should know about them.

    Raises UserError: they are not the model's, naming the first that does not fit, or not finite; the model is
    unchanged.
    """
    ours = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and not _counts(name)}
    theirs = {name: t for name, t in weights.items() if not _counts(name)}
    view, pairs = _by_name(theirs, ours, path) or _by_order(theirs, ours, path)
    values = {our: _value(view.tensors, their, our, ours, path) for our, their in pairs.items()}
    with torch.no_grad():
        for our, value in values.items():
            ours[our].copy_(value)
    used = set(pairs.values())
    further = [name for name in view.tensors if name not in used]
    unused = f"Not in the network and not used: {len(further)} of the checkpoint's tensors ({listed(further)})."
    return (*view.notes, unused) if further else view.notes


def _by_name(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: str) -> tuple[View, dict[str, str]] | None:
    """Their names for ours; None where some of ours are not in the file. Raises UserError: they are there twice, or
    the file has more layers of their kind."""
    groups = _tied(ours)
    for view in views(theirs):
        found = prefixes(view.tensors, groups)
        if len(found) > 1 and found[0]:
            raise UserError(
                f"model.checkpoint={path}: holds the network's tensors {len(found)} times, behind "
                f"{' and '.join(found)}; save the network's state_dict() alone"
            )
        if found:
            names = [[found[0] + our for our in group if found[0] + our in view.tensors] for group in groups]
            _check_tied(view.tensors, names, path)
            if further := next(further_layers(view.tensors, {name for group in names for name in group}), None):
                raise _misfit(view.tensors, further, None, ours, path)
            return view, {name.removeprefix(found[0]): name for group in names for name in group}
    return None


def _tied(ours: Mapping[str, Tensor]) -> list[list[str]]:
    """Our names, those of one tensor together."""
    groups: dict[tuple, list[str]] = {}
    for name, t in ours.items():
        groups.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,), []).append(name)
    return list(groups.values())


def _check_tied(theirs: Mapping[str, Tensor], names: list[list[str]], path: str) -> None:
    """Raises UserError: their tensors differ where the network has one under several names."""
    for first, *others in names:
        for other in others:
            if not torch.equal(theirs[first], theirs[other]):
                raise UserError(
                    f"model.checkpoint={path}: its {first} and {other} differ, and are one tensor in the network; "
                    "choose the model that was trained"
                )


def _by_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: str) -> tuple[View, dict[str, str]]:
    """Their names for ours. Raises UserError: there is no order in the file, or it is not the network's."""
    plain, made, _ = views(theirs)
    if path.endswith(SAFETENSORS):
        stranger = next((name for name in theirs if name not in ours), None) or next(n for n in ours if n not in theirs)
        raise UserError(
            f"model.checkpoint={path}: {stranger} is not in both the file and the network, and a {SAFETENSORS} file "
            "keeps no order by which other names could be matched; save it with torch.save"
        )
    for view in (plain, made):
        if _out_of_order(view.tensors, ours) is None:
            return view, dict(zip(ours, view.tensors))
    if computed := next(filter(is_computed, made.tensors), None):
        raise UserError(
            f"model.checkpoint={path}: {computed} is what a weight is computed from by a parametrization that is not "
            "known here; save the state_dict() after torch's remove_parametrizations or remove_spectral_norm"
        )
    raise _misfit(made.tensors, *_out_of_order(made.tensors, ours), ours, path)


def _out_of_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[str | None, str | None] | None:
    """The first names, theirs and ours, that stand at one place and do not fit; None when all do."""
    for their, our in zip_longest(theirs, ours):
        elsewhere = their != our and their in ours  # a name of ours goes to no other tensor of ours
        if their is None or our is None or elsewhere or not _fits(their, theirs[their], our, ours[our]):
            return their, our
    return None


def _value(theirs: Mapping[str, Tensor], their: str, our: str, ours: Mapping[str, Tensor], path: str) -> Tensor:
    """Their tensor as ours. Raises UserError: it does not fit, or is not finite where ours is."""
    if not _fits(their, theirs[their], our, ours[our]):
        raise _misfit(theirs, their, our, ours, path)
    value = theirs[their].to(ours[our].dtype)
    wrong = ours[our].isfinite() & ~value.to(ours[our].device).isfinite()
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        raise UserError(
            f"model.checkpoint={path}: its {their} holds {value[tuple(index)].item()} at {index}; such weights compute "
            "nothing, choose a checkpoint from before they came"
        )
    return value


def _misfit(
    theirs: Mapping[str, Tensor], their: str | None, our: str | None, ours: Mapping[str, Tensor], path: str
) -> UserError:
    if their is None:
        problem = f"it has no tensor for the network's {_shown(our, ours)}"
    else:
        place = "has no place in the network" if our is None else f"does not fit the network's {_shown(our, ours)}"
        problem = f"its tensor {list(theirs).index(their) + 1} of {len(theirs)}, {_shown(their, theirs)}, {place}"
    return UserError(f"model.checkpoint={path}: {problem}; choose the model that was trained")


def _fits(their: str, theirs: Tensor, our: str, ours: Tensor) -> bool:
    """Of one shape, both with fractions or both without, and, where both names say what they are (a batch norm's
    weight is as long as its mean), of one kind."""
    kinds = {name.rpartition(".")[2] for name in (their, our)}
    known = {"weight", "bias", "running_mean", "running_var"}
    alike = theirs.is_floating_point() == ours.is_floating_point() and theirs.is_complex() == ours.is_complex()
    return theirs.shape == ours.shape and alike and (len(kinds) == 1 or not kinds <= known)


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS  # and old checkpoints have none


def _shown(name: str, tensors: Mapping[str, Tensor]) -> str:
    tensor = tensors[name]
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{name} {tuple(tensor.shape)}{kind}"
