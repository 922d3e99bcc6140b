"""One experiment: everything that decides a result, and the runtime that does not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prune_cli.datasets.dataset import Dataset
from prune_cli.method import PruningMethod
from prune_cli.settings import Recipe, Runtime
from prune_cli.targets import resolve


@dataclass(frozen=True)
class ModelSpec:
    """A network as plain data: an importable callable and its keyword arguments.

    The callable is called as `target(channels=C, resolution=H, classes=K, **arguments)`.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, channels: int, resolution: int, classes: int) -> nn.Module:
        """The network with fresh weights for (N, channels, resolution, resolution) inputs."""
        model = resolve(self.target)(channels=channels, resolution=resolution, classes=classes, **self.arguments)
        model.input_shape = (channels, resolution, resolution)
        return model


@dataclass(frozen=True)
class Experiment:
    """model x dataset x method x recipe at one ratio and seed."""

    model: ModelSpec
    dataset: Dataset
    method: PruningMethod
    method_name: str
    recipe: Recipe
    ratio: float
    seed: int
    runtime: Runtime

    @property
    def name(self) -> str:
        """`method-model-dataset-ratio`, the folder of its runs."""
        return f"{self.method_name}-{self.model.name}-{self.dataset.name}-{self.ratio:g}"
