"""Soft filter pruning: "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks"
(He et al., IJCAI 2018)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prune_cli.criteria import filter_norm
from prune_cli.hooks import Progress
from prune_cli.soft import SoftPruning


@dataclass(frozen=True, kw_only=True)
class SoftFilterPruning(SoftPruning):
    """The filters with the smallest norm are zero at the start of every epoch and train on like all
    others, so that any of them may recover (algorithm 1).

    norm        which norm
    asymptotic  the fraction grows from 0 to `ratio` along an exponential curve, three quarters of it
                within an eighth of the training, all of it before the half (constants of our own,
                the authors' code was never released). On recipe=short it ends far below the constant
                rate: see README. ASFP: He et al., "Asymptotic Soft
                Filter Pruning for Deep Convolutional Neural Networks", IEEE Transactions on
                Cybernetics 2019
    """

    norm: Literal["l1", "l2"] = "l2"
    asymptotic: bool = False

    def score(self, weight: Tensor, ratio: float) -> Tensor:
        return filter_norm(weight, order=1 if self.norm == "l1" else 2)

    def rate(self, progress: Progress) -> float:
        if not self.asymptotic:
            return self.ratio
        # 1 - 4^-8t is three quarters at t = 1/8. It comes near 1 only at the end, where the last filter of
        # a layer would go after the last step, never to be trained without; so all are gone at 99 %.
        return self.ratio * min(1.0, (1 - 4 ** (-8 * progress.step / progress.steps)) / 0.99)
