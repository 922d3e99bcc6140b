"""Removal, for every method: what the masks say is taken out of the network.

    plain     training layers become ordinary ones (a skeleton is merged into its weight)
    mask      the reference: removed units are zero, removed channels also in bias and batch norm
    cut       dead channels are gone, stripes are packed; what is left to hold comes back as masks (see `cutting`)
    verify    masked and cut network compute the same, or the first layer that differs is named

Only channels that the network can do without are taken out: `trial` has tried it.
"""

import copy

from torch import nn

from prune_cli.cutting import PACKED, Cut, Removal, cut_in_place, mask_in_place
from prune_cli.masks import Masks
from prune_cli.plain import plain
from prune_cli.settings import Constant
from prune_cli.trial import channel_graph
from prune_cli.verify import verify

__all__ = ["PACKED", "Cut", "cut", "mask", "masked_and_cut", "plain", "verify"]


def mask(model: nn.Module, masks: Masks, constant: Constant = "drop") -> nn.Module:
    """A plain copy of the network with all removed units at zero."""
    return _masked(model, masks, constant)[0]


def cut(model: nn.Module, masks: Masks, constant: Constant = "drop") -> Cut:
    """A plain copy of the network without the removed units.

    Dead filters inside a residual sum go one by one, or as stripes; those of a grouped convolution
    stay as zeros, unless whole groups of it die with what they read.
    """
    return cut_in_place(*_masked(model, masks, constant), masks)


def masked_and_cut(model: nn.Module, masks: Masks, constant: Constant = "drop") -> tuple[nn.Module, Cut]:
    """Both, for which the network is traced once."""
    masked, removal = _masked(model, masks, constant)
    return masked, cut_in_place(copy.deepcopy(masked), removal, masks)


def _masked(model: nn.Module, masks: Masks, constant: Constant) -> tuple[nn.Module, Removal]:
    model = plain(model)
    return model, mask_in_place(channel_graph(model), masks, constant)
