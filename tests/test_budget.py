"""`target=macs|params`: the selection whose cut network comes nearest to the wanted size."""

from dataclasses import replace

import pytest
import torch
from tiny import randomise
from toys import network

from prune_cli import surgery
from prune_cli.budget import HIGHEST, NEAR, Budget
from prune_cli.build import build
from prune_cli.compose import CONF
from prune_cli.errors import UserError
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.fpgm import GeometricMedian
from prune_cli.methods.group import GroupPruning
from prune_cli.methods.sfp import SoftFilterPruning
from prune_cli.methods.stripe import StripePruning
from prune_cli.methods.weight import WeightPruning
from prune_cli.metrics.macs import count_macs, count_parameters
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SEARCHED = [
    (FilterPruning(), "macs", 0.35, "TinyVGG"),
    (FilterPruning(), "params", 0.6, "TinyResNet"),
    (FilterPruning(scope="global"), "macs", 0.6, "TinyVGG"),
    (StripePruning(), "macs", 0.35, "TinyResNet"),
    (GroupPruning(), "params", 0.35, "TinyVGG"),
    (WeightPruning(scope="local", layers="all", last_rate=0.5), "params", 0.6, "TinyVGG"),
]


def size(target: str, model: torch.nn.Module, held=None) -> int:
    """MACs or parameters, without the weights that are held at zero."""
    if target == "macs":
        return count_macs(model, model.input_shape)
    masked = {name: held.of(name, model.get_submodule(name).weight) for name in held.keep} if held else {}
    zeros = sum(model.get_submodule(name).weight[~keep.expand_as(model.get_submodule(name).weight)].numel()
                for name, keep in masked.items())  # fmt: skip
    return count_parameters(model) - zeros


def removed(target: str, dense: torch.nn.Module, model: torch.nn.Module, masks) -> float:
    small = surgery.cut(model, masks)
    return 1 - size(target, small.model, small.masks) / size(target, dense)


@pytest.mark.parametrize(("method", "target", "ratio", "model"), SEARCHED)
def test_no_ratio_of_units_comes_nearer(method, target, ratio, model):
    dense = network(f"tiny.{model}")
    model = randomise(method.prepare(dense))
    masks = Budget.of(target, ratio, dense).select(method, model)
    found = abs(removed(target, dense, model, masks) - ratio)
    tried = {}
    for step in range(61):
        other = method.prune(model, step / 61)
        counts = tuple(int(keep.sum()) for keep in other.keep.values())
        if counts not in tried:
            tried[counts] = abs(removed(target, dense, model, other) - ratio)
    assert found <= min(tried.values()) + NEAR
    assert masks.obtained == pytest.approx(masks.requested, abs=0.1)  # the fraction of units that was found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_meets_a_number_of_parameters(name, compose):
    """Without a sentence within half a percent, with one where whole units allow no better."""
    method = build(compose(f"method={name}", "target=params", "ratio=0.45")).method
    dense = network("tiny.TinyResNet")
    budget = Budget.of("params", 0.45, dense)
    trained = budget.for_training(method, dense)
    assert (trained == method) != method.needs_ratio
    model = randomise(trained.prepare(dense))
    budget.check(trained, model)
    masks = budget.select(trained, model)
    obtained = removed("params", dense, model, masks)
    assert obtained == pytest.approx(0.45, abs=0.1)
    said = [note for note in masks.notes if note.startswith("No selection comes nearer to 45.00% of the parameters")]
    assert len(said) == (abs(obtained - 0.45) > 0.005)
    assert all(f"{100 * obtained:.2f}%" in note for note in said)


