"""Filter pruning: "Pruning Filters for Efficient ConvNets" (PFEC, Li et al., ICLR 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGraph
from prune_cli.criteria import distance_sum, filter_norm
from prune_cli.errors import UserError
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.selection import select_global, select_local
from prune_cli.settings import Ratio, nearest


@dataclass(frozen=True, kw_only=True)
class FilterPruning(PruningMethod):
    """Removes the filters with the lowest score from the dense network, in one shot.

    Only filters whose channels no residual sum shares are prunable (in ResNets the first
    convolution of each block); in a network without convolutions the neurons of its hidden layers.

    criterion  `l1`, `l2` norm of the filter, or `geometric_median`: the summed distance to the
               layer's other filters (FPGM, He et al., CVPR 2019)
    scope      `local` removes the same fraction of every layer; `global` ranks all filters by
               their score relative to their layer's mean
    ratios     fraction per layer name (shell patterns allowed), as PFEC sets it by sensitivity;
               layers that are not named stay whole, and `ratio` is not used
    """

    unit: ClassVar[str] = "filter"
    finetune: bool = selection_field(default=True)
    criterion: Literal["l1", "l2", "geometric_median"] = selection_field(default="l1")
    scope: Literal["local", "global"] = selection_field(default="local")
    ratios: Mapping[str, Ratio] | None = selection_field(default=None)

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores = {name: self._score(model.get_submodule(name).weight) for name in _prunable(model)}
        if self.ratios is not None:
            ratios = _per_layer(self.ratios, list(scores))
            filters = sum(len(s) for s in scores.values())
            requested = sum(ratios[name] * len(s) for name, s in scores.items()) / filters
            return select_local(scores, ratios, self.unit, requested)
        if self.scope == "local":
            return select_local(scores, dict.fromkeys(scores, ratio), self.unit, ratio)
        tiny = torch.finfo(torch.float32).tiny  # a layer of zeros has scores of zero, not 0 / 0
        return select_global({name: s / s.mean().clamp_min(tiny) for name, s in scores.items()}, ratio, self.unit)

    def _score(self, weight: Tensor) -> Tensor:
        if self.criterion == "geometric_median":
            return distance_sum(weight)
        return filter_norm(weight, order=1 if self.criterion == "l1" else 2)


def _prunable(model: nn.Module) -> list[str]:
    """Layers with filters of their own, in the model's order."""
    inner = {group.producers[0] for group in ChannelGraph(model).inner}
    layers = {name: module for name, module in model.named_modules() if name in inner}
    convolutions = [name for name, module in layers.items() if not isinstance(module, nn.Linear)]
    if not layers:
        raise UserError("method=fp: the model has no filters that could be removed without touching a residual sum")
    return convolutions or list(layers)


def _per_layer(ratios: Mapping[str, float], layers: list[str]) -> dict[str, float]:
    for pattern in ratios:
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise UserError(f"method.ratios.{pattern}: no prunable layer has this name; {nearest(pattern, layers)}")
    return {
        layer: next((r for pattern, r in ratios.items() if fnmatch(layer, pattern)), 0.0) for layer in layers
    }
