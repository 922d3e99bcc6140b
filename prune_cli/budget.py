"""How much has to go: a fraction of the units, as in the papers, or of the dense network's MACs or parameters.

A method knows fractions of its units only. The fraction of units whose removal costs the network the
wanted fraction of its MACs or parameters is searched here, by cutting copies and counting them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from prune_cli import surgery
from prune_cli.errors import UserError
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod
from prune_cli.metrics.macs import count_macs, count_parameters
from prune_cli.settings import Target

NAMES = {"macs": "MACs", "params": "parameters"}
HIGHEST = math.nextafter(1, 0)  # all but what the floors keep
NEAR = 1e-4  # a hundredth of a percent: records are printed with as many decimals
MISSED = 5e-3  # half a percent: a user should hear of it


@dataclass(frozen=True)
class Budget:
    """What is to be removed.

    target  what `ratio` is a fraction of: the prunable `units`, or the dense network's `macs` or
            `params`; weights that are held at zero do not count as parameters
    ratio   fraction to remove
    dense   MACs or parameters of the dense network; None for units
    """

    target: Target
    ratio: float
    dense: int | None = None

    @classmethod
    def of(cls, target: Target, ratio: float, dense: nn.Module) -> "Budget":
        """The budget relative to this network."""
        return cls(target, ratio, _count(target, dense) if target in NAMES else None)

    def check(self, method: PruningMethod, model: nn.Module) -> None:
        """Raises UserError: no selection that the method could make in the (prepared) model is enough."""
        if self.target not in NAMES:
            return
        if self.target == "macs" and method.unit == "weight":
            raise UserError("target=macs: single weights at zero leave the MACs as they are; target=params counts them")
        name = NAMES[self.target]
        nothing, all_of_it = (method.prune(model, ratio) for ratio in (0.0, HIGHEST))
        if nothing.obtained == all_of_it.obtained:
            raise UserError(f"target={self.target}: how much this selection removes does not depend on ratio")
        if (most := self.removed(surgery.cut(model, all_of_it))) < self.ratio - MISSED:
            raise UserError(
                f"target={self.target} ratio={self.ratio:g}: at most {100 * most:.2f}% of the {name} can be removed "
                f"from this network, with one {method.unit} kept in every layer"
            )

    def for_training(self, method: PruningMethod, untrained: nn.Module) -> PruningMethod:
        """The method as it trains: where it needs its ratio then, with the one that meets the target.

        How many units of each layer go does not depend on what the weights are going to be.
        """
        if self.target not in NAMES or not method.needs_ratio:
            return method
        model = method.prepare(untrained)
        self.check(method, model)
        return replace(method, ratio=self._nearest(method, model).ratio)

    def select(self, method: PruningMethod, model: nn.Module) -> Masks:
        """The method's selection that comes nearest to the target."""
        if self.target not in NAMES:
            return method.prune(model, self.ratio)
        found = self._trial(method, model, method.ratio) if method.needs_ratio else self._nearest(method, model)
        if abs(found.removed - self.ratio) <= MISSED:
            return found.masks
        return found.masks.with_notes(
            f"No selection comes nearer to {100 * self.ratio:.2f}% of the {NAMES[self.target]} than "
            f"{100 * found.removed:.2f}%: only whole {method.unit}s go, dead ones always do, every layer keeps one."
        )

    def removed(self, small: surgery.Cut) -> float:
        """Fraction of the dense network's MACs or parameters that the cut network has not."""
        left = _count(self.target, small.model)
        if self.target == "params":
            weights = {layer: small.model.get_submodule(layer).weight for layer in small.masks.keep}
            left -= sum(int((~small.masks.of(n, w).expand_as(w)).sum()) for n, w in weights.items())
        return 1 - left / self.dense

    def _nearest(self, method: PruningMethod, model: nn.Module) -> "_Trial":
        return min(self._trials(method, model), key=lambda trial: abs(trial.removed - self.ratio))

    def _trials(self, method: PruningMethod, model: nn.Module) -> "Iterator[_Trial]":
        """Ever closer to the target: what is removed grows with the ratio, mostly smoothly, so every
        other step interpolates."""
        low, high = self._trial(method, model, 0.0), self._trial(method, model, HIGHEST)
        yield from (low, high)
        halve = False
        while high.ratio - low.ratio > NEAR and low.removed < self.ratio < high.removed:
            share = 0.5 if halve else (self.ratio - low.removed) / (high.removed - low.removed)
            ratio, halve = low.ratio + share * (high.ratio - low.ratio), not halve
            found = self._trial(method, model, ratio, known=(low, high))
            yield found
            if abs(found.removed - self.ratio) <= NEAR:
                return
            low, high = (found, high) if found.removed < self.ratio else (low, found)

    def _trial(
        self, method: PruningMethod, model: nn.Module, ratio: float, known: tuple["_Trial", ...] = ()
    ) -> "_Trial":
        masks = method.prune(model, ratio)
        for trial in known:  # prune is quick, a cut is not
            if trial.kept == _kept(masks):
                return replace(trial, ratio=ratio)
        return _Trial(ratio, masks, self.removed(surgery.cut(model, masks)))


@dataclass(frozen=True)
class _Trial:
    """A selection at a ratio of the units, and the fraction of the target that it removes."""

    ratio: float
    masks: Masks
    removed: float

    @property
    def kept(self) -> list[int]:
        return _kept(self.masks)


def _kept(masks: Masks) -> list[int]:
    """Units kept per layer; since selections of growing ratios are nested, equal counts are equal masks."""
    return [int(keep.sum()) for keep in masks.keep.values()]


def _count(target: Target, model: nn.Module) -> int:
    return count_macs(model, model.input_shape) if target == "macs" else count_parameters(model)
