"""`method.constant=fold`: what removed channels would go on emitting lives on in the layers that read them."""

import copy
from dataclasses import replace

import pytest
import torch
from fitting import same_state, workshop_of
from safetensors.torch import load_file
from test_surgery import compared, every_network, images, off_by
from tiny import randomise
from toys import network, random_masks
from torch import nn

from prune_cli import load, stages, surgery
from prune_cli.build import build
from prune_cli.commands.plan import plan_of
from prune_cli.errors import StageError, UserError
from prune_cli.masks import Masks
from prune_cli.methods.fp import FilterPruning
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run
from prune_cli.report.stages import sentences

LENET = "prune_cli.models.lenet"


def masks_of(model: nn.Module, *layers: str, gone: int = 3) -> Masks:
    """The first filters of these layers go."""
    return Masks("filter", {n: torch.arange(len(model.get_submodule(n).weight)) >= gone for n in layers}, 0.5)


@torch.no_grad()
def zeroed(model: nn.Module, masks: Masks) -> nn.Module:
    """The network with the weights of the masked units at zero, biases and norms as they were."""
    model = copy.deepcopy(model)
    for name in masks.keep:
        weight = model.get_submodule(name).weight
        weight.mul_(masks.of(name, weight))
    return model


@every_network
@pytest.mark.parametrize("unit", ["filter", "stripe"])
def test_the_cut_is_the_masked_network(target, arguments, unit):
    model = network(target, **arguments)
    masks = random_masks(model, unit, kept=0.3)
    assert compared(model, masks, "fold").removed == surgery.cut(model, masks).removed


EXACT = {
    "LeNet-300-100": (f"{LENET}.LeNet300100", {"channels": 1}, ("fc1", "fc2")),
    "LeNet-5": (f"{LENET}.LeNet5", {"channels": 1, "resolution": 16}, ("conv1", "conv2", "fc1")),
    "concatenated twice": ("toys.Concat", {}, ("left", "right", "next")),
    "flattened": ("tiny.TinyVGG", {}, ("features.6", "classifier.1")),
    "into the norm": ("toys.Pointwise", {}, ("stem", "reduce", "expand")),
    "on maps": ("toys.OnMaps", {}, ("wide", "next")),
}


@pytest.mark.parametrize(("target", "arguments", "layers"), EXACT.values(), ids=EXACT)
@torch.no_grad()
def test_nothing_but_the_weights_is_lost_where_all_readers_can_take_over(target, arguments, layers):
    model = network(target, **arguments)
    masks = masks_of(model, *layers)
    small = compared(model, masks, "fold")
    x = images(model)
    expected = zeroed(model, masks)(x)
    assert off_by(expected, small.model(x)) < 1e-5
    assert off_by(expected, surgery.cut(model, masks).model(x)) > 1e-2
    assert ", 0 lost it." in small.notes[0]


def test_what_the_layers_take_over_is_weight_times_constant():
    model = network(f"{LENET}.LeNet5", channels=1, resolution=16)
    small = compared(model, masks_of(model, "conv1", gone=1), "fold").model
    constant = model.conv1.bias[0].relu()
    assert constant > 0
    torch.testing.assert_close(small.conv2.bias, model.conv2.bias + model.conv2.weight[:, 0].sum((1, 2)) * constant)
    model = network("toys.Pointwise")
    small = compared(model, masks_of(model, "reduce", gone=1), "fold").model
    norm = model.bn2
    constant = (norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())[0].relu()
    assert constant > 0
    expected = model.bn3.running_mean - model.expand.weight[:, 0, 0, 0] * constant
    torch.testing.assert_close(small.bn3.running_mean, expected)
    assert small.expand.bias is None
    assert torch.equal(small.expand.weight, model.expand.weight[:, 1:])


def note_of(small: surgery.Cut) -> str:
    (note,) = small.notes
    return note.removeprefix("method.constant=fold: ")


