"""The events of one training loop, and what a hook is told when they happen."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from prune_cli.errors import UserError


@dataclass(frozen=True)
class Progress:
    """Where a training run stands. Hooks derive everything that changes with time from this.

    epoch, epochs   epochs begun before this one, epochs in all
    step, steps     optimizer steps taken before this batch (the same number for all hooks of one
                    batch; `after_epoch` counts its last batch too), steps in all
    travel          sum over all steps of the learning rate / (1 - momentum): how far a parameter
                    moves over the whole run under a constant gradient of one; None for an optimizer
                    that divides by the gradient's size
    weight_decay    of the optimizer, needed where a penalty is derived from the schedule
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    travel: float | None
    weight_decay: float

    def penalty_weight(self, strength: float) -> float:
        """The weight of an L1 penalty under which an unused parameter goes from one to zero
        `strength` times over the schedule.

        Such a parameter s moves by ds = -(weight + weight decay * s) per unit of travel, so it is
        zero after log(1 + weight decay / weight) / weight decay units: solved for the weight where
        that is 1 / `strength` of the travel.
        Raises UserError: the optimizer is one for which that means nothing.
        """
        if self.travel is None:
            raise UserError(
                "recipe.sparsify.optimizer=adam: method.strength derives its penalty from the steps of sgd; "
                "give the method the penalty's own weight instead, or take sgd"
            )
        travel = self.travel / strength
        decayed = min(self.weight_decay * travel, 700.0)  # exp of more overflows; the weight is nothing by then
        return self.weight_decay / math.expm1(decayed) if decayed > 1e-6 else 1 / travel


class TrainingHooks:
    """Six no-ops. `trainer.fit` calls them at these places, and at no others:

        before_fit                               once, never again after a resume
        for each epoch:
            for each batch:
                logits = model(x)
                loss = cross_entropy(logits, y)
                loss += each term of batch_loss  under autocast as the network, logged by name
                loss += each term of penalty     float32, outside autocast, logged by name
                backward
                after_backward                   gradients exist, the optimizer has not stepped
                optimizer step
                after_step                       the weights have moved
            after_epoch                          before the epoch is evaluated and saved
    """

    def before_fit(self, model: nn.Module, progress: Progress) -> None:
        """Change the model before the first epoch."""

    def batch_loss(self, model: nn.Module, progress: Progress, x: Tensor, logits: Tensor) -> Mapping[str, Tensor]:
        """Differentiable scalars to add to the loss, by name, made of the batch: the images x
        (N, C, H, W) and what the model says of them (N, classes)."""
        return {}

    def penalty(self, model: nn.Module, progress: Progress) -> Mapping[str, Tensor]:
        """Differentiable scalars to add to the loss, by name."""
        return {}

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Change gradients."""

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        """Change weights after every optimizer step."""

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        """Change weights after every epoch."""


@dataclass(frozen=True)
class Together(TrainingHooks):
    """Several hooks as one: at every place each of them in turn."""

    parts: tuple[TrainingHooks, ...]

    def before_fit(self, model: nn.Module, progress: Progress) -> None:
        for part in self.parts:
            part.before_fit(model, progress)

    def batch_loss(self, model: nn.Module, progress: Progress, x: Tensor, logits: Tensor) -> Mapping[str, Tensor]:
        return _united(part.batch_loss(model, progress, x, logits) for part in self.parts)

    def penalty(self, model: nn.Module, progress: Progress) -> Mapping[str, Tensor]:
        return _united(part.penalty(model, progress) for part in self.parts)

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        for part in self.parts:
            part.after_backward(model, progress)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        for part in self.parts:
            part.after_step(model, progress)

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        for part in self.parts:
            part.after_epoch(model, progress)


def _united(terms: Iterable[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return {name: term for part in terms for name, term in part.items()}
