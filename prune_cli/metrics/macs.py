"""What a network costs: multiply-adds of one image, and parameters.

MACs are those of convolutions and linear layers, without biases, BN, activations and pooling: the
convention of PFEC (Li et al., ICLR 2017, Table 2), half of what FLOP counters print.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prune_cli.errors import UserError


@runtime_checkable
class CountsMacs(Protocol):
    """A layer that knows its own cost, because it computes less than (or not as) a dense one."""

    def macs(self, output: Tensor) -> int:
        """Multiply-adds that this layer spent on `output`, which holds one image: (1, ...)."""
        ...


DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of `model` on one image of shape (C, H, W), as one forward pass runs it.

    A layer's own `macs(output)` (see CountsMacs) goes first, then the formula of its base class;
    a layer that is called twice counts twice. `model` is left as it was, training flags included.
    Raises UserError: a layer with a weight matrix or kernel for which neither is known.
    """
    counted = 0

    def count(layer: nn.Module, _, output: Tensor) -> None:
        nonlocal counted
        counted += layer.macs(output) if isinstance(layer, CountsMacs) else dense_macs(layer, output)

    hooks = [layer.register_forward_hook(count) for layer in dict.fromkeys(_layers(model))]
    try:
        with _evaluating(model), torch.no_grad():
            model(_blank_image(model, input_shape))
    finally:
        for hook in hooks:
            hook.remove()
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that BN neither needs a batch nor moves; then each module's own flag again."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _blank_image(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
