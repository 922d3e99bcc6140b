"""Group-wise pruning: the same column in all filters of a layer, gone from the product."""

import copy

import pytest
import torch
from toys import network, random_masks
from torch import nn
from torch.nn import functional as F

from prune_cli import surgery
from prune_cli.errors import UserError
from prune_cli.hooks import Progress
from prune_cli.layers.gathered import GatheredConv2d
from prune_cli.methods.group import GroupPruning
from prune_cli.metrics.macs import count_macs, count_parameters

NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)
SHAPES = [
    (5, 3, 1, 1, (9, 7)), (4, 3, 2, 1, (9, 8)), (6, 1, 1, 0, (5, 5)), (3, 5, 1, 2, (6, 7)), (3, 5, 2, 2, (7, 7)),
    (2, (3, 2), 1, "valid", (6, 6)), (4, 3, 1, "same", (5, 6)), (3, 2, 2, 0, (8, 9)), (1, 3, 3, 1, (10, 10)),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "kernel", "stride", "padding", "size"), SHAPES)
@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_dense_convolution_with_masked_weights(inputs, kernel, stride, padding, size, kept, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, 7, kernel, stride, padding, bias=bias)
    pattern = torch.rand(conv.weight.shape[1:]) < kept
    pattern.view(-1)[-1] = True
    layer = GatheredConv2d.from_conv(conv, pattern).eval()
    weight = (conv.weight * pattern).detach()
    assert torch.equal(layer.weight, weight)
    x = torch.randn(2, inputs, *size)
    expected = F.conv2d(x, weight, conv.bias, stride, padding).detach()
    with torch.inference_mode():
        for images in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(layer(images), expected, rtol=1e-5, atol=1e-5)
        assert layer.macs(expected[:1]) == 7 * int(pattern.sum()) * expected[0, 0].numel()
    torch.testing.assert_close(layer.train()(x).detach(), expected, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    layer.eval()(x).square().sum().backward()
    assert layer.columns.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


@torch.inference_mode()
def test_another_pattern_of_a_loaded_state_is_the_one_that_counts():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 3, 3), torch.randn(1, 4, 6, 6)
    order = torch.randperm(36).view(4, 3, 3)
    first, second = (GatheredConv2d.from_conv(conv, pattern).eval() for pattern in (order < 18, order >= 18))
    first(x)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x), second(x))
    torch.testing.assert_close(copy.deepcopy(first)(x), second(x))


def test_the_group_lasso_and_its_gradient():
    """A unit vector per group, whatever its size; zero at a group of zeros, where 0 / 0 would be no number."""
    model = network("tiny.TinyResNet")
    conv = model.block1.conv1
    conv.weight.data[:, 2, 1, 1] = 0
    GroupPruning(lam=0.5).penalty(model, NOW)["group_lasso"].backward()
    norms = conv.weight.detach().square().sum(0).sqrt()
    expected = torch.where(norms > 0, 0.5 * conv.weight.detach() / norms, 0)
    torch.testing.assert_close(conv.weight.grad, expected)
    assert model.stem[1].weight.grad is None


def test_a_global_ranking_does_not_see_how_many_filters_a_layer_has():
    model = network("tiny.TinyVGG")
    for name in ("features.0", "features.3", "features.6"):
        nn.init.normal_(model.get_submodule(name).weight)
    few, many = model.features[0].weight, model.features[3].weight  # 8 and 12 filters of like weights
    watched = GroupPruning().watch(model)
    assert watched["features.0"].shape == few.shape[1:]
    assert float(watched["features.0"].mean() / watched["features.3"].mean()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(watched["features.3"], many.detach().square().mean(0).sqrt())


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_same_columns_go_in_all_filters_and_no_channel_does(scope):
    """A dead input column is the layer's own affair: who writes the channel has other readers."""
    model = network("tiny.TinyResNet")
    masks = GroupPruning(scope=scope).prune(model, 0.5)
    masks.keep["block1.conv1"][3] = False  # a whole input channel, which the shortcut still needs
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert small.removed == {}
    for name, keep in masks.keep.items():
        layer = small.model.get_submodule(name)
        assert keep.all() or layer.columns.shape == (layer.out_channels, int(keep.sum()))
    kept = 1 - masks.obtained
    saved = count_macs(small.model, model.input_shape) / count_macs(model, model.input_shape)
    assert saved == pytest.approx(kept, abs=0.2) and saved < 1
    assert count_parameters(small.model) < count_parameters(model)


def test_the_cut_network_trains_what_is_left_and_nothing_else():
    model = network("tiny.TinyVGG")
    masks = random_masks(model, "group", kept=0.5)
    small = surgery.cut(model, masks)
    assert small.masks.keep == {}
    net, optimizer = small.model.train(), torch.optim.SGD(small.model.parameters(), 0.1, 0.9, weight_decay=1e-2)
    before = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("columns")}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(6, 3, 8, 8)), torch.arange(6) % 4).backward()
        optimizer.step()
    assert len(before) == 3
    for name, keep in masks.keep.items():
        layer = net.get_submodule(name)
        assert not torch.equal(layer.columns, before[f"{name}.columns"])
        assert not layer.weight[:, ~keep].any()


def test_a_network_without_such_convolutions_is_refused_before_any_training():
    with pytest.raises(UserError, match="fc1 and 2 more: fully connected$"):
        GroupPruning().prepare(network("prune_cli.models.lenet.LeNet300100", channels=1))
