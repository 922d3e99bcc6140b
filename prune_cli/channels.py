"""Which layers share channels: what goes together when a channel is removed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.evaluation import evaluating
from prune_cli.modules import fixed
from prune_cli.slicing import block_size, follows
from prune_cli.tracing import OUTPUT, Untraced, trace, writes


@dataclass(frozen=True)
class _Member:
    """A layer that writes, norms (`written`) or reads the channels of a group: per channel the places
    where it has it, several behind a flatten or where it is concatenated twice."""

    layer: str
    written: bool
    places: dict[int, list[int]]

    @cached_property
    def everywhere(self) -> list[int]:
        """The places of all channels, in the channels' order: asked for again and again."""
        return [place for channel in sorted(self.places) for place in self.places[channel]]


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels that exist or vanish together.

    producers  names of the convolutions and linear layers that write these channels; more than
               one where a residual sum, a grouped convolution or a gate couples them
    sources    those of the producers that decide: a channel is dead when all of them are dead there.
               Not a grouped convolution, whose block of outputs is made of the same block of inputs,
               nor a gate, which only scales (squeeze-and-excitation)
    norms      names of the batch norms on them; after a concatenation a norm has further channels
    width      number of channels
    block      neighbouring channels that go together: more than one where a grouped convolution reads them
    blocked    why no channel can be removed (the network's output or input, an operation that moves or
               mixes channels, an unknown layer), so that another one would change; None = all can
    """

    producers: tuple[str, ...]
    sources: tuple[str, ...]
    norms: tuple[str, ...]
    width: int
    block: int
    blocked: str | None

    @property
    def removable(self) -> bool:
        return self.blocked is None


class ChannelGraph:
    """The channel groups of a network.

    model.input_shape is the (C, H, W) that the network is traced with; `indispensable` are reasons why channels
    cannot be removed that tracing does not see, by the layers that write them.
    pointwise  names of the linear layers that work on the channels of maps, as 1x1 convolutions do
    """

    def __init__(self, model: nn.Module, indispensable: Mapping[tuple[str, ...], str] | None = None) -> None:
        self.model, self._indispensable, self._fixed = model, indispensable or {}, fixed(model)
        with evaluating(model):
            self._trace = trace(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._order = {name: place for place, name in enumerate(self._names.values())}
        self._members: dict[ChannelGroup, list[_Member]] = {}
        described = [self._describe(found) for found in self._trace.get_all_groups()]
        found = (group for group in described if group.producers)
        self.groups = tuple(sorted(found, key=lambda group: self._order[group.producers[0]]))
        self.pointwise = frozenset(self._names[layer] for layer in self._trace.pointwise)

    @property
    def inner(self) -> tuple[ChannelGroup, ...]:
        """The groups with one source, whose channels can be chosen one by one without asking another layer."""
        return tuple(g for g in self.groups if g.removable and len(g.sources) == 1 and g.block == 1)

    def of(self, layer: str) -> ChannelGroup | None:
        """The group that the layer writes; None where the network never calls the layer."""
        return next((group for group in self.groups if layer in group.producers), None)

    def why_not_alone(self, layer: str) -> str | None:
        """Why the layer's filters cannot be removed one by one, each with its channel; None = they can."""
        group = self.of(layer)
        if group is None:
            untraced = isinstance(self._trace, Untraced)
            return self._trace.reason if untraced else "the network never calls it, or without a gradient"
        if group.blocked is not None:
            return group.blocked
        others = [name for name in group.sources if name != layer]
        others = f"{others[0]} and {len(others) - 1} more" if len(others) > 2 else " and ".join(others)
        if layer not in group.sources:
            module = self.model.get_submodule(layer)
            return f"{_kind(module) if follows(module) else 'a gate'}: its channels go with those of {others}"
        if group.block > 1:
            return f"a grouped convolution reads its channels in blocks of {group.block}"
        return f"a residual sum shares its channels with {others}" if others else None

    def why_not_for_itself(self, layer: str) -> str | None:
        """Why the layer's filters cannot be removed where other layers go on writing their channels; None = they
        can, and what is left is put back at its places."""
        module, group = self.model.get_submodule(layer), self.of(layer)
        if layer in self._fixed:
            return self._fixed[layer]
        if group is None or group.blocked == OUTPUT:
            return self.why_not_alone(layer)
        if isinstance(module, nn.Linear):
            return None if layer in self.pointwise else group.blocked or "fully connected"
        return _kind(module) if module.groups > 1 else None

    def outputs(self, group: ChannelGroup, channels: Sequence[int]) -> dict[str, list[int]]:
        """The output channels of every producer and norm that are these `channels` of the group."""
        return {layer: sorted(places) for layer, places in self._places(group, channels, written=True)}

    def inputs(self, group: ChannelGroup, channels: Sequence[int]) -> dict[str, list[int]]:
        """The input channels of every layer that reads these `channels` of the group, in their
        order; behind a flatten one channel is several inputs."""
        return dict(self._places(group, channels, written=False))

    def _places(self, group: ChannelGroup, channels: Sequence[int], written: bool) -> Iterator[tuple[str, list[int]]]:
        for member in self._members[group]:
            if member.written != written:
                continue
            if channels == range(group.width):
                places = member.everywhere
            else:
                places = [place for channel in channels for place in member.places.get(channel, ())]
            if places:
                yield member.layer, places

    def own_norm(self, layer: str) -> str | None:
        """The batch norm that reads this layer and no other, where nothing else reads the layer."""
        node = self._trace.module2node.get(self.model.get_submodule(layer))
        readers = node.outputs if node else []  # a layer that the network never calls has no node
        if len(readers) != 1 or not isinstance(readers[0].module, _NormBase) or len(readers[0].inputs) != 1:
            return None
        return self._names[readers[0].module]

    def ways(self, layer: str) -> dict[str, set[tuple[str, ...]]]:
        """Per layer that reads what this one writes, the batch norms that lie between: for each way, in order."""
        start = self._trace.module2node.get(self.model.get_submodule(layer))
        found, seen, open_ = {}, set(), [(start, ())] if start else []
        while open_:
            node, norms = open_.pop()
            for follower in node.outputs:
                name = self._names.get(follower.module, "")
                if writes(follower.module):
                    found.setdefault(name, set()).add(norms)
                    continue
                way = (follower, (*norms, name) if isinstance(follower.module, _NormBase) else norms)
                if way not in seen:
                    seen.add(way)
                    open_.append(way)
        return found

    def _describe(self, found) -> ChannelGroup:
        producers, norms, reasons, members, block = [], [], [], [], 1
        for item in found:
            module, written = item.dep.target.module, self._trace.is_out_channel_pruning_fn(item.dep.handler)
            reasons.append(self._trace.reason(item.dep))
            if module not in self._names:
                continue
            block = max(block, block_size(module))
            places: dict[int, list[int]] = {}
            for channel, place in zip(item.root_idxs, item.idxs):
                places.setdefault(channel, []).append(place)
            members.append(_Member(self._names[module], written, places))
            if written and writes(module):
                producers.append(self._names[module])
            elif written and isinstance(module, _NormBase):
                norms.append(self._names[module])
        producers.sort(key=self._order.__getitem__)
        sources = tuple(name for name in producers if self._decides(name))
        if not sources:
            reasons.append("no layer of its own writes its channels")
        width = len(found[0].idxs)
        reasons.extend(self._in_part(name, members, width) for name in sources)
        reasons.extend(self._constant(member) for member in members)
        reasons.extend(f"{m.layer} {self._fixed[m.layer]}" for m in members if m.layer in self._fixed)
        reasons.append(self._indispensable.get(tuple(producers)))
        blocked = next(filter(None, reasons), None)
        group = ChannelGroup(tuple(producers), sources, tuple(norms), width, block, blocked)
        self._members[group] = members
        return group

    def _in_part(self, layer: str, members: list[_Member], width: int) -> str | None:
        """Why a layer cannot lose these channels that writes some of them only, or others as well."""
        places = [m.places for m in members if m.layer == layer and m.written]
        channels = {channel for found in places for channel in found}
        written = {place for found in places for own in found.values() for place in own}
        whole = len(channels) == width and len(written) == _width(self.model.get_submodule(layer))
        return None if whole else f"a sum with a concatenation, of which {layer} writes a part"

    def _constant(self, member: _Member) -> str | None:
        """Why a layer that reads the channels would feel that they are gone: what comes of a zero is no zero."""
        module = self.model.get_submodule(member.layer)
        return None if member.written or not writes(module) else self._trace.constant(module, member.everywhere)

    def _decides(self, layer: str) -> bool:
        module = self.model.get_submodule(layer)
        return not follows(module) and not self._trace.is_gate(module)


def _width(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _kind(convolution: nn.Conv2d) -> str:
    """What one with several groups is called."""
    return "depthwise" if convolution.groups == convolution.in_channels else "a grouped convolution"


def united(parts: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Per layer the channels of all parts."""
    channels: dict[str, set[int]] = {}
    for part in parts:
        for name, idxs in part.items():
            channels.setdefault(name, set()).update(idxs)
    return {name: sorted(idxs) for name, idxs in channels.items()}
