"""The measurements behind `prune-cli bench`.

A layer's dense time is that of the faster memory format, each from its own layout to its own
layout. Ours is from NCHW to NCHW, conversions included. All take turns; what counts is the
shortest time of each, which a busy machine disturbs least.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.checkpoint import load_model
from prune_cli.errors import UserError
from prune_cli.inference import InferenceConv2d, for_inference
from prune_cli.kernels.operation import Implementation, Operation
from prune_cli.kernels.plan import choose
from prune_cli.metrics.latency import measure as measure_models
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG
from prune_cli.timing import alternate

NETWORKS = {"vgg16": lambda: VGG(3, 32, 10, depth=16), "resnet56": lambda: CifarResNet(3, 32, 10, depth=56)}
WHOLE = "the whole network"


@dataclass(frozen=True)
class Row:
    """One comparison; times in milliseconds.

    count    layers of this shape in the network     floor   least time for its numbers and bytes
    pattern  random, or trained                      plan    what computed ours
    """

    layer: str
    count: int
    batch: int
    pattern: str
    ratio: float
    dense_ms: float
    ours_ms: float
    floor_ms: float | None
    plan: str

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ours_ms


@dataclass(frozen=True)
class Layer:
    """A dense convolution and the shape (C, H, W) of its input."""

    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    input_shape: tuple[int, int, int]


def kernel(options: argparse.Namespace) -> list[Row]:
    """The distinct 3x3 layers of the networks, with random patterns at each ratio and batch size."""
    dtype = getattr(torch, options.dtype)
    rate = _multiply_rate(dtype)
    rows = []
    cases = [(n, s, c, b) for n in options.networks for s, c in _shapes(NETWORKS[n]()).items() for b in options.batches]
    for network, (filters, stride, shape), count, batch in track(cases, "measuring", transient=True):
        generator = torch.Generator().manual_seed(0)
        layer = Layer(torch.randn(filters, shape[0], 3, 3, generator=generator), (stride, stride), (1, 1), shape)
        x = torch.randn(batch, *shape, generator=generator).to(dtype)
        operations = {}
        for ratio in options.ratios:
            pattern = torch.rand(filters, 3, 3, generator=generator) >= ratio
            stripes = layer.weight.permute(2, 3, 0, 1)[pattern.permute(1, 2, 0)]
            operations[ratio] = Operation(pattern, stripes, torch.zeros(filters), layer.stride, layer.padding)
        name = f"{network} {shape[0]}-{filters} @ {shape[1]}" + (f" / {stride}" if stride > 1 else "")
        for ratio, found in _compare(layer, x, operations, x, options).items():
            dense, ours, floor, plan = found(rate)
            rows.append(Row(name, count, batch, "random", ratio, dense, ours, floor, plan))
    return rows


def model(options: argparse.Namespace) -> list[Row]:
    """A run's dense network against its smallest: every stripe layer, and the whole."""
    dense = load_model(options.run / "checkpoints/dense.safetensors")
    finetuned = options.run / "checkpoints/finetuned.safetensors"
    small = load_model(finetuned if finetuned.is_file() else options.run / "checkpoints/pruned.safetensors")
    fast = for_inference(small, options.kernel)
    operations = {name: m.operation for name, m in fast.named_modules() if isinstance(m, InferenceConv2d)}
    if not operations:
        raise UserError(f"{options.run}: no stripes are gone from this run's network; bench model is for method=stripe")
    rate, rows = _multiply_rate(torch.float32), []
    layers, shapes = _layers(dense), {n: tuple(x) for n, x in _input_shapes(fast).items()}
    for batch in options.batches:
        for name, operation in track(operations.items(), "measuring", transient=True):
            ratio = 1 - operation.stripes.numel() / layers[name].weight.numel()
            x, y = torch.randn(batch, *layers[name].input_shape), torch.randn(batch, *shapes[name])
            dense_ms, ours, floor, plan = _compare(layers[name], x, {0: operation}, y, options)[0](rate)
            rows.append(Row(name, 1, batch, "trained", ratio, dense_ms, ours, floor, plan))
        times = measure_models(
            {"dense": dense, "ours": small}, dense.input_shape, [batch], 10 * options.seconds, kernel=options.kernel
        )
        whole = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
        rows.append(Row(WHOLE, 1, batch, "trained", whole, times["dense"][0].median_ms, times["ours"][0].median_ms, None, "all"))
    return rows


