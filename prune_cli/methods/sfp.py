"""Soft filter pruning: "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks"
(He et al., IJCAI 2018)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.criteria import filter_norm
from prune_cli.hooks import Progress
from prune_cli.masks import Masks
from prune_cli.soft import SoftPruning
from prune_cli.trial import channel_graph

# Of how loud a filter that always worked is behind its batch norm, and of the filters that go: above these the
# network relied on them to the end.
AT_WORK, SOME = 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class SoftFilterPruning(SoftPruning):
    """The filters with the smallest norm are zero at the start of every epoch and train on like all
    others, so that any of them may recover (algorithm 1).

    norm        which norm
    asymptotic  the fraction grows from 0 to `ratio` along an exponential curve, three quarters of it
                within an eighth of the training, all of it before the half (constants of our own,
                the authors' code was never released). On recipe=short it ends far below the constant
                rate; README says why. ASFP: He et al., "Asymptotic Soft Filter Pruning for Deep
                Convolutional Neural Networks", IEEE Transactions on Cybernetics 2019
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

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        masks = super().prune(model, ratio)
        return masks.with_notes(*_warning(model, masks))


def _warning(model: nn.Module, masks: Masks) -> tuple[str, ...]:
    """Where filters that go were at work in the last epoch.

    A batch norm divides by sqrt(variance + eps): it makes a filter that grew back from zero as loud as all others
    while its weights are still small, and its gradients as steep. Its variance says what the last steps saw.
    """
    seen = (m.num_batches_tracked for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats)
    if not any(seen):  # untrained: a search for the rate asks often, and tracing takes its time
        return ()
    graph, loudness = channel_graph(model), []
    for name, keep in masks.keep.items():
        norm = graph.own_norm(name)
        if norm is not None and (variance := model.get_submodule(norm).running_var) is not None:
            loudness.append((variance / (variance + model.get_submodule(norm).eps)).sqrt()[~keep.to(variance.device)])
    at_work = sum(int((loud > AT_WORK).sum()) for loud in loudness)
    share = at_work / max(1, sum(int((~keep).sum()) for keep in masks.keep.values()))
    if share < SOME:
        return ()
    return (
        f"{share:.0%} of the filters that go were at work behind their batch norms in the last epoch: the network has "
        "not learned to do without them; train longer.",
    )
