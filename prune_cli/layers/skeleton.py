"""A convolution with a trainable filter skeleton: the training form of stripe-wise pruning."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SkeletonConv2d(nn.Conv2d):
    """Conv2d whose stripe (o, :, i, j) is scaled by `skeleton[o, i, j]`.

    weight    (O, I, K, K)
    skeleton  (O, K, K) parameter, one at the start
    alive     (O, K, K) bool buffer; a stripe that has died never comes back
    norms     names of the batch norms whose channel o dies with filter o, as the layer's own bias
              then does; None where other layers write the same channels, which outlive the filter

    "Pruning Filter in Filter" (Meng et al., NeurIPS 2020), equation 1.
    """

    norms: tuple[str, ...] | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "SkeletonConv2d":
        """Takes over the settings and the weights of `conv` (not a copy of them).

        Padding must be with zeros, groups must be 1. A stripe of zeros is dead: it was pruned before.
        """
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, bias=conv.bias is not None, device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.skeleton = nn.Parameter(conv.weight.new_ones(conv.out_channels, *conv.kernel_size))
        layer.register_buffer("alive", conv.weight.detach().any(1))
        return layer.train(conv.training)

    def scaled_weight(self) -> Tensor:
        """(O, I, K, K): what is convolved."""
        return self.weight * self.skeleton.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.scaled_weight(), self.bias, self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def plain(self) -> nn.Conv2d:
        """The same function as an ordinary Conv2d: the skeleton is merged into the weight."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype,
        )
        conv.weight.copy_(self.scaled_weight())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)
