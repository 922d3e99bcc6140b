"""Channels of a smaller layer, put back at their places in a wider sum."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class ScatterChannels(nn.Module):
    """(N, C, ...) -> (N, `out_channels`, ...), or (N, ..., C) -> (N, ..., `out_channels`): channel c of the
    input becomes channel `channels[c]`, all others are zero.

    channels  (C,) indices, a buffer
    axis      where the channels are, 1 or -1

    Where filters of a residual sum are chosen independently, the channel of one writer dies while
    another writer still needs it: the filter goes, the width of the sum stays.
    """

    def __init__(self, channels: Tensor, out_channels: int, axis: int = 1) -> None:
        super().__init__()
        self.out_channels, self.axis = out_channels, axis
        self.register_buffer("channels", channels)

    @property
    def in_channels(self) -> int:
        return len(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, 1)
        wide = x.new_zeros(len(x), self.out_channels, *x.shape[2:])
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            wide = wide.contiguous(memory_format=torch.channels_last)  # the sum adds two tensors of one layout
        return wide.index_copy_(1, self.channels, x).movedim(1, self.axis)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}" + (f", axis={self.axis}" if self.axis != 1 else "")


def scattered(layer: nn.Module, channels: Tensor, out_channels: int) -> nn.Sequential:
    """The layer, under the name `layer`, with its output channels put back at their places."""
    scatter = ScatterChannels(channels, out_channels, axis=-1 if isinstance(layer, nn.Linear) else 1)
    return nn.Sequential(OrderedDict(layer=layer, scatter=scatter))
