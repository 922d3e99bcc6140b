"""Which layers share channels, and what may be removed at all."""

import pytest
import torch
from torch import nn
from toys import network

from prune_cli.channels import ChannelGroup
from prune_cli.grouping import traced
from prune_cli.slicing import take_out

RESNET, VGG, LENET = "prune_cli.models.resnet.CifarResNet", "prune_cli.models.vgg.VGG", "prune_cli.models.lenet"


def remove(graph, group: ChannelGroup, channels: list[int]) -> None:
    outputs, inputs = graph.outputs(group, channels), graph.inputs(group, channels)
    for name in outputs.keys() | inputs.keys():
        take_out(graph.model.get_submodule(name), outputs.get(name, ()), inputs.get(name, ()))


def groups(model: nn.Module) -> dict[frozenset, bool]:
    """Producers -> removable."""
    return {frozenset(group.producers): group.removable for group in traced(model).groups}


def test_every_layer_of_a_vgg_has_its_own_channels():
    model = network(VGG, depth=11, width=0.25, classifier="double")
    found = {group.producers: group for group in traced(model).groups}
    convolutions = [f"features.conv{n}" for n in range(1, 9)]
    assert set(found) == {(name,) for name in [*convolutions, "classifier.fc1", "classifier.fc2"]}
    for n, name in enumerate(convolutions, 1):
        group = found[name,]
        assert (group.norms, group.removable) == ((f"features.bn{n}",), True)
        assert group.width == model.get_submodule(name).out_channels
    assert found["classifier.fc1",].norms == ("classifier.bn",)
    assert not found["classifier.fc2",].removable


def inner_of_resnet20() -> set[frozenset]:
    return {frozenset([f"layer{stage}.{block}.conv1"]) for stage in (1, 2, 3) for block in range(3)}


def sum_of_stage(stage: int, first: str) -> frozenset:
    return frozenset([first, *(f"layer{stage}.{block}.conv2" for block in range(3))])


def test_residual_sums_of_a_resnet_with_convolutions_as_shortcuts():
    sums = {sum_of_stage(1, "conv1")} | {sum_of_stage(n, f"layer{n}.0.shortcut.conv") for n in (2, 3)}
    found = groups(network(RESNET, depth=20, shortcut="B"))
    assert found == dict.fromkeys(inner_of_resnet20() | sums, True) | {frozenset(["fc"]): False}


def test_a_parameter_free_shortcut_is_a_boundary():
    """Padding with zero channels ties the widths of two stages, so no residual sum is removable."""
    found = groups(network(RESNET, depth=20, shortcut="A"))
    assert {producers for producers, removable in found.items() if removable} == inner_of_resnet20()
    coupled = [producers for producers, removable in found.items() if not removable]
    for stage in (1, 2, 3):
        assert not any({f"layer{stage}.0.conv2"} < p and {f"layer{stage % 3 + 1}.0.conv2"} < p for p in coupled)


def test_the_flattened_map_of_a_lenet():
    model = network(f"{LENET}.LeNet5", channels=1, resolution=28)
    assert groups(model) == {frozenset([n]): n != "fc2" for n in ("conv1", "conv2", "fc1", "fc2")}
    graph = traced(model)
    group = next(g for g in graph.groups if g.producers == ("conv2",))
    remove(graph, group, [3, 10])
    assert model.fc1.in_features == 48 * 16
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_linear_layers(channels):
    model = network(f"{LENET}.LeNet300100", channels=channels)
    assert groups(model) == {frozenset(["fc1"]): True, frozenset(["fc2"]): True, frozenset(["fc3"]): False}


def test_branches_of_a_concatenation_have_their_own_channels():
    graph = traced(network("toys.Concat"))
    found = {group.producers: group for group in graph.groups}
    assert {p: g.removable for p, g in found.items()} == {
        ("left",): True, ("right",): True, ("next",): True, ("fc",): False,
    }  # fmt: skip
    assert found["left",].norms == found["right",].norms == ("bn",)
    assert graph.outputs(found["left",], [1, 3]) == {"left": [1, 3], "bn": [1, 3, 10, 12]}
    assert graph.outputs(found["right",], [0]) == {"right": [0], "bn": [4]}


def test_a_depthwise_convolution_shares_the_channels_it_reads():
    model = network("toys.Grouped", groups=6)
    assert groups(model)[frozenset(["expand", "spread"])] is True
    graph = traced(model)
    assert {group.sources for group in graph.inner} == {("project",), ("expand",)}
    remove(graph, next(g for g in graph.groups if "spread" in g.producers), [0, 5])
    assert model.spread.weight.shape == (4, 1, 3, 3)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_a_grouped_convolution_loses_whole_groups_with_what_it_reads():
    model = network("toys.Grouped", groups=2)
    graph = traced(model)
    group = graph.of("expand")
    assert (set(group.producers), group.sources, group.block, group.removable) == ({"expand", "spread"}, ("expand",), 3, True)
    assert [inner.sources for inner in graph.inner] == [("project",)]
    remove(graph, group, [3, 4, 5])
    assert (model.spread.groups, model.spread.weight.shape, model.project.in_channels) == (1, (3, 3, 3, 3), 3)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_a_norm_that_mixes_channels_keeps_them():
    found = groups(network("toys.GroupNormed"))
    assert found == {frozenset([n]): n == "next" for n in ("conv", "next", "fc")}


