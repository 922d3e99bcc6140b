"""Backends in plain PyTorch: they serve where nothing can be compiled, and some layers everywhere."""

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_cli.kernels.operation import Implementation, Operation, memory_format

CLUSTERS = 4  # convolutions into which `boxes` splits a layer at most


def dense(operation: Operation, channels_last: bool = False) -> Implementation:
    """The dense convolution with zeros for what is gone, in the input's memory format or channels_last."""
    weights: dict[tuple, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        outside = memory_format(x)
        inside = torch.channels_last if channels_last else outside
        if (x.dtype, inside) not in weights:
            weight = operation.weight.to(x.dtype).contiguous(memory_format=inside)
            weights[x.dtype, inside] = weight, operation.bias.to(x.dtype)
        y = F.conv2d(
            x.contiguous(memory_format=inside), *weights[x.dtype, inside], operation.stride, operation.padding
        )
        return (y.relu_() if operation.relu else y).contiguous(memory_format=outside)

    return run


def positions(operation: Operation) -> Implementation:
    """One matrix product per kernel position over the padded image, added to the filters that have it."""
    (stride_h, stride_w), (padding_h, padding_w) = operation.stride, operation.padding
    parts, first = [], 0
    for i in range(operation.kernel[0]):
        for j in range(operation.kernel[1]):
            filters = operation.pattern[:, i, j].nonzero().flatten()
            if len(filters):
                parts.append((i, j, filters, operation.stripes[first : first + len(filters)]))
            first += len(filters)

    def run(x: Tensor) -> Tensor:
        height, width = operation.output_size(*x.shape[2:])
        padded = F.pad(x, (padding_w, padding_w, padding_h, padding_h))
        y = operation.bias.view(1, -1, 1, 1).repeat(len(x), 1, height, width).flatten(2)
        for i, j, filters, stripes in parts:
            window = padded[:, :, i:, j:][:, :, ::stride_h, ::stride_w][:, :, :height, :width]
            y.index_add_(1, filters, torch.matmul(stripes.to(x.dtype), window.flatten(2)).float())
        y = y.unflatten(2, (height, width))
        return (y.relu_() if operation.relu else y).to(x.dtype).contiguous(memory_format=memory_format(x))

    return run


def boxes(operation: Operation) -> Implementation:
    """Filters clustered by the bounding box of their pattern: a small dense convolution per cluster."""
    weight, (padding_h, padding_w) = operation.weight, operation.padding
    parts = [
        (box, filters, weight[filters][:, :, box[0] : box[1], box[2] : box[3]].contiguous())
        for box, filters in _clusters(operation.pattern)
    ]

    def run(x: Tensor) -> Tensor:
        height, width = operation.output_size(*x.shape[2:])
        padded = F.pad(x, (padding_w, padding_w, padding_h, padding_h))
        y = operation.bias.to(x.dtype).view(1, -1, 1, 1).repeat(len(x), 1, height, width)
        for (top, _, left, _), filters, part in parts:
            window = padded[:, :, top:, left:]
            partial = F.conv2d(window, part.to(x.dtype), None, operation.stride)
            y.index_add_(1, filters, partial[:, :, :height, :width])
        return (y.relu_() if operation.relu else y).contiguous(memory_format=memory_format(x))

    return run


def _clusters(pattern: Tensor) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    """[(top, bottom, left, right), filters]; the two boxes that waste least are merged until few are left."""
    members: dict[tuple[int, int, int, int], list[int]] = {}
    for o in pattern.flatten(1).any(1).nonzero().flatten().tolist():
        rows, columns = pattern[o].any(1).nonzero().flatten(), pattern[o].any(0).nonzero().flatten()
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        members.setdefault(box, []).append(o)
    while len(members) > CLUSTERS:
        pairs = [(a, b) for a in members for b in members if a < b]
        a, b = min(pairs, key=lambda pair: _waste(*pair, len(members[pair[0]]), len(members[pair[1]])))
        merged = members.pop(a) + members.pop(b)
        members.setdefault(_union(a, b), []).extend(merged)
    return [(box, torch.tensor(sorted(filters), device=pattern.device)) for box, filters in members.items()]


def _union(a: tuple, b: tuple) -> tuple[int, int, int, int]:
    return min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3])


def _waste(a: tuple, b: tuple, filters_a: int, filters_b: int) -> int:
    """Positions that are multiplied in vain when the two clusters become one."""
    both = _area(_union(a, b))
    return (both - _area(a)) * filters_a + (both - _area(b)) * filters_b


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[1] - box[0]) * (box[3] - box[2])
