"""What all stages of a run share: the networks, the data, the budget, and the store that they come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from prune_cli import surgery
from prune_cli.base import Base
from prune_cli.budget import Budget
from prune_cli.checkpoint import load_model, load_tensors
from prune_cli.datasets.dataset import Splits
from prune_cli.errors import UserError
from prune_cli.experiment import Experiment
from prune_cli.hooks import Progress
from prune_cli.journal import Journal
from prune_cli.masks import Masks
from prune_cli.method import PruningMethod
from prune_cli.precision import resolved_precision
from prune_cli.repeated import packed, packing, unpacked
from prune_cli.seeding import derive, seeded
from prune_cli.settings import Constant, Precision
from prune_cli.store import Artifact, Make, Partial, Store, key_of
from prune_cli.targets import source_hash
from prune_cli.trainer import steps_per_epoch, travel

# Raised when a stage computes something else than before under the same settings.
VERSIONS = {"dense": 1, "sparse": 1, "pruned": 1, "random": 1, "finetuned": 1}  # others: 1


@dataclass(frozen=True)
class Made:
    """An artifact of this run.

    name    the stage's, with the number of its round except in the last one: what its files are called
    cached  whether the store already had it
    round   1, 2, ...; 0 for what comes before the first one
    source  what it was made from, None = the untrained network
    """

    stage: str
    name: str
    artifact: Artifact
    cached: bool
    round: int = 0
    source: "Made | None" = None


@dataclass
class Workshop:
    """What all stages of one run share."""

    experiment: Experiment
    store: Store
    journal: Journal
    rehearsed: bool = False

    @cached_property
    def device(self) -> torch.device:
        """Where everything is computed. Raises UserError when it is not there."""
        wanted, there = self.experiment.runtime.device, torch.cuda.is_available()
        if wanted == "cuda" and not there:
            raise UserError("runtime.device=cuda: torch finds no CUDA device here; auto and cpu run without one")
        return torch.device(("cuda" if there else "cpu") if wanted == "auto" else wanted)

    @cached_property
    def splits(self) -> Splits:
        recipe, runtime = self.experiment.recipe, self.experiment.runtime
        return self.experiment.dataset.load(
            Path(runtime.data_root), self.device,
            validation=recipe.validation, limit=recipe.limit, workers=runtime.workers,
        )

    @cached_property
    def precision(self) -> Precision:
        recipe = self.experiment.recipe
        smallest = min(settings.batch_size for settings in (recipe.pretrain, recipe.sparsify, recipe.finetune))
        return resolved_precision(recipe.precision, self.device, self.untrained(), smallest)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The settings that every stage's result depends on."""
        experiment = self.experiment
        return {
            "model": asdict(experiment.model) | {"source": source_hash(experiment.model.target)},
            "dataset": experiment.dataset.settings(),
            "content": experiment.dataset.fingerprint(Path(experiment.runtime.data_root)),
            "validation": experiment.recipe.validation,
            "limit": experiment.recipe.limit,
            "precision": self.precision,
            "seed": experiment.seed,
        }

    @cached_property
    def base(self) -> Base | None:
        """Where the run starts, None = at the dense network. Raises UserError: it cannot start there."""
        return None if self.experiment.base is None else Base.of(self.experiment)

    @cached_property
    def method(self) -> PruningMethod:
        """The method of every round; where training needs to know the ratio, with that of a round, or the
        one that meets the target."""
        experiment = self.experiment
        if experiment.rounds == 1 or not experiment.method.needs_ratio:
            return self.goal.for_training(experiment.method, self.untrained())
        if experiment.target != "units":
            raise UserError(f"target={experiment.target}: with several rounds this method removes a ratio of units only")
        return replace(experiment.method, ratio=experiment.round_ratio)

    @cached_property
    def goal(self) -> Budget:
        """How much has to go in all."""
        return Budget.of(self.experiment.target, self.experiment.ratio, self.untrained())

    def budget(self, number: int) -> Budget:
        """How much has to go in this round: of units a fraction of what is left, of all else what is to
        be gone after it."""
        experiment = self.experiment
        if experiment.rounds == 1:
            return self.goal
        gone = 1 - (1 - experiment.ratio) ** (number / experiment.rounds)
        return replace(self.goal, ratio=experiment.round_ratio if experiment.target == "units" else gone)

    @cached_property
    def rewound(self) -> int:
        """The optimizer step of pretrain that rewinding goes back to.

        Raises UserError: an epoch and a step are given; pretrain is not that long.
        """
        finetune, epochs = self.experiment.recipe.finetune, self.experiment.recipe.pretrain.epochs
        epoch, step = finetune.rewind_epoch, finetune.rewind_step
        if step is None:
            if epoch > epochs:
                raise UserError(f"recipe.finetune.rewind_epoch={epoch}: pretrain has {epochs} epochs")
            return epoch * self.pretrain_steps
        name = f"recipe.finetune.rewind_step={step}"
        if epoch:
            raise UserError(f"{name}: recipe.finetune.rewind_epoch={epoch} says where to go back to as well; give one")
        if step > (steps := epochs * self.pretrain_steps):
            raise UserError(f"{name}: pretrain has {steps} steps, {self.pretrain_steps} in each of its epochs")
        return step

    @cached_property
    def pretrain_steps(self) -> int:
        """Optimizer steps in one epoch of pretrain."""
        return steps_per_epoch(len(self.splits.train), self.experiment.recipe.pretrain.batch_size)

    def rehearse(self) -> None:
        """Once, before the first training: prepare, penalise, select, compensate, cut and verify on the
        untrained network, or the base; twice where there are further rounds.

        Whatever the method cannot do with this network is said now, not after hours.
        """
        if self.rehearsed:
            return
        self.rehearsed = True
        method, settings = self.method, self.experiment.recipe.sparsify
        model = self.untrained() if self.base is None else load_model(self.base.network).to(self.device)
        for number in range(1, min(self.experiment.rounds, 2) + 1):
            units, model = packing(model), method.prepare(unpacked(model))
            if method.start is not None:
                steps = settings.epochs * steps_per_epoch(len(self.splits.train), settings.batch_size)
                way = travel(settings, steps)
                method.penalty(model, Progress(0, settings.epochs, 0, steps, way, settings.weight_decay))
            if number == 1:
                self.goal.check(method, model)
            masks = method.prune(model, self.experiment.round_ratio)
            model = verified_cut(method.compensate(model, masks), masks, method.constant, units).model

    def untrained(self, purpose: str = "initialisation") -> nn.Module:
        """The network at initialisation; another one for another `purpose`."""
        splits = self.splits
        return self.experiment.untrained(splits.channels, splits.resolution, splits.classes, purpose).to(self.device)

    def trained(self, artifact: Artifact) -> nn.Module:
        """The network of a finished stage."""
        return load_model(artifact.file("model.safetensors")).to(self.device)

    def ready(self, made: Made | None) -> nn.Module:
        """The network as a method takes it: a finished stage's with packed layers unpacked, or the untrained one."""
        return self.untrained() if made is None else unpacked(self.trained(made.artifact))

    def source(self, made: Made) -> nn.Module:
        """What the method selects from: the sparse network with its training layers, or the one in hand."""
        if made.stage != "sparse":
            return self.ready(made)
        model = self.method.prepare(self.ready(made.source))
        load_tensors(model, load_file(made.artifact.file("training.safetensors"), device=str(self.device)))
        return model

    def packing(self, source: Made) -> dict[str, str]:
        """Which layers of what `source` gives were unpacked for it."""
        before = source.source if source.stage == "sparse" else source
        return {} if before is None else packing(self.trained(before.artifact))

    def pruned_before(self, made: Made | None) -> bool:
        """Whether the network may have zeros that an earlier pruning left to hold."""
        return made is not None and made.stage != "dense"

    def produced(
        self, stage: str, settings: Mapping[str, Any], make: Make, source: Made | None = None, round: int = 0
    ) -> Made:
        """The stage from the store, or made now, with random numbers that are its own."""
        settings = {**settings, "round": round if round > 1 else None}

        def seeded_make(folder: Path, partial: Partial) -> Mapping[str, Any]:
            with seeded(derive(self.experiment.seed, in_round(stage, round)), self.device):
                result = make(folder, partial)
            return {**result, "seconds": partial.seconds}

        key = key_of(stage, VERSIONS.get(stage, 1), settings, source and source.artifact.key)
        artifact, cached = self.store.produce(stage, key, settings, seeded_make)
        name = self.name_of(stage, round)
        if cached:
            self.journal.replay(name, artifact.result.get("history", []))
        return Made(stage, name, artifact, cached, round, source)

    def name_of(self, stage: str, round: int) -> str:
        """What the stage is called in files: earlier rounds have their number behind it."""
        return f"{stage}-{round}" if 0 < round < self.experiment.rounds else stage


def in_round(stage: str, round: int) -> str:
    """What the stage's random numbers follow from: those of later rounds are their own."""
    return f"{stage}/{round}" if round > 1 else stage


def verified_cut(model: nn.Module, masks: Masks, constant: Constant, units: Mapping[str, str]) -> surgery.Cut:
    """Cut, pack again what was packed before, and verify."""
    masked, small = surgery.masked_and_cut(model, masks, constant)
    small = packed(small, units)
    surgery.verify(masked, small)
    return small
