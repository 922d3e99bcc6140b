"""Neuron merging: what a removed filter contributed lives on in the kept one it is a multiple of."""

import pytest
import torch
from programs import load_script
from tiny import TinyResNet, TinyVGG, randomise
from toys import network
from torch import nn

from prune_cli import surgery
from prune_cli.grouping import traced
from prune_cli.masks import Masks
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.neuron_merging import NeuronMerging


def _network(kind) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(kind(channels=1, resolution=8, classes=10)).eval()
    model.input_shape = (1, 8, 8)
    return model


# Of TinyVGG: the batch norm behind each convolution.
NORMS = {"features.0": "features.1", "features.3": "features.4", "features.6": "features.7"}


def _images() -> torch.Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _make_redundant(model: nn.Module) -> None:
    """Every second prunable filter becomes 0.3 times its neighbour, also behind its batch norm."""
    for name, filters in NeuronMerging().prunable(model).layers.items():
        layer, group = model.get_submodule(name), filters.group
        for tensor in filter(lambda t: t is not None, (layer.weight, layer.bias)):
            tensor[1::2] = 0.3 * tensor[0::2]
        for norm in map(model.get_submodule, group.norms):
            norm.bias.zero_()
            norm.running_mean.zero_()  # so that no constant B is left behind
            if layer.bias is not None:
                layer.bias.zero_()
            norm.running_var[1::2] = 0.09 * (norm.running_var[0::2] + norm.eps) - norm.eps
            norm.weight[1::2] = 0.7 * norm.weight[0::2]


@pytest.mark.parametrize("kind", [TinyVGG, TinyResNet])
@torch.no_grad()
def test_a_network_of_multiples_is_merged_without_loss(kind):
    model = _network(kind)
    _make_redundant(model)
    method = NeuronMerging(bn_scale="exact", threshold=0.5)
    masks = method.prune(model, 0.5)
    merged = surgery.cut(method.compensate(model, masks), masks).model
    pruned = surgery.cut(model, masks).model
    x = 300 * _images()  # loud enough to be heard behind four layers that were never trained
    expected = model(x)
    torch.testing.assert_close(merged.eval()(x), expected, rtol=1e-4, atol=1e-4)
    assert (pruned.eval()(x) - expected).abs().max() > 1e-3 * expected.abs().max()


