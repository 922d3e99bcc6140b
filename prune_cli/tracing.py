"""How channels flow through a network, seen by Torch-Pruning, whose only importer this is.

Its DependencyGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) follows autograd
and takes every operation it does not know for an elementwise one, in which channel i stays channel i. So it
would walk through slices, padding, shuffles and sums over channels, and couple the wrong layers without a
word. Here such an operation is a barrier: what it writes has channels of its own, and neither those nor the
ones it reads can be removed.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from prune_cli.slicing import block_size, follows

INPUT = "its channels are those of the network's input"
OUTPUT = "its channels are the network's output"

_CONCATENATING = {"cat", "concat", "concatenate"}  # of channels, Torch-Pruning knows which comes from where
_MIXING = {  # the shape says nothing, and a zero channel would still be felt by the others
    "roll", "flip", "layer_norm", "group_norm", "local_response_norm", "softmax", "log_softmax",
    "channel_shuffle", "native_channel_shuffle", "cumsum", "sort", "scaled_dot_product_attention",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear",
    "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot",
}  # fmt: skip
_INDEXED = ("Index", "Gather", "Scatter", "Take")  # autograd nodes of what picks by a tensor of indices
_PERMUTING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
_NOT_ZERO_AT_ZERO = {"Sigmoid", "Hardsigmoid", "Softplus", "LogSigmoid", "Exp", "Cos", "Softmax", "LogSoftmax"}


class _Blocks(tp.pruner.function.DepthwiseConvPruner):
    """To Torch-Pruning, a grouped convolution whose blocks of outputs go with the same blocks of inputs."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        raise NotImplementedError("only the graph is Torch-Pruning's, removal is not")

    prune_in_channels = prune_out_channels


class Trace(tp.DependencyGraph):
    """The graph of one network, traced with a blank image of `model.input_shape` (C, H, W).

    pointwise  the linear layers that work on the channels of maps (N, H, W, C), as 1x1 convolutions do
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._blocks = _Blocks()
        self._in_channel_pruning_fn.add(self._blocks.prune_in_channels)
        self._out_channel_pruning_fn.add(self._blocks.prune_out_channels)
        self._barriers: dict[nn.Module, str] = {}
        self._watch = _Watch()
        like = next(model.parameters())
        # Autograd is the tracer: without a gradient, layers behind frozen weights go unseen.
        example = torch.zeros(1, *model.input_shape, device=like.device, dtype=like.dtype, requires_grad=True)
        with torch.enable_grad():
            # The addition is a node after the last layer: where the network's output begins.
            self.build_dependency(
                model, example, verbose=False, forward_fn=self._forward, output_transform=lambda logits: logits + 0
            )
        found = {m: self._watch.on_channels.get(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        self.pointwise = {layer for layer, on_channels in found.items() if on_channels}
        self._astray = {layer for layer, on_channels in found.items() if on_channels is False}
        # Every look at a group computes the indices behind the other nodes anew, which nothing has changed.
        self.module2node = {m: node for m, node in self.module2node.items() if isinstance(m, (_ConvNd, nn.Linear))}

    def reason(self, dep: Any) -> str | None:
        """Why a zero channel cannot leave the layer or operation that `dep` leads to; None = it can, and the
        other channels are computed as before."""
        module, node = dep.target.module, dep.target
        if module in self._barriers:
            return self._barriers[module]
        if module in self._astray:
            return "a linear layer works along another axis"
        if node.grad_fn in self._watch.hidden:
            return "they are read without a gradient, which cannot be traced"
        if isinstance(module, tp.ops._OutputOp):
            return OUTPUT
        if isinstance(module, nn.Parameter):
            return "they meet a parameter that belongs to no known layer"
        if type(module).__module__.startswith("torch_pruning"):  # additions, reshapes, concatenations, activations
            operation = _name(node)
            constant = operation in _NOT_ZERO_AT_ZERO and not self._gates(node)
            return f"{operation.lower()} makes something of a zero" if constant else None
        if isinstance(module, _ConvNd) and module.groups > 1:
            return None if follows(module) else "a grouped convolution has another number of inputs than of outputs"
        if writes(module) or isinstance(module, (_NormBase, nn.PReLU)):
            return None
        mixes = "mixes channels" if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) else "is a layer not known here"
        return f"{type(module).__name__} {mixes}"

    def is_gate(self, layer: nn.Module) -> bool:
        """Whether the layer only scales what others write, as the last one of squeeze-and-excitation does."""
        readers = self.module2node[layer].outputs
        return bool(readers) and all(_name(r) in _NOT_ZERO_AT_ZERO and self._gates(r) for r in readers)

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        return self._blocks if block_size(module) > 1 else super().get_pruner_of_module(module)

    def _forward(self, model: nn.Module, image: Tensor) -> Tensor:
        image = image + 0
        self._watch.found[image.grad_fn] = (INPUT, image.shape[1], image.shape[1])
        with self._watch:
            return model(image)

    def _trace_computational_graph(self, module2node, output, gradfn2module, reused, visited) -> None:
        for grad_fn, (reason, inputs, outputs) in self._watch.found.items():
            if grad_fn not in gradfn2module:  # a known layer speaks for itself
                stand_in = nn.Conv2d(inputs, outputs, 1, device="meta")  # where a walk along channels stops
                self._barriers[stand_in] = reason
                gradfn2module[grad_fn] = stand_in
        super()._trace_computational_graph(module2node, output, gradfn2module, reused, visited)

    @staticmethod
    def _gates(node: Any) -> bool:
        """Whether all that is done with the result is to multiply something else with it."""
        return bool(node.outputs) and all(_name(r) == "Mul" and len(r.inputs) > 1 for r in node.outputs)


def writes(module: nn.Module) -> bool:
    """Whether axis 0 of the layer's weight is its output channels."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def _name(node: Any) -> str:
    """Of an operation, as autograd calls it: Mul, Sigmoid."""
    return node.grad_fn.name().partition("Backward")[0]


