"""Some channels of a stream, for the layers behind one batch norm alone."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class SelectChannels(nn.Module):
    """(N, `in_channels`, ...) -> (N, C, ...): channel c of the output is channel `channels[c]` of the input.

    channels  (C,) indices, a buffer

    Where a batch norm reads a residual sum or a concatenation, other layers go on reading what it no
    longer does: network slimming (Liu et al., ICCV 2017) selects the channels before such a norm.
    """

    def __init__(self, channels: Tensor, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.register_buffer("channels", channels)

    @property
    def out_channels(self) -> int:
        return len(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # index_select alone gives up the layout
            return x.permute(0, 2, 3, 1).index_select(3, self.channels).permute(0, 3, 1, 2)
        return x.index_select(1, self.channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


def selected(layer: nn.Module, channels: Tensor, in_channels: int) -> nn.Sequential:
    """The layer, under the name `layer`, reading only these channels."""
    return nn.Sequential(OrderedDict(select=SelectChannels(channels, in_channels), layer=layer))
