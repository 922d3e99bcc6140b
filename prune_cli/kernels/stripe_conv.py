"""The stripe-wise convolution: its contract, and the torch reference that defines the right answer.

    y[n,o,h,w] = bias[o] + sum over surviving stripes (o,i,j) and over c of
                 stripe[(i,j,o),c] * x[n,c,h*s+i-p,w*s+j-p]          (x is 0 outside the image)

"Pruning Filter in Filter" (Meng et al., NeurIPS 2020), section 3.2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class StripePattern:
    """A pattern (O, K, K) prepared for computing: per kernel position the filters that survive.

    positions  list of (i, j, filters (S_ij,) int64, first row, last row + 1 of `stripes`)
    """

    def __init__(self, pattern: Tensor) -> None:
        self.filters, self.height, self.width = pattern.shape
        self.device = pattern.device
        self.positions, first = [], 0
        for i in range(self.height):
            for j in range(self.width):
                alive = pattern[:, i, j].nonzero().flatten()
                if len(alive):
                    self.positions.append((i, j, alive, first, first + len(alive)))
                first += len(alive)


def stripe_conv2d(
    x: Tensor, stripes: Tensor, pattern: StripePattern, bias: Tensor | None,
    stride: tuple[int, int], padding: tuple[int, int],
) -> Tensor:
    """(N, C, H, W) and (S, C) to (N, O, H', W'): one matrix product per kernel position.

    stripes are ordered by (i, j, o). For half-precision inputs the products of one position are
    rounded to the input's type, and their sum over the positions is float32.
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height = (x.shape[2] - pattern.height) // stride[0] + 1
    width = (x.shape[3] - pattern.width) // stride[1] + 1
    exact = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape[0], pattern.filters, height, width, device=x.device, dtype=exact)
    if bias is not None:
        y += bias.to(exact).view(-1, 1, 1)
    for i, j, filters, first, last in pattern.positions:
        rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
        window = x[:, :, rows, columns]
        part = torch.matmul(stripes[first:last].to(x.dtype), window.flatten(2))
        y.index_add_(1, filters, part.view(-1, last - first, height, width).to(exact))
    return y.to(x.dtype)
