"""Network slimming: a penalty that reaches every batch norm scale, and one threshold for all of them."""

import pytest
import torch
from tiny import randomise
from toys import network
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli import surgery
from prune_cli.errors import UserError
from prune_cli.hooks import Progress
from prune_cli.masks import random_like
from prune_cli.methods.slimming import NetworkSlimming

NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)
VGG, LENET = "prune_cli.models.vgg.VGG", "prune_cli.models.lenet"


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _NormBase)]


def test_the_penalty_is_the_sub_gradient_of_the_paper():
    """lam * sign(gamma), zero at zero, at every batch norm: those inside a residual sum too."""
    model = network("tiny.TinyResNet")
    for norm in _norms(model):
        norm.weight.data[:3] = torch.tensor([-0.5, 0.0, 0.5])
    NetworkSlimming(lam=0.25).penalty(model, NOW)["scale_l1"].backward()
    assert len(_norms(model)) == 5
    for norm in _norms(model):
        assert torch.equal(norm.weight.grad, 0.25 * norm.weight.detach().sign())
    scales = {id(norm.weight) for norm in _norms(model)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in scales)


@pytest.mark.parametrize(("published", "strength"), [(1e-4, 9.5), (1e-5, 2.7)])
def test_the_default_weight_of_the_paper_follows_from_its_schedule(published, strength):
    """160 epochs of 782 steps of 0.1, a tenth of it at 50 % and 75 %, momentum 0.9."""
    travel = 160 * 782 * (0.5 * 0.1 + 0.25 * 0.01 + 0.25 * 0.001) / (1 - 0.9)
    progress = Progress(0, 160, 0, 160 * 782, travel, weight_decay=1e-4)
    [term] = NetworkSlimming(strength=strength).penalty(network("tiny.TinyVGG"), progress).values()
    [given] = NetworkSlimming(lam=published).penalty(network("tiny.TinyVGG"), progress).values()
    assert (term / given).item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_one_threshold_for_the_network_and_not_one_filter_more(ratio):
    """The published code keeps what is above the ratio-th scale: one less than was asked for."""
    model = network(VGG, depth=11, width=0.25)
    masks = NetworkSlimming().prune(model, ratio)
    assert sum(int((~keep).sum()) for keep in masks.keep.values()) == round(ratio * masks.total)
    scales = {name: model.get_submodule(name.replace("conv", "bn")).weight.detach() for name in masks.keep}
    kept = torch.cat([scales[name][keep] for name, keep in masks.keep.items()])
    removed = torch.cat([scales[name][~keep] for name, keep in masks.keep.items()])
    assert removed.max() <= kept.min()


def test_sparse_training_starts_from_scratch():
    assert NetworkSlimming().start == "init"


def test_the_sign_of_a_scale_does_not_count():
    model = network("tiny.TinyVGG")
    masks = NetworkSlimming().prune(model, 0.5)
    for norm in _norms(model):
        norm.weight.data[::2] *= -1
    again = NetworkSlimming().prune(model, 0.5)
    assert all(torch.equal(keep, again.keep[name]) for name, keep in masks.keep.items())


def test_a_layer_that_would_collapse_keeps_one_filter_and_the_log_says_where():
    model = network("tiny.TinyVGG")
    model.features[4].weight.data.mul_(1e-3)
    masks = NetworkSlimming().prune(model, 0.6)
    assert int(masks.keep["features.3"].sum()) == 1
    assert int(masks.keep["features.3"].nonzero()) == int(model.features[4].weight.argmax())
    assert sum(int((~keep).sum()) for keep in masks.keep.values()) == round(0.6 * 32)
    assert any("features.3" in note for note in masks.notes)
    surgery.verify(surgery.mask(model, masks), surgery.cut(model, masks))


