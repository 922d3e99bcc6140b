"""The stages of a run: each reads the artifacts of earlier stages and its own settings.

    train_dense       -> dense       the baseline of every table, shared by all methods
    sparsify          -> sparse      what the method trains, where it trains
    prune             -> pruned      selected, cut, verified
    prune_at_random   -> random      the control: as many units of every layer, chosen at random
    finetune          -> finetuned   the cut network, trained again

Every artifact holds model.safetensors (self-contained, see `checkpoint`) and its result: the
accuracy on the test set, read once, when the stage is made.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prune_cli import surgery
from prune_cli.budget import Budget
from prune_cli.checkpoint import load_model, save_model
from prune_cli.datasets.dataset import Splits
from prune_cli.errors import UserError
from prune_cli.experiment import Experiment
from prune_cli.foreign import content_hash, fill, read_weights
from prune_cli.hooks import Progress, TrainingHooks
from prune_cli.journal import Journal
from prune_cli.masks import Masks, random_like
from prune_cli.method import PruningMethod
from prune_cli.metrics.accuracy import accuracy
from prune_cli.metrics.macs import count_elementwise, count_nonzero, count_parameters, layer_macs
from prune_cli.seeding import derive, seeded
from prune_cli.settings import FitSettings, Precision
from prune_cli.store import Artifact, Make, Partial, Store, key_of
from prune_cli.targets import source_hash
from prune_cli.trainer import fit, resolved_precision, steps_per_epoch, travel

# Raised when a stage computes something else than before under the same settings.
VERSIONS = {"dense": 1, "sparse": 1, "pruned": 1, "random": 1, "finetuned": 1}


@dataclass(frozen=True)
class Made:
    """An artifact of this run; `cached` when the store already had it."""

    stage: str
    artifact: Artifact
    cached: bool


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
        return resolved_precision(self.experiment.recipe.precision, self.device, self.untrained())

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

    def rehearse(self) -> None:
        """Once, before the first training: prepare, penalise, select, compensate, cut and verify on the untrained network.

        Whatever the method cannot do with this network is said now, not after hours.
        """
        if self.rehearsed:
            return
        self.rehearsed = True
        method = self.method
        model = method.prepare(self.untrained())
        self.budget.check(method, model)
        if method.start is not None:
            settings = self.experiment.recipe.sparsify
            steps = settings.epochs * steps_per_epoch(len(self.splits.train), settings.batch_size)
            way = travel(settings, steps)
            method.penalty(model, Progress(0, settings.epochs, 0, steps, way, settings.weight_decay))
        masks = method.prune(model, self.experiment.ratio)
        model = method.compensate(model, masks)
        surgery.verify(surgery.mask(model, masks), surgery.cut(model, masks))

    @cached_property
    def budget(self) -> Budget:
        """How much has to go."""
        return Budget.of(self.experiment.target, self.experiment.ratio, self.untrained())

    @cached_property
    def method(self) -> PruningMethod:
        """The experiment's method; where training needs to know the ratio, with the one that meets the target."""
        return self.budget.for_training(self.experiment.method, self.untrained())

    def untrained(self) -> nn.Module:
        """The network at initialisation, the same for every method and stage of this seed."""
        splits = self.splits
        with seeded(derive(self.experiment.seed, "initialisation"), torch.device("cpu")):
            model = self.experiment.model.build(splits.channels, splits.resolution, splits.classes)
        return model.to(self.device)

    def trained(self, artifact: Artifact) -> nn.Module:
        """The network of a finished stage."""
        return load_model(artifact.file("model.safetensors")).to(self.device)

    def source(self, made: Made) -> nn.Module:
        """What the method selects from: the sparse network with its training layers, or the dense one."""
        if made.stage != "sparse":
            return self.trained(made.artifact)
        model = self.method.prepare(self.untrained())
        model.load_state_dict(load_file(made.artifact.file("training.safetensors"), device=str(self.device)))
        return model


def train_dense(shop: Workshop) -> Made:
    """The untrained network, trained without any hook; or, not trained, with weights from a checkpoint."""
    if shop.experiment.checkpoint is not None:
        return _dense_from(shop, shop.experiment.checkpoint)
    settings = shop.experiment.recipe.pretrain
    return _fit_stage(shop, "dense", shop.untrained, settings, TrainingHooks(), {})


def _dense_from(shop: Workshop, checkpoint: str) -> Made:
    weights = read_weights(checkpoint)

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.untrained()
        fill(model, weights, checkpoint)
        return _describe(shop, folder, model, model)

    return _produced(shop, "dense", {**shop.common, "checkpoint": content_hash(weights)}, make)


def sparsify(shop: Workshop, dense: Made) -> Made:
    """The prepared network (untrained, or the dense one), trained with the method's hooks."""
    method = shop.method
    from_dense = method.start == "dense"

    def start() -> nn.Module:
        return method.prepare(shop.trained(dense.artifact) if from_dense else shop.untrained())

    return _fit_stage(
        shop, "sparse", start, shop.experiment.recipe.sparsify, method, {"method": method.training_settings()},
        parent=dense.artifact.key if from_dense else None,
    )


def prune(shop: Workshop, source: Made) -> Made:
    """Select, compensate, cut, and verify that the cut network is the masked one."""
    method, ratio, target = shop.method, shop.experiment.ratio, shop.experiment.target
    settings = {
        **shop.common, "method": {**method.training_settings(), **asdict(method)}, "ratio": ratio,
        "target": None if target == "units" else target,
    }  # fmt: skip

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.source(source)
        masks = shop.budget.select(method, model)
        return _cut_into(shop, folder, method.compensate(model, masks), masks)

    pruned = _produced(shop, "pruned", settings, make, parent=source.artifact.key)
    _picture(shop, source, pruned)
    return pruned


