"""FPGM: "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration"
(He et al., CVPR 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_cli.criteria import distance_sum, filter_norm
from prune_cli.hooks import Progress
from prune_cli.layers.masked import Masked, masked
from prune_cli.masks import Masks
from prune_cli.modules import replace_module, why_not_replaced
from prune_cli.prunable import Skip
from prune_cli.settings import Ratio
from prune_cli.soft import SoftPruning


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(SoftPruning):
    """The filters nearest to the geometric median of their layer are replaceable by the others: zero
    for an epoch, without gradient, then selected anew (algorithm 1, equation 4).

    norm_ratio  of all filters, the fraction that goes by smallest L2 norm instead, before distances
                among the remaining ones decide about the rest of `ratio`. The paper's FPGM-mix at a
                ratio of 0.4 is 0.1
    """

    norm_ratio: Ratio = 0.0

    def score(self, weight: Tensor, ratio: float) -> Tensor:
        order = filter_norm(weight, order=2).argsort(stable=True)
        by_norm, rest = order.tensor_split([int(len(order) * min(self.norm_ratio, ratio))])
        score = weight.new_full((len(order),), -1.0, dtype=torch.float32)  # below every distance
        score[rest] = distance_sum(weight[rest])
        return score

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module | Skip]:
        """Not a layer that its masked form would not stand for."""
        found = super().candidates(model)
        reasons = {name: why_not_replaced(layer) for name, layer in found.items() if isinstance(layer, nn.Module)}
        return found | {name: Skip(reason) for name, reason in reasons.items() if reason}

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        for name, layer in self.prunable(model).layers.items():
            replace_module(model, name, masked(layer))
        return model

    @torch.no_grad()
    def zero(self, model: nn.Module, masks: Masks) -> None:
        super().zero(model, masks)
        for name, keep in masks.keep.items():
            model.get_submodule(name).alive.copy_(keep)

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        for layer in _masked(model):
            layer.hold(layer.weight.grad)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        # What a filter collected before it was zeroed, its momentum, would still move it.
        for layer in _masked(model):
            layer.hold(layer.weight)


def _masked(model: nn.Module) -> list[Masked]:
    return [module for module in model.modules() if isinstance(module, Masked)]
