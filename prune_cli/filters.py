"""What the methods share whose unit is the filter: which filters are prunable, and at which ratio."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGraph, ChannelGroup
from prune_cli.errors import UserError
from prune_cli.masks import Coupled, Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.prunable import Skip, named_by, weighted
from prune_cli.selection import select_global, select_local
from prune_cli.settings import Ratio, nearest
from prune_cli.trial import channel_graph


@dataclass(frozen=True)
class Filters:
    """A layer whose filters are prunable, the channels they write, and (O,) the batch norm's scales for
    them, without sign; None where no batch norm has a scale for each."""

    layer: nn.Module
    group: ChannelGroup
    scales: Tensor | None


@dataclass(frozen=True, kw_only=True)
class FilterMethod(PruningMethod):
    """Removes the filters with the lowest score.

    In a network without convolutions the neurons of its hidden layers are the filters.

    scope    `local` removes the same fraction of every layer; `global` ranks all filters by their
             score relative to their layer's mean
    ratios   fraction per layer name (shell patterns allowed), as PFEC sets it by sensitivity;
             layers that are not named stay whole, and `ratio` is not used
    coupled  layers that share channels, in a residual sum or by blocks with a grouped convolution: None
             leaves them whole (in ResNets the first convolution of each block is pruned, as in the papers);
             `joint` removes a channel from all of them, ranked by the sum of their scores, as DepGraph
             does (Fang et al., CVPR 2023)
    """

    unit: ClassVar[str] = "filter"
    scope: Literal["local", "global"] = selection_field(default="local")
    ratios: Mapping[str, Ratio] | None = selection_field(default=None)
    coupled: Literal["joint"] | None = selection_field(default=None)

    @abstractmethod
    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        """(O,): how much each filter of the layer is worth; `scales` (O,) are those of the batch norm
        behind it, without sign."""

    def lacks(self, layer: nn.Module, scales: Tensor | None) -> str | None:
        """What the score is made of and this layer has not; None = it has all."""
        return None

    def candidates(self, model: nn.Module) -> Mapping[str, Filters | Skip]:
        return self.candidates_of(channel_graph(model))

    def candidates_of(self, graph: ChannelGraph) -> Mapping[str, Filters | Skip]:
        """`candidates` of a network whose channels are known already."""
        layers = weighted(graph.model)
        found = {name: self._candidate(graph, name) for name in layers}
        flat = {name for name, layer in layers.items() if isinstance(layer, nn.Linear) and name not in graph.pointwise}
        if all(isinstance(candidate, Skip) for name, candidate in found.items() if name not in flat):
            return found
        connected = Skip("fully connected, in a network with convolutions")
        return {n: connected if n in flat and isinstance(c, Filters) else c for n, c in found.items()}

    def _candidate(self, graph: ChannelGraph, name: str) -> Filters | Skip:
        reason, group = graph.why_not_alone(name), graph.of(name)
        joint = self.coupled == "joint" and group is not None and group.removable and name in group.sources
        if reason is not None and not joint:
            return Skip(reason)
        for source in group.sources:
            filters = _filters(graph, group, source)
            if lack := self.lacks(filters.layer, filters.scales):
                return Skip(lack if source == name else f"shares its channels with {source}: {lack}")
            if source != name and named_by(self.exclude, source):
                return Skip(f"shares its channels with {source}, which is excluded")
        return _filters(graph, group, name)

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        layers, groups = self.prunable(model).layers, {}
        for name, filters in layers.items():
            groups.setdefault(filters.group, []).append(name)
        coupled = {names[0]: Coupled(tuple(names), group.block) for group, names in groups.items()}
        scores = {}
        for first, together in coupled.items():
            score = sum(self.score(layers[name].layer, layers[name].scales).detach() for name in together.layers)
            scores[first] = score.view(-1, together.block).mean(1) if together.block > 1 else score
        rounding = round if all(isinstance(filters.layer, nn.Linear) for filters in layers.values()) else int
        return _spread(self._selected(scores, ratio, coupled, rounding), coupled)

    def _selected(self, scores: dict[str, Tensor], ratio: float, coupled: dict[str, Coupled], rounding) -> Masks:
        if self.ratios is not None:
            ratios = _per_layer(self.ratios, coupled)
            filters = sum(len(s) for s in scores.values())
            requested = sum(ratios[name] * len(s) for name, s in scores.items()) / filters
            return select_local(scores, ratios, self.unit, requested, rounding)
        if self.scope == "local":
            return select_local(scores, dict.fromkeys(scores, ratio), self.unit, ratio, rounding)
        tiny = torch.finfo(torch.float32).tiny  # a layer of zeros has scores of zero, not 0 / 0
        return select_global({name: s / s.mean().clamp_min(tiny) for name, s in scores.items()}, ratio, self.unit)


def _filters(graph: ChannelGraph, group: ChannelGroup, name: str) -> Filters:
    own = {source: graph.own_norm(source) for source in group.sources}
    # Without a norm of its own a layer has those behind it, but not those of the layers beside it in a sum.
    behind = (own[name],) if own.get(name) else tuple(norm for norm in group.norms if norm not in own.values())
    return Filters(graph.model.get_submodule(name), group, _scales(graph, group, behind))


def _scales(graph: ChannelGraph, group: ChannelGroup, names: Sequence[str]) -> Tensor | None:
    """(O,): |gamma| of each channel, where several batch norms read it (DenseNet) their mean."""
    places = graph.outputs(group, range(group.width))
    norms = {name: graph.model.get_submodule(name).weight for name in names}
    # channels that are concatenated twice have two places in one norm, in no order that tells them apart
    found = [
        weight.detach()[places[name]].abs() for name, weight in norms.items()
        if weight is not None and len(places[name]) == group.width
    ]  # fmt: skip
    return torch.stack(found).mean(0) if found else None


def _spread(masks: Masks, coupled: Mapping[str, Coupled]) -> Masks:
    """What was decided for the first layer, in blocks, for all layers that share its channels."""
    keep = {
        name: masks.keep[first].repeat_interleave(together.block)
        for first, together in coupled.items() for name in together.layers
    }  # fmt: skip
    shared = tuple(together for together in coupled.values() if len(together.layers) > 1 or together.block > 1)
    return replace(masks, keep=keep, coupled=shared)


def _per_layer(ratios: Mapping[str, float], coupled: Mapping[str, Coupled]) -> dict[str, float]:
    layers = [name for together in coupled.values() for name in together.layers]
    for pattern in ratios:
        if not any(named_by([pattern], layer) for layer in layers):
            raise UserError(f"method.ratios.{pattern}: no prunable layer has this name; {nearest(pattern, layers)}")
    return {first: _first_named(ratios, together.layers) for first, together in coupled.items()}


def _first_named(ratios: Mapping[str, float], layers: Sequence[str]) -> float:
    return next((r for pattern, r in ratios.items() if any(named_by([pattern], n) for n in layers)), 0.0)
