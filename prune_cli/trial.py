"""What a network cannot do without, found by trying it before anything is trained.

Tracing shows which channels go together; it can miss what only the network's own code knows: a view of fixed size,
a table by position, a branch that exists while training only. So each kind of removal is tried once on a copy with
random weights: half of everything goes, and what is left has to compute the same as with zeros, and to run in
training mode. Where it does not, the layers at fault are found by halving, and stay whole with the reason.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.channels import ChannelGraph
from prune_cli.cutting import PACKED, cut_in_place, mask_in_place
from prune_cli.evaluation import observe, random_images
from prune_cli.grouping import traced
from prune_cli.layers.stripe import unpackable
from prune_cli.masks import UNIT_AXES, Masks
from prune_cli.plain import plain
from prune_cli.streams import stream_norms
from prune_cli.structure import structure
from prune_cli.user_code import what_failed
from prune_cli.verify import first_difference

Removal = Literal["channel", "filter", "selection", "stripe", "group"]
_UNITS = {"channel": "filter", "filter": "filter", "selection": "filter", "stripe": "stripe", "group": "group"}
_PLURAL = {"filter": "channels", "stripe": "stripes", "group": "columns"}
_KNOWN: dict[tuple, Mapping[tuple[str, ...], str]] = {}  # per structure of a network, and what is removed


def channel_graph(model: nn.Module) -> ChannelGraph:
    """The channel groups of the network; those that it cannot do without are blocked."""
    return traced(model).blocking(indispensable(model, "channel"))


def indispensable(model: nn.Module, removal: Removal) -> Mapping[tuple[str, ...], str]:
    """What cannot be removed from the network, and why: the end of a sentence that begins with the layer's name.

    channel    whole channels, by the layers that write them
    filter     filters alone, whose channel other layers go on writing; what is left is put back at its places
    selection  channels of a stream, for the layers behind one batch norm
    stripe, group  parts of all filters of a layer, which becomes a packed one
    """
    key = (removal, structure(model))
    if key not in _KNOWN:
        _KNOWN[key] = _refused(plain(model), removal)
    return _KNOWN[key]


def why_not_for_itself(graph: ChannelGraph, layer: str) -> str | None:
    """Why the layer's filters cannot be removed where other layers go on writing their channels; None = they can."""
    return graph.why_not_for_itself(layer) or indispensable(graph.model, "filter").get((layer,))


def why_not_packed(model: nn.Module, layer: str, removal: Removal) -> str | None:
    """Why the layer cannot do with a part of its stripes or groups; None = it can."""
    return unpackable(model.get_submodule(layer)) or indispensable(model, removal).get((layer,))


class _Attempt(NamedTuple):
    """Half of the units of some layers, to be removed together. `names`: by which they are refused."""

    names: tuple[str, ...]
    keep: Mapping[str, Tensor]


