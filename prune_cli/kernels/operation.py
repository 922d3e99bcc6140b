"""The contract of the stripe-wise convolution: what every backend is given and has to compute.

    y[n,o,h,w] = relu(bias[o] + sum over surviving stripes (o,i,j) and over c of
                      stripe[(i,j,o),c] * x[n,c,h*s+i-p,w*s+j-p])         (x is 0 outside the image)

"Pruning Filter in Filter" (Meng et al., NeurIPS 2020), section 3.2; bias and ReLU are the epilogue.
A backend is a function Operation -> Implementation. Inputs are float32, float16 or bfloat16, NCHW
or channels_last; the output has the input's type and memory format; sums are float32.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Implementation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Operation:
    """One layer of which only the surviving stripes exist.

    pattern  (O, Kh, Kw) bool, True where a stripe survives
    stripes  (S, C) float32, ordered by (kernel row, kernel column, filter)
    bias     (O,) float32
    relu     whether max(y, 0) follows
    """

    pattern: Tensor
    stripes: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    relu: bool = False

    @property
    def filters(self) -> int:
        return self.pattern.shape[0]

    @property
    def channels(self) -> int:
        return self.stripes.shape[1]

    @property
    def kernel(self) -> tuple[int, int]:
        """(Kh, Kw)"""
        return self.pattern.shape[1], self.pattern.shape[2]

    @property
    def weight(self) -> Tensor:
        """(O, C, Kh, Kw), zero where a stripe is gone."""
        dense = self.stripes.new_zeros(*self.kernel, self.filters, self.channels)
        dense[self.pattern.permute(1, 2, 0)] = self.stripes
        return dense.permute(2, 3, 0, 1).contiguous()

    @property
    def filter_of_stripe(self) -> Tensor:
        """(S,) the filter to which each stripe belongs."""
        return self.pattern.permute(1, 2, 0).nonzero()[:, 2]

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides how fast the operation is: everything but the values."""
        alive = self.pattern.cpu().numpy().tobytes()
        shape = f"{tuple(self.pattern.shape)} {self.channels} {self.stride} {self.padding} {self.relu}"
        return hashlib.sha256(shape.encode() + alive).hexdigest()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') for an input of (H, W)."""
        return tuple(
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        )

    def to(self, device: torch.device) -> "Operation":
        """The same operation with its tensors on `device`."""
        return replace(
            self, pattern=self.pattern.to(device), stripes=self.stripes.to(device), bias=self.bias.to(device)
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where the strides of (N, C, H, W) say so and NCHW is not meant as well."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
