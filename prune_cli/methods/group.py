"""Group-wise pruning: "Learning Structured Sparsity in Deep Neural Networks" (SSL, Wen et al.,
NIPS 2016), shape-wise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.hooks import Progress
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.prunable import Skip, weighted
from prune_cli.selection import of_all, select_global, select_local, separation_note
from prune_cli.settings import NonNegative, Positive
from prune_cli.trial import why_not_packed


@dataclass(frozen=True, kw_only=True)
class GroupPruning(PruningMethod):
    """A group is what stands at one (input channel, row, column) in all filters of a layer: a column
    of the layer as a matrix. A group lasso drives whole groups to zero (section 3.2), and the cut
    layer multiplies the remaining columns only. No other layer notices.

    lam       weight of the penalty lam * sum of the groups' L2 norms; None derives it from the schedule
    strength  used when lam is None: how many times over the schedule would drive an unused group of
              norm one to zero
    scope     `global` ranks all groups by their root mean square weight, which does not depend on how
              many filters a layer has; `local` removes the same fraction of every layer
    """

    unit: ClassVar[str] = "group"
    scope: Literal["global", "local"] = selection_field(default="global")
    start: Literal["init", "dense"] = "init"
    finetune: bool = selection_field(default=True)
    lam: NonNegative | None = None
    strength: Positive = 1.3

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module | Skip]:
        reasons = {name: why_not_packed(model, name, "group") for name in weighted(model)}
        return {name: Skip(reason) if reason else model.get_submodule(name) for name, reason in reasons.items()}

    def penalty(self, model: nn.Module, progress: Progress) -> dict[str, Tensor]:
        norms = torch.cat([_norms(layer.weight).flatten() for layer in self.prunable(model).layers.values()])
        weight = progress.penalty_weight(self.strength) if self.lam is None else self.lam
        return {"group_lasso": weight * norms.sum()}

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores = self.watch(model)
        if self.scope == "local":
            ratios = {name: of_all(ratio, score == 0) for name, score in scores.items()}
            masks = select_local(scores, ratios, self.unit, ratio)
        else:
            gone = torch.cat([score.flatten() == 0 for score in scores.values()])
            masks = select_global(scores, of_all(ratio, gone), self.unit)
        return masks.with_notes(*separation_note(scores, masks, "strength of groups"))

    def watch(self, model: nn.Module) -> dict[str, Tensor]:
        """(I, K, K): the root mean square of each group's weights, by layer."""
        layers = self.prunable(model).layers
        return {name: _norms(layer.weight.detach()) / len(layer.weight) ** 0.5 for name, layer in layers.items()}


def _norms(weight: Tensor) -> Tensor:
    """(O, I, K, K) to (I, K, K). The gradient at a group of zeros is zero, not 0 / 0."""
    return torch.linalg.vector_norm(weight, dim=0)
