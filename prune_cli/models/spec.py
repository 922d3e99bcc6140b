"""A network as plain data."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from prune_cli.errors import UserError
from prune_cli.models.own_network import check
from prune_cli.targets import is_ours, resolve
from prune_cli.user_code import what_failed

_CHECKED: set[tuple] = set()  # networks of users that can be trained and pruned


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
        given = {name: size for name, size in shape.items() if name in taken}
        if is_ours(self.target):
            model = network(**given, **self.arguments)
        else:
            model = self._own(network, given)
            self._check(network, model, shape)
        model.input_shape = (channels, resolution, resolution)
        return model

    def without_weights(self) -> "ModelSpec":
        """The same network without trained weights to start from: for one whose weights come from a file."""
        initial = getattr(resolve(self.target), "initial", ())
        return replace(self, arguments={k: v for k, v in self.arguments.items() if k not in initial})

    def _own(self, network: Callable[..., Any], given: Mapping[str, int]) -> Any:
        try:
            return network(**given, **self.arguments)
        except UserError:
            raise
        except Exception as problem:  # of the user's code, whatever it is
            raise UserError(
                f"model.target={self.target}: cannot be built ({what_failed(problem)})"
            ) from problem

    def _check(self, network: Callable[..., Any], model: Any, shape: Mapping[str, int]) -> None:
        """Once for each network: it is built again for every stage."""
        known = (network, repr(self.arguments), *shape.values())
        if known not in _CHECKED:
            check(model, f"model.target={self.target}", **shape)
            _CHECKED.add(known)
