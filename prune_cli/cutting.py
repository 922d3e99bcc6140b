"""Taking out of a network what the masks say, where its channel groups are known.

The constant that a removed channel would go on emitting is dropped, as the papers' code does: its scale and
shift are zero in the masked network, which makes the removal exact. Or it is folded, where a method has
`constant=fold`: the masked channel emits it, and in the cut network the layers that read it have taken it over
(see `folding`). A channel of a residual sum goes only when every layer that writes it is masked there. A filter
of such a sum that dies alone goes too, with its entries of the norm that is its layer's own; the sum keeps its
width, and a `ScatterChannels` puts the surviving channels back at their places. A batch norm that is masked
itself sits on a stream: its removed channels are left out by a `SelectChannels` before it, for the layers
behind it alone (see `streams`).
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.channels import ChannelGraph, ChannelGroup, united
from prune_cli.folding import Share, fold
from prune_cli.layers.gathered import GatheredConv2d
from prune_cli.layers.scatter import scattered
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.masks import UNIT_AXES, Masks, dead_filters
from prune_cli.modules import replace_module
from prune_cli.settings import Constant
from prune_cli.slicing import take_out
from prune_cli.streams import select

# Layers of which only the surviving units exist, with nothing to hold at zero.
PACKED = {"stripe": StripeConv2d, "group": GatheredConv2d}


@dataclass(frozen=True)
class Cut:
    """A cut network, and how it relates to the masked one.

    model    the smaller network
    masks    what must still be held at zero in it, in its own coordinates
    removed  per layer the output channels that are gone, in the old coordinates
    renamed  new names of layers that got another one
    unread   per layer the input channels that are gone, in the old coordinates
    shifted  layers whose constants the batch norm behind them has taken over: only from there on they compute
             what they did
    notes    sentences a user should read: what became of the constants
    """

    model: nn.Module
    masks: Masks
    removed: dict[str, list[int]]
    renamed: dict[str, str]
    unread: dict[str, list[int]]
    shifted: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removal:
    """What goes, per layer, in the coordinates of the network before the cut.

    removed     channels that a layer writes or norms
    unread      channels that it reads and nobody writes any more
    gaps        filters that die while other layers go on writing their channels
    unselected  channels of a norm on a stream that the layers behind it no longer read
    shares      constants of removed channels that layers take over
    notes       what became of the constants
    """

    removed: dict[str, list[int]]
    unread: dict[str, list[int]]
    gaps: list["_Gap"]
    unselected: dict[str, list[int]]
    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()


def mask_in_place(graph: ChannelGraph, masks: Masks, constant: Constant = "drop") -> Removal:
    """Zero all removed units of the network behind `graph`; returns what a cut takes out of it."""
    model = graph.model
    _zero_units(model, masks)
    dead = silenced = _dead_channels(graph, masks)
    removed = united(graph.outputs(group, channels) for group, channels in dead)
    unread = united(graph.inputs(group, channels) for group, channels in dead)
    removal = Removal(removed, unread, _gaps(graph, masks, removed), _unselected(model, masks))
    for outputs in (removal.unselected, *(gap.outputs for gap in removal.gaps)):
        _zero_channels(model, outputs)
    if constant == "fold":
        alone = sum(len(gap.channels) for gap in removal.gaps) + sum(map(len, removal.unselected.values()))
        folding = fold(graph, dead, alone)
        removal = replace(removal, shares=folding.shares, notes=folding.notes)
        silenced = folding.dropped
    _zero_channels(model, united(graph.outputs(group, channels) for group, channels in silenced))
    return removal


def cut_in_place(model: nn.Module, removal: Removal, masks: Masks) -> Cut:
    """Take out of the masked network what goes."""
    removed, unread, unselected = removal.removed, removal.unread, removal.unselected
    for share in removal.shares:
        share.take_over(model)
    for name in removed.keys() | unread.keys():
        take_out(model.get_submodule(name), removed.get(name, ()), unread.get(name, ()))
    for gap in removal.gaps:
        _close(model, gap, removed.get(gap.layer, []))
        removed = united([removed, gap.outputs])
    remaining = _remap(masks, removed, unread)
    renamed = {gap.last: f"{gap.last}.layer" for gap in removal.gaps}
    if unselected:
        keep = {name: remaining.keep.pop(name) for name in unselected if name in remaining.keep}
        keep = {name: kept for name, kept in keep.items() if kept.any()}  # else it stays, and emits zeros
        renamed |= select(model, keep)
        removed = united([removed, {name: unselected[name] for name in keep}])
    if packed := PACKED.get(masks.unit):
        for layer, pattern in remaining.keep.items():
            if not pattern.all():
                replace_module(model, layer, packed.from_conv(model.get_submodule(layer), pattern.cpu()))
        remaining = Masks(masks.unit, {}, masks.requested)
    shifted = frozenset(share.layer for share in removal.shares if share.norm is not None)
    return Cut(model, remaining, removed, renamed, unread, shifted, removal.notes)


def _zero_units(model: nn.Module, masks: Masks) -> None:
    with torch.no_grad():
        for layer in masks.keep:
            weight = model.get_submodule(layer).weight
            weight.mul_(masks.of(layer, weight))


def _dead_channels(graph: ChannelGraph, masks: Masks) -> list[tuple[ChannelGroup, list[int]]]:
    """Per removable group the channels that all of its sources have lost, as far as they make whole
    blocks; at least one block stays."""
    found = []
    for group in graph.groups:
        if not group.removable:
            continue
        dead = torch.stack([dead_filters(masks, p, graph.model.get_submodule(p)) for p in group.sources]).all(0)
        blocks = dead.view(-1, group.block).all(1).nonzero().flatten().tolist()[: group.width // group.block - 1]
        channels = [block * group.block + place for block in blocks for place in range(group.block)]
        if channels:
            found.append((group, channels))
    return found


@dataclass(frozen=True)
class _Gap:
    """Filters that die while another layer goes on writing their channels.

    layer     their convolution, or linear layer on maps
    norm      the norm that is its own, None where there is none
    channels  which filters
    """

    layer: str
    norm: str | None
    channels: list[int]

    @property
    def last(self) -> str:
        """The layer behind which the surviving channels are put back."""
        return self.norm or self.layer

    @property
    def outputs(self) -> dict[str, list[int]]:
        return {name: self.channels for name in (self.layer, self.norm) if name is not None}


def _gaps(graph: ChannelGraph, masks: Masks, removed: dict[str, list[int]]) -> list[_Gap]:
    """The dead filters that are not `removed` with their whole channel; of every layer one stays."""
    found = []
    for layer in masks.keep if masks.unit == "filter" else ():
        module = graph.model.get_submodule(layer)
        if graph.why_not_for_itself(layer):
            continue
        gone = removed.get(layer, [])
        dead = [c for c in dead_filters(masks, layer, module).nonzero().flatten().tolist() if c not in gone]
        if channels := dead[: len(module.weight) - len(gone) - 1]:
            found.append(_Gap(layer, graph.own_norm(layer), channels))
    return found


@torch.no_grad()
def _close(model: nn.Module, gap: _Gap, removed: list[int]) -> None:
    """Take the gap's filters out, and put the others back at their places in the sum, from which
    the `removed` channels are gone already."""
    width = [c for c in range(model.get_submodule(gap.layer).weight.shape[0] + len(removed)) if c not in removed]
    kept = torch.tensor([place for place, c in enumerate(width) if c not in gap.channels])
    gone = set(range(len(width))) - set(kept.tolist())
    for name in gap.outputs:
        take_out(model.get_submodule(name), gone)
    last = model.get_submodule(gap.last)
    replace_module(model, gap.last, scattered(last, kept.to(next(model.parameters()).device), len(width)))


def _unselected(model: nn.Module, masks: Masks) -> dict[str, list[int]]:
    """Per masked batch norm the channels that the layers behind it no longer read."""
    norms = [name for name in masks.keep if isinstance(model.get_submodule(name), _NormBase)]
    return {name: (~masks.keep[name]).nonzero().flatten().tolist() for name in norms}


def _zero_channels(model: nn.Module, outputs: dict[str, list[int]]) -> None:
    """So that the channels emit zero: weights, biases, and what a norm without weights subtracts."""
    with torch.no_grad():
        for name, channels in outputs.items():
            module = model.get_submodule(name)
            if isinstance(module, nn.PReLU):  # its slopes make nothing of a zero, and one may serve all channels
                continue
            for attribute in ("weight", "bias", "running_mean"):
                if (tensor := getattr(module, attribute, None)) is not None:
                    tensor[channels] = 0


def _remap(masks: Masks, removed: dict[str, list[int]], unread: dict[str, list[int]]) -> Masks:
    """The masks of the cut network: what belongs to removed filters and to inputs that nobody
    writes is gone, and so are layers of which everything that is left is kept."""
    keep = {}
    for layer, mask_ in masks.keep.items():
        for axis, channels in enumerate((removed.get(layer, ()), unread.get(layer, ()))):
            if channels and axis in UNIT_AXES[masks.unit]:
                dim = UNIT_AXES[masks.unit].index(axis)
                left = torch.tensor(sorted(set(range(mask_.shape[dim])) - set(channels)), device=mask_.device)
                mask_ = mask_.index_select(dim, left)
        if not mask_.all():
            keep[layer] = mask_
    return Masks(masks.unit, keep, masks.requested)
