"""Pruning what was pruned before: layers unpacked for the next selection, zeros that stay, and the
selections of several rounds as one.

    unpacked   packed layers become convolutions with zeros, which every method can prune
    packing    which layers those are, so that `packed` packs them again behind the cut
    zeros      the weights that are exactly zero, as masks: what an earlier pruning left to hold
    lifted     a later selection in the coordinates of an earlier one
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from prune_cli.errors import UserError
from prune_cli.masks import UNIT_AXES, Masks
from prune_cli.modules import replace_module
from prune_cli.surgery import PACKED, Cut

UNIT_OF = {layer: unit for unit, layer in PACKED.items()}


def packing(model: nn.Module) -> dict[str, str]:
    """Per packed layer the unit of which it holds the surviving ones only."""
    return {name: UNIT_OF[type(module)] for name, module in model.named_modules() if type(module) in UNIT_OF}


@torch.no_grad()
def unpacked(model: nn.Module) -> nn.Module:
    """A copy in which packed layers are convolutions, zero where a unit is gone."""
    model = copy.deepcopy(model)
    for name in packing(model):
        layer = model.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        conv = nn.Conv2d(
            layer.in_channels, layer.out_channels, weight.shape[2:], layer.stride, layer.padding,
            bias=bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        conv.weight.copy_(weight)
        if bias is not None:
            conv.bias.copy_(bias)
        replace_module(model, name, conv.train(layer.training))
    return model


def packed(small: Cut, units: Mapping[str, str]) -> Cut:
    """The cut network with the layers packed again that were (`units`: see `packing`).

    Raises UserError: the cut went through such a layer by a finer or another unit, whose zeros a packed
    layer cannot hold as well.
    """
    model = copy.deepcopy(small.model)
    for old, unit in units.items():
        name = small.renamed.get(old, old)
        layer = model.get_submodule(name)
        now = small.masks.unit if name in small.masks.keep else UNIT_OF.get(type(layer), unit)
        if now != unit:
            raise UserError(
                f"base: {old} holds the surviving {unit}s only, in which a selection of {now}s cannot be held; "
                "take a method that removes filters"
            )
        if isinstance(layer, nn.Conv2d):
            other_axes = [axis for axis in range(4) if axis not in UNIT_AXES[unit]]
            pattern = (layer.weight != 0).any(other_axes[0])
            if not pattern.all():
                replace_module(model, name, PACKED[unit].from_conv(layer, pattern.cpu()))
    return replace(small, model=model)


def zeros(model: nn.Module) -> Masks:
    """Single weights, kept where they are not exactly zero, of the layers that have such zeros."""
    keep = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and not (alive := weight.detach() != 0).all():
            keep[name] = alive
    return Masks("weight", keep, 0.0)


def lifted(later: Masks, small: Cut, masks: Masks) -> Masks:
    """`masks` and, in their coordinates, `later`, which was selected in the network `small` that they cut."""
    keep = {}
    for layer, first in masks.keep.items():
        second = later.keep.get(small.renamed.get(layer, layer))
        if second is None:  # nothing more was selected there
            keep[layer] = first
            continue
        gone = {0: small.removed.get(layer, ()), 1: small.unread.get(layer, ())}
        places = [
            torch.tensor([place for place in range(size) if place not in gone.get(axis, ())])
            for axis, size in zip(UNIT_AXES[masks.unit], first.shape)
        ]
        wide = torch.zeros_like(first)
        wide[torch.meshgrid(*places, indexing="ij")] = second.to(first.device)
        keep[layer] = wide & first
    return replace(masks, keep=keep, requested=masks.requested)
