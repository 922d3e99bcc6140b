"""Removal is exact: the cut network computes what the masked one does, with every constant random."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from toys import network, random_masks

from prune_cli import surgery
from prune_cli.errors import StageError
from prune_cli.layers.gathered import GatheredConv2d
from prune_cli.layers.scatter import ScatterChannels
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.masks import UNIT_AXES, Masks
from prune_cli.methods.stripe import StripePruning
from prune_cli.metrics.macs import count_macs, count_parameters, layer_macs
from prune_cli.pipeline import _layers

RESNET, VGG, LENET = "prune_cli.models.resnet.CifarResNet", "prune_cli.models.vgg.VGG", "prune_cli.models.lenet"
NETWORKS = {
    "VGG single": (VGG, {"depth": 11, "width": 0.25}),
    "VGG double": (VGG, {"depth": 11, "width": 0.25, "classifier": "double"}),
    "ResNet A": (RESNET, {"depth": 20, "shortcut": "A"}),
    "ResNet B": (RESNET, {"depth": 20, "shortcut": "B"}),
    "LeNet-5": (f"{LENET}.LeNet5", {"channels": 1, "resolution": 16}),
    "kernels": ("toys.Kernels", {}),
    "concat": ("toys.Concat", {}),
    "depthwise": ("toys.Grouped", {"groups": 6}),
    "grouped": ("toys.Grouped", {"groups": 2}),
    "group norm": ("toys.GroupNormed", {}),
    "biased sum": ("toys.BiasedSum", {}),
    "pointwise": ("toys.Pointwise", {}),
    "cardinal": ("toys.Cardinal", {}),
    "shuffled": ("toys.Shuffled", {}),
    "padded": ("toys.Padded", {}),
    "squeezed": ("toys.Squeezed", {}),
    "attended": ("toys.Attended", {}),
    "sigmoids": ("toys.Sigmoids", {}),
    "added to input": ("toys.AddedToInput", {}),
    "twice": ("toys.Twice", {}),
    "on maps": ("toys.OnMaps", {}),
    "halves": ("toys.Halves", {}),
    "split and added": ("toys.SplitAndAdded", {}),
    "sum of concatenation": ("toys.SumOfConcatenation", {}),
    "stacked": ("toys.Stacked", {}),
    "along the width": ("toys.AlongTheWidth", {}),
    "functional": ("toys.Functional", {}),
    "unseen": ("toys.Unseen", {}),
    "tempered": ("toys.Tempered", {}),
    "pixels first": ("toys.PixelsFirst", {}),
    "tiny VGG": ("tiny.TinyVGG", {}),
    "tiny ResNet": ("tiny.TinyResNet", {}),
}
every_network = pytest.mark.parametrize(("target", "arguments"), NETWORKS.values(), ids=NETWORKS)
both_units = pytest.mark.parametrize("unit", ["filter", "stripe"])
every_unit = pytest.mark.parametrize("unit", list(UNIT_AXES))


def images(model: nn.Module, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(1))


def off_by(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def compared(model: nn.Module, masks: Masks, constant: str = "drop") -> surgery.Cut:
    """Cut, after checking against the masked network by hand and by `verify`."""
    x, before = images(model), {n: t.clone() for n, t in model.state_dict().items()}
    masked, small = surgery.mask(model, masks, constant), surgery.cut(model, masks, constant)
    with torch.no_grad():
        dense, expected, found = (network.eval()(x) for network in (model, masked, small.model))
    assert off_by(dense, expected) > 1e-3
    assert off_by(expected, found) < 1e-4
    surgery.verify(masked, small)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return small


@every_network
@every_unit
def test_cut_is_masked(target, arguments, unit):
    model = network(target, **arguments)
    small = compared(model, random_masks(model, unit, kept=0.3))
    if unit == "stripe":
        assert any(isinstance(module, StripeConv2d) for module in small.model.modules())
        assert count_parameters(small.model) < count_parameters(model)
    assert count_macs(small.model, model.input_shape) <= count_macs(model, model.input_shape)


@every_network
def test_masks_follow_the_cut(target, arguments):
    """Filters that lost everything are gone, with the inputs that read them; what is held at zero
    afterwards are the zeros of the cut network and nothing else."""
    model = network(target, **arguments)
    masks = random_masks(model, "weight", kept=0.6)
    for keep in masks.keep.values():
        keep[::2] = False
    small = compared(model, masks)
    assert any(small.removed.values())
    for name in masks.keep:
        weight = small.model.get_submodule(name).weight
        held = small.masks.of(name, weight) if name in small.masks.keep else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(held.expand_as(weight), weight != 0), name


@every_network
def test_columns_are_gone(target, arguments):
    model = network(target, **arguments)
    masks = random_masks(model, "group", kept=0.6)
    small = compared(model, masks)
    assert small.masks.keep == {}
    for name, keep in masks.keep.items():
        layer = small.model.get_submodule(name)
        assert isinstance(layer, GatheredConv2d) or keep.all()
        assert layer.weight[0].count_nonzero() == keep.sum()
    assert count_parameters(small.model) < count_parameters(model)


@settings(deadline=None, max_examples=15)
@given(
    chosen=st.sampled_from(["ResNet B", "LeNet-5", "kernels", "concat", "biased sum", "pointwise", "tiny ResNet"]),
    unit=st.sampled_from(list(UNIT_AXES)),
    kept=st.floats(0, 0.9), seed=st.integers(0, 1000), constant=st.sampled_from(["drop", "fold"]),
)  # fmt: skip
def test_cut_is_masked_whatever_is_chosen(chosen, unit, kept, seed, constant):
    target, arguments = NETWORKS[chosen]
    model = network(target, **arguments)
    compared(model, random_masks(model, unit, kept, seed), constant)


@pytest.mark.parametrize("chosen", sorted(set(NETWORKS) - {"VGG single", "VGG double", "ResNet A"}))
def test_the_cut_network_trains(chosen):
    target, arguments = NETWORKS[chosen]
    model = network(target, **arguments)
    for unit in ("filter", "stripe"):
        small = surgery.cut(model, random_masks(model, unit, kept=0.4)).model.train()
        before = [parameter.detach().clone() for parameter in small.parameters()]
        optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
        F.cross_entropy(small(images(model, 6)), torch.arange(6) % 4).backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, small.parameters()))
        assert all(parameter.isfinite().all() for parameter in small.parameters())


def test_widths_after_a_cut():
    model = network(f"{LENET}.LeNet5", channels=1, resolution=16)
    keep = {"conv1": torch.arange(20) < 7, "conv2": torch.arange(50) % 2 == 0, "fc1": torch.arange(500) >= 100}
    small = compared(model, Masks("filter", keep, 0.5))
    assert (small.model.conv1.out_channels, small.model.conv2.in_channels) == (7, 7)
    assert small.model.conv2.weight.shape == (25, 7, 5, 5)
    assert small.model.fc1.weight.shape == (400, 25)  # one pixel is left of a channel
    assert small.removed["conv2"] == list(range(1, 50, 2))
    assert small.masks.keep == {}


def test_flattened_maps_lose_all_pixels_of_a_channel():
    model = network(f"{LENET}.LeNet5", channels=1, resolution=28)
    small = compared(model, Masks("filter", {"conv2": torch.arange(50) != 4}, 0.02))
    kept = [n for n in range(800) if n // 16 != 4]
    assert torch.equal(small.model.fc1.weight, model.fc1.weight[:, kept])


def test_norms_keep_the_statistics_of_their_channels():
    model = network("tiny.TinyVGG")
    keep = torch.arange(12) % 3 == 0
    small = compared(model, Masks("filter", {"features.3": keep}, 0.6)).model.features[4]
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(small, name), getattr(model.features[4], name)[keep])


def test_a_filter_that_dies_alone_in_a_residual_sum_is_gone():
    """With its entries of its own norm, constant and all; the others return to their places."""
    model = network("tiny.TinyResNet")
    keep = torch.tensor([True, False] * 4)
    small = compared(model, Masks("filter", {"block1.conv2": keep}, 0.5))
    block, norm = small.model.block1, small.model.block1.bn2.layer
    assert small.masks.keep == {}
    assert torch.equal(block.conv2.weight, model.block1.conv2.weight[keep])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(model.block1.bn2, name)[keep])
    assert block.bn2.scatter.channels.tolist() == [0, 2, 4, 6]
    assert small.removed == {"block1.conv2": [1, 3, 5, 7], "block1.bn2": [1, 3, 5, 7]}
    with torch.no_grad():
        sums = block.bn2(block.conv2(torch.randn(2, 8, 8, 8)))
    assert sums.shape[1] == 8
    assert not sums[:, 1::2].any()
    saved = count_parameters(model) - count_parameters(small.model)
    assert saved == 4 * (8 * 9 + 2)


def test_a_neuron_on_maps_that_dies_alone_in_a_residual_sum_is_gone():
    """With its bias; and the layer is cut once more, where the other channels of the sum are mixed by a norm."""
    model = network("toys.OnMaps")
    keep = torch.tensor([True, False] * 3)
    small = compared(model, Masks("filter", {"narrow": keep}, 0.5))
    assert small.masks.keep == {}
    for name in ("weight", "bias"):
        assert torch.equal(getattr(small.model.narrow.layer, name), getattr(model.narrow, name)[keep])
    with torch.no_grad():
        sums = small.model.narrow(torch.randn(2, 5, 4, 12))
    assert sums.shape == (2, 5, 4, 6)
    assert not sums[..., 1::2].any()
    again = compared(small.model, Masks("filter", {"narrow.layer": torch.tensor([True, False, True])}, 0.3))
    assert len(again.model.get_submodule("narrow.layer.layer").weight) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_return_to_their_places(layout):
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    y = ScatterChannels(torch.tensor([4, 0, 2]), 6)(x)
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(y[:, [4, 0, 2]], x)
    assert not y[:, [1, 3, 5]].any()
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    maps = x.detach().movedim(1, -1)
    assert torch.equal(ScatterChannels(torch.tensor([4, 0, 2]), 6, axis=-1)(maps), y.movedim(1, -1))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@torch.no_grad()
def test_independent_filters_of_every_convolution_of_a_resnet(shortcut):
    """The naive index-free cut of such a network answers at random; masks of all convolutions at
    half rate go through sums, subsampling shortcuts and stems."""
    model = network(RESNET, depth=20, shortcut=shortcut)
    masks = random_masks(model, "filter", kept=0.5)
    small = compared(model, masks)
    for name, keep in masks.keep.items():
        assert small.model.get_submodule(name).out_channels == int(keep.sum()), name
    assert count_macs(small.model, model.input_shape) < 0.55 * count_macs(model, model.input_shape)


def test_a_network_with_scattered_channels_is_cut_again():
    """Whichever unit comes second, and also the same filters once more."""
    model = network(RESNET, depth=20, shortcut="A")
    for unit in ("filter", "stripe", "filter", "weight", "group"):
        masked = compared(model, random_masks(model, unit, kept=0.6))
        if unit == "filter":
            model = masked.model
    assert all(torch.equal(t, t.round()) for n, t in model.state_dict().items() if n.endswith(".channels"))


@pytest.mark.parametrize("target", ["tiny.TinyResNet", "toys.BiasedSum"])
@both_units
def test_a_channel_of_a_residual_sum_goes_when_all_its_writers_lose_it(target, unit):
    """With it go the biases and norm constants of all of them, in the masked network too."""
    model = network(target)
    writers = {"tiny.TinyResNet": ("stem.0", "block1.conv2"), "toys.BiasedSum": ("stem", "outer")}[target]
    masks = random_masks(model, unit, kept=1.0, only=writers)
    for n, writer in enumerate(writers):
        masks.keep[writer][[0, 3, n + 4]] = False  # 0 and 3 in both, another one in each
    small = compared(model, masks)
    for n, writer in enumerate(writers):
        alone = [n + 4] if unit == "filter" else []  # a dead filter's stripes are gone, its constants stay
        assert small.removed[writer] == [0, 3, *alone]
        layer = small.model.get_submodule(small.renamed.get(writer, writer))
        assert len(layer.weight) == len(masks.keep[writer]) - 2 - len(alone)


@both_units
def test_a_dead_layer_in_a_residual_sum(unit):
    """As stripes it still emits its bias; of filters, which take their bias along, one stays."""
    model = network("toys.BiasedSum")
    masks = random_masks(model, unit, kept=1.0, only=("outer",))
    masks.keep["outer"][:] = False
    small = compared(model, masks).model
    if unit == "filter":
        assert small.outer.layer.weight.shape == (1, 7, 3, 3)
        return
    assert torch.equal(small.outer.bias, model.outer.bias)
    assert not small.outer.weight.any()
    assert small.outer.weight.shape == (6, 7, 3, 3)


@both_units
def test_an_emptied_layer_keeps_one_channel(unit):
    """No selection does that, but a network without channels would crash far from the cause."""
    model = network("tiny.TinyVGG")
    masks = random_masks(model, unit, kept=1.0, only=("features.3",))
    masks.keep["features.3"][:] = False
    assert compared(model, masks).model.features[3].weight.shape[0] == 1


def test_nothing_to_remove():
    model = network("tiny.TinyVGG")
    for unit in ("filter", "stripe"):
        masks = random_masks(model, unit, kept=1.0)
        small = surgery.cut(model, masks)
        surgery.verify(surgery.mask(model, masks), small)
        assert small.removed == {}
        assert torch.equal(small.model(images(model)), model(images(model)))


def test_skeletons_are_merged_before_anything_is_removed():
    model = StripePruning().prepare(network("tiny.TinyResNet"))
    for module in model.modules():
        if isinstance(module, SkeletonConv2d):
            nn.init.normal_(module.skeleton)
    small = compared(model.eval(), random_masks(model, "stripe", kept=0.4))
    assert not any(isinstance(module, SkeletonConv2d) for module in small.model.modules())
    plain = surgery.plain(model)
    assert not any(isinstance(module, SkeletonConv2d) for module in plain.modules())
    assert torch.allclose(plain(images(model)), model(images(model)), atol=1e-5)


def test_any_precision():
    model = network("toys.Kernels").double()
    masks = random_masks(model, "stripe", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    with torch.no_grad():
        assert off_by(masked(images(model).double()), small.model(images(model).double())) < 1e-12


BREAKS = {
    "features.3": lambda features: features[3].weight.data.mul_(1.01),
    "features.4": lambda features: features[4].running_mean.add_(0.1),
    "features.6": lambda features: features[6].weight.data.copy_(features[6].weight.flip(1)),
    "features.7": lambda features: features[7].bias.data.copy_(features[7].bias.flip(0)),
}


@pytest.mark.parametrize("layer", BREAKS)
@both_units
def test_a_broken_cut_is_named(layer, unit):
    model = network("tiny.TinyVGG")
    masks = random_masks(model, unit, kept=0.5, only=("features.0", "features.3"))
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    if unit == "stripe" and layer == "features.3":
        small.model.features[3].stripes.data.mul_(1.01)
    else:
        BREAKS[layer](small.model.features)
    with pytest.raises(StageError, match=rf"masked one: {layer} is off by"):
        surgery.verify(masked, small)


def test_a_difference_that_later_layers_swallow_is_named():
    """Behind ten layers with random constants, the outputs agree to five digits for any image."""
    model = network(VGG, depth=11, width=0.25)
    masks = random_masks(model, "filter", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    small.model.features.conv2.weight.data.mul_(1.01)
    with pytest.raises(StageError, match=r"features\.conv2 is off by 1.0e-02"):
        surgery.verify(masked, small)


def test_a_wrong_width_is_named():
    model = network("tiny.TinyVGG")
    masks = random_masks(model, "filter", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    small.removed["features.3"].pop()
    with pytest.raises(StageError, match="features.3 has another shape"):
        surgery.verify(masked, small)


def test_a_broken_stripe_layer_is_named():
    model = network(RESNET, depth=20, shortcut="A")
    masks = random_masks(model, "stripe", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    stripes = small.model.layer2[1].conv2.stripes
    stripes.data.copy_(stripes.flip(0))
    with pytest.raises(StageError, match=r"layer2\.1\.conv2 is off by"):
        surgery.verify(masked, small)


def test_a_network_that_is_not_finite_is_no_match():
    model = network("tiny.TinyVGG")
    masks = random_masks(model, "filter", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    small.model.features[3].weight.data[0] = torch.nan
    with pytest.raises(StageError, match="features.3"):
        surgery.verify(masked, small)


def test_verify_leaves_both_networks_as_they_were():
    model = network(RESNET, depth=20, shortcut="B").train()
    masks = random_masks(model, "stripe", kept=0.5)
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    surgery.verify(masked, small)
    for net in (masked, small.model):
        assert all(module.training for module in net.modules())
        assert not any(module._forward_hooks for module in net.modules())


def test_linear_layers_on_maps_lose_their_channels():
    model = network("toys.OnMaps")
    small = compared(model, Masks("filter", {"wide": torch.arange(12) % 3 == 0, "next": torch.arange(5) < 3}, 0.5))
    assert (small.model.wide.out_features, small.model.narrow.in_features) == (4, 4)


def test_activations_in_place_do_not_change_what_is_compared():
    """Behind a norm that is put back at its places, it no longer works upon the norm's own output."""
    model = network("tiny.TinyResNet")
    model.stem[2] = nn.ReLU(inplace=True)
    keep = {"stem.0": torch.arange(8) < 4, "block1.conv2": torch.arange(8) >= 4}
    compared(model, Masks("filter", keep, 0.5))


def test_the_record_finds_a_layer_behind_which_channels_are_put_back():
    model = network("tiny.TinyResNet")
    keep = torch.arange(12) % 2 == 0
    masks = Masks("filter", {"block2.shortcut": keep}, 0.5)
    small = surgery.cut(model, masks)
    before, after = (
        {name: {"macs": macs, "parameters": 0, "stripes": 0} for name, macs in layer_macs(m, model.input_shape).items()}
        for m in (model, small.model)
    )
    assert "block2.shortcut" not in after
    found = _layers({"layers": before}, {"layers": after, "units": {}}, masks)
    (change,) = [change for change in found if change.name == "block2.shortcut"]
    assert change.macs[1] * 2 == change.macs[0] > 0
