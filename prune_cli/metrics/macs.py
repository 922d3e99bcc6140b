"""What a network costs: multiply-adds of one image, and parameters.

MACs are those of convolutions, linear layers and other products of matrices, without biases, BN, activations and
pooling: the convention of PFEC (Li et al., ICLR 2017, Table 2), half of what FLOP counters print.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from prune_cli.evaluation import blank_image, observe
from prune_cli.metrics.products import has_products, own_products
from prune_cli.modules import weight_shape


@runtime_checkable
class CountsMacs(Protocol):
    """A layer that knows its own cost, because it computes less than (or not as) a dense one."""

    def macs(self, output: Tensor) -> int:
        """Multiply-adds that this layer spent on `output`, which holds one image: (1, ...)."""
        ...


RECURRENT = (nn.RNNBase, nn.RNNCellBase)
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

    A layer's own `macs(output)` (see CountsMacs) goes first, then the formula of its base class, then
    what PyTorch counts in its forward; a layer that is called twice counts twice. `model` is left as it
    was, training flags included.
    """
    names = {layer: name for name, layer in model.named_modules()}
    layers, image = dict.fromkeys(_layers(model)), blank_image(model, input_shape)
    counted = {names[layer]: 0 for layer in layers}

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counted[names[layer]] += _macs(layer, inputs, output)

    observe(model, image, layers, count)
    if has_products(model, layers):
        counted |= {names[module]: spent for module, spent in own_products(model, image, layers).items()}
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


def count_own_parameters(module: nn.Module) -> int:
    """Of a layer all; of a module that holds others, those that are no other's."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=weight_shape(module) is not None))


def count_stripes(layer: nn.Module) -> int:
    """Filters x kernel positions of a convolution, what a skeleton has; 0 for other layers."""
    shape = weight_shape(layer)
    return shape[0] * math.prod(shape[2:]) if shape is not None and len(shape) == 4 else 0


def count_nonzero(model: nn.Module) -> int:
    """Elements of all Parameters that are not zero: what a sparse format would store."""
    return int(sum(parameter.count_nonzero() for parameter in model.parameters()))


def dense_macs(layer: nn.Module, output: Tensor) -> int:
    """Outputs of one image x weights that each of them meets.

    The weight is (O, I / groups, K...) or (O, I): its shape is what runs, also after surgery.
    """
    return output[0].numel() * math.prod(layer.weight.shape[1:])


def recurrent_macs(layer: nn.Module, x: Tensor) -> int:
    """Each step of a sequence meets every weight matrix once. The sequence x is (T, I) or of one image: (1, T, I) or
    (T, 1, I); a cell reads one step."""
    steps = 1 if isinstance(layer, nn.RNNCellBase) else math.prod(x.shape[:-1])
    return steps * sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)


def _macs(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    if isinstance(layer, CountsMacs):
        return layer.macs(output)
    return recurrent_macs(layer, inputs[0]) if isinstance(layer, RECURRENT) else dense_macs(layer, output)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with a formula. What lies inside one of them (a parametrization) is part of it."""
    if isinstance(module, (CountsMacs, *RECURRENT, *DENSE)):
        yield module
        return
    for child in module.children():
        yield from _layers(child)