def prune_at_random(shop: Workshop, source: Made, pruned: Made) -> Made:
    """The same cut with the selection left to chance."""

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        masks = Masks.load(pruned.artifact.file("masks.safetensors"))
        chance = random_like(masks, derive(shop.experiment.seed, "random selection"))
        return _cut_into(shop, folder, shop.source(source), chance)

    return _produced(shop, "random", {"seed": shop.experiment.seed}, make, parent=pruned.artifact.key)


def finetune(shop: Workshop, pruned: Made) -> Made:
    """The cut network, trained again while what was pruned stays pruned."""
    held = Masks.load(pruned.artifact.file("held.safetensors")).to(shop.device)
    return _fit_stage(
        shop, "finetuned", lambda: shop.trained(pruned.artifact), shop.experiment.recipe.finetune,
        shop.method.constraint(held), {}, parent=pruned.artifact.key,
    )


def _fit_stage(
    shop: Workshop, stage: str, start: Callable[[], nn.Module], settings: FitSettings, hooks: TrainingHooks,
    further: Mapping[str, Any], parent: str | None = None,
) -> Made:
    """Train what `start` gives. `further`: settings of the key besides those of every training."""

    def make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        shop.rehearse()
        model = start()
        steps = steps_per_epoch(len(shop.splits.train), settings.batch_size)
        with shop.journal.stage(stage, settings.epochs, steps) as monitor:
            history = fit(
                model, shop.splits, settings, hooks, precision=shop.precision, seed=shop.experiment.seed,
                stage=stage, checkpoint=partial, monitor=monitor, watch=getattr(hooks, "watch", lambda model: {}),
            )
        if stage == "sparse":  # with the layers that `prepare` installed: what `prune` reads
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "training.safetensors")
        return {"history": history, **_describe(shop, folder, surgery.plain(model), model)}

    return _produced(shop, stage, {**shop.common, **further, "fit": settings}, make, parent)


def _cut_into(shop: Workshop, folder: Path, model: nn.Module, masks: Masks) -> dict[str, Any]:
    """Cut, verify, and save the network with the masks that made it and those it has to keep."""
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    masks.save(folder / "masks.safetensors")
    small.masks.save(folder / "held.safetensors")
    return {
        "unit": masks.unit, "requested": masks.requested, "obtained": masks.obtained, "notes": list(masks.notes),
        "removed": None if shop.budget.dense is None else shop.budget.removed(small),
        "units": {layer: _units(keep) for layer, keep in masks.keep.items()},
        **_describe(shop, folder, small.model, small.model),
    }


def _describe(shop: Workshop, folder: Path, model: nn.Module, evaluated: nn.Module) -> dict[str, Any]:
    """Save the network and say what it costs and what it knows."""
    path = folder / "model.safetensors"
    save_model(path, model, shop.experiment.model, shop.splits.classes)
    validation = shop.splits.validation
    macs = layer_macs(model, model.input_shape)
    return {
        "accuracy": accuracy(evaluated, shop.splits.test),
        "validation": None if validation is None else accuracy(evaluated, validation),
        "parameters": count_parameters(model),
        "nonzero": count_nonzero(model),
        "macs": sum(macs.values()),
        "elementwise": count_elementwise(model, model.input_shape),
        "layers": {name: _layer(model.get_submodule(name), spent) for name, spent in macs.items()},
        "file_bytes": path.stat().st_size,
    }


def _layer(layer: nn.Module, macs: int) -> dict[str, int]:
    """What one layer costs; `stripes`: filters x kernel positions of its shape, what a skeleton has."""
    shape = layer.weight.shape
    stripes = shape[0] * math.prod(shape[2:]) if len(shape) == 4 else 0
    return {"macs": macs, "parameters": count_parameters(layer), "stripes": stripes}


def _units(keep: torch.Tensor) -> dict[str, Any]:
    """How many units of a layer stay; `positions` (K, K): the fraction at each position of the kernel."""
    found = {"kept": int(keep.sum()), "total": keep.numel()}
    return found | ({"positions": keep.float().mean(0).tolist()} if keep.ndim == 3 else {})


def _produced(shop: Workshop, stage: str, settings: Mapping[str, Any], make: Make, parent: str | None = None) -> Made:
    """The stage from the store, or made now, with random numbers that are its own."""

    def seeded_make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        with seeded(derive(shop.experiment.seed, stage), shop.device):
            result = make(folder, partial)
        return {**result, "seconds": partial.seconds}

    key = key_of(stage, VERSIONS[stage], settings, parent)
    artifact, cached = shop.store.produce(stage, key, settings, seeded_make)
    if cached:
        shop.journal.replay(stage, artifact.result.get("history", []))
    return Made(stage, artifact, cached)


def _picture(shop: Workshop, source: Made, pruned: Made) -> None:
    """Skeletons before and after, and how much of every layer went: in every run's folder, whether
    the stages were made now or came from the store."""
    watched = shop.method.watch(shop.source(source))
    keep = Masks.load(pruned.artifact.file("masks.safetensors")).keep
    shop.journal.skeletons(source.stage, {layer: t for layer, t in watched.items() if t.ndim == 3})
    shop.journal.skeletons("pruned", {layer: t for layer, t in keep.items() if t.ndim == 3})
    shop.journal.layer_sparsity("pruned", {layer: 1 - float(t.float().mean()) for layer, t in keep.items()})
    if source.cached:  # while it trained, every epoch was logged
        shop.journal.histograms(source.stage, len(source.artifact.result.get("history", [])), watched)