def _refused(model: nn.Module, removal: Removal) -> dict[tuple[str, ...], str]:
    """By halving: what fails together with others that are known to go is at fault."""
    accepted: list[_Attempt] = []
    refused: dict[tuple[str, ...], str] = {}

    def settle(attempts: Sequence[_Attempt]) -> None:
        if (problem := _problem(model, [*accepted, *attempts], removal)) is None:
            accepted.extend(attempts)
        elif len(attempts) == 1:
            refused[attempts[0].names] = problem
        else:
            settle(attempts[: len(attempts) // 2])
            settle(attempts[len(attempts) // 2 :])

    attempts = list(_ATTEMPTS[removal](model))
    if removal in PACKED:  # another layer in its place would go unused
        never = _never_called(model)
        refused |= dict.fromkeys((a.names for a in attempts if a.names[0] in never), "the network never calls it")
        attempts = [attempt for attempt in attempts if attempt.names not in refused]
    if attempts:
        settle(attempts)
    return refused


def _channels(model: nn.Module) -> Iterator[_Attempt]:
    for group in traced(model).groups:
        if group.removable and group.width > group.block:
            keep = _every_other(group.width // group.block).repeat_interleave(group.block)
            yield _Attempt(group.producers, dict.fromkeys(group.sources, keep))


def _filters(model: nn.Module) -> Iterator[_Attempt]:
    graph = traced(model)
    for name, layer in model.named_modules():
        prunable = isinstance(layer, (nn.Conv2d, nn.Linear)) and graph.why_not_for_itself(name) is None
        if prunable and len(layer.weight) > 1:
            yield _Attempt((name,), {name: _every_other(len(layer.weight))})


def _selections(model: nn.Module) -> Iterator[_Attempt]:
    for name in stream_norms(model):
        if (width := model.get_submodule(name).num_features) > 1:
            yield _Attempt((name,), {name: _every_other(width)})


def _packings(unit: str) -> Callable[[nn.Module], Iterator[_Attempt]]:
    def attempts(model: nn.Module) -> Iterator[_Attempt]:
        for name, layer in model.named_modules():
            if unpackable(layer) is None:
                shape = [size for axis, size in enumerate(layer.weight.shape) if axis in UNIT_AXES[unit]]
                places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
                keep = sum(places) % 2 == 0  # a checkerboard: something of every filter, input and position is left
                if not keep.all():
                    yield _Attempt((name,), {name: keep})

    return attempts


_ATTEMPTS: Mapping[Removal, Callable[[nn.Module], Iterator[_Attempt]]] = {
    "channel": _channels, "filter": _filters, "selection": _selections, **{unit: _packings(unit) for unit in PACKED},
}  # fmt: skip


def _never_called(model: nn.Module) -> set[str]:
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    called: set[str] = set()
    observe(model, random_images(model), layers, lambda layer, inputs, output: called.add(layers[layer]))
    return set(layers.values()) - called


def _every_other(count: int) -> Tensor:
    return torch.arange(count) % 2 == 1


def _problem(model: nn.Module, attempts: Sequence[_Attempt], removal: Removal) -> str | None:
    """What goes wrong where all of the attempts are made; None = nothing."""
    unit, known = _UNITS[removal], {} if removal == "channel" else indispensable(model, "channel")
    what = f"without some of its {_PLURAL[unit]} the network"
    masks = Masks(unit, {name: keep for attempt in attempts for name, keep in attempt.keep.items()}, 0.5)
    masked = _randomised(copy.deepcopy(model))
    try:
        small = cut_in_place(copy.deepcopy(masked), mask_in_place(traced(masked).blocking(known), masks), masks)
        if (found := first_difference(masked, small)) is not None:
            return f"{what} computes something else: {found[0] or 'the output'} {found[1]}"
    except Exception as problem:  # of the user's code, or because a layer is not what it seems
        return f"{what} does not run ({what_failed(problem)})"
    return _problem_in_training(masked, small.model, what)


def _problem_in_training(masked: nn.Module, small: nn.Module, what: str) -> str | None:
    try:
        expected = masked.train()(random_images(masked))
    except Exception:  # it does not train as it is either, which others say
        return None
    try:
        found = small.train()(random_images(masked))
    except Exception as problem:
        return f"{what} does not train ({what_failed(problem)})"
    same = _shapes(expected) == _shapes(found)
    return None if same else f"{what} makes {_shapes(found)} while it trains, not {_shapes(expected)}"


def _shapes(made: Any) -> Any:
    return tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__


@torch.no_grad()
def _randomised(model: nn.Module) -> nn.Module:
    """In place: with the constants that networks begin with, some removals would be exact by accident."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.is_floating_point()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            drawn /= max(1, parameter[0].numel()) ** 0.5  # so that the values stay of one size behind many layers
        else:
            drawn = 1 + 0.3 * drawn.clamp(-2, 2)
        parameter.copy_(drawn)
    for norm in (m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None):
        norm.running_mean.copy_(0.3 * torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator))
    return model