def _compare(layer: Layer, x_dense: Tensor, operations: dict[float, Operation], x: Tensor, options: argparse.Namespace):
    """By ratio: a function of the machine's rate of multiply-adds to (dense ms, ours ms, floor ms, plan)."""
    with torch.inference_mode():
        plans: dict[float, tuple[str, Implementation]] = {r: choose(o, x, options.kernel) for r, o in operations.items()}
        runs = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            weight = layer.weight.to(x.dtype).contiguous(memory_format=layout)
            inside = x_dense.contiguous(memory_format=layout)
            bias = torch.zeros(len(weight), dtype=x.dtype)
            runs[layout] = lambda i=inside, w=weight, b=bias: F.conv2d(i, w, b, layer.stride, layer.padding)
        for ratio, (_, implementation) in plans.items():
            runs[ratio] = lambda implementation=implementation: implementation(x)
        outputs = {ratio: runs[ratio]().numel() for ratio in plans}
        moved = {ratio: torch.empty((x.numel() + outputs[ratio]) // 2, dtype=x.dtype) for ratio in plans}
        for ratio, source in moved.items():
            runs["copy", ratio] = lambda source=source, target=torch.empty_like(source): target.copy_(source)
        ms = {name: 1e3 * min(times) for name, times in alternate(runs, options.seconds).items()}
    dense = min(ms[torch.contiguous_format], ms[torch.channels_last])

    def result(ratio: float):
        macs = len(x) * _needed_macs(operations[ratio], x.shape[2:])
        return lambda rate: (dense, ms[ratio], max(1e3 * macs / rate, ms["copy", ratio]), plans[ratio][0])

    return {ratio: result(ratio) for ratio in operations}


def _needed_macs(operation: Operation, size: tuple[int, int]) -> int:
    """Multiply-adds of one image (H, W), without those that multiply padding."""
    inside = F.unfold(torch.ones(1, 1, *size), operation.kernel, 1, operation.padding, operation.stride)[0].sum(1)
    return int(operation.channels * (operation.pattern.flatten(1).sum(0) * inside).sum())


def _multiply_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Multiply-adds per second of a large matrix product."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    return size**3 / min(alternate({"product": lambda: a @ b}, 0.3)["product"])


def _shapes(network: nn.Module) -> Counter[tuple[int, int, tuple[int, int, int]]]:
    """How often the network has a 3x3 layer of (filters, stride, input shape)."""
    network.input_shape = (3, 32, 32)
    layers = _layers(network).values()
    return Counter((len(l.weight), l.stride[0], l.input_shape) for l in layers if l.weight.shape[2:] == (3, 3))


def _layers(network: nn.Module) -> dict[str, Layer]:
    shapes = _input_shapes(network)
    convs = ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    return {name: Layer(m.weight.detach(), m.stride, m.padding, tuple(shapes[name])) for name, m in convs}


@torch.inference_mode()
def _input_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """(C, H, W) of what each convolution is given."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str):
        return lambda module, inputs: shapes.__setitem__(name, inputs[0].shape[1:])

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, InferenceConv2d)):
            module.register_forward_pre_hook(note(name))
    network.eval()(torch.zeros(1, *network.input_shape))
    return shapes


def speedups(rows: list[Row]) -> Iterator[tuple[int, float, list[Row]]]:
    """(batch, ratio, rows) of the layers, random patterns only by ratio."""
    keys = dict.fromkeys((row.batch, row.ratio if row.pattern == "random" else None) for row in rows)
    for batch, ratio in keys:
        found = [r for r in rows if r.batch == batch and r.layer != WHOLE and ratio in (None, r.ratio)]
        yield batch, ratio, found
