"""Taking channels out of one layer."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")  # tensors whose axis 0 is the output channels


def follows(module: nn.Module) -> bool:
    """Whether the layer is a convolution that makes channel block b of channel block b alone (depthwise, or
    with as many inputs per group as outputs), so that one goes with the other."""
    grouped = isinstance(module, _ConvNd) and not module.transposed and module.groups > 1
    return grouped and module.in_channels == module.out_channels


def block_size(module: nn.Module) -> int:
    """How many neighbouring channels the layer ties together: those of one group of a grouped convolution."""
    return module.in_channels // module.groups if follows(module) else 1


@torch.no_grad()
def take_out(layer: nn.Module, outputs: Collection[int] = (), inputs: Collection[int] = ()) -> None:
    """Remove channels from a convolution, a linear layer, a batch norm or a PReLU, in place.

    outputs  what it writes or norms; a grouped convolution loses the groups with them
    inputs   what it reads
    """
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return
    if follows(layer):
        layer.groups -= len(outputs) // block_size(layer)
        layer.in_channels -= len(outputs)
    for attribute in PER_CHANNEL:
        if (tensor := getattr(layer, attribute, None)) is not None:
            rest = _without(tensor, 0, outputs)
            if attribute == "weight" and not follows(layer):
                rest = _without(rest, 1, inputs)
            learned = isinstance(tensor, nn.Parameter)
            setattr(layer, attribute, nn.Parameter(rest, tensor.requires_grad) if learned else rest)
    for attribute in ("out_channels", "out_features", "num_features", "num_parameters"):
        if hasattr(layer, attribute):
            setattr(layer, attribute, getattr(layer, attribute) - len(outputs))
    for attribute in ("in_channels", "in_features"):
        if hasattr(layer, attribute) and not follows(layer):
            setattr(layer, attribute, getattr(layer, attribute) - len(inputs))


def _without(tensor: Tensor, axis: int, channels: Collection[int]) -> Tensor:
    if not channels:
        return tensor.detach()
    left = sorted(set(range(tensor.shape[axis])) - set(channels))
    return tensor.index_select(axis, torch.tensor(left, device=tensor.device))
