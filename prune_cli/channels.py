"""Which layers share channels, and removing a channel from all of them.

The only importer of Torch-Pruning, whose DependencyGraph (Fang et al., CVPR 2023) finds the groups.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prune_cli.layers.scatter import ScatterChannels
from prune_cli.layers.select import SelectChannels
from prune_cli.layers.shortcut import ShortcutA


MOVERS = (ShortcutA, ScatterChannels, SelectChannels)  # layers without parameters that move channels


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels that exist or vanish together.

    producers  names of the convolutions and linear layers that write these channels; more than
               one where a residual sum couples them
    norms      names of the batch norms on them; after a concatenation a norm has further channels
    width      number of channels
    removable  False where the network's output, a parameter-free layer or a grouped convolution
               fixes the width, or where a layer mixes the channels (group norm), so that removing
               one would change the others
    """

    producers: tuple[str, ...]
    norms: tuple[str, ...]
    width: int
    removable: bool


class ChannelGraph:
    """The channel groups of a network. Removing channels changes the network in place.

    model.input_shape is the (C, H, W) that the network is traced with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        like = next(model.parameters())
        # Autograd is the tracer: without a gradient, layers behind frozen weights go unseen.
        example = torch.zeros(1, *model.input_shape, device=like.device, dtype=like.dtype, requires_grad=True)
        with _flags_kept(model), _placeholders(model) as self._placeholders, torch.enable_grad():
            self._graph = tp.DependencyGraph().build_dependency(
                model, example, verbose=False,
                forward_fn=lambda model, x: model(x),  # left to itself, it would unpack x into images
                # The addition is a node after the last layer: where the network's output begins.
                output_transform=lambda logits: logits + 0,
            )  # fmt: skip
            self._names = {module: name for name, module in model.named_modules()}
            self._roots = {}
            described = [self._describe(found) for found in self._graph.get_all_groups()]
            self.groups = tuple(group for group in described if group.producers)

    @property
    def inner(self) -> tuple[ChannelGroup, ...]:
        """The groups with one producer: their channels can be chosen without asking another layer."""
        return tuple(g for g in self.groups if g.removable and len(g.producers) == 1)

    def outputs(self, group: ChannelGroup, channels: Sequence[int]) -> dict[str, list[int]]:
        """The output channels of every producer and norm that are these `channels` of the group."""
        found: dict[str, set[int]] = {}
        for dep, idxs in self._items(group, channels):
            if self._is_output(dep):  # one layer may come twice: a norm on channels concatenated twice
                found.setdefault(self._names[dep.target.module], set()).update(idxs)
        return {name: sorted(idxs) for name, idxs in found.items()}

    def inputs(self, group: ChannelGroup, channels: Sequence[int]) -> dict[str, list[int]]:
        """The input channels of every layer that reads these `channels` of the group, in their
        order; behind a flatten one channel is several inputs."""
        items = self._items(group, channels)
        return {self._names[dep.target.module]: list(idxs) for dep, idxs in items if self._is_input(dep)}

    def own_norm(self, layer: str) -> str | None:
        """The batch norm that reads this layer and no other, where nothing else reads the layer."""
        node = self._graph.module2node.get(self.model.get_submodule(layer))
        readers = node.outputs if node else []  # a layer that the network never calls has no node
        if len(readers) != 1 or not isinstance(readers[0].module, _NormBase) or len(readers[0].inputs) != 1:
            return None
        return self._names[readers[0].module]

    def ways(self, layer: str) -> dict[str, set[tuple[str, ...]]]:
        """Per layer that reads what this one writes, the batch norms that lie between: for each way, in order."""
        start = self._graph.module2node.get(self.model.get_submodule(layer))
        found, seen, open_ = {}, set(), [(start, ())] if start else []
        while open_:
            node, norms = open_.pop()
            for follower in node.outputs:
                name = self._names.get(follower.module, "")
                if _writes(follower.module):
                    found.setdefault(name, set()).add(norms)
                    continue
                way = (follower, (*norms, name) if isinstance(follower.module, _NormBase) else norms)
                if way not in seen:
                    seen.add(way)
                    open_.append(way)
        return found

    def remove(self, group: ChannelGroup, channels: Sequence[int]) -> None:
        """Remove the channels from every layer that writes, normalises or reads them."""
        with torch.no_grad():
            self._items(group, channels).prune()

    def _items(self, group: ChannelGroup, channels: Sequence[int]):
        root = self._roots[group.producers[0]]
        return self._graph.get_pruning_group(root.dep.target.module, root.dep.handler, list(channels))

    def _describe(self, found) -> ChannelGroup:
        producers, norms, removable = [], [], True
        for dep, _ in found:
            module = dep.target.module
            stand_in = module in self._placeholders
            removable = removable and not stand_in and _removes_exactly(module)
            if stand_in or not self._is_output(dep):
                continue
            if _writes(module):
                producers.append(self._names[module])
            elif isinstance(module, _NormBase):
                norms.append(self._names[module])
        if producers:
            self._roots[producers[0]] = found[0]
        return ChannelGroup(tuple(producers), tuple(norms), len(found[0].idxs), removable)

    def _is_output(self, dep) -> bool:
        return dep.target.module in self._names and self._graph.is_out_channel_pruning_fn(dep.handler)

    def _is_input(self, dep) -> bool:
        return dep.target.module in self._names and not self._graph.is_out_channel_pruning_fn(dep.handler)


def _writes(module: nn.Module) -> bool:
    """Whether axis 0 of the layer's weight is its output channels."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def _removes_exactly(module: nn.Module) -> bool:
    """Whether a zero channel can leave this layer without changing what the others compute."""
    if isinstance(module, _ConvNd) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    if isinstance(module, tp.ops._OutputOp):
        return False
    # Torch-Pruning's own modules stand for additions, reshapes, concatenations; a bare Parameter is
    # not one of them, and nobody knows what it does with the channels.
    operation = not isinstance(module, nn.Parameter) and type(module).__module__.startswith("torch_pruning")
    return operation or _writes(module) or isinstance(module, (_NormBase, nn.PReLU))


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Tracing leaves everything in evaluation mode; afterwards each module has its own mode again."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _placeholders(model: nn.Module) -> Iterator[set[nn.Module]]:
    """While tracing, a parameter-free layer that moves channels is a convolution.

    A tracer walks through slicing, padding and scattering as if channel i stayed channel i, and
    couples the wrong layers without a word; a convolution is where it stops.
    """
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, MOVERS)}
    stand_ins = set()
    like = next(model.parameters())
    for name, mover in swapped.items():
        conv = nn.Conv2d(mover.in_channels, mover.out_channels, 1, getattr(mover, "stride", 1), bias=False)
        conv = conv.to(device=like.device, dtype=like.dtype)
        stand_ins.add(conv)
        model.set_submodule(name, conv)
    try:
        yield stand_ins
    finally:
        for name, mover in swapped.items():
            model.set_submodule(name, mover)