def test_the_shift_of_a_removed_channel_goes_too():
    """A scale of zero still emits its shift, which the next layer would see."""
    model = network("tiny.TinyVGG")
    model.features[1].weight.data[:4] = 0
    masks = NetworkSlimming().prune(model, 0.125)
    assert (~masks.keep["features.0"]).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert model.features[1].bias[:4].all()
    masked, small = surgery.mask(model, masks), surgery.cut(model, masks)
    assert not masked.features[1].bias[:4].any()
    assert torch.equal(small.model.features[1].bias, model.features[1].bias[4:])
    surgery.verify(masked, small)


def test_scales_that_did_not_separate_are_reported():
    model = network("tiny.TinyVGG")
    for norm in _norms(model):
        nn.init.uniform_(norm.weight, 0.9, 1.1)
    [note] = NetworkSlimming().prune(model, 0.5).notes
    assert "not separated" in note
    for norm in _norms(model):
        norm.weight.data[::2] = 1e-3
    assert NetworkSlimming().prune(model, 0.5).notes == ()


@pytest.mark.parametrize("model", [f"{LENET}.LeNet300100", f"{LENET}.LeNet5"])
def test_a_network_without_batch_norm_is_refused_before_any_training(model):
    with pytest.raises(UserError, match="^method: the model has nothing that it could prune; .*: no batch norm") as caught:
        NetworkSlimming().prepare(network(model, channels=1, resolution=28))
    assert "\n" not in str(caught.value)


def test_prunable_layers_without_a_scale_of_their_own_stay_whole():
    """A norm without weights, and one behind a concatenation, say nothing about one layer's filters;
    the channels of the second are selected for the layer that reads it."""
    model = randomise(network("tiny.TinyVGG"))
    model.features[4] = nn.BatchNorm2d(12, affine=False)
    assert set(NetworkSlimming().prune(model, 0.5).keep) == {"features.0", "features.6"}
    assert set(NetworkSlimming().prune(network("toys.Concat"), 0.5).keep) == {"bn"}


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_filters_of_residual_sums_by_option(shortcut):
    model = network("prune_cli.models.resnet.CifarResNet", depth=20, shortcut=shortcut)
    inner = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    assert set(NetworkSlimming().prune(model, 0.5).keep) == inner
    masks = NetworkSlimming(residual=True).prune(model, 0.5)
    assert inner | {"conv1", "layer1.0.conv2", "layer3.2.conv2"} < set(masks.keep)
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    for name, keep in masks.keep.items():
        assert small.model.get_submodule(name).out_channels == int(keep.sum())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.99])
def test_what_a_grouped_convolution_reads_goes_in_its_blocks(ratio):
    """So that the grouped convolution shrinks with it: blocks of three, those with the smallest mean scale."""
    model = network("toys.Cardinal")
    model.bn1.weight.data = torch.tensor([0.9, 0.9, 0.1, 0.2, 0.3, 0.2, -0.8, 0.8, 0.7, 0.1, 0.6, 0.1])
    assert set(NetworkSlimming().prune(model, ratio).keep) == {"project"}
    masks = NetworkSlimming(residual=True).prune(model, ratio)
    blocks = masks.keep["expand"].view(4, 3)
    assert torch.equal(blocks.all(1), blocks.any(1)) and blocks.any()
    gone = [block for block, kept in enumerate(blocks.any(1).tolist()) if not kept]
    assert gone and set(gone) == {1, 3, 0} - set([1, 3, 0][len(gone) :])
    assert abs(masks.obtained - ratio) * 20 <= 4  # what is left of a block stays, and one filter of each layer
    for chosen in (masks, random_like(masks, seed=1)):
        small = surgery.cut(model, chosen)
        surgery.verify(surgery.mask(model, chosen), small)
        assert small.model.spread.groups == small.model.spread.weight.shape[0] // 3 == 4 - len(gone)
        assert small.model.expand.out_channels == small.model.project.in_channels == 12 - 3 * len(gone)


def test_neurons_behind_a_norm_of_their_own_count_too():
    """The fully connected layers of a VGG: the paper's VGG-A for ImageNet loses most of its there."""
    masks = NetworkSlimming().prune(network(VGG, depth=11, width=0.25, classifier="double"), 0.5)
    assert "classifier.fc1" in masks.keep
    assert "classifier.fc2" not in masks.keep
