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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_cli import surgery
from prune_cli.base import Base, digest
from prune_cli.checkpoint import load_model, save_model, tensors_of
from prune_cli.distillation import Distillation
from prune_cli.errors import StageError, UserError
from prune_cli.evaluation import difference, evaluating
from prune_cli.foreign import content_hash, fill, read_weights
from prune_cli.hooks import Together, TrainingHooks
from prune_cli.masks import Masks, random_like
from prune_cli.method import KeepPruned
from prune_cli.metrics.accuracy import accuracy, memory_format
from prune_cli.metrics.macs import (
    count_elementwise,
    count_nonzero,
    count_own_parameters,
    count_parameters,
    count_stripes,
    layer_macs,
)
from prune_cli.repeated import lifted, packed, packing, unpacked, zeros
from prune_cli.seeding import derive
from prune_cli.settings import FitSettings, Start
from prune_cli.store import Artifact, Partial
from prune_cli.trainer import fit, steps_per_epoch
from prune_cli.workshop import Made, Workshop, in_round, verified_cut


FORWARD = "(forward)"  # what the network's own forward multiplies, in the list of its layers
FILE_IMAGES = 8  # with which a file is compared with the network that it was made of
FILE_TOLERANCE = 1e-3  # relative to the largest logit: a merged skeleton and another memory format round differently


def train_dense(shop: Workshop) -> Made:
    """The untrained network, trained without any hook; or, not trained, with weights from a checkpoint;
    or the dense network of the run that made the base.

    Raises UserError: a network that is not trained here has no early weights to go back to, nor a short
    training late ones.
    """
    recipe, checkpoint, begin = shop.experiment.recipe, shop.experiment.checkpoint, None
    starts = {recipe.finetune.start, *recipe.controls}
    rewinds, step = "rewind" in starts, shop.rewound if starts & {"rewind", "learning_rate"} else 0
    if shop.base and shop.base.dense:
        return _given(shop, "dense", shop.base.dense)
    if checkpoint is not None:
        if rewinds:
            raise UserError("recipe: rewind needs a dense network that is trained here; model.checkpoint is another's")
        return _dense_from(shop, checkpoint)
    if rewinds and step >= shop.pretrain_steps:
        begin = rewind_point(shop).file("state.safetensors")  # the first epochs are the dense network's own
    return _fit_stage(shop, "dense", shop.untrained, recipe.pretrain, TrainingHooks(), begin_with=begin)


def _dense_from(shop: Workshop, checkpoint: str) -> Made:
    weights = read_weights(checkpoint)

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.untrained()
        notes = fill(model, weights, checkpoint)
        return {**_describe(shop, folder, model, model), "notes": notes}

    return shop.produced("dense", {**shop.common, "checkpoint": content_hash(weights)}, make)


def rewind_point(shop: Workshop) -> Artifact:
    """The dense network as it was at `recipe.finetune.rewind_epoch` or `rewind_step`, and the state to train
    it further, which is that of its last whole epoch, where there was one."""
    recipe, step, steps = shop.experiment.recipe, shop.rewound, shop.pretrain_steps
    settings, given = recipe.pretrain, recipe.finetune.rewind_step
    stop = {"stop": recipe.finetune.rewind_epoch} if given is None else {"stop_step": given}

    def make(folder: Path, partial: Partial) -> Mapping[str, Any]:
        shop.rehearse()
        model = shop.untrained()
        with shop.journal.stage("rewind", math.ceil(step / steps), steps) as monitor:
            history = fit(
                model, shop.splits, settings, TrainingHooks(), precision=shop.precision, seed=shop.experiment.seed,
                stage="dense", checkpoint=partial, monitor=monitor, stop=step,
            )
        save_model(folder / "model.safetensors", model, shop.experiment.model, shop.splits.classes)
        if step >= steps:
            partial.copy(folder / "state.safetensors")
        return {"history": history}

    return shop.produced("rewind", {**shop.common, "fit": settings, **stop}, make, None).artifact


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
        **shop.common, "method": method.selection_settings(), "ratio": budget.ratio,
        "target": None if budget.target == "units" else budget.target,
    }  # fmt: skip

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = shop.source(source)
        masks = budget.select(method, model)
        return _cut_into(shop, folder, method.compensate(model, masks), masks, shop.packing(source))

    pruned = shop.produced("pruned", settings, make, source, number)
    _picture(shop, source, pruned)
    return pruned


def selected(shop: Workshop, cuts: Sequence[Made]) -> Masks:
    """What all rounds together removed, in the coordinates of the network that the first one pruned."""
    *earlier, last = [(cut, Masks.load(cut.artifact.file("masks.safetensors"))) for cut in cuts]
    found = last[1]
    for cut, masks in reversed(earlier):
        found = lifted(found, surgery.cut(shop.source(cut.source), masks), masks)
    return found


def over_rounds(shop: Workshop, masks: Masks) -> dict[str, Any]:
    """What the result of a stage says of its selection, for the `masks` of all rounds together."""
    units = {layer: _units(keep) for layer, keep in masks.keep.items()}
    return {"requested": shop.experiment.ratio, "obtained": masks.obtained, "units": units}


