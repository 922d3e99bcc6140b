"""From a traced network to the channel groups in it."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.channels import ChannelGraph, ChannelGroup, Member, Step
from prune_cli.evaluation import evaluating
from prune_cli.modules import fixed
from prune_cli.slicing import block_size, follows
from prune_cli.structure import structure
from prune_cli.tracing import Trace, Untraced, trace, writes

KNOWN = 64  # structures whose graphs are kept: a search cuts the same network again and again
_GRAPHS: OrderedDict[tuple, ChannelGraph] = OrderedDict()


def traced(model: nn.Module) -> ChannelGraph:
    """The channel groups of the network, as far as tracing sees them; traced once for each structure.

    model.input_shape is the (C, H, W) that the network is traced with.
    """
    key = structure(model)
    if key not in _GRAPHS:
        _GRAPHS[key] = _Grouping(model).graph().of_model(nn.Module())  # the network itself is not kept
        if len(_GRAPHS) > KNOWN:
            _GRAPHS.popitem(last=False)
    _GRAPHS.move_to_end(key)
    return _GRAPHS[key].of_model(model)


class _Grouping:
    """The search for them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.fixed = model, fixed(model)
        with evaluating(model):
            self.trace: Trace | Untraced = trace(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.order = {name: place for place, name in enumerate(self.names.values())}

    def graph(self) -> ChannelGraph:
        described = [self._describe(found) for found in self.trace.get_all_groups()]
        found = sorted((pair for pair in described if pair[0].producers), key=lambda pair: self.order[pair[0].producers[0]])
        return ChannelGraph(
            self.model, tuple(group for group, _ in found), {group.producers: members for group, members in found},
            frozenset(self.names[layer] for layer in self.trace.pointwise), self.fixed, self._steps(),
            self.trace.reason if isinstance(self.trace, Untraced) else None,
        )  # fmt: skip

    def _steps(self) -> dict[str, Step]:
        """The nodes of the trace without the tensors they hold."""
        steps: dict[Any, Step] = {}
        open_ = list(self.trace.module2node.values())
        while open_:
            node = open_.pop()
            if node not in steps:
                steps[node] = Step(self.names.get(node.module, ""), isinstance(node.module, _NormBase), writes(node.module), len(node.inputs))
                open_.extend(node.outputs)
        for node, step in steps.items():
            step.readers.extend(steps[reader] for reader in node.outputs)
        return {self.names[layer]: steps[node] for layer, node in self.trace.module2node.items() if layer in self.names}

    def _describe(self, found: Any) -> tuple[ChannelGroup, Sequence[Member]]:
        producers, norms, reasons, members, block = [], [], [], [], 1
        for item in found:
            module, written = item.dep.target.module, self.trace.is_out_channel_pruning_fn(item.dep.handler)
            reasons.append(self.trace.reason(item.dep))
            if module not in self.names:
                continue
            block = max(block, block_size(module))
            places: dict[int, list[int]] = {}
            for channel, place in zip(item.root_idxs, item.idxs):
                places.setdefault(channel, []).append(place)
            members.append(Member(self.names[module], written, places))
            if written and writes(module):
                producers.append(self.names[module])
            elif written and isinstance(module, _NormBase):
                norms.append(self.names[module])
        producers.sort(key=self.order.__getitem__)
        sources = tuple(name for name in producers if self._decides(name))
        if not sources:
            reasons.append("no layer of its own writes its channels")
        width = len(found[0].idxs)
        reasons.extend(self._in_part(name, members, width) for name in sources)
        reasons.extend(self._constant(member) for member in members)
        reasons.extend(f"{m.layer} {self.fixed[m.layer]}" for m in members if m.layer in self.fixed)
        blocked = next(filter(None, reasons), None)
        group = ChannelGroup(tuple(producers), sources, tuple(norms), width, block, blocked)
        return group, members

    def _in_part(self, layer: str, members: Sequence[Member], width: int) -> str | None:
        """Why a layer cannot lose these channels that writes some of them only, or others as well."""
        places = [m.places for m in members if m.layer == layer and m.written]
        channels = {channel for found in places for channel in found}
        written = {place for found in places for own in found.values() for place in own}
        whole = len(channels) == width and len(written) == _width(self.model.get_submodule(layer))
        return None if whole else f"a sum with a concatenation, of which {layer} writes a part"

    def _constant(self, member: Member) -> str | None:
        """Why a layer that reads the channels would feel that they are gone: what comes of a zero is no zero."""
        module = self.model.get_submodule(member.layer)
        return None if member.written or not writes(module) else self.trace.constant(module, member.everywhere)

    def _decides(self, layer: str) -> bool:
        module = self.model.get_submodule(layer)
        return not follows(module) and not self.trace.is_gate(module)


def _width(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
