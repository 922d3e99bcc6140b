"""A convolution of which only some input columns exist: the shipped form of group-wise pruning."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.layers.stripe import in_pixels


class GatheredConv2d(nn.Module):
    """Conv2d that reads only G of its I * K * K input columns, the same ones in all filters.

    columns  (O, G) parameter, ordered by (kernel row, kernel column, input channel)
    bias     (O,) parameter or None
    pattern  (I, K, K) bool buffer, True where a column survives

    Inference gathers the surviving columns of the image and multiplies once, as Lebedev & Lempitsky
    describe it ("Fast ConvNets Using Group-wise Brain Damage", CVPR 2016); training, and whatever
    else wants a gradient, convolves with the dense weight.
    """

    def __init__(
        self, pattern: Tensor, out_channels: int, stride: tuple[int, int], padding: tuple[int, int] | str, bias: bool
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = pattern.shape[0], out_channels
        self.stride, self.padding = tuple(stride), in_pixels(padding, pattern.shape[1:])
        self.columns = nn.Parameter(torch.empty(out_channels, int(pattern.sum())))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("pattern", pattern.bool())
        self._plan: list[tuple[int, int, Tensor]] | None = None
        self.register_load_state_dict_post_hook(_forget_plan)

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, pattern: Tensor) -> "GatheredConv2d":
        """The columns of `conv` at `pattern` (I, K, K); groups and dilation must be 1, padding zeros."""
        layer = cls(pattern, conv.out_channels, conv.stride, conv.padding, conv.bias is not None)
        layer = layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)
        layer.columns.copy_(conv.weight.permute(0, 2, 3, 1)[:, layer.pattern.permute(1, 2, 0)])
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """(O, I, K, K): the dense weight, zero where a column is gone; differentiable."""
        pattern = self.pattern.permute(1, 2, 0)
        dense = self.columns.new_zeros(self.out_channels, *pattern.shape)
        return dense.masked_scatter(pattern, self.columns).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self._needs_gradient(x):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        height, width = (
            (size - kernel) // stride + 1
            for size, kernel, stride in zip(x.shape[2:], self.pattern.shape[1:], self.stride)
        )
        gathered = []
        for i, j, channels in self._positions():
            rows = slice(i, i + (height - 1) * self.stride[0] + 1, self.stride[0])
            columns = slice(j, j + (width - 1) * self.stride[1] + 1, self.stride[1])
            gathered.append(x[:, channels, rows, columns].flatten(2))
        y = self.columns.to(x.dtype) @ torch.cat(gathered, 1)  # (O, G) x (N, G, H' W')
        if self.bias is not None:
            y += self.bias.to(x.dtype).unsqueeze(1)
        return y.view(len(x), self.out_channels, height, width)

    def _positions(self) -> list[tuple[int, int, Tensor]]:
        """Per kernel position the channels it reads: looked up once, which on a GPU has to wait for it."""
        if self._plan is None or self._plan[0][2].device != self.pattern.device:
            positions = self.pattern.any(0).nonzero().tolist()
            self._plan = [(i, j, self.pattern[:, i, j].nonzero().flatten()) for i, j in positions]
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # derived from `pattern`; a copy derives its own

    def _needs_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters()))

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of one image whose output is (N, O, H, W)."""
        return self.columns.numel() * output.shape[-2] * output.shape[-1]

    def extra_repr(self) -> str:
        alive, total = self.columns.shape[1], self.pattern.numel()
        return f"{self.in_channels}, {self.out_channels}, columns={alive}/{total}, stride={self.stride}"


def _forget_plan(layer: GatheredConv2d, _) -> None:
    """A loaded pattern may be another one than the plan was made for."""
    layer._plan = None