@pytest.mark.parametrize(
    ("target", "arguments", "layer", "note"),
    [
        ("tiny.TinyVGG", {}, "features.0", "a layer that reads them pads its input"),
        ("toys.BiasedSum", {}, "inner", "a layer that reads them pads its input"),
        ("toys.Kernels", {}, "wide", "a layer that reads them has neither a bias nor a batch norm of its own"),
        ("toys.Grouped", {"groups": 6}, "expand", "a layer that reads them sees no constant"),  # behind the border
        ("toys.Squeezed", {}, "branch", "a gate scales them"),
        ("tiny.TinyResNet", {}, "block1.conv2", "their channel stays for other layers"),
        ("tiny.TinyStream", {}, "bn1", "their channel stays for other layers"),
    ],
)
@torch.no_grad()
def test_what_some_reader_cannot_take_over_is_dropped(target, arguments, layer, note):
    model = loud(network(target, **arguments))
    masks = masks_of(model, layer)
    small = compared(model, masks, "fold")
    assert torch.equal(surgery.mask(model, masks, "fold")(images(model)), surgery.mask(model, masks)(images(model)))
    found = f"of 3 removed channels 0 left their constant to the layers that read them, 0 had none, 3 lost it (3: {note})."
    assert note_of(small) == found


def loud(model: nn.Module) -> nn.Module:
    """All constants are above zero, so that no activation silences them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.abs_().neg_()
    return model


@torch.no_grad()
def test_a_padded_reader_beside_one_that_could_take_over_means_drop():
    """The sum of the stem and the first block: a shortcut of 1x1 reads it, and 3x3 convolutions do."""
    model = network("toys.BiasedSum")  # fc and inner read the sum
    small = compared(model, masks_of(model, "stem", "outer"), "fold")
    assert "(3: a layer that reads them pads its input)" in note_of(small)
    assert torch.equal(small.model.fc.bias, model.fc.bias)


@torch.no_grad()
def test_a_gate_that_is_open_for_all_measured_images_is_still_a_gate():
    model = network("toys.Squeezed")
    model.excite.bias.fill_(200.0)
    assert torch.sigmoid(model.excite(torch.rand(4, 3, 1, 1))).eq(1).all()
    small = compared(model, masks_of(model, "branch"), "fold")
    assert "(3: a gate scales them)" in note_of(small)


@torch.no_grad()
def test_channels_that_emit_nothing_are_said_to():
    model = network("tiny.TinyVGG")
    model.features[1].running_mean[:3], model.features[1].bias[:3] = 0, -0.1  # below zero, but for loud images
    small = compared(model, masks_of(model, "features.0"), "fold")
    assert "3 had none, 0 lost it." in note_of(small)


@torch.no_grad()
def test_a_norm_with_statistics_of_the_batch_takes_nothing_over():
    model = network("toys.Pointwise")
    model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    small = compared(model, masks_of(model, "stem"), "fold")
    assert "neither a bias nor a batch norm" in note_of(small)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(lambda m: m.bn3.running_mean.add_(0.1), "bn3"), (lambda m: m.expand.weight.mul_(1.01), "bn3"),
     (lambda m: m.reduce.weight.mul_(1.01), "reduce"), (lambda m: m.fc.bias.add_(0.1), "fc")],
)  # fmt: skip
@torch.no_grad()
def test_a_broken_folded_cut_is_named(spoil, named):
    model = network("toys.Pointwise")
    masked, small = surgery.masked_and_cut(model, masks_of(model, "reduce", "expand"), "fold")
    assert small.shifted == {"expand"}
    spoil(small.model)
    with pytest.raises(StageError, match=f"{named} is off by"):
        surgery.verify(masked, small)


def test_another_choice_than_the_masked_network_s_is_found_out():
    model = network("tiny.TinyVGG")
    masks = masks_of(model, "features.6")
    with pytest.raises(StageError, match=r"classifier\.1 is off by"):
        surgery.verify(surgery.mask(model, masks, "drop"), surgery.cut(model, masks, "fold"))


@torch.no_grad()
def test_channels_of_a_bottleneck_s_sum_go_into_all_that_read_it(compose):
    """1x1 convolutions without bias, each with its norm, and the classifier behind a pooling layer."""
    method = build(compose("method=fp", "method.coupled=joint", "method.constant=fold")).method
    spec = ModelSpec("resnet50", "prune_cli.models.zoo.classifier", {"architecture": "resnet50"})
    torch.manual_seed(0)
    model = loud(spec.build(3, 64, 10)).eval()
    masks = Masks("filter", {n: k for n, k in method.prune(model, 0.5).keep.items() if n.endswith(("conv3", "downsample.0"))}, 0.5)
    masked, small = surgery.masked_and_cut(model, masks, method.constant)
    surgery.verify(masked, small)
    assert "0 lost it." in note_of(small)
    assert off_by(zeroed(model, masks)(images(model)), small.model.eval()(images(model))) < 1e-4


# In a run


@pytest.fixture
def experiment(compose):
    def made(*overrides: str):
        quick = "debug=default", "dataset=digits", "runtime.latency_seconds=0", "method=fp", *overrides
        return replace(build(compose(*quick)), model=ModelSpec("TinyVGG", "tiny.TinyVGG"))

    return made


def test_a_run_folds_wherever_it_cuts_and_says_so(experiment, tmp_path):
    recipe = "recipe.finetune.start=rewind", "recipe.controls=[random]"
    plain = run(experiment(*recipe), tmp_path / "drop", command="test")
    one = experiment("method.constant=fold", *recipe)
    record = run(one, tmp_path / "fold", command="test")
    keys = [{s.stage: s.key for s in r.stages} for r in (plain, record)]
    assert {stage for stage in keys[0] if keys[0][stage] == keys[1][stage]} == {"dense"}

    (note,) = (note for note in record.notes if note.startswith("method.constant=fold: of 16 removed channels "))
    assert note in sentences(record)
    assert not any("constant" in note for note in plain.notes)
    dense = load(tmp_path / "fold/checkpoints/dense.safetensors")
    store = tmp_path / "store"
    for stage in ("pruned", "random"):
        masks = Masks.load(store / stage / keys[1][stage] / "masks.safetensors")
        expected = surgery.cut(dense, masks, "fold").model.state_dict()
        assert same_state(load_file(tmp_path / f"fold/checkpoints/{stage}.safetensors"), expected), stage
        assert not same_state(load_file(tmp_path / f"drop/checkpoints/{stage}.safetensors"), expected), stage
    assert all(s.cached for s in run(one, tmp_path / "again", command="test").stages)


def test_rewinding_and_rounds_fold_too(experiment):
    shop = workshop_of(experiment("method.constant=fold", "rounds=2"))
    network, cuts, expected = stages.train_dense(shop), [], shop.untrained()
    for number in (1, 2):
        cuts.append(stages.prune(shop, network, number))
        network = cuts[-1]
        masks = Masks.load(network.artifact.file("masks.safetensors"))
        expected = surgery.cut(expected, masks, "fold").model
        begun = stages._begin(shop, cuts, "rewind")
        assert same_state(begun.state_dict(), expected.state_dict())
        assert any("constant=fold" in note for note in network.artifact.result["notes"])


def test_a_plan_verifies_the_method_s_choice(compose, monkeypatch):
    seen = []
    cut = surgery.masked_and_cut
    monkeypatch.setattr(surgery, "masked_and_cut", lambda *a: seen.append(a[2]) or cut(*a))
    plans = [plan_of(build(compose("method=fp", "model=lenet5", f"method.constant={c}"))) for c in ("drop", "fold")]
    assert seen == ["drop", "fold"] and plans[0] == plans[1]


def test_there_is_no_third_choice(compose):
    with pytest.raises(UserError, match=r"^method\.constant=keep: .*allowed: drop, fold"):
        build(compose("method=fp", "method.constant=keep"))


@pytest.mark.parametrize("seed", [3, 21])
def test_a_block_of_a_grouped_convolution_leaves_its_constants_together_or_not_at_all(seed):
    """What one channel of a block loses changes what the others would go on emitting."""
    torch.manual_seed(seed)
    model = randomise(ModelSpec("resnext", "written.blocks.ResNeXt").build(3, 8, 4))
    method = FilterPruning(coupled="joint", constant="fold")
    masked, small = surgery.masked_and_cut(model, method.prune(randomise(model, 1), 0.5), "fold")
    surgery.verify(masked, small)
