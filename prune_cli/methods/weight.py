"""Magnitude pruning: "Learning both Weights and Connections for Efficient Neural Networks" (Han et al., NIPS 2015)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from prune_cli.errors import UserError
from prune_cli.evaluation import blank_image, observe
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.prunable import Skip, weighted
from prune_cli.selection import of_all, select_global, select_local
from prune_cli.settings import Fraction


@dataclass(frozen=True, kw_only=True)
class WeightPruning(PruningMethod):
    """Removes single weights, those with the smallest absolute value. The network keeps its shape
    and its MACs, unless whole filters lose every weight; what falls is the number of nonzero
    parameters. Biases and batch norms are left alone. In rounds each one removes the same fraction of
    the weights that are left, r of them: 1 - (1 - r)^rounds in all. With `recipe.finetune.start=rewind`
    the survivors go back to their early values: the lottery ticket of Frankle & Carbin, ICLR 2019.

    layers     `conv`: convolutions only, as "Rethinking the Value of Network Pruning" (Liu et al.,
               ICLR 2019) and the deep networks of the lottery ticket paper have it; `all`: linear
               layers too. In a network without convolutions both mean the linear layers
    scope      `global` ranks all weights together; `local` removes the same fraction of every layer
    last_rate  the last layer loses this much of the fraction that the others lose (Frankle & Carbin,
               "The Lottery Ticket Hypothesis", ICLR 2019, figure 2: a half); needs scope=local
    """

    unit: ClassVar[str] = "weight"
    scope: Literal["global", "local"] = selection_field(default="global")
    finetune: bool = selection_field(default=True)
    layers: Literal["conv", "all"] = selection_field(default="conv")
    last_rate: Fraction = selection_field(default=1.0)

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module | Skip]:
        layers = weighted(model)
        linear = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        if self.layers == "all" or len(linear) == len(layers):
            return layers
        skip = Skip("fully connected; method.layers=all prunes it too")
        return {name: skip if name in linear else layer for name, layer in layers.items()}

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores = {name: layer.weight.detach().abs() for name, layer in self.prunable(model).layers.items()}
        if self.scope == "global":
            if self.last_rate != 1:
                raise UserError("method.last_rate: belongs to method.scope=local; a global ranking has no layer rates")
            gone = torch.cat([s.flatten() == 0 for s in scores.values()])
            return select_global(scores, of_all(ratio, gone), self.unit)
        rates = dict.fromkeys(scores, ratio)
        if self.last_rate != 1 and (last := _last(model)) in rates:
            rates[last] *= self.last_rate
        ratios = {name: of_all(rates[name], s == 0) for name, s in scores.items()}
        sizes = {name: s.numel() for name, s in scores.items()}
        requested = sum(ratios[name] * size for name, size in sizes.items()) / sum(sizes.values())
        return select_local(scores, ratios, self.unit, requested)


def _last(model: nn.Module) -> str:
    """The convolution or linear layer that is called last, wherever the network has defined it."""
    names, called = {layer: name for name, layer in weighted(model).items()}, []
    observe(model, blank_image(model, model.input_shape), names, lambda layer, inputs, output: called.append(layer))
    return names[called[-1]]
