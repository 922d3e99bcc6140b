"""Which layers share channels: what goes together when a channel is removed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from prune_cli.slicing import follows

INPUT = "its channels are those of the network's input"
OUTPUT = "its channels are the network's output"


@dataclass(frozen=True)
class Member:
    """A layer that writes, norms (`written`) or reads the channels of a group: per channel the places
    where it has it, several behind a flatten or where it is concatenated twice."""

    layer: str
    written: bool
    places: Mapping[int, Sequence[int]]

    @cached_property
    def everywhere(self) -> list[int]:
        """The places of all channels, in the channels' order: asked for again and again."""
        return [place for channel in sorted(self.places) for place in self.places[channel]]


@dataclass(eq=False)
class Step:
    """A layer or an operation on the way of the channels.

    layer    its name; "" for an operation
    norm     whether it is a batch norm; writes: whether it writes channels of its own
    inputs   how many others it reads; readers: those that read it
    """

    layer: str
    norm: bool
    writes: bool
    inputs: int
    readers: list["Step"] = field(default_factory=list)


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


@dataclass(frozen=True)
class ChannelGraph:
    """The channel groups of a network, by the names of its layers.

    groups     in the order of the network
    members    per group, by its producers, the layers that have its channels
    pointwise  the linear layers that work on the channels of maps, as 1x1 convolutions do
    fixed      per module whose tensors nobody may change why
    steps      per convolution and linear layer that is called where it stands on the way of the channels
    untraced   why the network could not be traced, so that there are no groups
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    members: Mapping[tuple[str, ...], Sequence[Member]]
    pointwise: frozenset[str]
    fixed: Mapping[str, str]
    steps: Mapping[str, Step]
    untraced: str | None = None

    def of_model(self, model: nn.Module) -> "ChannelGraph":
        """The same of another network of the same structure."""
        return replace(self, model=model)

    def blocking(self, reasons: Mapping[tuple[str, ...], str]) -> "ChannelGraph":
        """The same with groups, by their producers, whose channels cannot be removed after all."""
        groups = (replace(g, blocked=g.blocked or reasons.get(g.producers)) for g in self.groups)
        return replace(self, groups=tuple(groups))

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
            return self.untraced or "the network never calls it, or without a gradient"
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
        if layer in self.fixed:
            return self.fixed[layer]
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
        for member in self.members[group.producers]:
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
        readers = self.steps[layer].readers if layer in self.steps else []  # else the network never calls it
        alone = len(readers) == 1 and readers[0].norm and readers[0].inputs == 1
        return readers[0].layer if alone else None

    def ways(self, layer: str) -> dict[str, set[tuple[str, ...]]]:
        """Per layer that reads what this one writes, the batch norms that lie between: for each way, in order."""
        found, seen, open_ = {}, set(), [(self.steps[layer], ())] if layer in self.steps else []
        while open_:
            step, norms = open_.pop()
            for follower in step.readers:
                if follower.writes:
                    found.setdefault(follower.layer, set()).add(norms)
                    continue
                way = (follower, (*norms, follower.layer) if follower.norm else norms)
                if way not in seen:
                    seen.add(way)
                    open_.append(way)
        return found


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
