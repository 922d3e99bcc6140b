"""What a method can prune in a network, and why the rest stays whole."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn

from prune_cli.errors import UserError
from prune_cli.settings import nearest

EXCLUDED = "excluded by method.exclude"


@dataclass(frozen=True)
class Skip:
    """A layer stays whole, and why: the end of a sentence that begins with the layer's name."""

    reason: str


@dataclass(frozen=True)
class Prunable:
    """The convolutions and linear layers of a network, in its order.

    layers   what a method prunes: per layer what it needs to score it
    skipped  per other layer the reason
    """

    layers: Mapping[str, Any]
    skipped: Mapping[str, str]


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


def named_by(patterns: Sequence[str] | None, layer: str) -> bool:
    """Whether one of the shell patterns names the layer."""
    return any(fnmatch(layer, pattern) for pattern in patterns or ())


def sorted_out(candidates: Mapping[str, Any | Skip], exclude: Sequence[str] | None) -> Prunable:
    """Candidates without the ones that the user excludes, by shell patterns of layer names.

    Raises UserError: a pattern that names no layer; nothing is left to prune.
    """
    for pattern in exclude or ():
        if not any(named_by([pattern], name) for name in candidates):
            raise UserError(f"method.exclude: {pattern} is no layer's name; {nearest(pattern, candidates)}")
    found = {name: Skip(EXCLUDED) if named_by(exclude, name) else found for name, found in candidates.items()}
    layers = {name: candidate for name, candidate in found.items() if not isinstance(candidate, Skip)}
    skipped = {name: candidate.reason for name, candidate in found.items() if isinstance(candidate, Skip)}
    if not layers:
        raise UserError(f"method: the model has nothing that it could prune{_because(skipped)}")
    return Prunable(layers, skipped)


def _because(skipped: Mapping[str, str]) -> str:
    """The reasons, the most frequent first, with one layer each."""
    layers = defaultdict(list)
    for name, reason in skipped.items():
        layers[reason].append(name)
    ranked = sorted(layers.items(), key=lambda item: -len(item[1]))
    parts = [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}" for reason, names in ranked]
    return "".join(f"; {part}" for part in parts)
