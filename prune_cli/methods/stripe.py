"""Stripe-wise pruning: "Pruning Filter in Filter" (Meng et al., NeurIPS 2020)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGroup
from prune_cli.hooks import Progress
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.layers.stripe import unpackable
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.modules import replace_module
from prune_cli.prunable import Skip, weighted
from prune_cli.selection import keep_best, of_all, select_global, select_threshold, separation_note
from prune_cli.settings import NonNegative, Positive
from prune_cli.trial import channel_graph, why_not_packed


@dataclass(frozen=True, kw_only=True)
class StripePruning(PruningMethod):
    """A trainable skeleton value per stripe, driven to zero by an L1 penalty.

    alpha      weight of the penalty alpha * sum |skeleton|; None derives it from the schedule
    strength   used when alpha is None: how many times over the schedule would drive an unused
               stripe from one to zero. The published CIFAR-10 setting is a strength of 2.7
    threshold  a stripe whose |skeleton| is not above it after a step is dead for good
    train      `all` weights, or `skeleton`: the paper's second experiment, in which nothing but
               the skeleton of a random network is trained
    select     `ratio` removes that fraction of all stripes by global rank of |skeleton| (all dead
               ones where they are more); `threshold` removes what is not above the threshold, as
               the paper does
    """

    unit: ClassVar[str] = "stripe"
    scope: ClassVar[str] = "global"
    start: Literal["init", "dense"] = "init"
    alpha: NonNegative | None = None
    strength: Positive = 1.05
    threshold: NonNegative = 0.01
    train: Literal["all", "skeleton"] = "all"
    select: Literal["ratio", "threshold"] = selection_field(default="ratio")

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module | Skip]:
        reasons = {name: _without_stripes(model, name) for name in weighted(model)}
        return {name: Skip(reason) if reason else model.get_submodule(name) for name, reason in reasons.items()}

    def prepare(self, model: nn.Module) -> nn.Module:
        layers = self.prunable(model).layers
        model = copy.deepcopy(model)
        norms = {group.sources[0]: _own_norms(model, group) for group in channel_graph(model).inner}
        for name in layers:
            layer = SkeletonConv2d.from_conv(model.get_submodule(name))
            layer.norms = norms.get(name)
            replace_module(model, name, layer)
        if self.train == "skeleton":
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name.endswith(".skeleton")
        return model

    def penalty(self, model: nn.Module, progress: Progress) -> dict[str, Tensor]:
        skeletons = torch.cat([layer.skeleton.flatten() for layer in _skeletons(model).values()])
        return {"skeleton_l1": self.penalty_weight(progress) * skeletons.abs().sum()}

    def penalty_weight(self, progress: Progress) -> float:
        """alpha, or what the schedule makes of `strength`."""
        return progress.penalty_weight(self.strength) if self.alpha is None else self.alpha

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress) -> None:
        for layer in _skeletons(model).values():
            strength = layer.skeleton.abs().where(layer.alive, -1.0)
            # The layer's strongest stripe stays: an empty layer would end the network.
            layer.alive.copy_((strength > self.threshold) | keep_best(strength))
            layer.skeleton.mul_(layer.alive)
            live = layer.alive.flatten(1).any(1)
            for constant in _constants(model, layer):
                constant.mul_(live)

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores = self.watch(model)
        if self.select == "threshold":
            return select_threshold(scores, self.threshold, self.unit, requested=ratio)
        gone = torch.cat([~layer.weight.detach().any(1).flatten() for layer in _skeletons(model).values()])
        masks = select_global(scores, of_all(ratio, gone), self.unit)
        return masks.with_notes(*separation_note(scores, masks, "skeleton"))

    def watch(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: (layer.skeleton.detach() * layer.alive).abs() for name, layer in _skeletons(model).items()}


def _without_stripes(model: nn.Module, name: str) -> str | None:
    reason = unpackable(layer := model.get_submodule(name))
    if reason is None and math.prod(layer.kernel_size) == 1:
        return "1x1, a single stripe"
    return reason or why_not_packed(model, name, "stripe")


def _own_norms(model: nn.Module, group: ChannelGroup) -> tuple[str, ...]:
    """The norms on the group's channels alone, not those behind a concatenation."""
    return tuple(name for name in group.norms if model.get_submodule(name).num_features == group.width)


def _constants(model: nn.Module, layer: SkeletonConv2d) -> list[Tensor]:
    """(O,) parameters through which a dead filter would still emit a constant."""
    if layer.norms is None:
        return []
    norms = [model.get_submodule(name) for name in layer.norms]
    parameters = [layer.bias, *(p for norm in norms for p in (norm.weight, norm.bias))]
    return [parameter for parameter in parameters if parameter is not None]


def _skeletons(model: nn.Module) -> dict[str, SkeletonConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SkeletonConv2d)}
