"""What removed channels go on emitting, taken over by the layers that read them (`method.constant=fold`).

A filter of zeros still emits a constant: its bias, or behind a batch norm relu(shift - scale * mean / deviation).
Where a layer reads the same number from every image and at every place, its bias can take over weight * number
for good, and the channel goes without a trace. A convolution without bias leaves it to the batch norm that is
its own. Whether the number is the same is measured on random images, so that pooling, concatenations or what a
padded depthwise convolution does at the border need no rules here.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prune_cli.channels import ChannelGraph, ChannelGroup
from prune_cli.evaluation import observe, random_images
from prune_cli.modules import why_not_replaced
from prune_cli.slicing import follows

ALIKE = 1e-5  # relative: pooling over windows of several sizes rounds a constant in several ways

# What becomes of a channel's constant: taken over, there is none, or why it is lost.
FOLDED, SILENT = "folded", "silent"
GATED = "a gate scales them"
VARIES = "a layer that reads them sees no constant"
PADS = "a layer that reads them pads its input"
OWN = "a layer that reads them is not called as it is"
NOWHERE = "a layer that reads them has neither a bias nor a batch norm of its own"
STAYS = "their channel stays for other layers"


@dataclass(frozen=True)
class Share:
    """The constants that one layer takes over.

    layer   the layer that reads them
    norm    the batch norm behind it whose mean is lowered by them, None = the layer's bias is raised
    places  which of its inputs they are
    values  (len(places),)
    """

    layer: str
    norm: str | None
    places: list[int]
    values: Tensor

    @torch.no_grad()
    def take_over(self, model: nn.Module) -> None:
        """In place, while the inputs are still there."""
        layer = model.get_submodule(self.layer)
        weights = layer.weight[:, self.places].double().reshape(len(layer.weight), len(self.places), -1).sum(2)
        share = weights @ self.values.double()
        if self.norm is None:
            layer.bias.add_(share)
        else:
            model.get_submodule(self.norm).running_mean.sub_(share)


@dataclass(frozen=True)
class Folding:
    """What becomes of the constants of removed channels.

    shares   per layer that reads some of them what it takes over
    dropped  per group the channels that have to emit zero instead
    notes    a sentence about how many they are, where there are any
    """

    shares: tuple[Share, ...]
    dropped: tuple[tuple[ChannelGroup, list[int]], ...]
    notes: tuple[str, ...]


def fold(graph: ChannelGraph, dead: Sequence[tuple[ChannelGroup, list[int]]], alone: int) -> Folding:
    """Of the network behind `graph`, in which the weights of all `dead` channels are zero.

    alone  how many more filters are going to emit zero, because other layers keep their channel
    """
    readers = _Readers(graph, {reader for group, channels in dead for reader in _reading(graph, group, channels)})
    taken: dict[str, list[int]] = {}
    fates, dropped = Counter({STAYS: alone}), []
    for group, channels in dead:
        places = {channel: _reading(graph, group, [channel]) for channel in channels}
        gated = _gated(graph, group)
        fate = {channel: GATED if gated else readers.fate(inputs) for channel, inputs in places.items()}
        fate |= _of_blocks(fate, group.block)
        for channel in (channel for channel in channels if fate[channel] == FOLDED):
            for reader, inputs in places[channel].items():
                if readers.fate({reader: inputs}) == FOLDED:  # behind another norm it may have none
                    taken.setdefault(reader, []).extend(inputs)
        fates.update(fate.values())
        dropped.append((group, [channel for channel in channels if fate[channel] not in (FOLDED, SILENT)]))
    shares = tuple(readers.share(reader, places) for reader, places in taken.items())
    return Folding(shares, tuple(dropped), (_note(fates),) if fates.total() else ())


def _of_blocks(fate: Mapping[int, str], block: int) -> dict[int, str]:
    """Where a grouped convolution mixes blocks of channels: one that loses its constant changes those of its block."""
    lost = {channel // block: why for channel, why in fate.items() if why not in (FOLDED, SILENT)}
    return {channel: lost[channel // block] for channel in fate if channel // block in lost}


class _Readers:
    """The layers that read removed channels, and the lowest and highest value (I,) of each of their inputs."""

    def __init__(self, graph: ChannelGraph, names: Collection[str]) -> None:
        self.graph = graph
        self.seen = _ranges(graph.model, names)

    def fate(self, places: dict[str, list[int]]) -> str:
        """FOLDED or SILENT, or why what is read at these inputs of these layers cannot be taken over by all."""
        fates = {self._fate(reader, inputs) for reader, inputs in places.items()} | {SILENT}
        obstacles = sorted(fates - {FOLDED, SILENT})
        return obstacles[0] if obstacles else FOLDED if FOLDED in fates else SILENT

    def _fate(self, reader: str, inputs: list[int]) -> str:
        layer = self.graph.model.get_submodule(reader)
        if reader not in self.seen or why_not_replaced(layer):
            return OWN
        low, high = (bound[inputs] for bound in self.seen[reader])
        if not (low.any() or high.any()):
            return SILENT
        if not (high - low <= ALIKE * low.abs().maximum(high.abs())).all():  # also where it is not a number
            return VARIES
        # Zeros at the border: what a channel adds there is less than elsewhere.
        if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
            return PADS
        return FOLDED if layer.bias is not None or self._norm(reader) else NOWHERE

    def share(self, reader: str, places: list[int]) -> Share:
        low, high = (bound[places] for bound in self.seen[reader])
        norm = None if self.graph.model.get_submodule(reader).bias is not None else self._norm(reader)
        return Share(reader, norm, places, (low + high) / 2)

    def _norm(self, reader: str) -> str | None:
        name = self.graph.own_norm(reader)
        norm = self.graph.model.get_submodule(name or "")
        return None if name is None or norm.running_mean is None or why_not_replaced(norm) else name


def _reading(graph: ChannelGraph, group: ChannelGroup, channels: list[int]) -> dict[str, list[int]]:
    """Per layer that is left with the channels' constants the inputs that they are. A grouped convolution
    goes with them."""
    found = graph.inputs(group, channels)
    return {name: inputs for name, inputs in found.items() if not follows(graph.model.get_submodule(name))}


def _gated(graph: ChannelGraph, group: ChannelGroup) -> bool:
    """Whether what the channels emit is scaled by something that depends on the image, even if not on the
    random ones that are measured with: a hard sigmoid may be one for all of them."""
    others = set(group.producers) - set(group.sources)
    return any(not follows(graph.model.get_submodule(name)) for name in others)


def _ranges(model: nn.Module, names: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer the lowest and the highest value (I,) of each input, over images, places and calls."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    layers = {model.get_submodule(name): name for name in names}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        values = inputs[0].movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        low, high = values.amin(0), values.amax(0)
        if (name := layers[layer]) in seen:
            low, high = low.minimum(seen[name][0]), high.maximum(seen[name][1])
        seen[name] = low, high

    with torch.backends.cudnn.flags(enabled=False):
        observe(model, random_images(model), layers, note)
    return seen


def _note(fates: Counter) -> str:
    """Of how many channels have which fate."""
    lost = {fate: count for fate, count in fates.most_common() if count and fate not in (FOLDED, SILENT)}
    because = "; ".join(f"{count}: {reason}" for reason, count in lost.items())
    return (
        f"method.constant=fold: of {fates.total()} removed channels {fates[FOLDED]} left their constant to the layers "
        f"that read them, {fates[SILENT]} had none, {sum(lost.values())} lost it{f' ({because})' if lost else ''}."
    )