STREAMS = {
    "PreResNet": ("prune_cli.models.preresnet.PreResNet", {"depth": 11}),
    "WRN": ("prune_cli.models.wide_resnet.WideResNet", {"depth": 10, "width": 2}),
    "DenseNet": ("prune_cli.models.densenet.DenseNet", {"depth": 10}),
    "DenseNet-BC, norm after": (
        "prune_cli.models.densenet.DenseNet", {"depth": 10, "bottleneck": True, "norm": "after"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("constant", ["drop", "fold"])
@pytest.mark.parametrize(("target", "arguments"), STREAMS.values(), ids=STREAMS)
@torch.no_grad()
def test_duplicates_merge_exactly_whatever_lies_before_the_reader(target, arguments, constant):
    """Every second filter is half of its neighbour and sounds the same behind every batch norm: the one
    inside a block (conv1 - bn2 - relu - conv2), those behind a concatenation, none at all before a shortcut."""
    model = network(target, **arguments)
    graph = traced(model)
    groups = {name: filters.group for name, filters in NeuronMerging().prunable(model).layers.items()}
    for name, group in groups.items():
        layer, places = model.get_submodule(name), graph.outputs(group, range(group.width))
        pairs = group.width // 2
        layer.weight[1::2] = 0.5 * layer.weight[0::2][:pairs]
        for norm in group.norms:
            module, even, odd = model.get_submodule(norm), places[norm][0::2][:pairs], places[norm][1::2]
            module.weight[odd], module.bias[odd] = module.weight[even], module.bias[even]
            module.running_mean[odd] = 0.5 * module.running_mean[even]
            module.running_var[odd] = 0.25 * (module.running_var[even] + module.eps) - module.eps
    if "wide" in target:
        assert set(groups) == {"conv1", *(f"layer{n}.0.conv1" for n in (1, 2, 3))}
    masks = Masks("filter", {name: torch.arange(group.width) % 2 == 0 for name, group in groups.items()}, 0.5)
    x = 10 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    merged = surgery.cut(NeuronMerging(bn_scale="exact", threshold=0.5).compensate(model, masks), masks, constant).model
    torch.testing.assert_close(merged(x), expected, **close)
    pruned = surgery.cut(model, masks).model
    assert (pruned(x) - expected).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def test_neurons_with_bias_are_merged_through_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    model.input_shape = (1, 8, 8)
    _make_redundant(model)
    method = NeuronMerging(threshold=0.45)
    masks = method.prune(model, 0.5)
    assert masks.keep["1"].sum() == 10 and masks.keep["3"].sum() == 5
    merged = surgery.cut(method.compensate(model, masks), masks).model
    torch.testing.assert_close(merged(_images()), model(_images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bn_scale", ["exact", "authors"])
@pytest.mark.parametrize("lam", [0.3, 0.85, 1.0])
@torch.no_grad()
def test_it_is_the_loop_over_neurons_of_the_paper(bn_scale, lam):
    model = _network(TinyVGG)
    method = NeuronMerging(bn_scale=bn_scale, lam=lam, threshold=0.05)
    masks = method.prune(model, 0.5)
    merged = method.compensate(model, masks)
    graph, changed = traced(model), False
    for group in graph.inner:
        if group.producers[0] not in masks.keep:
            continue
        (reader,) = graph.inputs(group, [0])
        expected = model.get_submodule(reader).weight.clone().double()
        for i, j, scale in _slow_merges(model, group, masks.keep[group.producers[0]], bn_scale, lam, 0.05):
            to, of = graph.inputs(group, [j])[reader], graph.inputs(group, [i])[reader]
            expected[:, to] += scale * model.get_submodule(reader).weight[:, of].double()
            expected[:, of] = 0
        found = merged.get_submodule(reader).weight
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
        changed |= not torch.equal(found, model.get_submodule(reader).weight)
    assert changed


def _slow_merges(model, group, keep, bn_scale, lam, threshold):
    layer, norm = model.get_submodule(group.producers[0]), model.get_submodule(group.norms[0])
    weight = layer.weight.flatten(1).double()
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.double()[:, None]], 1)
    sigma = norm.running_var.double() if bn_scale == "authors" else (norm.running_var.double() + norm.eps).sqrt()
    gamma, beta, mu = norm.weight.double(), norm.bias.double(), norm.running_mean.double()
    kept = keep.nonzero().flatten().tolist()
    for i in (~keep).nonzero().flatten().tolist():
        cosines, distances, scales = [], [], []
        for j in kept:
            s = weight[i].norm() / weight[j].norm()
            scale = s * gamma[i] / gamma[j] * sigma[j] / sigma[i]
            if bn_scale == "authors":
                scale = s * gamma[j] / gamma[i] * sigma[i] / sigma[j]
            constant = gamma[i] / sigma[i] * (s * (mu[j] - beta[j] * sigma[j] / gamma[j]) - mu[i]) + beta[i]
            cosines.append(float(weight[i] @ weight[j] / weight[i].norm() / weight[j].norm()))
            distances.append(float(constant.abs() / scale.abs()))
            scales.append(float(scale))
        low, high = min(distances), max(distances)
        costs = [lam * (1 - c) + (1 - lam) * (d - low) / (high - low) for c, d in zip(cosines, distances)]
        best = costs.index(min(costs))
        if cosines[best] >= threshold and scales[best] >= 0:
            yield i, kept[best], scales[best]


@torch.no_grad()
def test_without_merging_it_prunes_only():
    model = _network(TinyVGG)
    method = NeuronMerging(merge=False)
    masks = method.prune(model, 0.5)
    assert method.compensate(model, masks) is model
    plain = FilterPruning(criterion="l2").prune(model, 0.5)
    assert masks.keep.keys() == plain.keep.keys() and masks.obtained == plain.obtained


@torch.no_grad()
def test_only_similar_filters_merge_and_never_with_a_negative_scale():
    model = _network(TinyVGG)
    masks = NeuronMerging().prune(model, 0.5)
    unmerged = NeuronMerging(threshold=1.0).compensate(model, masks)
    assert all(torch.equal(a, b) for a, b in zip(unmerged.parameters(), model.parameters()))
    for name, keep in masks.keep.items():
        norm = model.get_submodule(NORMS[name])
        norm.weight.copy_(norm.weight.abs().where(keep, -norm.weight.abs()))
    for bn_scale in ("exact", "authors"):
        unmerged = NeuronMerging(threshold=0.0, bn_scale=bn_scale).compensate(model, masks)
        assert all(torch.equal(a, b) for a, b in zip(unmerged.parameters(), model.parameters()))


@pytest.mark.parametrize("bn_scale", ["exact", "authors"])
@torch.no_grad()
def test_scales_and_variances_of_zero_merge_nothing_and_harm_no_other_merge(bn_scale):
    model = _network(TinyVGG)
    method = NeuronMerging(threshold=0.0, bn_scale=bn_scale)
    masks = method.prune(model, 0.5)
    whole = method.compensate(model, masks)
    for name, keep in masks.keep.items():
        norm = model.get_submodule(NORMS[name])
        removed, kept = (~keep).nonzero().flatten(), keep.nonzero().flatten()
        norm.weight[removed[0]] = norm.weight[kept[0]] = 0
        norm.running_var[removed[1]] = norm.running_var[kept[1]] = 0
    merged = method.compensate(model, masks)
    assert all(p.isfinite().all() for p in merged.parameters())
    for layer in ("features.3", "features.6", "classifier.1"):
        before, after = model.get_submodule(layer).weight, merged.get_submodule(layer).weight
        assert not torch.equal(before, after) and not torch.equal(after, whole.get_submodule(layer).weight)


@torch.no_grad()
def test_one_kept_filter_and_equal_distances_divide_nothing_by_zero():
    model = _network(TinyVGG)
    method = NeuronMerging(threshold=0.0)
    masks = method.prune(model, 0.95)
    assert all(p.isfinite().all() for p in method.compensate(model, masks).parameters())


def test_the_loop_that_ours_is_timed_against_makes_the_same_network():
    benchmark = load_script("benchmark_merging")
    model = benchmark.network(width=0.125)
    masks = benchmark.METHOD.prune(model, 0.0)
    assert masks.obtained > 0.2
    benchmark.check(model, masks)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)])
def test_nothing_merges_behind_a_norm_that_has_no_statistics(norm):
    model = network("tiny.TinyResNet")
    model.stem[1] = norm
    method = NeuronMerging(threshold=-1.0)
    masks = method.prune(model, 0.5)
    merged = method.compensate(model, masks)
    assert torch.equal(merged.block1.conv1.weight, model.block1.conv1.weight)
    assert not torch.equal(merged.block1.conv2.weight, model.block1.conv2.weight)


def test_filters_of_a_residual_sum_go_together_and_merge_into_nothing():
    """A sum is no multiple of one of its filters: only what is written inside the blocks merges."""
    model = network("tiny.TinyResNet")
    method = NeuronMerging(coupled="joint", threshold=-1.0)
    masks = method.prune(model, 0.5)
    assert not masks.keep["block1.conv2"].all()
    merged = method.compensate(model, masks)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, merged.get_parameter(n))}
    assert changed == {"block1.conv2.weight", "block2.conv2.weight"}
