"""Scores to masks. Every threshold, every scope and every floor of the program stands here.

The floor: no layer loses all of its units. The unit with the highest score of each layer is never
removed; where that changed a selection, the masks carry a note that says so.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prune_cli.masks import Masks

Scores = Mapping[str, Tensor]
# Mean score of the removed units over that of the kept ones. Where training has separated them it
# is 0.00; at 0.48, measured on the digits, removing half of the stripes left 11 to 43 % of 98 %.
SEPARATION = 0.1


def keep_best(scores: Tensor) -> Tensor:
    """Bool of the shape of `scores`, True at one unit with the highest score. Waits for no device."""
    return (torch.arange(scores.numel(), device=scores.device) == scores.argmax()).view_as(scores)


def of_all(ratio: float, gone: Tensor) -> float:
    """The fraction of all units to remove so that `ratio` of those go that are not `gone` (bool) already."""
    return 1 - (1 - ratio) * (1 - float(gone.float().mean())) if gone.any() else ratio


def select_global(scores: Scores, ratio: float, unit: str, most: float = 1.0) -> Masks:
    """Remove the fraction `ratio` of all units, the lowest scores first, ranked across layers.

    Units with a score of exactly zero are dead and always removed, also where they are more than
    `ratio`. What the floor protects in one layer is removed elsewhere, so that the ratio is met. With
    `most` below 1 no layer loses more than that fraction of its units: the threshold stays as it is,
    and less than the ratio is removed.
    """
    flat = torch.cat([s.flatten() for s in scores.values()]).float()
    protected = torch.cat([keep_best(s).flatten() for s in scores.values()])
    dead = flat == 0
    count = round(ratio * flat.numel())
    ranking = flat.argsort(stable=True)
    removed = dead.index_fill(0, ranking[~protected[ranking]][:count], True) & ~protected
    without_floor = dead.index_fill(0, ranking[:count], True)
    sizes = [s.numel() for s in scores.values()]
    keep = {layer: part.reshape(scores[layer].shape) for layer, part in zip(scores, (~removed).split(sizes))}
    floors = [layer for layer, part in zip(scores, without_floor.split(sizes)) if part.all()]
    capped = {layer: _at_least(keep[layer], s, math.ceil((1 - most) * s.numel() - 1e-9)) for layer, s in scores.items()}
    limited = [layer for layer in keep if not torch.equal(keep[layer], capped[layer])]
    notes = _floor_note(floors, unit) + _limit_note(limited, unit, most)
    return Masks(unit, capped, ratio, notes)


def select_local(
    scores: Scores, ratios: Mapping[str, float], unit: str, requested: float, rounding: Callable[[float], int] = int
) -> Masks:
    """Remove the fraction `ratios[layer]` of each layer's units, the lowest scores first.

    A layer of n units keeps `int(n * (1 - ratio))`, at least one. That is the expression of the
    authors' code (PFEC) with its binary rounding: `int(20 * (1 - 0.9))` is 1, not 2. Neuron merging
    has `round` for fully connected layers, SFP and FPGM round up.
    """
    keep, floors = {}, []
    for layer, score in scores.items():
        kept = rounding(score.numel() * (1 - ratios[layer]))
        if kept < 1:
            floors.append(layer)
        best = score.flatten().argsort(descending=True, stable=True)[: max(kept, 1)]
        mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        mask[best] = True
        keep[layer] = mask.reshape(score.shape)
    return Masks(unit, keep, requested, _floor_note(floors, unit))


def select_threshold(scores: Scores, threshold: float, unit: str, requested: float) -> Masks:
    """Remove every unit whose score is not above `threshold`, the same for all layers."""
    keep, floors = {}, []
    for layer, score in scores.items():
        mask = score > threshold
        if not mask.any():
            floors.append(layer)
            mask = keep_best(score)
        keep[layer] = mask
    return Masks(unit, keep, requested, _floor_note(floors, unit))


def separation_note(scores: Scores, masks: Masks, trained: str) -> tuple[str, ...]:
    """A sentence where training has not driven the removed units away from the kept ones, so that
    their ranking is noise; `trained`: what the scores are, a word for the user."""
    kept = torch.cat([scores[layer][keep] for layer, keep in masks.keep.items()])
    removed = torch.cat([scores[layer][~keep] for layer, keep in masks.keep.items()])
    if not len(removed) or removed.mean() <= SEPARATION * kept.mean():
        return ()
    return (
        f"The {trained} has not separated: removed {masks.unit}s have a mean strength of {removed.mean():.3f}, "
        f"kept ones {kept.mean():.3f}, so the ranking is noise; raise method.strength or train longer.",
    )


def _at_least(keep: Tensor, scores: Tensor, count: int) -> Tensor:
    """The mask, or the `count` units with the highest scores where it keeps fewer."""
    if int(keep.sum()) >= count:
        return keep
    best = scores.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(keep).flatten().index_fill(0, best, True).view_as(keep)


def _floor_note(layers: list[str], unit: str) -> tuple[str, ...]:
    if not layers:
        return ()
    return (f"The selection would have emptied {_shown(layers)}: one {unit} is kept there.",)


def _limit_note(layers: list[str], unit: str, most: float) -> tuple[str, ...]:
    if not layers:
        return ()
    return (f"The limit of {most:.0%} per layer kept {unit}s in {_shown(layers)} that the threshold would remove.",)


def _shown(layers: list[str]) -> str:
    return ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
