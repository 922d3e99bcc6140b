"""Channels that are selected for the layers behind one batch norm, while the stream keeps them."""

import pytest
import torch
from toys import network
from torch import nn

from prune_cli import surgery
from prune_cli.checkpoint import load_model, save_model
from prune_cli.layers.select import SelectChannels
from prune_cli.masks import Masks
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.slimming import NetworkSlimming
from prune_cli.metrics.macs import count_macs
from prune_cli.models.spec import ModelSpec
from prune_cli.streams import stream_norms

PRERESNET, WIDE, DENSENET = (
    f"prune_cli.models.{name}" for name in ("preresnet.PreResNet", "wide_resnet.WideResNet", "densenet.DenseNet")
)
NETWORKS = {
    "PreResNet": (PRERESNET, {"depth": 11}),
    "WRN": (WIDE, {"depth": 10, "width": 2}),
    "DenseNet": (DENSENET, {"depth": 10}),
    "DenseNet-BC": (DENSENET, {"depth": 10, "bottleneck": True}),
    "DenseNet, norm after": (DENSENET, {"depth": 10, "bottleneck": True, "norm": "after"}),
}
every_network = pytest.mark.parametrize(("target", "arguments"), NETWORKS.values(), ids=NETWORKS)


def images(model: nn.Module, number: int = 4) -> torch.Tensor:
    return torch.randn(number, *model.input_shape, generator=torch.Generator().manual_seed(1))


def channels_of(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@every_network
def test_slimming_prunes_every_batch_norm_as_the_authors_do(target, arguments):
    """Twice over, the second time behind the selections of the first."""
    model = network(target, **arguments)
    for _ in range(2):
        masks = NetworkSlimming().prune(model, 0.4)
        assert masks.total == channels_of(model)
        small = surgery.cut(model, masks)
        surgery.verify(surgery.mask(model, masks), small)
        assert small.masks.keep == {}
        assert channels_of(small.model) == masks.total - round(0.4 * masks.total)
        assert count_macs(small.model, model.input_shape) < 0.8 * count_macs(model, model.input_shape)
        model = small.model


def test_a_selection_comes_back_from_a_file(tmp_path):
    target, arguments = NETWORKS["PreResNet"]
    model = network(target, **arguments)
    for _ in range(2):
        model = surgery.cut(model, NetworkSlimming().prune(model, 0.4)).model.eval()
        save_model(tmp_path / "model", model, ModelSpec("toy", target, arguments), classes=4)
        loaded = load_model(tmp_path / "model")
        assert repr(loaded) == repr(model)
        assert torch.equal(loaded(images(model)), model(images(model)))


def test_the_stream_the_stem_and_the_last_convolutions_stay_whole():
    """The bottleneck shrinks inside; what is written to the stream keeps its width."""
    target, arguments = NETWORKS["PreResNet"]
    model = network(target, **arguments)
    masks = NetworkSlimming().prune(model, 0.5)
    small = surgery.cut(model, masks).model
    for name in ("conv1", "layer1.0.conv3", "layer2.0.shortcut", "layer3.0.conv3"):
        assert small.get_submodule(name).out_channels == model.get_submodule(name).out_channels
    block = small.layer2[0]
    assert block.conv1.out_channels == block.bn2.num_features == block.conv2.in_channels < 32
    assert block.conv2.out_channels == block.bn3.num_features == block.conv3.in_channels < 32
    assert block.bn1.layer.num_features == block.conv1.in_channels == int(masks.keep["layer2.0.bn1"].sum())
    assert block.shortcut.in_channels == 64  # reads the stream beside the norm
    assert not list(block.bn1.select.parameters())  # a selection costs none
    assert small.bn.layer.num_features == small.fc.in_features


def test_one_reader_loses_a_channel_that_the_others_keep():
    model = network("tiny.TinyStream")
    keep = torch.arange(8) != 3
    masked, small = (f(model, Masks("filter", {"bn1": keep}, 0.1)) for f in (surgery.mask, surgery.cut))
    surgery.verify(masked, small)
    assert not masked.bn1.weight[3] and not masked.bn1.bias[3]
    assert small.removed == {"bn1": [3]} and small.renamed == {"bn1": "bn1.layer"}
    assert small.model.bn1.select.channels.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(small.model.conv1.weight, model.conv1.weight[:, keep])
    assert torch.equal(small.model.bn1.layer.running_var, model.bn1.running_var[keep])
    for name in ("stem", "bn3", "conv3", "bn4"):
        assert small.model.get_submodule(name).weight.shape == model.get_submodule(name).weight.shape


def test_behind_a_flatten_a_channel_is_several_inputs():
    model = network("tiny.TinyStream")
    small = surgery.cut(model, Masks("filter", {"bn4": torch.arange(13) % 2 == 0}, 0.5)).model
    assert small.head[2].in_features == 7 * 4


def test_a_filter_and_a_channel_of_the_norm_that_reads_it_go_together():
    """Once with its writer, once for its reader; and what is left of a norm's mask may be nothing."""
    model = network("toys.Concat")
    model.bn = nn.Sequential(nn.Identity(), model.bn)  # a norm as users wrap it
    masks = {"left": torch.tensor([True, True, False, False]), "bn.1": torch.arange(13) % 3 > 0}
    nothing_left = torch.isin(torch.arange(13), torch.tensor([0, 9]))  # both places of the filter that goes
    for extra in ({}, {"left": torch.arange(4) > 0, "bn.1": nothing_left}):
        chosen = Masks("filter", {**masks, **extra}, 0.5)
        small = surgery.cut(model, chosen)
        surgery.verify(surgery.mask(model, chosen), small)


def test_which_norms_sit_on_a_stream():
    assert stream_norms(network("tiny.TinyStream")) == ("bn1", "bn3", "bn4")
    assert stream_norms(network("tiny.TinyResNet")) == stream_norms(network("tiny.TinyVGG")) == ()
    assert stream_norms(network("toys.Concat")) == ("bn",)
    model = network("tiny.TinyStream")
    model.bn3 = nn.BatchNorm2d(8, affine=False)  # nothing says what its channels are worth
    assert stream_norms(model) == ("bn1", "bn4")


def test_asking_changes_nothing():
    model = network("tiny.TinyStream").train()
    before = dict(model.named_modules())
    stream_norms(model)
    assert all(module is before[name] and module.training for name, module in model.named_modules())


@every_network
def test_filter_pruning_removes_what_it_says(target, arguments):
    model = network(target, **arguments)
    masks = FilterPruning().prune(model, 0.5)
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert not any(isinstance(module, SelectChannels) for module in small.model.modules())
    for name, keep in masks.keep.items():
        assert small.model.get_submodule(name).out_channels == int(keep.sum())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_selection_keeps_the_layout_and_passes_gradients(layout):
    x = torch.randn(2, 5, 4, 3).to(memory_format=layout).requires_grad_()
    y = SelectChannels(torch.tensor([4, 0, 2]), 5)(x)
    assert torch.equal(y, x[:, [4, 0, 2]])
    assert y.is_contiguous(memory_format=layout)
    y.square().sum().backward()
    assert torch.equal(x.grad[:, [1, 3]], torch.zeros(2, 2, 4, 3)) and torch.equal(x.grad[:, 4], 2 * x[:, 4])
