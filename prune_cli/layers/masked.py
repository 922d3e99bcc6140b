"""A convolution that remembers which of its filters are pruned while it trains."""

import torch
from torch import nn


class MaskedConv2d(nn.Conv2d):
    """Conv2d with `alive`, (O,) bool buffer: False where a filter is held at zero."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "MaskedConv2d":
        """Takes over the settings and the weights of `conv` (not a copy of them)."""
        layer = _like(cls, conv)
        layer.register_buffer("alive", torch.ones(len(conv.weight), dtype=torch.bool, device=conv.weight.device))
        return layer

    def plain(self) -> nn.Conv2d:
        """The ordinary convolution."""
        return _like(nn.Conv2d, self)


def _like(kind: type[nn.Conv2d], conv: nn.Conv2d) -> nn.Conv2d:
    layer = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None, conv.padding_mode, device="meta",
    )
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer.train(conv.training)
