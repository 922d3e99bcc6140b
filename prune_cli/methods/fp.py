"""Filter pruning: "Pruning Filters for Efficient ConvNets" (PFEC, Li et al., ICLR 2017)."""

from dataclasses import dataclass

from torch import Tensor, nn

from prune_cli.criteria import Criterion, filter_score
from prune_cli.filters import FilterMethod
from prune_cli.method import selection_field


@dataclass(frozen=True, kw_only=True)
class FilterPruning(FilterMethod):
    """Removes the filters with the lowest score from the dense network, in one shot."""

    finetune: bool = selection_field(default=True)
    criterion: Criterion = selection_field(default="l1")

    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        return filter_score(layer.weight, self.criterion)
