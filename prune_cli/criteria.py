"""Tensors to one score per unit: the higher, the more the unit is worth keeping."""

from typing import Literal

import torch
from torch import Tensor


def filter_norm(weight: Tensor, order: int) -> Tensor:
    """(O,): the L1 (`order` 1) or L2 (`order` 2) norm of each filter of a weight (O, ...).

    PFEC (Li et al., ICLR 2017), section 3.
    """
    return torch.linalg.vector_norm(weight.detach().float().flatten(1), ord=order, dim=1)


def distance_sum(weight: Tensor) -> Tensor:
    """(O,): each filter's summed Euclidean distance to all filters of the layer.

    The filters nearest to the geometric median have the smallest sums and are the replaceable
    ones: FPGM (He et al., CVPR 2019), equation 4.
    """
    flat = weight.detach().double().flatten(1)  # so that the product of matrices, the fast way, is exact enough
    return torch.cdist(flat, flat, compute_mode="use_mm_for_euclid_dist").sum(1).float()


Criterion = Literal["l1", "l2", "geometric_median"]


def filter_score(weight: Tensor, criterion: Criterion) -> Tensor:
    """(O,): the score of each filter of a weight (O, ...) by the named criterion."""
    if criterion == "geometric_median":
        return distance_sum(weight)
    return filter_norm(weight, order=1 if criterion == "l1" else 2)
