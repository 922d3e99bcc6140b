"""Where the channels are in a forward pass, operation by operation.

The pass is made with a network whose layers all emit zeros (see `silenced`), as each does for a channel that is
removed. So what an activation, a gate or a constant makes of a removed channel is not looked up, but seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from prune_cli.modules import computed
from prune_cli.user_code import running_line

_CONCATENATING = {"cat", "concat", "concatenate"}  # of channels, Torch-Pruning knows which comes from where
_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
_MULTIPLYING = {"mul", "multiply", "rmul", "imul"}
_MIXING = {  # the shape says nothing, and a zero channel would still be felt by the others
    "roll", "flip", "layer_norm", "group_norm", "local_response_norm", "softmax", "log_softmax",
    "channel_shuffle", "native_channel_shuffle", "cumsum", "sort", "scaled_dot_product_attention",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", *_LAYERS,
    "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot",
}  # fmt: skip
_INDEXED = ("Index", "Gather", "Scatter", "Take")  # autograd nodes of what picks by a tensor of indices
_PERMUTING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
_MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm)
_MEETS = "they meet a tensor that belongs to no known layer"


class Barrier(NamedTuple):
    """An operation that channels do not pass: why, and how many of them go in and come out."""

    reason: str
    inputs: int
    outputs: int


class Constant(NamedTuple):
    """What a layer reads where everything before it emits zeros: (I,) bool, the inputs that are not zero, and the
    operation that made something of a zero."""

    inputs: Tensor
    maker: str


class _Opaque(torch.autograd.Function):
    """What an operation has made, as one autograd node whatever it did inside: behind it only what it has read."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, *read: Tensor) -> Tensor:
        return made.clone()  # a view could not be worked upon in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("a trace is looked at, nothing is trained by it")


