"""What the methods share that prune while they train: zero filters that a later epoch may bring back."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGraph
from prune_cli.hooks import Progress
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod
from prune_cli.prunable import Skip, named_by, weighted
from prune_cli.selection import select_local
from prune_cli.settings import Ratio
from prune_cli.trial import channel_graph, why_not_for_itself

SHORTCUTS = ("*shortcut*", "*downsample*")


@dataclass(frozen=True, kw_only=True)
class SoftPruning(PruningMethod):
    """Selects the same fraction of the filters of every convolution and zeroes them, before the
    first epoch and after each one. Nothing is trained again after the cut.

    Linear layers on maps, as in ConvNeXt, are convolutions of one pixel. Layers that write into a residual
    sum are selected like all others, each for itself. Batch norms are left alone; that a removed channel emits
    no constant is the cut's doing, and the accuracy is that of the cut network.

    ratio    fraction of filters to zero: the experiment's, which training has to know here, or what
             meets the experiment's target
    exclude  as for all methods; None leaves the convolutions of shortcuts whole
    """

    unit: ClassVar[str] = "filter"
    scope: ClassVar[str] = "local"
    needs_ratio: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 2: linear layers on maps are pruned
    start: Literal["init", "dense"] = "init"
    ratio: Ratio

    @abstractmethod
    def score(self, weight: Tensor, ratio: float) -> Tensor:
        """(O,): how much each filter of the weight (O, I, K, K) is worth, where `ratio` of them go."""

    def rate(self, progress: Progress) -> float:
        """The fraction that is zero now."""
        return self.ratio

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module | Skip]:
        graph = channel_graph(model)
        return {name: self._candidate(graph, name, layer) for name, layer in weighted(model).items()}

    def _candidate(self, graph: ChannelGraph, name: str, layer: nn.Module) -> nn.Module | Skip:
        if reason := why_not_for_itself(graph, name):
            return Skip(reason)
        spared = self.exclude is None and named_by(SHORTCUTS, name)
        return Skip("in a shortcut; method.exclude=[] prunes it too") if spared else layer

    def before_fit(self, model: nn.Module, progress: Progress) -> None:
        self.zero(model, self.select(model, self.rate(progress)))

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        self.zero(model, self.select(model, self.rate(progress)))

    def select(self, model: nn.Module, ratio: float) -> Masks:
        """By score alone, whatever was zero until now."""
        scores = {name: self.score(layer.weight.detach(), ratio) for name, layer in self.prunable(model).layers.items()}
        return self._lowest(scores, ratio)

    @torch.no_grad()
    def zero(self, model: nn.Module, masks: Masks) -> None:
        """Apply a selection."""
        for name in masks.keep:
            weight = model.get_submodule(name).weight
            weight.mul_(masks.of(name, weight))

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        """Filters that training left at zero first: to any other score they are like all others."""
        scores = {}
        for name, layer in self.prunable(model).layers.items():
            dead = ~layer.weight.detach().flatten(1).any(1)
            scores[name] = self.score(layer.weight.detach(), ratio).masked_fill(dead, -torch.inf)
        return self._lowest(scores, ratio)

    def _lowest(self, scores: dict[str, Tensor], ratio: float) -> Masks:
        # The authors round the number of filters that go, int(n * ratio): what stays is rounded up.
        return select_local(scores, dict.fromkeys(scores, ratio), self.unit, ratio, lambda kept: ceil(kept - 1e-9))
