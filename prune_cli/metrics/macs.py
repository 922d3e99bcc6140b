"""What a network costs: multiply-adds of one image, and parameters.

MACs are those of convolutions and linear layers, without biases, BN, activations and pooling: the
convention of PFEC (Li et al., ICLR 2017, Table 2), half of what FLOP counters print.
"""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from prune_cli.errors import UserError
from prune_cli.evaluation import blank_image, observe


@runtime_checkable
class CountsMacs(Protocol):
    """A layer that knows its own cost, because it computes less than (or not as) a dense one."""

    def macs(self, output: Tensor) -> int:
        """Multiply-adds that this layer spent on `output`, which holds one image: (1, ...)."""
        ...


DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
ELEMENTWISE = {
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "relu": (nn.ReLU,),
    "pool": (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
}


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of `model` on one image of shape (C, H, W): the sum of `layer_macs`."""
    return sum(layer_macs(model, input_shape).values())


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds of every layer on one image of shape (C, H, W), as one forward pass runs it.

    A layer's own `macs(output)` (see CountsMacs) goes first, then the formula of its base class;
    a layer that is called twice counts twice. `model` is left as it was, training flags included.
    Raises UserError: a layer with a weight matrix or kernel for which neither is known.
    """
    names = {layer: name for name, layer in model.named_modules()}
    counted = {names[layer]: 0 for layer in _layers(model)}

    def count(layer: nn.Module, _, output: Tensor) -> None:
        counted[names[layer]] += layer.macs(output) if isinstance(layer, CountsMacs) else dense_macs(layer, output)

    observe(model, blank_image(model, input_shape), dict.fromkeys(_layers(model)), count)
    return counted


def count_elementwise(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """What some papers add to the multiply-adds, on one image: elements that batch norms and ReLUs
    write, and elements that poolings read.

    Returns them under `batch_norm`, `relu` and `pool`.
    """
    counted = {"batch_norm": 0, "relu": 0, "pool": 0}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind = next(kind for kind, types in ELEMENTWISE.items() if isinstance(layer, types))
        counted[kind] += inputs[0].numel() if kind == "pool" else output.numel()

    layers = [m for m in model.modules() if isinstance(m, sum(ELEMENTWISE.values(), ()))]
    observe(model, blank_image(model, input_shape), layers, count)
    return counted


def count_parameters(model: nn.Module) -> int:
    """Elements of all Parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Elements of all Parameters that are not zero: what a sparse format would store."""
    return int(sum(parameter.count_nonzero() for parameter in model.parameters()))


def dense_macs(layer: nn.Module, output: Tensor) -> int:
    """Outputs of one image x weights that each of them meets.

    The weight is (O, I / groups, K...) or (O, I): its shape is what runs, also after surgery.
    """
    return output[0].numel() * math.prod(layer.weight.shape[1:])


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that are counted. What lies inside one of them (a parametrization) is part of it."""
    if isinstance(module, (CountsMacs, *DENSE)):
        yield module
        return
    # A layer is never free just because its formula is unknown; scales such as (C, 1, 1) are free.
    if any(parameter.squeeze().dim() > 1 for parameter in module.parameters(recurse=False)):
        kind = type(module).__name__
        raise UserError(f"no formula for the MACs of a {kind} layer: give the class a method macs(self, output)")
    for child in module.children():
        yield from _layers(child)