def test_activations_with_parameters_write_no_channels():
    found = traced(network("toys.Kernels")).inner
    assert {group.producers for group in found} == {("wide",), ("point",), ("bare",), ("same",)}


@pytest.mark.parametrize(
    ("target", "blocked", "reason"),
    [
        ("toys.Shuffled", {"branch"}, "view moves or mixes channels"),
        ("toys.Padded", {"stem", "branch"}, "moves or mixes channels"),
        ("toys.Squeezed", set(), ""),
        ("toys.Attended", {"branch", "attention"}, "moves or mixes channels"),
        ("toys.Sigmoids", {"branch"}, "sigmoid makes something of a zero"),
        ("toys.AddedToInput", {"depthwise", "mix"}, "its channels are those of the network's input"),
        ("toys.Twice", set(), ""),
        ("toys.OnMaps", {"stem", "narrow"}, "mixes channels"),
        ("toys.Halves", {"branch"}, "chunk moves or mixes channels"),
        ("toys.SplitAndAdded", {"branch"}, "moves or mixes channels"),
        ("toys.SumOfConcatenation", {"stem", "branch", "mix"}, "a sum with a concatenation"),
        ("toys.AlongTheWidth", {"stem", "rows"}, "a linear layer works along another axis"),
        ("toys.Functional", set(), ""),
        ("toys.Unseen", {"stem"}, "without a gradient"),
        ("toys.PixelsFirst", {"next"}, "flatten moves or mixes channels"),
    ],
)
def test_what_cannot_be_removed_says_why(target, blocked, reason):
    graph = traced(network(target))
    found = {name: group.blocked for group in graph.groups for name in group.producers if group.blocked}
    assert found.pop("fc") == "its channels are the network's output"
    assert set(found) == blocked
    assert all(reason in found[name] for name in blocked)


def test_a_gate_goes_with_what_it_scales():
    graph = traced(network("toys.Squeezed"))
    group = graph.of("branch")
    assert (set(group.producers), group.sources) == ({"branch", "excite"}, ("branch",))
    assert graph.why_not_alone("excite") == "a gate: its channels go with those of branch"
    assert {g.sources for g in graph.inner} == {("stem",), ("branch",), ("squeeze",), ("next",)}


def test_a_layer_called_twice_shares_what_it_reads_and_writes():
    group = traced(network("toys.Twice")).of("stem")
    assert set(group.sources) == {"stem", "branch"}


def test_linear_layers_on_maps_are_known():
    graph = traced(network("toys.OnMaps"))
    assert graph.pointwise == {"wide", "narrow"}
    assert {group.sources for group in graph.inner} == {("wide",), ("next",)}


NETWORKS = [
    (VGG, {"depth": 11, "width": 0.25}), (RESNET, {"depth": 20, "shortcut": "A"}), (RESNET, {"depth": 20, "shortcut": "B"}),
    (f"{LENET}.LeNet5", {}), ("toys.Kernels", {}), ("toys.Concat", {}), ("toys.Grouped", {"groups": 6}),
    ("toys.BiasedSum", {}), ("tiny.TinyResNet", {}), ("tiny.TinyVGG", {}),
]  # fmt: skip


@pytest.mark.parametrize(("target", "arguments"), NETWORKS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_the_network_output_stays(target, arguments, frozen):
    """Also behind frozen weights, where no gradient would show the way."""
    model = network(target, **arguments)
    model.requires_grad_(not frozen)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    graph = traced(model)
    assert [group.removable for group in graph.groups if last in group.producers] == [False]
    written = [name for group in graph.groups for name in group.producers]
    assert len(written) == len(set(written))
    assert set(written) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize(("target", "arguments"), NETWORKS)
@pytest.mark.parametrize("grad", [False, True])
def test_looking_at_a_network_leaves_it_as_it_was(target, arguments, grad):
    model = network(target, **arguments).train()
    next(model.children()).eval()
    for n, parameter in enumerate(model.parameters()):
        parameter.requires_grad = n % 3 != 0
    modules, flags = dict(model.named_modules()), [m.training for m in model.modules()]
    learns = [p.requires_grad for p in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.set_grad_enabled(grad):
        graph = traced(model)
        graph.outputs(graph.inner[0], [0])
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_network_that_cannot_run_is_left_as_it_was():
    model = network(RESNET, depth=20, shortcut="A").train()
    shortcut, model.input_shape = model.layer2[0].shortcut, (5, 8, 8)
    with pytest.raises(RuntimeError):
        traced(model)
    assert model.layer2[0].shortcut is shortcut
    assert all(module.training for module in model.modules())
