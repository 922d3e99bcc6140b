"""A network as plain data."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from prune_cli.errors import UserError, one_line
from prune_cli.evaluation import evaluating
from prune_cli.targets import is_ours, resolve


@dataclass(frozen=True)
class ModelSpec:
    """An importable callable and its keyword arguments.

    The callable is called as `target(channels=C, resolution=H, classes=K, **arguments)`, with those of
    the first three that it has.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, channels: int, resolution: int, classes: int) -> nn.Module:
        """The network with fresh weights for (N, channels, resolution, resolution) inputs.

        It carries its input's shape (C, H, W) as `input_shape`: tracing, counting and timing need it.
        Raises UserError: a user's own network does not read such images or has other outputs.
        """
        network = resolve(self.target)
        shape = {"channels": channels, "resolution": resolution, "classes": classes}
        taken = inspect.signature(network).parameters
        model = network(**{name: size for name, size in shape.items() if name in taken}, **self.arguments)
        if not is_ours(self.target):
            self._check(model, **shape)
        model.input_shape = (channels, resolution, resolution)
        return model

    def without_weights(self) -> "ModelSpec":
        """The same network without trained weights to start from: for one whose weights come from a file."""
        initial = getattr(resolve(self.target), "initial", ())
        return replace(self, arguments={k: v for k, v in self.arguments.items() if k not in initial})

    def _check(self, model: Any, channels: int, resolution: int, classes: int) -> None:
        where = f"model.target={self.target}"
        if not isinstance(model, nn.Module):
            raise UserError(f"{where}: makes a {type(model).__name__}, must make a torch.nn.Module")
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and "weight" not in dict(layer.named_parameters(recurse=False)):
                raise UserError(
                    f"{where}: the weight of {name} is computed from other parameters (weight_norm or the like), so it "
                    "cannot be pruned; make it an ordinary one, as torch.nn.utils.parametrize.remove_parametrizations does"
                )
        images = torch.zeros(2, channels, resolution, resolution)
        try:
            with torch.no_grad(), evaluating(model):
                logits = model(images)
        except Exception as problem:  # of the user's code, whatever it is
            raise UserError(
                f"{where}: does not read images of shape {tuple(images.shape)} ({one_line(problem)}); a parameter "
                "named channels or resolution is given the data set's"
            ) from problem
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(
                f"{where}: makes {found} of two images, must be (2, {classes}), a score per class; a parameter "
                "named classes is given their number"
            )