def prune_at_random(shop: Workshop, cuts: Sequence[Made]) -> Made:
    """As much of every layer as the rounds `cuts` removed, at once, with the selection left to chance."""
    first, last = cuts[0].source, cuts[-1]

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        chance = random_like(selected(shop, cuts), derive(shop.experiment.seed, "random selection"))
        return _cut_into(shop, folder, shop.source(first), chance, shop.packing(first))

    return shop.produced("random", {"seed": shop.experiment.seed}, make, last, last.round)


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
        first = shop.rewound
        further |= {"first": recipe.finetune.rewind_epoch, "first_step": recipe.finetune.rewind_step}
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
    if start == "rewind" and shop.rewound:
        model = shop.trained(rewind_point(shop))
    else:
        model = shop.untrained() if start == "rewind" else shop.untrained("scratch")
    for cut in cuts:
        masks = Masks.load(cut.artifact.file("masks.safetensors"))
        units = packing(model)
        model = packed(surgery.cut(unpacked(model), masks, shop.method.constant), units).model
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
    first       optimizer step of the schedule to start at
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
        with shop.journal.stage(shop.name_of(stage, round), settings.epochs, steps) as monitor:
            history = fit(
                model, shop.splits, settings, held, precision=shop.precision, seed=shop.experiment.seed,
                stage=in_round(stage, round), checkpoint=partial, monitor=monitor, watch=watch, start=first,
            )  # fmt: skip
        if stage == "sparse":  # with the layers that `prepare` installed: what `prune` reads
            save_file(tensors_of(model), folder / "training.safetensors")
        return {"history": history, **_describe(shop, folder, surgery.plain(model), model)}

    return shop.produced(stage, {**shop.common, **(further or {}), "fit": settings}, make, source, round)


def _given(shop: Workshop, stage: str, path: Path) -> Made:
    """A network that is there already, as a stage of this run."""

    def make(folder: Path, _: Partial) -> Mapping[str, Any]:
        model = load_model(path).to(shop.device)
        return _describe(shop, folder, model, model)

    return shop.produced(stage, {**shop.common, "file": digest(path)}, make)


def _cut_into(
    shop: Workshop, folder: Path, model: nn.Module, masks: Masks, units: Mapping[str, str]
) -> dict[str, Any]:
    """Cut and save the network with the masks that made it and those it has to keep."""
    small = verified_cut(model, masks, shop.method.constant, units)
    masks.save(folder / "masks.safetensors")
    small.masks.save(folder / "held.safetensors")
    return {
        "unit": masks.unit, "requested": masks.requested, "obtained": masks.obtained,
        "notes": [*masks.notes, *small.notes],
        "removed": None if shop.goal.dense is None else shop.goal.removed(small),
        "units": {layer: _units(keep) for layer, keep in masks.keep.items()},
        **_describe(shop, folder, small.model, small.model),
    }


def _describe(shop: Workshop, folder: Path, model: nn.Module, evaluated: nn.Module) -> dict[str, Any]:
    """Save the network and say what it costs and what it knows."""
    path = folder / "model.safetensors"
    save_model(path, model, shop.experiment.model, shop.splits.classes)
    _check_file(path, evaluated, shop)
    macs = layer_macs(model, model.input_shape)
    splits = {"accuracy": shop.splits.test, "validation": shop.splits.validation}
    with shop.journal.busy("Classifying the held-out images"):
        found = {name: None if split is None else accuracy(evaluated, split) for name, split in splits.items()}
    return {
        **found,
        "parameters": count_parameters(model),
        "nonzero": count_nonzero(model),
        "macs": sum(macs.values()),
        "elementwise": count_elementwise(model, model.input_shape),
        "layers": {name or FORWARD: _layer(model.get_submodule(name), spent) for name, spent in macs.items()},
        "file_bytes": path.stat().st_size,
    }


@torch.no_grad()
def _check_file(path: Path, evaluated: nn.Module, shop: Workshop) -> None:
    """Raises StageError: the network in the file is not the one that is about to be measured."""
    images = next(iter(shop.splits.test.batches(FILE_IMAGES)))[0]
    loaded = load_model(path).to(shop.device)
    with evaluating(evaluated), torch.backends.cudnn.flags(enabled=False):
        off = difference(evaluated(images.contiguous(memory_format=memory_format(evaluated))), loaded(images))
    if not off <= FILE_TOLERANCE:  # also where it is not a number
        raise StageError(
            f"The file of this stage holds another network than the one that was trained: its answers are off by "
            f"{off:.1e} relative, allowed {FILE_TOLERANCE:.0e}; nothing is recorded"
        )


def _layer(layer: nn.Module, macs: int) -> dict[str, int]:
    """What one layer costs."""
    return {"macs": macs, "parameters": count_own_parameters(layer), "stripes": count_stripes(layer)}


def _units(keep: Tensor) -> dict[str, Any]:
    """How many units of a layer stay; `positions` (K, K): the fraction at each position of the kernel."""
    found = {"kept": int(keep.sum()), "total": keep.numel()}
    return found | ({"positions": keep.float().mean(0).tolist()} if keep.ndim == 3 else {})


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
