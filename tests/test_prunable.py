"""Which layers a method prunes, why it skips the others, and pruning layers that share channels together."""

import pytest
import torch
from toys import network

from prune_cli import surgery
from prune_cli.errors import UserError
from prune_cli.masks import Masks, random_like
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.group import GroupPruning
from prune_cli.methods.random import RandomFilters
from prune_cli.methods.sfp import SoftFilterPruning
from prune_cli.methods.slim_magnitude import SlimMagnitude
from prune_cli.methods.slimming import NetworkSlimming
from prune_cli.methods.stripe import StripePruning
from prune_cli.methods.weight import WeightPruning

RESNET = "prune_cli.models.resnet.CifarResNet"
METHODS = [
    FilterPruning(), SoftFilterPruning(ratio=0.5), NetworkSlimming(), StripePruning(), GroupPruning(), WeightPruning(),
]  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@each_method
def test_every_layer_is_pruned_or_says_why_not(method):
    model = network("tiny.TinyResNet")
    found = method.prunable(model)
    layers = ["stem.0", *(f"block{b}.conv{c}" for b in (1, 2) for c in (1, 2)), "block2.shortcut", "head.2"]
    assert sorted([*found.layers, *found.skipped]) == sorted(layers)
    assert set(method.prune(method.prepare(model), 0.5).keep) == set(found.layers)
    assert "head.2" in found.skipped


@each_method
def test_an_excluded_layer_stays_whole(method):
    excluding = type(method)(**{**vars(method), "exclude": ("block1.*",)})
    model = excluding.prepare(network("tiny.TinyResNet"))
    assert excluding.prunable(network("tiny.TinyResNet")).skipped["block1.conv1"] == "excluded by method.exclude"
    assert not any(name.startswith("block1.") for name in excluding.prune(model, 0.5).keep)


def test_a_pattern_that_names_no_layer_is_refused():
    with pytest.raises(UserError, match=r"^method\.exclude: block1\.conv is no layer's name; did you mean block1\."):
        FilterPruning(exclude=("block1.conv",)).prunable(network("tiny.TinyResNet"))


def test_reasons_name_what_a_layer_is_coupled_to():
    skipped = FilterPruning().prunable(network(RESNET, depth=20, shortcut="B")).skipped
    assert skipped["layer2.0.conv2"].startswith("a residual sum shares its channels with layer2.")
    assert skipped["fc"] == "its channels are the network's output"
    skipped = FilterPruning().prunable(network("toys.Grouped", groups=6)).skipped
    assert skipped["spread"] == "depthwise: its channels go with those of expand"
    assert "blocks of 3" in FilterPruning().prunable(network("toys.Grouped", groups=2)).skipped["expand"]
    assert SlimMagnitude().prunable(network("toys.Grouped", groups=6)).skipped["project"].startswith("no batch norm")
    with pytest.raises(UserError, match="nothing that it could prune; stem: .*; next: no batch norm .*; fc: its"):
        SlimMagnitude().prunable(network("toys.Padded"))


@pytest.mark.parametrize("criterion", ["l1", "geometric_median"])
def test_a_residual_sum_loses_its_channels_together(criterion):
    model = network(RESNET, depth=20, shortcut="B")
    masks = FilterPruning(coupled="joint", criterion=criterion).prune(model, 0.5)
    assert set(masks.keep) == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert masks.obtained == pytest.approx(0.5)
    writers = ["conv1", *(f"layer1.{block}.conv2" for block in range(3))]
    total = sum(FilterPruning(criterion=criterion).score(model.get_submodule(name), None) for name in writers)
    assert set((~masks.keep["conv1"]).nonzero().flatten().tolist()) == set(total.argsort()[:8].tolist())
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    widths = {name: small.model.get_submodule(name).out_channels for name in masks.keep}
    assert widths == {name: int(keep.sum()) for name, keep in masks.keep.items()}


def test_joint_needs_every_layer_of_the_sum():
    model = network("tiny.TinyResNet")
    found = FilterPruning(coupled="joint", exclude=("block1.conv2",)).prunable(model)
    assert found.skipped["stem.0"] == "shares its channels with block1.conv2, which is excluded"
    assert "shortcut" in SlimMagnitude(coupled="joint").prunable(model).skipped["block2.conv2"]


def test_groups_of_a_convolution_go_as_a_whole():
    model = network("toys.Grouped", groups=3)
    masks = FilterPruning(coupled="joint").prune(model, 0.3)
    assert masks.keep["expand"].view(3, 2).sum(1).sort().values.tolist() == [0, 2, 2]
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert (small.model.spread.groups, small.model.spread.in_channels) == (2, 4)


@pytest.mark.parametrize(("target", "arguments"), [("tiny.TinyResNet", {}), ("toys.Grouped", {"groups": 3})])
def test_the_control_chooses_for_coupled_layers_together(target, arguments, tmp_path):
    model = network(target, **arguments)
    FilterPruning(coupled="joint").prune(model, 0.5).save(tmp_path / "masks.safetensors")
    masks = Masks.load(tmp_path / "masks.safetensors")
    assert masks.coupled
    chance = [random_like(masks, seed) for seed in range(20)]
    assert len({str(control.keep) for control in chance}) > 1
    for control in chance:
        assert control.obtained == masks.obtained
        for together in control.coupled:
            keeps = [control.keep[name] for name in together.layers]
            assert all(torch.equal(keep, keeps[0]) for keep in keeps)
            assert set(keeps[0].view(-1, together.block).sum(1).tolist()) <= {0, together.block}
    assert surgery.cut(model, chance[0]).removed.keys() == surgery.cut(model, masks).removed.keys()


def test_linear_layers_on_maps_are_convolutions_to_filter_methods():
    assert set(RandomFilters().prune(network("toys.OnMaps"), 0.5).keep) == {"wide", "next"}
