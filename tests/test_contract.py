"""What every method keeps. Adding a YAML file to conf/method adds its tests; none is named here."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fitting import same_state, workshop_of
from safetensors.torch import load_file
from tiny import randomise

from prune_cli import surgery
from prune_cli.build import build
from prune_cli.compose import CONF
from prune_cli.errors import UserError
from prune_cli.experiment import Experiment
from prune_cli.hooks import Progress, TrainingHooks
from prune_cli.journal import StageJournal
from prune_cli.method import PruningMethod
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run
from prune_cli.record import Record

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
RATIO = 0.5
STAGES = ["dense", "sparse", "pruned", "random", "finetuned"]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=["TinyVGG", "TinyResNet", "TinyStream"])
def experiment(method, request, compose):
    return _experiment(compose, method, request.param)


def _experiment(compose, method: str, model: str):
    config = compose(
        f"method={method}", "debug=default", "dataset=digits", f"ratio={RATIO}",
        "recipe.pretrain.epochs=2", "recipe.finetune.epochs=2", "runtime.latency_seconds=0",
    )  # fmt: skip
    return replace(build(config), model=ModelSpec(model, f"tiny.{model}"))


class Ran(NamedTuple):
    experiment: Experiment
    record: Record
    folder: Path


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """What an experiment left, run in a store that had nothing. Tests of the same method and network share it,
    and may only add to that store."""
    made: dict[tuple[str, str], Ran] = {}

    def ran(experiment) -> Ran:
        key = experiment.method_name, experiment.model.name
        if key not in made:
            folder = tmp_path_factory.mktemp("first")
            experiment = _in_store(experiment, folder / "store")
            made[key] = Ran(experiment, run(experiment, folder / "run", command="test"), folder / "run")
        return made[key]

    return ran


def _in_store(experiment, store: Path):
    return replace(experiment, runtime=replace(experiment.runtime, store=str(store)))


def _prepared(experiment):
    """The network that the method selects from, with everything random that removal could rely on."""
    return randomise(experiment.method.prepare(workshop_of(experiment).untrained()))


def _state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_unknown_key_is_refused_with_a_sentence(method, compose):
    config = compose(f"method={method}")
    config["method"]["strenght"] = 1
    with pytest.raises(UserError, match=r"method\.strenght: there is no such setting"):
        build(config)


def test_the_pipeline_runs_and_a_second_run_trains_nothing(experiment, first_run, tmp_path):
    experiment, first, _ = first_run(experiment)
    expected = [s for s in STAGES if s not in ("sparse", "finetuned")]
    expected += ["sparse"] * (experiment.method.start is not None) + ["finetuned"] * experiment.method.finetune
    assert sorted(s.stage for s in first.stages) == sorted(expected)
    assert not any(s.cached for s in first.stages)
    assert first.stage("pruned").macs < first.stage("dense").macs or experiment.method.unit == "weight"

    second = run(experiment, tmp_path / "second", command="test")
    assert all(s.cached for s in second.stages)
    assert [replace(s, cached=False) for s in second.stages] == list(first.stages)


def test_warm_and_cold_store_agree(method, compose, first_run, tmp_path):
    """A ratio sweep that finds its training in the store ends where a run from nothing ends."""
    experiment = _experiment(compose, method, "TinyResNet")
    _, cold, folder = first_run(experiment)
    run(replace(experiment, ratio=0.3), tmp_path / "other", command="test")
    warm = run(experiment, tmp_path / "warm", command="test")
    assert warm.stage("dense").cached
    for stage in cold.stages:
        name = f"checkpoints/{stage.stage}.safetensors"
        assert same_state(load_file(tmp_path / "warm" / name), load_file(folder / name)), stage.stage
    assert [s.accuracy for s in warm.stages] == [s.accuracy for s in cold.stages]


def test_every_overridden_hook_changes_something(experiment):
    method, model = experiment.method, _prepared(experiment)
    progress = Progress(epoch=0, epochs=1, step=0, steps=10, travel=1.0, weight_decay=1e-4)
    shape = model.input_shape
    for hook in (name for name in vars(TrainingHooks) if not name.startswith("_")):
        if getattr(type(method), hook) is getattr(TrainingHooks, hook):
            continue
        model(torch.randn(4, *shape)).square().mean().backward()
        if hook == "penalty":
            terms = method.penalty(model, progress)
            assert terms and all(term.requires_grad and term.item() > 0 for term in terms.values())
            continue
        for name, parameter in model.named_parameters():
            if parameter.numel() and "skeleton" in name:
                parameter.data.view(-1)[0] = 1e-4  # something that has shrunk away
        if hook in ("after_step", "after_epoch"):
            for parameter in model.parameters():
                parameter.data.add_(1e-3)  # the optimizer has been at work
        before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
        getattr(method, hook)(model, progress)
        after = [(p.detach(), p.grad) for p in model.parameters() if p.grad is not None]
        assert any(not torch.equal(a, b) for old, new in zip(before, after) for a, b in zip(old, new)), hook


def test_prune_leaves_the_network_untouched(experiment):
    model = _prepared(experiment)
    before, flags = _state(model), [m.training for m in model.modules()]
    experiment.method.prune(model, RATIO)
    assert same_state(before, _state(model))
    assert flags == [m.training for m in model.modules()]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_the_ratio_is_met_and_no_layer_is_emptied(experiment, ratio):
    masks = experiment.method.prune(_prepared(experiment), ratio)
    assert masks.requested == pytest.approx(ratio)
    assert all(keep.any() for keep in masks.keep.values())
    if experiment.method.scope == "global":
        assert abs(masks.obtained - ratio) * masks.total <= 1 + len(masks.keep)
    else:
        for keep in masks.keep.values():
            assert abs(float((~keep).sum()) - ratio * keep.numel()) <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_masked_differs_from_dense_and_equals_cut(experiment, seed):
    model = randomise(_prepared(experiment), seed)
    masks = experiment.method.prune(model, RATIO)
    compensated = experiment.method.compensate(model, masks)
    masked, small = surgery.mask(compensated, masks), surgery.cut(compensated, masks)
    x = torch.randn(8, *model.input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        dense, expected, found = (m.eval()(x) for m in (surgery.plain(model), masked, small.model))
    assert (dense - expected).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_is_pruned_stays_exactly_zero_in_finetuning(experiment, first_run, tmp_path):
    experiment = first_run(experiment).experiment
    experiment = replace(experiment, method=replace(experiment.method, finetune=True))
    run(experiment, tmp_path / "run", command="test")
    pruned, tuned = (
        _dense_weights(tmp_path / "run/checkpoints" / f"{stage}.safetensors") for stage in ("pruned", "finetuned")
    )
    assert pruned.keys() == tuned.keys()
    for name in pruned:
        assert (tuned[name][pruned[name] == 0] == 0).all(), name
    assert any(not torch.equal(pruned[name], tuned[name]) for name in pruned)


def _dense_weights(path: Path) -> dict[str, torch.Tensor]:
    from prune_cli import load

    modules = load(path).named_modules()
    return {name: module.weight.detach() for name, module in modules if getattr(module, "weight", None) is not None and module.weight.ndim > 1}


def test_rounds_go_on_with_what_the_round_before_left(method, compose, tmp_path):
    experiment = _experiment(compose, method, "TinyResNet")
    experiment = replace(experiment, rounds=2, method=replace(experiment.method, finetune=True))
    record = run(experiment, tmp_path / "run", command="test")
    sparse = ["sparse"] * (experiment.method.start is not None)
    expected = [("dense", None)] + [(s, n) for n in (1, 2) for s in (*sparse, "pruned", "finetuned")] + [("random", 2)]
    assert [(s.stage, s.round) for s in record.stages] == expected
    assert not any(s.cached for s in record.stages)
    first, second = (s for s in record.stages if s.stage == "pruned")
    dense, tuned, random = (record.stage(stage) for stage in ("dense", "finetuned", "random"))
    assert record.stage("pruned") == second
    assert dense.nonzero > first.nonzero > second.nonzero and dense.macs >= first.macs >= second.macs >= tuned.macs
    assert 0.97 <= tuned.nonzero / second.nonzero <= 1 + 1e-9 and random.nonzero < dense.nonzero

    # The ratio is what both rounds together remove; each rounds by one unit of a layer, at most.
    one, two, chance = (load_file(_masks(experiment, result)) for result in (first, second, random))
    total, kept = sum(keep.numel() for keep in one.values()), sum(int(keep.sum()) for keep in two.values())
    assert record.requested == RATIO
    assert abs(record.obtained - RATIO) * total <= 1 + 3 * len(one)
    assert kept == round((1 - record.obtained) * total)
    assert {name: int(keep.sum()) for name, keep in chance.items()} == {
        name: int(two.get(name, two.get(f"{name}.layer", keep)).sum()) for name, keep in one.items()
    }  # the control removes as much of every layer, from what the first round had

    again = run(experiment, tmp_path / "again", command="test")
    assert all(s.cached for s in again.stages) and again.obtained == record.obtained
    _dense_weights(tmp_path / "run/checkpoints/finetuned-1.safetensors")  # loads


def _masks(experiment, result) -> Path:
    return Path(experiment.runtime.store) / result.stage / result.key / "masks.safetensors"


def test_killed_in_the_middle_and_resumed_equals_uninterrupted(method, compose, tmp_path):
    """SIGKILL in the third epoch of the last stage that trains, in the second round; 4 steps are an epoch."""
    steps, experiment = 9, replace(_experiment(compose, method, "TinyResNet"), rounds=2)
    recipe = experiment.recipe
    longer = {stage: replace(getattr(recipe, stage), epochs=4) for stage in ("pretrain", "sparsify", "finetune")}
    experiment = replace(experiment, recipe=replace(recipe, **longer))
    whole = run(_in_store(experiment, tmp_path / "elsewhere"), tmp_path / "whole", command="test")
    stage = [s.stage for s in whole.stages if s.stage in ("dense", "sparse", "finetuned")][-1]

    child = os.fork()
    if child == 0:
        try:
            _kill_in(stage, steps)
            run(experiment, tmp_path / "killed", command="test")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "killed/record.json").exists()

    resumed = run(experiment, tmp_path / "resumed", command="test")
    assert resumed.stage("dense").cached == (stage != "dense") and not resumed.stage(stage).cached
    log = (tmp_path / "resumed/run.log").read_text()
    assert f"{stage}: resumed after epoch 2 of 4" in log
    for file in (tmp_path / "whole/checkpoints").iterdir():
        assert same_state(load_file(file), load_file(tmp_path / "resumed/checkpoints" / file.name)), file.name


def _kill_in(stage: str, steps: int) -> None:
    taken = 0
    step = StageJournal.step

    def dying(self):
        nonlocal taken
        step(self)
        if self._name == stage:
            taken += 1
            if taken == steps:
                os.kill(os.getpid(), signal.SIGKILL)

    StageJournal.step = dying


def test_methods_are_frozen_and_reached_by_their_target_only(experiment):
    assert isinstance(experiment.method, PruningMethod)
    with pytest.raises(AttributeError):
        experiment.method.start = "dense"