class ChannelTracker(TorchFunctionMode):
    """Finds the operations in which channel i does not stay channel i, and what becomes of zeros.

    barriers   per autograd node of an operation that moves, mixes or makes channels
    weights    per autograd node of a convolution or linear map with a parameter as its weight the parameter
    hidden     autograd nodes of what is read where autograd sees nothing
    pointwise  per weight of a linear layer on maps whether it works on their channels, wherever it is called
    constants  per weight of a convolution or linear layer that reads something else than zeros
    gates      per autograd node of a product of zeros with something else the node of that something

    called_by  the file that calls the network: what is called from there is the network's own code
    """

    def __init__(self, called_by: str) -> None:
        super().__init__()
        self._called_by = called_by
        self.barriers: dict[Any, Barrier] = {}
        self.weights: dict[Any, nn.Parameter] = {}
        self.hidden: set[Any] = set()
        self.pointwise: dict[Tensor, bool] = {}
        self.constants: dict[Tensor, Constant] = {}
        self.gates: dict[Any, Any] = {}
        self._last: set[Any] = set()  # autograd nodes of maps whose channels are the last axis
        self._makers: dict[Any, str] = {}  # per autograd node of what is not zero the operation that made it

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__.strip("_")
        if name in _CONCATENATING:
            args, kwargs = self._with_traced_parts(args, kwargs)
        read = [t for t in _tensors([*args, *kwargs.values()]) if t.grad_fn is not None]  # not parameters
        axes = [t.ndim - 1 if t.grad_fn in self._last else min(1, t.ndim - 1) for t in read]  # of the channels
        loud = [t.grad_fn for t in read if t.grad_fn in self._makers]
        result = func(*args, **kwargs)
        if not read:
            return result
        if isinstance(result, Tensor):
            if result.requires_grad:
                result = self._note(name, func, args, kwargs, read, axes, result)
                self._weigh(name, args, read, loud, result)
            elif not name.startswith("new_") and not name.endswith("_like"):  # these read the shape alone
                self.hidden.update(t.grad_fn for t in read)
        elif any(t.requires_grad for t in _tensors(result if isinstance(result, (tuple, list)) else ())):
            return self._in_parts(name, result, read, loud)
        if func.__name__ == "__setitem__" or func.__name__.endswith("_"):
            self._note_written(name, args[0])
        return result

    def _note(
        self, name: str, func: Any, args: tuple, kwargs: dict, read: list[Tensor], axes: list[int], result: Tensor
    ) -> Tensor:
        """What became of the channels, which were at `axes` of what was read: the result, one node where they end."""
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
            self.pointwise[weight] = axes[0] == read[0].ndim - 1 and self.pointwise.get(weight, True)
        constants = [t for t in _tensors([*args, *kwargs.values()]) if t.grad_fn is None]
        channels = _size(read[0], axes[0]), _size(result, result.ndim - 1 if last else 1)
        if not keeps:
            result = self._ended(result, f"{name} moves or mixes channels", read, *channels)
        elif any(_differs_by_channel(t, read[0], axes[0]) for t in constants):
            result = self._ended(result, _MEETS, read, *channels)
        if name in _LAYERS and isinstance(args[1], nn.Parameter):
            self.weights[result.grad_fn] = args[1]
        if last:
            self._last.add(result.grad_fn)
        return result

    def _ended(self, result: Tensor, reason: str, read: list[Tensor], inputs: int, outputs: int) -> Tensor:
        """The result, behind a barrier; what works in place has written into the tensor that others hold."""
        if not any(result is tensor for tensor in read):
            result = _Opaque.apply(result.detach(), *read)
        self._bar(result, reason, inputs, outputs)
        return result

    def _weigh(self, name: str, args: tuple, read: list[Tensor], loud: list[Any], result: Tensor) -> None:
        """What became of zeros: `loud` are the autograd nodes of what was read and is not zero."""
        if name in _MULTIPLYING and len(read) == 2 and len(loud) == 1:
            self.gates[result.grad_fn] = loud[0]
        if loud and name in _LAYERS and isinstance(args[1], nn.Parameter) and args[0].grad_fn in loud:
            self._hear(args[0], args[1], self._makers[args[0].grad_fn], -1 if name == "linear" else 1 - args[1].ndim)
        if bool(result.any()):
            self._makers[result.grad_fn] = self._makers[loud[0]] if loud else name

    def _hear(self, x: Tensor, weight: Tensor, maker: str, axis: int) -> None:
        inputs = x.detach().movedim(axis, -1).flatten(0, -2).bool().any(0)
        if weight in self.constants:
            inputs = inputs | self.constants[weight].inputs
        self.constants[weight] = Constant(inputs, maker)

    def _in_parts(self, name: str, parts: Any, read: list[Tensor], loud: list[Any]) -> Any:
        """The parts that an operation makes of what it has read, whose channels end there."""
        made = []
        for part in parts:
            if isinstance(part, (tuple, list)):
                part = self._in_parts(name, part, read, loud)
            elif isinstance(part, Tensor) and part.requires_grad:
                channels = _size(part, min(1, part.ndim - 1))
                part = self._ended(part, f"{name} moves or mixes channels", read, _size(read[0], 1), channels)
                if bool(part.any()):
                    self._makers[part.grad_fn] = self._makers[loud[0]] if loud else name
            made.append(part)
        return made if type(parts) is list else type(parts)(made)

    def _note_written(self, name: str, written: Tensor) -> None:
        """What is assigned to a part of a tensor has no channels that could be followed."""
        whole = written if written._base is None else written._base
        in_part = name == "setitem" or written.numel() < whole.numel()
        if in_part and whole.grad_fn is not None:
            channels = _size(whole, min(1, whole.ndim - 1))
            self._bar(whole, "they are written into a part of a tensor", channels, channels)

    def _with_traced_parts(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a concatenation with a place in the graph for the parts that autograd does not see: their
        channels count where those of the others are looked for."""
        parts = args[0] if args else kwargs.get("tensors", ())
        if not isinstance(parts, (tuple, list)) or not any(t.grad_fn is not None for t in _tensors(parts)):
            return args, kwargs
        parts = [t if t.grad_fn is not None else self._constant(t) for t in parts]
        return ((parts, *args[1:]), kwargs) if args else ((), {**kwargs, "tensors": parts})

    def _constant(self, tensor: Tensor) -> Tensor:
        traced = tensor + torch.zeros((), requires_grad=True, dtype=tensor.dtype, device=tensor.device)
        channels = _size(tensor, min(1, tensor.ndim - 1))
        self._bar(traced, _MEETS, channels, channels)
        if bool(tensor.any()):
            self._makers[traced.grad_fn] = "a constant"
        return traced

    def _bar(self, result: Tensor, reason: str, inputs: int, outputs: int) -> None:
        self.barriers[result.grad_fn] = Barrier(reason + running_line(self._called_by), inputs, outputs)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Meanwhile every convolution, linear layer and norm emits zeros: weights, biases, and the means that norms
    subtract. The tensors come back untouched."""
    kinds = (_ConvNd, nn.Linear, _NormBase, *_MIXING_NORMS)
    layers = [module for module in model.modules() if isinstance(module, kinds) and not computed(module)]
    tensors = {t for layer in layers for t in (*layer.parameters(), *layer.buffers()) if t is not getattr(layer, "running_var", None)}
    before = {tensor: tensor.data for tensor in tensors if tensor.is_floating_point()}
    try:
        for tensor, data in before.items():
            tensor.data = torch.zeros_like(data)
        yield
    finally:
        for tensor, data in before.items():
            tensor.data = data


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
    both = [(tensor, axis) for tensor, axis in zip(read, axes, strict=True) if tensor.numel() > 1]  # scalars scale all
    read, axes = [tensor for tensor, _ in both], [axis for _, axis in both]
    if result.ndim < 2 or not read or any(t.ndim < 2 for t in read):
        return False
    whole = result.ndim == 2 and len(read) == 1 and axes == [1] and result.shape[1] == read[0][0].numel()
    return whole or all(t.shape[a] == result.shape[axis] for t, a in zip(read, axes, strict=True))


def _differs_by_channel(constant: Tensor, read: Tensor, axis: int) -> bool:
    """Whether the constant, which meets what was read element by element, has a value of its own for each channel."""
    place = axis - read.ndim + constant.ndim
    return 0 <= place < constant.ndim and constant.shape[place] > 1


def _order(func: Any, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Per axis of the result which one it was, told by axes of sizes 0, 1, 2, ..."""
    axes = torch.empty(tuple(range(args[0].ndim)), device="meta")
    return tuple(func(axes, *args[1:], **kwargs).shape)


def _along(args: tuple, kwargs: dict) -> int:
    """The axis of a concatenation."""
    return args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
