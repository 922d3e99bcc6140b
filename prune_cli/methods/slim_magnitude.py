"""Filters by batch norm scale times filter norm, a mixture of network slimming and PFEC."""

from dataclasses import dataclass

from torch import Tensor, nn

from prune_cli.criteria import filter_norm
from prune_cli.filters import FilterMethod
from prune_cli.method import selection_field


@dataclass(frozen=True, kw_only=True)
class SlimMagnitude(FilterMethod):
    """Removes the filters with the smallest |gamma| * L2 norm: how loud a channel is behind its
    batch norm, not only how large its weights are (model_compression's SlimMagnitude)."""

    finetune: bool = selection_field(default=True)

    def lacks(self, layer: nn.Module, scales: Tensor | None) -> str | None:
        return "no batch norm scales its channels" if scales is None else None

    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        return scales * filter_norm(layer.weight, order=2)
