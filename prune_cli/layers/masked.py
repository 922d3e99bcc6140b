"""Layers that remember which of their filters are pruned while they train."""

import torch
from torch import Tensor, nn


class Masked:
    """A layer with `alive`, (O,) bool buffer: False where a filter is held at zero."""

    weight: Tensor
    alive: Tensor

    def plain(self) -> nn.Module:
        """The ordinary layer."""
        return _like(self, nn.Conv2d, nn.Linear)

    @torch.no_grad()
    def hold(self, values: Tensor) -> None:
        """Zero the filters that are not alive in `values`, of the weight's shape (O, ...), in place."""
        values.mul_(self.alive.view(-1, *[1] * (values.ndim - 1)))


class MaskedConv2d(Masked, nn.Conv2d):
    """Conv2d that remembers."""


class MaskedLinear(Masked, nn.Linear):
    """Linear that remembers."""


def masked(layer: nn.Conv2d | nn.Linear) -> MaskedConv2d | MaskedLinear:
    """The layer with all filters alive; takes over its settings and its weights (not a copy of them)."""
    remembers = _like(layer, MaskedConv2d, MaskedLinear)
    remembers.register_buffer("alive", torch.ones(len(layer.weight), dtype=torch.bool, device=layer.weight.device))
    return remembers


def _like(layer: nn.Conv2d | nn.Linear, conv: type[nn.Conv2d], linear: type[nn.Linear]) -> nn.Conv2d | nn.Linear:
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        new = linear(layer.in_features, layer.out_features, biased, device="meta")
    else:
        new = conv(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, biased, layer.padding_mode, device="meta",
        )  # fmt: skip
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)
