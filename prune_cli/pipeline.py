"""One run, from an experiment to its record."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from prune_cli import stages
from prune_cli.environment import fingerprint, machine, versions, write_env
from prune_cli.experiment import Experiment
from prune_cli.journal import Journal
from prune_cli.kernels.plan import require
from prune_cli.masks import Masks
from prune_cli.metrics.latency import measure
from prune_cli.pictures import packed
from prune_cli.record import Latency, LayerChange, Record, StageResult
from prune_cli.report.stages import render
from prune_cli.settings import Control
from prune_cli.store import Store, canonical, full_disk_explained, key_of
from prune_cli.workshop import Made, Workshop

BATCHES = (1, 128)  # batch sizes whose latency is measured
CONTROLS = {"random", "random_finetuned", *get_args(Control)}  # stages that a run is compared with


def run(experiment: Experiment, run_dir: Path, *, command: str) -> Record:
    """Run the experiment, write everything to `run_dir`, print the table of stages.

    Raises UserError: a device, store or data set that is not to be had, a method that cannot prune
    this network. StageError: a training that cannot end well, a full disk.
    """
    runtime, console = experiment.runtime, Console()
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    with full_disk_explained(run_dir, Path(runtime.store)), Journal(run_dir, console) as journal:
        shop = Workshop(experiment, Store(runtime.store), journal)
        require(runtime.kernel, shop.device)
        write_env(run_dir / "env.json", device=str(shop.device))
        made = _make(shop)
        record = _record(shop, made, _latency(shop, made), command)
        _keep(shop, run_dir, made, record)
        written = {"run": run_dir, "checkpoints": run_dir / "checkpoints", "store": shop.store.root}
        render(record, console, written)
    return record


def _make(shop: Workshop) -> list[Made]:
    """The dense network, the rounds of the method, and the controls."""
    method, recipe = shop.method, shop.experiment.recipe
    base, dense = shop.base, stages.train_dense(shop)
    made = [dense] if base is None else [dense, stages.go_on_from(shop, base)]
    cuts: list[Made] = []
    for number in range(1, shop.experiment.rounds + 1):
        if method.start is not None:
            made.append(stages.sparsify(shop, made[-1], number))
        cuts.append(stages.prune(shop, made[-1], number))
        made.append(cuts[-1])
        if method.finetune and recipe.finetune.epochs:
            made.append(stages.finetune(shop, cuts, dense, recipe.finetune.start))
    return [*made, *_controls(shop, cuts, dense)]


def _controls(shop: Workshop, cuts: list[Made], dense: Made) -> list[Made]:
    """The same selection left to chance, and what else the recipe wants the training compared with."""
    recipe, random = shop.experiment.recipe, stages.prune_at_random(shop, cuts)
    made = [random]
    for control in recipe.controls:
        if control == "random":
            made.append(stages.finetune(shop, [random], dense, recipe.finetune.start, "random_finetuned"))
        else:
            made.append(stages.finetune(shop, cuts, dense, control, control))
    return made


def _latency(shop: Workshop, made: list[Made]) -> dict[str, tuple[Latency, ...]]:
    """Measured once per set of artifacts, machine, duration and kernel; the controls are as fast as
    what they control."""
    seconds, kernel = shop.experiment.runtime.latency_seconds, shop.experiment.runtime.kernel
    if not seconds:
        return {}
    timed = [m for m in made if m.stage not in CONTROLS]
    settings = {
        "artifacts": {m.name: m.artifact.key for m in timed},
        "machine": fingerprint(machine(str(shop.device))),
        "batches": BATCHES,
        "seconds": seconds,
        "kernel": kernel,
    }

    def make(folder: Path, _) -> dict:
        models = {m.name: shop.trained(m.artifact) for m in timed}
        shape = models["dense"].input_shape
        found = measure(models, shape, BATCHES, seconds, shop.device, kernel)
        return {stage: [asdict(latency) for latency in latencies] for stage, latencies in found.items()}

    artifact, _ = shop.store.produce("latency", key_of("latency", 2, settings), settings, make)
    return {stage: tuple(Latency(**row) for row in rows) for stage, rows in artifact.result.items()}


def _record(shop: Workshop, made: list[Made], latency: dict[str, tuple[Latency, ...]], command: str) -> Record:
    experiment = shop.experiment
    cuts = [m for m in made if m.stage == "pruned"]
    rounds, dense, pruned = len(cuts), made[0].artifact.result, cuts[-1].artifact.result
    masks = stages.selected(shop, cuts)
    if rounds > 1:
        pruned = {**pruned, **stages.over_rounds(shop, masks)}
    settings = {key: value for key, value in asdict(experiment).items() if key != "reference"}
    return Record(
        name=experiment.name,
        status="complete",
        command=command,
        config=canonical(settings),
        seed=experiment.seed,
        ratio=experiment.ratio,
        unit=pruned["unit"],
        requested=pruned["requested"],
        obtained=pruned["obtained"],
        notes=(
            *dense.get("notes", ()),  # about weights from a checkpoint
            *(_numbered(note, cut.round, rounds) for cut in cuts for note in cut.artifact.result["notes"]),
        ),
        stages=tuple(_stage_result(m, latency.get(m.name, ()), rounds) for m in made),
        machine=machine(str(shop.device)),
        versions=versions(),
        target=experiment.target,
        removed=pruned.get("removed"),
        layers=_layers(dense, pruned, masks),
        reference=experiment.reference,
    )


def _layers(dense: Mapping[str, Any], pruned: Mapping[str, Any], masks: Masks) -> tuple[LayerChange, ...]:
    """The layers of the dense network, with what is left of each: nothing of one that was removed whole."""
    after, gone = pruned.get("layers", {}), {"macs": 0, "parameters": 0, "stripes": 0}
    # a cut that puts channels back, or selects them, makes the layer a part named `layer` of what it was
    after = {re.sub(r"(\.layer)+$", "", name): left for name, left in after.items()} | after
    skeletons = {name: {"skeleton": packed(keep.numpy())} for name, keep in masks.keep.items() if keep.ndim == 3}
    units = {name: counted | skeletons.get(name, {}) for name, counted in pruned["units"].items()}
    return tuple(
        LayerChange(
            name=name,
            **{what: (figure, after.get(name, gone)[what]) for what, figure in before.items()},
            units=units.get(name),
        )
        for name, before in (dense.get("layers", {}) if after else {}).items()  # older artifacts have none
    )


def _numbered(note: str, number: int, rounds: int) -> str:
    return note if rounds == 1 else f"Round {number}: {note}"


def _stage_result(made: Made, latency: tuple[Latency, ...], rounds: int) -> StageResult:
    result = made.artifact.result
    curve = [figures["validation"] for figures in result.get("history", []) if "validation" in figures]
    best = max(curve, default=None)
    return StageResult(
        stage=made.stage,
        key=made.artifact.key,
        accuracy=result["accuracy"],
        validation=result["validation"],
        best_validation=best,
        best_epoch=None if best is None else curve.index(best) + 1,
        parameters=result["parameters"],
        nonzero=result.get("nonzero"),  # not in artifacts made before it was counted
        macs=result["macs"],
        elementwise=result.get("elementwise"),
        file_bytes=result["file_bytes"],
        latency=latency,
        seconds=result["seconds"],
        cached=made.cached,
        round=made.round if made.round and rounds > 1 else None,
        epochs=len(result["history"]) if "history" in result else None,
    )


def _keep(shop: Workshop, run_dir: Path, made: list[Made], record: Record) -> None:
    """Everything that outlives the store: checkpoints, the record, TensorBoard's comparison."""
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for m in made:
        shutil.copyfile(m.artifact.file("model.safetensors"), checkpoints / f"{m.name}.safetensors")
    record.write(run_dir / "record.json")
    experiment = shop.experiment
    names = {"method": experiment.method_name, "model": experiment.model.name, "dataset": experiment.dataset.name}
    metrics = {f"accuracy/{m.name}": m.artifact.result["accuracy"] for m in made}
    pruned, dense = record.stage("pruned"), record.stage("dense")
    metrics["macs_removed"] = 1 - pruned.macs / dense.macs
    shop.journal.hyperparameters(
        {**names, "ratio": experiment.ratio, "seed": experiment.seed, "recipe": experiment.recipe.name}, metrics
    )
