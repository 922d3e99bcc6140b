"""Filters at random: the control that every criterion has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_cli.filters import FilterMethod
from prune_cli.method import selection_field
from prune_cli.seeding import derive
from prune_cli.settings import Natural


@dataclass(frozen=True, kw_only=True)
class RandomFilters(FilterMethod):
    """Removes filters chosen by the seed alone."""

    finetune: bool = selection_field(default=True)
    seed: Natural = selection_field(default=0)

    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        # Neither 0 (dead, always removed) nor the same for two layers of one shape.
        shape = "x".join(map(str, layer.weight.shape))
        generator = torch.Generator().manual_seed(derive(self.seed, "random filters", shape))
        return 1 + torch.rand(len(layer.weight), generator=generator)
