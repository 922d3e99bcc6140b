"""A network as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prune_cli.targets import resolve


@dataclass(frozen=True)
class ModelSpec:
    """An importable callable and its keyword arguments.

    The callable is called as `target(channels=C, resolution=H, classes=K, **arguments)`.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, channels: int, resolution: int, classes: int) -> nn.Module:
        """The network with fresh weights for (N, channels, resolution, resolution) inputs.

        It carries its input's shape (C, H, W) as `input_shape`: tracing, counting and timing need it.
        """
        model = resolve(self.target)(channels=channels, resolution=resolution, classes=classes, **self.arguments)
        model.input_shape = (channels, resolution, resolution)
        return model
