"""The torch reference: it defines the right answer, on any device, slowly."""

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_cli.kernels.operation import Implementation, Operation, memory_format


def reference(operation: Operation) -> Implementation:
    """One matrix product per kernel position, summed in float32."""
    return lambda x: stripe_conv2d(operation, x)


def stripe_conv2d(operation: Operation, x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, O, H', W')."""
    (stride_h, stride_w), (padding_h, padding_w) = operation.stride, operation.padding
    height, width = operation.output_size(*x.shape[2:])
    padded = F.pad(x.float(), (padding_w, padding_w, padding_h, padding_h))
    y = operation.bias.view(1, -1, 1, 1).repeat(len(x), 1, height, width)
    first = 0
    for i in range(operation.kernel[0]):
        for j in range(operation.kernel[1]):
            filters = operation.pattern[:, i, j].nonzero().flatten()
            stripes = operation.stripes[first : first + len(filters)]
            window = padded[:, :, i:, j:][:, :, ::stride_h, ::stride_w][:, :, :height, :width]
            y.index_add_(1, filters, torch.einsum("sc,nchw->nshw", stripes, window))
            first += len(filters)
    return (y.relu() if operation.relu else y).to(x.dtype, memory_format=memory_format(x))
