"""The classification models of torchvision, made to fit a data set."""

from collections.abc import Collection
from typing import Annotated

import torch
from torch import nn
from torch.func import functional_call

from prune_cli.errors import UserError, one_line
from prune_cli.evaluation import evaluating
from prune_cli.settings import Choice, Count, nearest
from prune_cli.vision import torchvision

LARGEST = 512  # pixels; a model that does not read images of this size reads those of one other size only
AUXILIARY = ("googlenet", "inception_v3")  # have further outputs while they train, which are off here


def architectures() -> Collection[str]:
    """The names that torchvision has for its classification models."""
    models = torchvision().models
    return models.list_models(module=models)


def classifier(
    channels: Count, resolution: Count, classes: Count,
    architecture: Annotated[str, Choice(architectures)], weights: str | None = None,
) -> nn.Module:  # fmt: skip
    """One of torchvision's classification models with `classes` outputs.

    weights  torchvision's name of trained weights (DEFAULT is its best), downloaded where they are
             not; the classifier starts anew where the classes are not ImageNet's. For grey images
             the first layer sums its weights over the colours

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes).
    Raises UserError: unknown weights, a download that failed, images too small for the model.
    """
    model = _made(architecture, classes)
    _check_resolution(model, architecture, resolution)
    if weights is not None:
        _load(model, architecture, weights)
        if hasattr(model, "transform_input"):
            model.transform_input = channels == 3  # as its weights were trained
    _read_channels(model, channels)
    return model


# What only decides how its training starts: a file with weights of its own does without the download.
classifier.initial = ("weights",)


def _made(architecture: str, classes: int) -> nn.Module:
    options = {"aux_logits": False, "init_weights": True} if architecture in AUXILIARY else {}
    return torchvision().models.get_model(architecture, weights=None, num_classes=classes, **options)


def _load(model: nn.Module, architecture: str, name: str) -> None:
    """The trained weights, but for a classifier of another width and outputs that are off."""
    known = torchvision().models.get_model_weights(architecture).__members__
    if name not in known:
        raise UserError(f"model.weights={name}: {architecture} has no such weights; {nearest(name, known)}")
    try:
        trained = known[name].get_state_dict(progress=False, check_hash=True)
    except OSError as problem:
        raise UserError(f"model.weights={name}: the download failed ({problem}); null starts without them") from problem
    ours = model.state_dict()
    fitting = {key: t for key, t in trained.items() if key in ours and t.shape == ours[key].shape}
    model.load_state_dict(fitting, strict=False)


def _read_channels(model: nn.Module, channels: int) -> None:
    """Let the first layer read images of so many channels."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if channels == first.in_channels:
        return
    conv = nn.Conv2d(
        channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=first.bias is not None
    )
    if channels == 1:
        conv.load_state_dict({**first.state_dict(), "weight": first.weight.detach().sum(1, keepdim=True)})
    model.set_submodule(name, conv)


def _check_resolution(model: nn.Module, architecture: str, resolution: int) -> None:
    reason = _refusal(model, resolution)
    if reason is None:
        return
    if resolution >= LARGEST or _refusal(model, LARGEST) is not None:
        raise UserError(f"model={architecture}: cannot read images of {resolution}x{resolution} pixels ({reason})")
    low, high = resolution, LARGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _refusal(model, middle) else (low, middle)
    raise UserError(
        f"model={architecture}: needs images of at least {high}x{high} pixels, those of the data set have "
        f"{resolution}x{resolution}"
    )


def _refusal(model: nn.Module, resolution: int) -> str | None:
    """Why the model does not read colour images of this size; None where it does."""
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}  # computes nothing
    try:
        with torch.no_grad(), evaluating(model):
            functional_call(model, shapes, torch.zeros(2, 3, resolution, resolution, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as problem:
        return one_line(problem)
    return None
