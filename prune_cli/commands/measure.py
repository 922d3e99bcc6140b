"""The measurements behind `prune-cli bench`.

A layer's dense time is that of the faster memory format, each from its own layout to its own
layout. Ours is from one memory format to the same one, conversions included. All take turns; what
counts is the shortest time of each, which a busy machine disturbs least. On a GPU everything runs in
CUDA graphs, and cuDNN chooses its algorithms by measurement.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.checkpoint import load_model
from prune_cli.errors import UserError
from prune_cli.evaluation import blank_image, observe
from prune_cli.inference import InferenceConv2d, for_inference
from prune_cli.kernels.operation import Implementation, Operation
from prune_cli.kernels.plan import choose, require
from prune_cli.masks import Masks
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG
from prune_cli.timing import alternate, autotuned, captured

NETWORKS = {"vgg16": lambda: VGG(3, 32, 10, depth=16), "resnet56": lambda: CifarResNet(3, 32, 10, depth=56)}
# 3x3 layers of ResNet-50 on 224x224 images, as torchvision has it: (filters, stride, input shape) -> how many.
RESNET50 = Counter({
    (64, 1, (64, 56, 56)): 3, (128, 2, (128, 56, 56)): 1, (128, 1, (128, 28, 28)): 3, (256, 2, (256, 28, 28)): 1,
    (256, 1, (256, 14, 14)): 5, (512, 2, (512, 14, 14)): 1, (512, 1, (512, 7, 7)): 2,
})  # fmt: skip
WHOLE = "the whole network"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
REPEAT = 10  # runs of a layer in one CUDA graph


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
    """The distinct 3x3 layers of the networks, with random patterns at each ratio and batch size, and
    the layers of the networks with the patterns of `options.masks`."""
    with numbers(options) as (device, dtype):
        rate = _multiply_rate(dtype, device)
        rows = []
        cases = [case for network in options.networks for case in _cases(network, options)]
        for name, count, kind, layer, batch, patterns in track(cases, "measuring", transient=True):
            x = torch.randn(batch, *layer.input_shape).to(device, dtype)
            operations = {ratio: _with_stripes(layer, pattern, device) for ratio, pattern in patterns.items()}
            for ratio, found in _compare(layer, x, operations, x, options).items():
                dense, ours, floor, plan = found(rate)
                rows.append(Row(name, count, batch, kind, ratio, dense, ours, floor, plan))
    return rows


def _cases(network: str, options: argparse.Namespace) -> Iterator[tuple]:
    """(name, how many, kind of pattern, layer, batch, ratio -> pattern)"""
    generator = torch.Generator().manual_seed(0)
    shapes = RESNET50 if network == "resnet50" else _shapes(NETWORKS[network]())
    for (filters, stride, shape), count in shapes.items():
        layer = Layer(torch.randn(filters, shape[0], 3, 3, generator=generator), (stride, stride), (1, 1), shape)
        name = f"{network} {shape[0]}-{filters} @ {shape[1]}" + (f" / {stride}" if stride > 1 else "")
        for batch in options.batches:
            patterns = {r: torch.rand(filters, 3, 3, generator=generator) >= r for r in options.ratios}
            yield name, count, "random", layer, batch, patterns
    trained = Masks.load(options.masks) if options.masks and network in NETWORKS else None
    layers = _layers(_sized(NETWORKS[network]())) if trained else {}
    for name, layer in layers.items():
        pattern = trained.keep.get(name)
        if pattern is not None and pattern.shape == (len(layer.weight), *layer.weight.shape[2:]) and pattern.any():
            for batch in options.batches:
                yield f"{network} {name}", 1, "trained", layer, batch, {1 - float(pattern.float().mean()): pattern}


def _with_stripes(layer: Layer, pattern: Tensor, device: torch.device) -> Operation:
    stripes = layer.weight.permute(2, 3, 0, 1)[pattern.permute(1, 2, 0)]
    return Operation(pattern, stripes, torch.zeros(len(pattern)), layer.stride, layer.padding).to(device)


def model(options: argparse.Namespace) -> list[Row]:
    """A run's dense network against its smallest: every stripe layer, and the whole."""
    dense = load_model(options.run / "checkpoints/dense.safetensors")
    finetuned = options.run / "checkpoints/finetuned.safetensors"
    small = load_model(finetuned if finetuned.is_file() else options.run / "checkpoints/pruned.safetensors")
    fast = for_inference(small, options.kernel)
    operations = {name: m.operation for name, m in fast.named_modules() if isinstance(m, InferenceConv2d)}
    if not operations:
        raise UserError(f"{options.run}: no stripes are gone from this run's network; bench model is for method=stripe")
    layers, shapes = _layers(dense), {n: tuple(x) for n, x in _input_shapes(_as_torch_computes(fast)).items()}
    with numbers(options) as (device, dtype):
        rate, rows = _multiply_rate(dtype, device), []
        for batch in options.batches:
            for name, operation in track(operations.items(), "measuring", transient=True):
                ratio = 1 - operation.stripes.numel() / layers[name].weight.numel()
                x = torch.randn(batch, *layers[name].input_shape).to(device, dtype)
                y = torch.randn(batch, *shapes[name]).to(device, dtype)
                dense_ms, ours, floor, plan = _compare(layers[name], x, {0: operation.to(device)}, y, options)[0](rate)
                rows.append(Row(name, 1, batch, "trained", ratio, dense_ms, ours, floor, plan))
            whole = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
            rows.append(Row(WHOLE, 1, batch, "trained", whole, *_whole_ms(dense, small, batch, device, dtype, options), None, "all"))
    return rows


