"""Magnitude pruning of single weights: which ones, how many, and that they stay at zero."""

from dataclasses import replace

import pytest
import torch
from toys import network
from torch import nn
from torch.nn import functional as F

from prune_cli import surgery
from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.hooks import Progress
from prune_cli.methods.weight import WeightPruning
from prune_cli.metrics.macs import count_macs, count_nonzero, count_parameters
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run
from prune_cli.record import Record
from prune_cli.report.stages import markdown

NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)
LENET = "prune_cli.models.lenet"


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
def test_one_threshold_for_all_convolutions_and_nothing_else(ratio):
    model = network("tiny.TinyVGG")
    masks = WeightPruning().prune(model, ratio)
    assert set(masks.keep) == {"features.0", "features.3", "features.6"}
    weights = {name: model.get_submodule(name).weight.detach().abs() for name in masks.keep}
    kept = torch.cat([weights[name][keep] for name, keep in masks.keep.items()])
    removed = torch.cat([weights[name][~keep] for name, keep in masks.keep.items()])
    assert removed.max() <= kept.min()
    assert len(removed) == round(ratio * masks.total)
    masked = surgery.mask(model, masks)
    for name, parameter in masked.named_parameters():
        if name.removesuffix(".weight") not in masks.keep:
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_linear_layers_by_option_and_where_there_is_nothing_else():
    model = network("tiny.TinyVGG")
    linear = {"classifier.1", "classifier.3"}
    assert linear < set(WeightPruning(layers="all").prune(model, 0.5).keep)
    model = network(f"{LENET}.LeNet300100", channels=1)
    assert set(WeightPruning().prune(model, 0.5).keep) == {"fc1", "fc2", "fc3"}


def test_the_last_layer_is_the_one_that_is_called_last():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)
            self.conv = nn.Conv2d(3, 8, 3)
            self.input_shape = (3, 6, 6)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    keep = WeightPruning(layers="all", scope="local", last_rate=0.5).prune(HeadFirst(), 0.5).keep
    assert {name: float((~k).float().mean()) for name, k in keep.items()} == {"head": 0.25, "conv": 0.5}


def test_the_last_layer_at_half_rate():
    model = network(f"{LENET}.LeNet300100", channels=1)
    masks = WeightPruning(scope="local", last_rate=0.5).prune(model, 0.5)
    removed = {name: float((~keep).float().mean()) for name, keep in masks.keep.items()}
    assert removed == pytest.approx({"fc1": 0.5, "fc2": 0.5, "fc3": 0.25})
    assert masks.requested == pytest.approx(masks.obtained)
    assert masks.requested < 0.5
    with pytest.raises(UserError, match=r"^method\.last_rate: belongs to method\.scope=local"):
        WeightPruning(last_rate=0.5).prune(model, 0.5)


def test_a_network_of_nothing_but_norms_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(UserError, match="^method: the model has nothing that it could prune$"):
        WeightPruning().prune(model, 0.5)


def test_the_shape_stays_and_the_zeros_are_counted():
    model = network("tiny.TinyResNet")
    masks = WeightPruning().prune(model, 0.6)
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert small.removed == {}
    assert count_macs(small.model, model.input_shape) == count_macs(model, model.input_shape)
    assert count_parameters(small.model) == count_parameters(model)
    assert count_nonzero(small.model) == count_nonzero(model) - round(0.6 * masks.total)


def test_a_filter_that_loses_every_weight_is_gone():
    model = network("tiny.TinyVGG")
    model.features[3].weight.data[:2].mul_(1e-4)
    small = surgery.cut(model, WeightPruning().prune(model, 0.5))
    assert small.removed["features.3"] == [0, 1]
    assert small.masks.keep["features.6"].shape == small.model.features[6].weight.shape == (12, 10, 5, 5)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_momentum_and_weight_decay_do_not_wake_a_pruned_weight(scope):
    """A masked gradient alone leaves the momentum of the steps before to move it."""
    model = network("tiny.TinyVGG").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 4).backward()
        optimizer.step()

    step()
    method = WeightPruning(scope=scope)
    masks = method.prune(model, 0.5)
    hooks = method.constraint(masks)
    for _ in range(3):
        step()
        hooks.after_step(model, NOW)
        for name, keep in masks.keep.items():
            weight = model.get_submodule(name).weight
            assert not weight[~keep].any()
            assert weight[keep].all()


def test_the_record_and_the_table_show_how_much_is_not_zero(compose, tmp_path):
    config = compose("method=weight", "debug=default", "dataset=digits", "ratio=0.8", "runtime.latency_seconds=0")
    experiment = replace(build(config), model=ModelSpec("TinyResNet", "tiny.TinyResNet"))
    record = run(experiment, tmp_path / "run", command="test")
    dense, pruned, tuned = (record.stage(name) for name in ("dense", "pruned", "finetuned"))
    assert pruned.macs <= dense.macs
    assert tuned.nonzero == pytest.approx(pruned.nonzero, rel=0.02)
    assert pruned.nonzero < 0.35 * pruned.parameters
    assert Record.read(tmp_path / "run/record.json") == record
    assert f"{100 * pruned.nonzero / pruned.parameters:.2f}" in markdown(record)