@pytest.mark.parametrize("method", [SoftFilterPruning(ratio=0.3), GeometricMedian(ratio=0.3, norm_ratio=0.1)])
def test_a_rate_that_training_needs_is_solved_from_the_shapes(method):
    dense = network("tiny.TinyVGG")
    budget = Budget.of("macs", 0.5, dense)
    solved = budget.for_training(method, dense)
    assert replace(solved, ratio=0.3) == method
    for seed in (1, 2):  # whatever the weights have become by then
        model = randomise(solved.prepare(dense), seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        masks = budget.select(solved, model)
        assert masks.requested == solved.ratio
        assert removed("macs", dense, model, masks) == pytest.approx(0.5, abs=0.05)


def test_units_are_left_to_the_method():
    model, method = network("tiny.TinyVGG"), FilterPruning()
    budget = Budget.of("units", 0.4, model)
    assert budget.for_training(SoftFilterPruning(ratio=0.2), model).ratio == 0.2
    budget.check(method, model)
    masks, plain = budget.select(method, model), method.prune(model, 0.4)
    assert masks.requested == 0.4 and masks.notes == ()
    assert all(torch.equal(masks.keep[name], keep) for name, keep in plain.keep.items())


def test_more_is_dead_than_was_asked_for():
    model = network("tiny.TinyVGG")
    model.features[3].weight.data[2:] = 0
    masks = Budget.of("macs", 0.1, model).select(FilterPruning(scope="global"), model)
    assert (~masks.keep["features.3"]).sum() == 10
    assert "nearer to 10.00% of the MACs" in masks.notes[-1]


@pytest.mark.parametrize(
    ("method", "target", "ratio", "sentence"),
    [
        (FilterPruning(), "macs", 0.995, "target=macs ratio=0.995: at most 9"),
        (FilterPruning(), "params", 0.97, "target=params ratio=0.97: at most 9"),
        (SoftFilterPruning(ratio=0.1), "macs", 0.999, "target=macs ratio=0.999: at most 9"),
        (WeightPruning(), "macs", 0.1, "target=macs: single weights at zero leave the MACs as they are"),
        (WeightPruning(), "params", 0.99, "target=params ratio=0.99: at most 9"),  # linear layers stay
        (StripePruning(select="threshold"), "macs", 0.5, "target=macs: how much this selection removes does not"),
        (FilterPruning(ratios={"*": 0.5}), "params", 0.5, "target=params: how much this selection removes does not"),
    ],
)
def test_what_cannot_be_met_is_refused(method, target, ratio, sentence):
    dense = network("tiny.TinyVGG")
    budget = Budget.of(target, ratio, dense)
    with pytest.raises(UserError) as caught:
        solved = budget.for_training(method, dense)
        budget.check(solved, solved.prepare(dense))
    assert str(caught.value).startswith(sentence)


def test_the_highest_ratio_leaves_one_unit_of_every_layer():
    masks = FilterPruning().prune(network("tiny.TinyVGG"), HIGHEST)
    assert [int(keep.sum()) for keep in masks.keep.values()] == [1, 1, 1]


@pytest.mark.parametrize(("name", "start"), [("sfp", "sparse"), ("stripe", None)])
def test_a_run_records_what_it_removed(name, start, compose, tmp_path):
    """And trains again for another target only where training needs to know it."""
    config = compose(
        f"method={name}", "target=macs", "ratio=0.5", "dataset=digits", "debug=default", "runtime.latency_seconds=0"
    )
    experiment = replace(build(config), model=ModelSpec("TinyResNet", "tiny.TinyResNet"))
    record = run(experiment, tmp_path / "run", command="test")
    dense, pruned = record.stage("dense"), record.stage("pruned")
    assert (record.target, record.ratio) == ("macs", 0.5)
    assert record.removed == pytest.approx(1 - pruned.macs / dense.macs)
    assert abs(record.removed - 0.5) < 0.1
    assert record.unit in ("filter", "stripe") and record.obtained == pytest.approx(record.requested, abs=0.1)
    assert experiment.name.endswith("-0.5-macs")
    units = run(replace(experiment, target="units"), tmp_path / "units", command="test")
    assert (units.target, units.removed) == ("units", None)
    assert units.stage("pruned").key != pruned.key
    assert units.stage("sparse").cached == (start is None)
