"""What the methods share whose unit is the filter: which filters are prunable, and at which ratio."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGraph, ChannelGroup
from prune_cli.errors import UserError
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.selection import select_global, select_local
from prune_cli.settings import Ratio, nearest


@dataclass(frozen=True, kw_only=True)
class FilterMethod(PruningMethod):
    """Removes the filters with the lowest score.

    Only filters whose channels no residual sum shares are prunable (in ResNets the first
    convolution of each block); in a network without convolutions the neurons of its hidden layers.

    scope   `local` removes the same fraction of every layer; `global` ranks all filters by their
            score relative to their layer's mean
    ratios  fraction per layer name (shell patterns allowed), as PFEC sets it by sensitivity;
            layers that are not named stay whole, and `ratio` is not used
    """

    unit: ClassVar[str] = "filter"
    scope: Literal["local", "global"] = selection_field(default="local")
    ratios: Mapping[str, Ratio] | None = selection_field(default=None)

    @abstractmethod
    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        """(O,): how much each filter of the layer is worth; `scales` (O,) are those of the batch norm
        behind it, without sign.

        Raises UserError: the layer lacks what the score is made of.
        """

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores, graph = {}, ChannelGraph(model)
        for name, group in prunable_filters(graph).items():
            scores[name] = self.score(model.get_submodule(name), _scales(graph, group)).detach()
        rounding = round if all(isinstance(model.get_submodule(name), nn.Linear) for name in scores) else int
        if self.ratios is not None:
            ratios = _per_layer(self.ratios, list(scores))
            filters = sum(len(s) for s in scores.values())
            requested = sum(ratios[name] * len(s) for name, s in scores.items()) / filters
            return select_local(scores, ratios, self.unit, requested, rounding)
        if self.scope == "local":
            return select_local(scores, dict.fromkeys(scores, ratio), self.unit, ratio, rounding)
        tiny = torch.finfo(torch.float32).tiny  # a layer of zeros has scores of zero, not 0 / 0
        return select_global({name: s / s.mean().clamp_min(tiny) for name, s in scores.items()}, ratio, self.unit)


def prunable_filters(graph: ChannelGraph) -> dict[str, ChannelGroup]:
    """The layers with filters of their own, in the model's order, with their channel groups.

    Raises UserError: there are none.
    """
    model, inner = graph.model, {group.producers[0]: group for group in graph.inner}
    layers = {name: inner[name] for name, _ in model.named_modules() if name in inner}
    if not layers:
        raise UserError("method: the model has no filters that could be removed without touching a residual sum")
    convolutions = {n: g for n, g in layers.items() if not isinstance(model.get_submodule(n), nn.Linear)}
    return convolutions or layers


def _scales(graph: ChannelGraph, group: ChannelGroup) -> Tensor | None:
    """(O,): |gamma| of each channel, where several batch norms read it (DenseNet) their mean; None
    where no batch norm has a scale for it."""
    places = graph.outputs(group, range(group.width))
    norms = {name: graph.model.get_submodule(name).weight for name in group.norms}
    # channels that are concatenated twice have two places in one norm, in no order that tells them apart
    found = [w[places[name]].abs() for name, w in norms.items() if w is not None and len(places[name]) == group.width]
    return torch.stack(found).mean(0) if found else None


def _per_layer(ratios: Mapping[str, float], layers: list[str]) -> dict[str, float]:
    for pattern in ratios:
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise UserError(f"method.ratios.{pattern}: no prunable layer has this name; {nearest(pattern, layers)}")
    return {
        layer: next((r for pattern, r in ratios.items() if fnmatch(layer, pattern)), 0.0) for layer in layers
    }
