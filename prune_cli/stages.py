"""The stages of a run: each reads the artifacts of earlier stages and its own settings.

    train_dense       -> dense       the baseline of every table, shared by all methods
    go_on_from        -> base        a finished run's network, where the run begins with one
    sparsify          -> sparse      what the method trains, where it trains
    prune             -> pruned      selected, cut, verified
    prune_at_random   -> random      the control: as many units of every layer, chosen at random
    finetune          -> finetuned   the cut network, trained again
                         scratch_e, random_finetuned ...   controls: the same, begun elsewhere

sparsify, prune and finetune are repeated in rounds, each with the network of the one before. Every
artifact holds model.safetensors (self-contained, see `checkpoint`) and its result: the accuracy on the
test set, read once, when the stage is made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prune_cli import surgery
from prune_cli.base import Base, digest
from prune_cli.budget import Budget
from prune_cli.checkpoint import load_model, load_tensors, save_model
from prune_cli.datasets.dataset import Splits
from prune_cli.distillation import Distillation
from prune_cli.errors import UserError
from prune_cli.experiment import Experiment
from prune_cli.foreign import content_hash, fill, read_weights
from prune_cli.hooks import Progress, Together, TrainingHooks
from prune_cli.journal import Journal
from prune_cli.masks import Masks, random_like
from prune_cli.method import KeepPruned, PruningMethod
from prune_cli.metrics.accuracy import accuracy
from prune_cli.metrics.macs import count_elementwise, count_nonzero, count_parameters, layer_macs
from prune_cli.precision import resolved_precision
from prune_cli.repeated import lifted, packed, packing, unpacked, zeros
from prune_cli.seeding import derive, seeded
from prune_cli.settings import FitSettings, Precision, Start
from prune_cli.store import Artifact, Make, Partial, Store, key_of
from prune_cli.targets import source_hash
from prune_cli.trainer import fit, steps_per_epoch, travel

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
            model = _cut(method.compensate(model, masks), masks, units).model

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


def train_dense(shop: Workshop) -> Made:
    """The untrained network, trained without any hook; or, not trained, with weights from a checkpoint;
    or the dense network of the run that made the base.

    Raises UserError: a network that is not trained here has no early weights to go back to.
    """
    recipe, checkpoint, begin = shop.experiment.recipe, shop.experiment.checkpoint, None
    rewinds = "rewind" in (recipe.finetune.start, *recipe.controls)
    if shop.base and shop.base.dense:
        return _given(shop, "dense", shop.base.dense)
    if checkpoint is not None:
        if rewinds:
            raise UserError("recipe: rewind needs a dense network that is trained here; model.checkpoint is another's")
        return _dense_from(shop, checkpoint)
    if rewinds and recipe.finetune.rewind_epoch:
        begin = rewind_point(shop).file("state.safetensors")  # the first epochs are the dense network's own
    return _fit_stage(shop, "dense", shop.untrained, recipe.pretrain, TrainingHooks(), begin_with=begin)


def _dense_from(shop: Workshop, checkpoint: str) -> Made:
    weights = read_weights(checkpoint)

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.untrained()
        fill(model, weights, checkpoint)
        return _describe(shop, folder, model, model)

    return _produced(shop, "dense", {**shop.common, "checkpoint": content_hash(weights)}, make)


def rewind_point(shop: Workshop) -> Artifact:
    """The dense network as it was at `recipe.finetune.rewind_epoch`, and the state to train it further.

    Raises UserError: pretraining is not that long.
    """
    settings, epoch = shop.experiment.recipe.pretrain, shop.experiment.recipe.finetune.rewind_epoch
    if epoch > settings.epochs:
        raise UserError(f"recipe.finetune.rewind_epoch={epoch}: pretrain has {settings.epochs} epochs")

    def make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        shop.rehearse()
        model = shop.untrained()
        steps = steps_per_epoch(len(shop.splits.train), settings.batch_size)
        with shop.journal.stage("rewind", epoch, steps) as monitor:
            history = fit(
                model, shop.splits, settings, TrainingHooks(), precision=shop.precision, seed=shop.experiment.seed,
                stage="dense", checkpoint=partial, monitor=monitor, stop=epoch,
            )
        save_model(folder / "model.safetensors", model, shop.experiment.model, shop.splits.classes)
        partial.copy(folder / "state.safetensors")
        return {"history": history}

    return _produced(shop, "rewind", {**shop.common, "fit": settings, "stop": epoch}, make, None).artifact


def go_on_from(shop: Workshop, base: Base) -> Made:
    """The network of a finished run, measured again."""
    return _given(shop, "base", base.network)


def sparsify(shop: Workshop, network: Made, number: int) -> Made:
    """The prepared network, trained with the method's hooks: in the first round the untrained or the
    dense one, as the method has it; later, and with a base, the one in hand."""
    method = shop.method
    start = None if network.stage == "dense" and method.start == "init" else network
    return _fit_stage(
        shop, "sparse", lambda: method.prepare(shop.ready(start)), shop.experiment.recipe.sparsify, method,
        {"method": method.training_settings()}, round=number, source=start, watch=method.watch,
        zeros_of=start if shop.pruned_before(start) else None,
    )  # fmt: skip


def prune(shop: Workshop, source: Made, number: int) -> Made:
    """Select, compensate, cut, and verify that the cut network is the masked one."""
    method, budget = shop.method, shop.budget(number)
    settings = {
        **shop.common, "method": {**method.training_settings(), **asdict(method)}, "ratio": budget.ratio,
        "target": None if budget.target == "units" else budget.target,
    }  # fmt: skip

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.source(source)
        masks = budget.select(method, model)
        return _cut_into(shop, folder, method.compensate(model, masks), masks, shop.packing(source))

    pruned = _produced(shop, "pruned", settings, make, source, number)
    _picture(shop, source, pruned)
    return pruned


def selected(shop: Workshop, cuts: Sequence[Made]) -> Masks:
    """What all rounds together removed, in the coordinates of the network that the first one pruned."""
    *earlier, last = [(cut, Masks.load(cut.artifact.file("masks.safetensors"))) for cut in cuts]
    found = last[1]
    for cut, masks in reversed(earlier):
        found = lifted(found, surgery.cut(shop.source(cut.source), masks), masks)
    return found


def over_rounds(shop: Workshop, cuts: Sequence[Made]) -> dict[str, Any]:
    """What the result of a stage says of its selection, for all rounds together."""
    masks = selected(shop, cuts)
    units = {layer: _units(keep) for layer, keep in masks.keep.items()}
    return {"requested": shop.experiment.ratio, "obtained": masks.obtained, "units": units}


def prune_at_random(shop: Workshop, cuts: Sequence[Made]) -> Made:
    """As much of every layer as the rounds `cuts` removed, at once, with the selection left to chance."""
    first, last = cuts[0].source, cuts[-1]

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        chance = random_like(selected(shop, cuts), derive(shop.experiment.seed, "random selection"))
        return _cut_into(shop, folder, shop.source(first), chance, shop.packing(first))

    return _produced(shop, "random", {"seed": shop.experiment.seed}, make, last, last.round)


def finetune(shop: Workshop, cuts: Sequence[Made], dense: Made, start: Start, stage: str = "finetuned") -> Made:
    """The network that the last of the `cuts` left, trained while what was pruned stays pruned, from the
    weights and with the settings that `start` says (see `FinetuneSettings`)."""
    last, recipe = cuts[-1], shop.experiment.recipe
    held = Masks.load(last.artifact.file("held.safetensors")).to(shop.device)
    hooks, further = shop.method.constraint(held), {"start": None if start == "trained" else start}
    if weight := recipe.finetune.distillation:
        temperature = recipe.finetune.temperature
        teacher = shop.trained(dense.artifact).to(memory_format=torch.channels_last)
        hooks = Together((hooks, Distillation(teacher, temperature, weight)))
        further["distillation"] = [dense.artifact.key, temperature, weight]
    settings, first = recipe.pretrain, 0
    if start == "trained":
        settings = recipe.finetune.fit
    elif start in ("learning_rate", "rewind"):
        first = further["first"] = recipe.finetune.rewind_epoch
    elif start == "scratch_b":
        factor = dense.artifact.result["macs"] / last.artifact.result["macs"]
        settings = replace(settings, epochs=round(settings.epochs * factor))
    return _fit_stage(
        shop, stage, lambda: _begin(shop, cuts, start), settings, hooks, further, round=last.round, source=last,
        first=first, zeros_of=last if shop.pruned_before(cuts[0].source) or len(cuts) > 1 else None,
    )  # fmt: skip


def _begin(shop: Workshop, cuts: Sequence[Made], start: Start) -> nn.Module:
    """The cut network with the weights it is trained from."""
    if start in ("trained", "learning_rate"):
        return shop.trained(cuts[-1].artifact)
    if start == "rewind" and shop.experiment.recipe.finetune.rewind_epoch:
        model = shop.trained(rewind_point(shop))
    else:
        model = shop.untrained() if start == "rewind" else shop.untrained("scratch")
    for cut in cuts:
        masks = Masks.load(cut.artifact.file("masks.safetensors"))
        units = packing(model)
        model = packed(surgery.cut(unpacked(model), masks), units).model
    return model


def _fit_stage(
    shop: Workshop, stage: str, start: Callable[[], nn.Module], settings: FitSettings, hooks: TrainingHooks,
    further: Mapping[str, Any] | None = None, *, round: int = 0, source: Made | None = None,
    watch: Callable[[nn.Module], Mapping[str, Tensor]] = lambda model: {}, zeros_of: Made | None = None,
    first: int = 0, begin_with: Path | None = None,
) -> Made:  # fmt: skip
    """Train what `start` gives.

    further     settings of the key besides those of every training
    zeros_of    whose zeros stay zeros
    first       epoch of the schedule to start at
    begin_with  the state of a run that ended earlier, to go on from
    """

    def make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        shop.rehearse()
        model, held = start(), hooks
        if zeros_of is not None:
            held = Together((hooks, KeepPruned(zeros(shop.ready(zeros_of)).to(shop.device))))
        if begin_with is not None:
            partial.begin_with(begin_with)
        steps = steps_per_epoch(len(shop.splits.train), settings.batch_size)
        with shop.journal.stage(_name(shop, stage, round), settings.epochs, steps) as monitor:
            history = fit(
                model, shop.splits, settings, held, precision=shop.precision, seed=shop.experiment.seed,
                stage=_in_round(stage, round), checkpoint=partial, monitor=monitor, watch=watch, start=first,
            )  # fmt: skip
        if stage == "sparse":  # with the layers that `prepare` installed: what `prune` reads
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "training.safetensors")
        return {"history": history, **_describe(shop, folder, surgery.plain(model), model)}

    return _produced(shop, stage, {**shop.common, **(further or {}), "fit": settings}, make, source, round)


def _given(shop: Workshop, stage: str, path: Path) -> Made:
    """A network that is there already, as a stage of this run."""

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = load_model(path).to(shop.device)
        return _describe(shop, folder, model, model)

    return _produced(shop, stage, {**shop.common, "file": digest(path)}, make)


def _cut(model: nn.Module, masks: Masks, units: Mapping[str, str]) -> surgery.Cut:
    """Cut, pack again what was packed before, and verify."""
    masked, small = surgery.masked_and_cut(model, masks)
    small = packed(small, units)
    surgery.verify(masked, small)
    return small


def _cut_into(
    shop: Workshop, folder: Path, model: nn.Module, masks: Masks, units: Mapping[str, str]
) -> dict[str, Any]:
    """Cut and save the network with the masks that made it and those it has to keep."""
    small = _cut(model, masks, units)
    masks.save(folder / "masks.safetensors")
    small.masks.save(folder / "held.safetensors")
    return {
        "unit": masks.unit, "requested": masks.requested, "obtained": masks.obtained, "notes": list(masks.notes),
        "removed": None if shop.goal.dense is None else shop.goal.removed(small),
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


def _units(keep: Tensor) -> dict[str, Any]:
    """How many units of a layer stay; `positions` (K, K): the fraction at each position of the kernel."""
    found = {"kept": int(keep.sum()), "total": keep.numel()}
    return found | ({"positions": keep.float().mean(0).tolist()} if keep.ndim == 3 else {})


def _produced(
    shop: Workshop, stage: str, settings: Mapping[str, Any], make: Make, source: Made | None = None, round: int = 0
) -> Made:
    """The stage from the store, or made now, with random numbers that are its own."""
    settings = {**settings, "round": round if round > 1 else None}

    def seeded_make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        with seeded(derive(shop.experiment.seed, _in_round(stage, round)), shop.device):
            result = make(folder, partial)
        return {**result, "seconds": partial.seconds}

    key = key_of(stage, VERSIONS.get(stage, 1), settings, source and source.artifact.key)
    artifact, cached = shop.store.produce(stage, key, settings, seeded_make)
    name = _name(shop, stage, round)
    if cached:
        shop.journal.replay(name, artifact.result.get("history", []))
    return Made(stage, name, artifact, cached, round, source)


def _name(shop: Workshop, stage: str, round: int) -> str:
    """What the stage is called in files: earlier rounds have their number behind it."""
    return f"{stage}-{round}" if 0 < round < shop.experiment.rounds else stage


def _in_round(stage: str, round: int) -> str:
    """What the stage's random numbers follow from: those of later rounds are their own."""
    return f"{stage}/{round}" if round > 1 else stage


def _picture(shop: Workshop, source: Made, pruned: Made) -> None:
    """Skeletons before and after, and how much of every layer went: in every run's folder, whether
    the stages were made now or came from the store."""
    watched = shop.method.watch(shop.source(source))
    keep = Masks.load(pruned.artifact.file("masks.safetensors")).keep
    shop.journal.skeletons(source.name, {layer: t for layer, t in watched.items() if t.ndim == 3})
    shop.journal.skeletons(pruned.name, {layer: t for layer, t in keep.items() if t.ndim == 3})
    shop.journal.layer_sparsity(pruned.name, {layer: 1 - float(t.float().mean()) for layer, t in keep.items()})
    if source.cached:  # while it trained, every epoch was logged
        shop.journal.histograms(source.name, len(source.artifact.result.get("history", [])), watched)
