"""The protocol of a pruning method: only what differs between methods.

A run is  pretrain: fit(network, no hooks)
          sparsify: fit(prepare(network), method)         where `start` is not None
          prune:    masks = prune(network, ratio); cut(compensate(network, masks), masks)
          finetune: fit(cut network, constraint(masks))   where `finetune` is true
once or in rounds, each of which goes on with the network of the one before,
and the loop in `fit` is drawn in `hooks.TrainingHooks`. A method is a frozen dataclass without
state: what must live between steps is a buffer of the layers that `prepare` installs, or a
function of `Progress`; so an interrupted run resumes without a line of method code.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prune_cli.hooks import Progress, TrainingHooks
from prune_cli.masks import Masks
from prune_cli.modules import fixed
from prune_cli.prunable import Prunable, Skip, sorted_out
from prune_cli.settings import Constant
from prune_cli.targets import source_hash


def selection_field(**options: Any) -> Any:
    """A dataclass field that is read by `prune` only: changing it trains nothing again."""
    return field(metadata={"selection": True}, **options)


@dataclass(frozen=True, kw_only=True)
class PruningMethod(TrainingHooks, ABC):
    """Base of all methods.

    start     what sparsify trains: `init` the untrained network, `dense` the trained one,
              None = nothing, the dense network itself is pruned; later rounds, and runs with a base,
              train the network that they have
    finetune  whether the cut network is trained again
    exclude   layers that stay whole, shell patterns of their names
    constant  what becomes of what a removed channel, whose weights are zero, would go on emitting: `drop` sets it
              to zero, `fold` leaves it to the layers that read it, where they can take it over (see `folding`)

    and what `prune` promises, which every method says of itself:
    unit      what is removed together, a key of `masks.UNIT_AXES`
    scope     `global` removes the ratio of all units, `local` of every layer's

    needs_ratio  whether training itself has to know the ratio: the method then has a field `ratio`
    version      raised when the method makes something else than before of the same settings, so that what
                 the store has of it is not used again
    """

    unit: ClassVar[str]
    needs_ratio: ClassVar[bool] = False
    version: ClassVar[int] = 1
    scope: str
    start: Literal["init", "dense", None] = None
    finetune: bool = selection_field(default=False)
    exclude: tuple[str, ...] | None = None
    constant: Constant = selection_field(default="drop")

    @abstractmethod
    def candidates(self, model: nn.Module) -> Mapping[str, Any | Skip]:
        """Per convolution and linear layer, in the model's order: what the method needs to score its
        units, or why it cannot prune this one."""

    def prunable(self, model: nn.Module) -> Prunable:
        """What the method prunes in this network, and why the rest stays whole.

        Raises UserError: nothing can be pruned, or `exclude` names no layer.
        """
        whole = {name: Skip(reason) for name, reason in fixed(model).items()}
        found = self.candidates(model)
        return sorted_out({name: whole.get(name, candidate) for name, candidate in found.items()}, self.exclude)

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of the network with the layers installed that sparsify trains.

        Raises UserError when the network has nothing this method could remove.
        """
        self.prunable(model)
        return copy.deepcopy(model)

    @abstractmethod
    def prune(self, model: nn.Module, ratio: float) -> Masks:
        """Select `ratio` of the units that are still there; the network is left as it is.

        A unit whose weights are all exactly zero is gone: an earlier round removed it. It stays out of
        the masks or in them as removed, but is none of those that this selection removes.
        """

    def compensate(self, model: nn.Module, masks: Masks) -> nn.Module:
        """The network with its surviving weights adjusted for what is about to be removed."""
        return model

    def constraint(self, masks: Masks) -> TrainingHooks:
        """What holds while the cut network is fine-tuned."""
        return KeepPruned(masks)

    def watch(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors of the prepared network whose histograms are worth logging, by layer."""
        return {}

    def training_settings(self) -> dict[str, Any]:
        """The method's identity and the fields that sparsify depends on; part of its key."""
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        trained = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("selection")}
        version = None if self.version == 1 else self.version
        return {"target": target, "source": source_hash(target), "version": version, **trained}

    def selection_settings(self) -> dict[str, Any]:
        """All that prune depends on; part of its key. `drop`, what every cut did before there was a choice,
        is None."""
        constant = None if self.constant == "drop" else self.constant
        return {**self.training_settings(), **asdict(self), "constant": constant}


@dataclass(frozen=True)
class KeepPruned(TrainingHooks):
    """Holds pruned weights at exactly zero: masks after the step, since momentum moves weights
    whose gradient is zero."""

    masks: Masks

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress) -> None:
        for layer in self.masks.keep:
            weight = model.get_submodule(layer).weight
            weight.mul_(self.masks.of(layer, weight))
