"""A convolution of which only the surviving stripes exist: the shipped form of stripe-wise pruning."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.modules import why_not_replaced


class StripeConv2d(nn.Module):
    """Conv2d with (O, K, K) stripes of C input channels each, of which only S survive.

    stripes  (S, C) parameter, ordered by (kernel row, kernel column, filter)
    bias     (O,) parameter or None
    pattern  (O, K, K) bool buffer, True where a stripe survives

    There is nothing to hold at zero while training: a removed stripe has no parameter. The stripes
    are scattered into a dense weight, which convolves: the same numbers in training and evaluation,
    on every machine. `inference.for_inference` puts the stripe-wise kernels in its place.
    """

    def __init__(
        self, in_channels: int, pattern: Tensor, stride: tuple[int, int], padding: tuple[int, int] | str, bias: bool
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, pattern.shape[0]
        self.stride, self.padding = tuple(stride), in_pixels(padding, pattern.shape[1:])
        self.stripes = nn.Parameter(torch.empty(int(pattern.sum()), in_channels))
        self.bias = nn.Parameter(torch.empty(self.out_channels)) if bias else None
        self.register_buffer("pattern", pattern.bool())

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, pattern: Tensor) -> "StripeConv2d":
        """The stripes of `conv` at `pattern` (O, K, K); groups and dilation must be 1, padding zeros."""
        layer = cls(conv.in_channels, pattern, conv.stride, conv.padding, conv.bias is not None)
        layer = layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)
        layer.stripes.copy_(conv.weight.permute(2, 3, 0, 1)[layer.pattern.permute(1, 2, 0)])
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """(O, C, K, K): the dense weight, zero where a stripe is gone; differentiable."""
        dense = self.stripes.new_zeros(*self.pattern.permute(1, 2, 0).shape, self.in_channels)
        dense = dense.masked_scatter(self.pattern.permute(1, 2, 0).unsqueeze(-1), self.stripes)
        return dense.permute(2, 3, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of one image whose output is (N, O, H, W)."""
        return self.stripes.numel() * output.shape[-2] * output.shape[-1]

    def extra_repr(self) -> str:
        alive, total = len(self.stripes), self.pattern.numel()
        return f"{self.in_channels}, {self.out_channels}, stripes={alive}/{total}, stride={self.stride}"


def unpackable(module: nn.Module) -> str | None:
    """Why the layer cannot do with a part of its stripes or columns; None = it is a convolution without
    groups and dilation, padded with as many zeros on either side."""
    if not isinstance(module, nn.Conv2d):
        return "fully connected"
    if reason := why_not_replaced(module):
        return reason
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "a grouped convolution"
    if module.dilation != (1, 1):
        return "a dilated convolution"
    asymmetric = module.padding == "same" and any(size % 2 == 0 for size in module.kernel_size)
    return "not padded with as many zeros on either side" if asymmetric or module.padding_mode != "zeros" else None


def in_pixels(padding: tuple[int, int] | str, kernel: torch.Size) -> tuple[int, int]:
    """The padding on either side; nn.Conv2d also has the words "valid" and "same" (odd kernels here)."""
    if isinstance(padding, str):
        return tuple(size // 2 if padding == "same" else 0 for size in kernel)
    return tuple(padding)
