"""Evaluation mode for a while, and what a network does in it with an image."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which BN neither needs a batch nor moves; afterwards each module has its own mode again."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def observe(
    model: nn.Module,
    x: Tensor,
    layers: Iterable[nn.Module],
    note: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None],
) -> Tensor:
    """What `model` makes of the images `x` (N, C, H, W); `note(layer, inputs, output)` is called whenever one
    of the layers has run. The model is left as it was, training flags included."""
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def blank_image(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """(1, *`input_shape`) of zeros as the model reads them, for what does not depend on the image."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)


def random_images(model: nn.Module, count: int = 4) -> Tensor:
    """(`count`, C, H, W) as the model reads them, the same ones for every network of one input shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *model.input_shape, generator=generator).to(next(model.parameters()))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `a`."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
