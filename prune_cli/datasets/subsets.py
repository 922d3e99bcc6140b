"""Stratified subsets: the same images for the same request, on every machine and in every run."""

import torch
from torch import Tensor

from prune_cli.errors import UserError


def stratified(labels: Tensor, count: int) -> Tensor:
    """Sorted indices (count,) of a subset with every class in proportion, to within one image.

    labels: int64 (N,) on the CPU; count: 0..N. Each class gives the head of its own fixed
    permutation, so that a larger subset repeats the smaller one wherever the rounding allows.
    """
    sizes = torch.bincount(labels)
    quotas = _largest_remainders(sizes, count)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = (sizes.cumsum(0) - sizes)[labels[by_class]]  # where the class of each index begins
    rank = torch.arange(len(labels)) - first
    return by_class[rank < quotas[labels[by_class]]].sort().values


def _largest_remainders(sizes: Tensor, count: int) -> Tensor:
    """`count` shared out in proportion to `sizes` (K,), in whole numbers that add up to it."""
    total = max(int(sizes.sum()), 1)
    quotas = sizes * count // total  # integers throughout: no rounding differs between machines
    remainders = sizes * count % total
    favoured = remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]
    quotas[favoured] += 1
    return quotas


def partition(labels: Tensor, validation: float, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the training and of the validation images among `labels`, int64 (N,).

    The held-out images depend on `validation` alone; `limit` then thins both parts.
    Raises UserError when nothing would be left to train on.
    """
    everything = torch.arange(len(labels))
    if not validation:
        return limited(everything, labels, limit), None
    held_out = stratified(labels, max(1, round(validation * len(labels))))
    if len(held_out) == len(labels):
        raise UserError(f"recipe.validation={validation:g} leaves none of the {len(labels)} training images")
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    return limited(everything[kept], labels, limit), limited(held_out, labels, limit)


def limited(indices: Tensor, labels: Tensor, limit: int | None) -> Tensor:
    """At most `limit` of the `indices` into `labels`, stratified; None keeps all."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[stratified(labels[indices], limit)]