def _whole_ms(
    dense: nn.Module, small: nn.Module, batch: int, device: torch.device, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[float, float]:
    """(dense network in its faster memory format, with batch norm folded as well; ours), milliseconds."""
    x = torch.randn(batch, *dense.input_shape).to(device, dtype)
    networks = {("dense", layout): (for_inference(dense), layout) for layout in LAYOUTS.values()}
    networks["ours"] = for_inference(small, options.kernel), LAYOUTS[layout_name(options)]
    with torch.inference_mode():
        runs = {
            name: partial(network.to(device=device, dtype=dtype, memory_format=layout), x.contiguous(memory_format=layout))
            for name, (network, layout) in networks.items()
        }
        ms = _shortest_ms(runs, 10 * options.seconds, device)
    return min(ms["dense", layout] for layout in LAYOUTS.values()), ms["ours"]


def _as_torch_computes(fast: nn.Module) -> nn.Module:
    """Only the shapes of its inputs are wanted: no plan is chosen for that."""
    for module in fast.modules():
        if isinstance(module, InferenceConv2d):
            module.kernel = "torch"
    return fast


@contextmanager
def numbers(options: argparse.Namespace) -> Iterator[tuple[torch.device, torch.dtype]]:
    """(device, type of the numbers) as the options want them. Raises UserError."""
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise UserError("bench --device cuda: torch finds no CUDA device here")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    require(options.kernel, device)
    tf32 = options.dtype == "tf32"
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        with autotuned():
            yield device, torch.float32 if tf32 else getattr(torch, options.dtype)
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def layout_name(options: argparse.Namespace) -> str:
    """The name of the memory format in which ours is measured."""
    return options.memory_format or ("channels_last" if torch.cuda.is_available() and options.device != "cpu" else "nchw")


def _compare(layer: Layer, x_dense: Tensor, operations: dict[float, Operation], x: Tensor, options: argparse.Namespace):
    """By ratio: a function of the machine's rate of multiply-adds to (dense ms, ours ms, floor ms, plan)."""
    x = x.contiguous(memory_format=LAYOUTS[layout_name(options)])
    with torch.inference_mode():
        plans: dict[float, tuple[str, Implementation]] = {r: choose(o, x, options.kernel) for r, o in operations.items()}
        runs = {}
        for layout in LAYOUTS.values():
            weight = layer.weight.to(x.device, x.dtype).contiguous(memory_format=layout)
            inside = x_dense.contiguous(memory_format=layout)
            bias = torch.zeros(len(weight), dtype=x.dtype, device=x.device)
            runs[layout] = lambda i=inside, w=weight, b=bias: F.conv2d(i, w, b, layer.stride, layer.padding)
        for ratio, (_, implementation) in plans.items():
            runs[ratio] = lambda implementation=implementation: implementation(x)
        outputs = {ratio: runs[ratio]().numel() for ratio in plans}
        numbers_moved = {r: x.numel() + outputs[r] + operations[r].stripes.numel() for r in plans}
        moved = {r: torch.empty(n // 2, dtype=x.dtype, device=x.device) for r, n in numbers_moved.items()}
        for ratio, source in moved.items():
            runs["copy", ratio] = lambda source=source, target=torch.empty_like(source): target.copy_(source)
        ms = _shortest_ms(runs, options.seconds, x.device)
    dense = min(ms[torch.contiguous_format], ms[torch.channels_last])

    def result(ratio: float):
        macs = len(x) * _needed_macs(operations[ratio].to(torch.device("cpu")), x.shape[2:])
        return lambda rate: (dense, ms[ratio], max(1e3 * macs / rate, ms["copy", ratio]), plans[ratio][0])

    return {ratio: result(ratio) for ratio in operations}


def _shortest_ms(runs: Mapping, seconds: float, device: torch.device) -> dict:
    """Shortest time of a run, milliseconds."""
    if device.type == "cpu":
        return {name: 1e3 * min(times) for name, times in alternate(runs, seconds).items()}
    graphs: dict[object, Callable[[], None]] = {name: captured(run, REPEAT) for name, run in runs.items()}
    times = alternate(graphs, seconds, torch.cuda.synchronize)
    return {name: 1e3 * min(found) / REPEAT for name, found in times.items()}


def _needed_macs(operation: Operation, size: tuple[int, int]) -> int:
    """Multiply-adds of one image (H, W), without those that multiply padding."""
    inside = F.unfold(torch.ones(1, 1, *size), operation.kernel, 1, operation.padding, operation.stride)[0].sum(1)
    return int(operation.channels * (operation.pattern.flatten(1).sum(0) * inside).sum())


def _multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds per second of a large matrix product."""
    size = 1024 if device.type == "cpu" else 8192 if dtype.itemsize == 2 else 4096
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return size**3 / (1e-3 * _shortest_ms({"product": lambda: a @ b}, 0.3, device)["product"])


def _shapes(network: nn.Module) -> Counter[tuple[int, int, tuple[int, int, int]]]:
    """How often the network has a 3x3 layer of (filters, stride, input shape)."""
    layers = _layers(_sized(network)).values()
    return Counter((len(l.weight), l.stride[0], l.input_shape) for l in layers if l.weight.shape[2:] == (3, 3))


def _sized(network: nn.Module) -> nn.Module:
    network.input_shape = (3, 32, 32)
    return network


def _layers(network: nn.Module) -> dict[str, Layer]:
    shapes = _input_shapes(network)
    convs = ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    return {name: Layer(m.weight.detach(), m.stride, m.padding, tuple(shapes[name])) for name, m in convs}


def _input_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """(C, H, W) of what each convolution is given."""
    names = {m: name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, InferenceConv2d))}
    shapes: dict[str, torch.Size] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        shapes[names[layer]] = inputs[0].shape[1:]

    observe(network, blank_image(network, network.input_shape), names, note)
    return shapes


def speedups(rows: list[Row]) -> Iterator[tuple[int, float, list[Row]]]:
    """(batch, ratio, rows) of the layers, random patterns only by ratio."""
    keys = dict.fromkeys((row.batch, row.ratio if row.pattern == "random" else None) for row in rows)
    for batch, ratio in keys:
        found = [r for r in rows if r.batch == batch and r.layer != WHOLE and ratio in (None, r.ratio)]
        yield batch, ratio, found
