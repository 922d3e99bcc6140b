"""Evaluation mode for a while."""

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
    input_shape: tuple[int, ...],
    layers: Iterable[nn.Module],
    note: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None],
) -> None:
    """Show `model` one blank image of shape (C, H, W) and call `note(layer, inputs, output)` whenever one
    of the layers runs. The model is left as it was, training flags included."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()


def random_images(model: nn.Module, count: int = 4) -> Tensor:
    """(`count`, C, H, W) as the model reads them, the same ones for every network of one input shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *model.input_shape, generator=generator).to(next(model.parameters()))