class _Watch(TorchFunctionMode):
    """Finds the operations in which channel i does not stay channel i, and where the channels are.

    found        per autograd node of an operation that moves, mixes or makes channels: the reason, and the channels
                 that go in and come out
    hidden       autograd nodes of what is read where autograd sees nothing
    on_channels  per weight of a linear layer on maps whether it works on their channels, wherever it is called
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[str, int, int]] = {}
        self.hidden: set[Any] = set()
        self.on_channels: dict[Tensor, bool] = {}
        self._last: set[Any] = set()  # autograd nodes of maps whose channels are the last axis

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__.strip("_")
        read = [t for t in _tensors([*args, *kwargs.values()]) if t.grad_fn is not None]  # not parameters
        axes = [t.ndim - 1 if t.grad_fn in self._last else min(1, t.ndim - 1) for t in read]  # of the channels
        result = func(*args, **kwargs)
        if not read:
            return result
        if isinstance(result, Tensor):
            if result.requires_grad:
                self._note(name, func, args, kwargs, read, axes, result)
            elif not name.startswith("new_") and not name.endswith("_like"):  # these read the shape alone
                self.hidden.update(t.grad_fn for t in read)
        elif any(t.requires_grad for t in _tensors(result if isinstance(result, (tuple, list)) else ())):
            return self._in_parts(name, func, args, kwargs, read, axes)
        return result

    def _note(
        self, name: str, func: Any, args: tuple, kwargs: dict, read: list[Tensor], axes: list[int], result: Tensor
    ) -> None:
        """What became of the channels, which were at `axes` of what was read."""
        last = max(axes) > 1 and result.ndim > 2
        if name in _PERMUTING and args:
            order = _order(func, args, kwargs)
            axis = order.index(axes[0])
            keeps = order[0] == 0 and axis in (1, result.ndim - 1)
            last = keeps and axis > 1
        elif name in _CONCATENATING:
            keeps = _along(args, kwargs) % result.ndim == axes[0] and len(set(axes)) == 1
        else:
            indexed = result.grad_fn.name().startswith(_INDEXED)
            axis = result.ndim - 1 if last else 1
            keeps = name not in _MIXING and not indexed and _keeps_channels(read, axes, result, axis)
        if name == "linear" and read[0].ndim > 2:
            weight = args[1]
            self.on_channels[weight] = axes[0] == read[0].ndim - 1 and self.on_channels.get(weight, True)
        if last:
            self._last.add(result.grad_fn)
        if not keeps:
            self._bar(name, result, _size(read[0], axes[0]), _size(result, result.ndim - 1 if last else 1))

    def _in_parts(
        self, name: str, func: Any, args: tuple, kwargs: dict, read: list[Tensor], axes: list[int]
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """The parts that an operation makes of a tensor, whose channels end before it."""
        if not args or read[0] is not args[0]:
            self.hidden.update(t.grad_fn for t in read)
            return func(*args, **kwargs)
        self.hidden.update(t.grad_fn for t in read[1:])
        whole, channels = read[0] + 0, _size(read[0], axes[0])
        self._bar(name, whole, channels, channels)
        return func(whole, *args[1:], **kwargs)

    def _bar(self, name: str, result: Tensor, inputs: int, outputs: int) -> None:
        self.found[result.grad_fn] = (f"{name} moves or mixes channels", inputs, outputs)


def _size(tensor: Tensor, axis: int) -> int:
    """Number of channels; what is not a batch of anything has one."""
    return tensor.shape[axis] if tensor.ndim > 1 else 1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _keeps_channels(read: list[Tensor], axes: list[int], result: Tensor, axis: int) -> bool:
    """Whether the shapes say that channel i of the result, at `axis`, is made of channel i of what was read, or of
    its pixels behind a flatten."""
    if result.ndim < 2 or any(t.ndim < 2 for t in read):
        return False
    whole = result.ndim == 2 and len(read) == 1 and axes == [1] and result.shape[1] == read[0][0].numel()
    return whole or all(t.shape[a] == result.shape[axis] for t, a in zip(read, axes, strict=True))


def _order(func: Any, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Per axis of the result which one it was, told by axes of sizes 0, 1, 2, ..."""
    axes = torch.empty(tuple(range(args[0].ndim)), device="meta")
    return tuple(func(axes, *args[1:], **kwargs).shape)


def _along(args: tuple, kwargs: dict) -> int:
    """The axis of a concatenation."""
    return args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
