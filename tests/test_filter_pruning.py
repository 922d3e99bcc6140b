"""Filter pruning is the papers', trap by trap, and gives networks of their sizes (METHODS, section 2)."""

import math

import pytest
import torch
from torch import nn
from toys import network

from prune_cli import surgery
from prune_cli.build import build
from prune_cli.compose import shipped_tables
from prune_cli.errors import UserError
from prune_cli.methods.fp import FilterPruning
from prune_cli.metrics.macs import count_macs, count_parameters
from prune_cli.published import override_line

RESNET, VGG, LENET = "prune_cli.models.resnet.CifarResNet", "prune_cli.models.vgg.VGG", "prune_cli.models.lenet"


def naive_score(weight: torch.Tensor, criterion: str) -> list[float]:
    filters = [f.flatten().tolist() for f in weight]
    if criterion == "l1":
        return [sum(abs(w) for w in f) for f in filters]
    if criterion == "l2":
        return [math.sqrt(sum(w * w for w in f)) for f in filters]
    return [sum(math.dist(f, g) for g in filters) for f in filters]


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median"])
def test_the_lowest_filters_of_every_layer_go(criterion):
    model = network("tiny.TinyVGG")
    masks = FilterPruning(criterion=criterion).prune(model, 0.4)
    assert set(masks.keep) == {"features.0", "features.3", "features.6"}
    for name, keep in masks.keep.items():
        score = naive_score(model.get_submodule(name).weight.detach(), criterion)
        kept = sorted(range(len(score)), key=lambda f: score[f])[-int(len(score) * (1 - 0.4)) :]
        assert keep.nonzero().flatten().tolist() == sorted(kept)


def test_duplicates_are_nearest_to_the_median():
    model = network("tiny.TinyVGG")
    weight = model.features[0].weight.data
    weight[:5] = weight[0] * 0.001 + torch.randn(5, *weight.shape[1:]) * 1e-6
    weight[5:] *= 10
    masks = FilterPruning(criterion="geometric_median").prune(model, 0.6)
    assert masks.keep["features.0"].tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_global_scope_ranks_relative_to_the_layer(criterion, scale):
    """However a layer is scaled, since the batch norm behind it undoes the scale."""
    model = network("tiny.TinyVGG")
    model.features[3].weight.data[:8] *= 0.01
    expected = FilterPruning(criterion=criterion, scope="global").prune(model, 0.5)
    model.features[3].weight.data *= scale
    masks = FilterPruning(criterion=criterion, scope="global").prune(model, 0.5)
    assert all(torch.equal(masks.keep[name], expected.keep[name]) for name in expected.keep)
    assert sum(int(keep.sum()) for keep in masks.keep.values()) == 16
    assert masks.keep["features.3"].sum() == 4


def test_layers_without_a_scale():
    """All zeros, and a single filter whose distance to the others is none."""
    model = network("tiny.TinyVGG")
    model.features[3].weight.data.zero_()
    for criterion in ("l1", "geometric_median"):
        masks = FilterPruning(criterion=criterion, scope="global").prune(model, 0.25)
        assert masks.keep["features.3"].sum() == 1
        assert "features.3" in masks.notes[0]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_residual_sums_are_left_alone(scope, shortcut):
    model = network(RESNET, depth=20, shortcut=shortcut)
    masks = FilterPruning(scope=scope).prune(model, 0.5)
    assert set(masks.keep) == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert small.masks.keep == {}


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_network_of_linear_layers_loses_hidden_neurons(criterion, scope):
    model = network(f"{LENET}.LeNet300100", channels=1)
    masks = FilterPruning(criterion=criterion, scope=scope).prune(model, 0.5)
    assert set(masks.keep) == {"fc1", "fc2"}
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert small.model.fc1.out_features + small.model.fc2.out_features == 200
    assert small.model.fc3.in_features == small.model.fc2.out_features
    assert small.model.fc3.out_features == 4


def test_ratios_by_layer():
    model = network("tiny.TinyVGG")
    masks = FilterPruning(ratios={"features.0": 0.25, "features.*": 0.5}).prune(model, 0.9)
    assert {name: int(keep.sum()) for name, keep in masks.keep.items()} == {
        "features.0": 6, "features.3": 6, "features.6": 6,
    }  # fmt: skip
    assert masks.requested == pytest.approx((0.25 * 8 + 0.5 * 24) / 32)
    assert masks.obtained == pytest.approx(14 / 32)
    masks = FilterPruning(ratios={"features.3": 0.5}).prune(model, 0.9)
    assert masks.keep["features.0"].all()
    assert masks.keep["features.6"].all()


@pytest.mark.parametrize("pattern", ["feature.0", "features.9", "classifier.1", "Features.*"])
def test_a_pattern_that_names_no_layer(pattern):
    with pytest.raises(UserError) as caught:
        FilterPruning(ratios={pattern: 0.5}).prune(network("tiny.TinyVGG"), 0.5)
    assert str(caught.value).startswith(f"method.ratios.{pattern}: no prunable layer has this name")
    assert "features." in str(caught.value)
    assert "\n" not in str(caught.value)


class OneLayer(nn.Module):
    """Nothing but the layer that writes the output."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(channels * resolution**2, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_a_network_without_filters_of_its_own_is_refused():
    with pytest.raises(UserError, match="^method: the model has nothing that it could prune; .*: its channels are the network's output$"):
        FilterPruning().prune(network("test_filter_pruning.OneLayer"), 0.5)


def per_stage(depth: int, shares: tuple[float, ...], skip: tuple[int, ...]) -> dict[str, float]:
    """PFEC's setting of a CIFAR ResNet. Layers count from the stem, 1; first convolutions are even."""
    blocks = (depth - 2) // 6
    ratios = {}
    for stage, share in enumerate(shares):
        for block in range(blocks):
            if 2 * (stage * blocks + block) + 2 not in skip:
                ratios[f"layer{stage + 1}.{block}.conv1"] = share
    return ratios


# METHODS 2.1 and 0.1: PFEC, Table 1, to the digit
PFEC = {
    "VGG-16-A": (
        VGG, {"depth": 16, "classifier": "double"},
        {"features.conv1": 0.5, "features.conv[89]": 0.5, "features.conv1[0-3]": 0.5}, 5_397_034, "206.28",
    ),
    "ResNet-56-A": (
        RESNET, {"depth": 56, "shortcut": "A"}, per_stage(56, (0.1, 0.1, 0.1), (16, 20, 38, 54)), 773_336, "112.44",
    ),
    "ResNet-56-B": (
        RESNET, {"depth": 56, "shortcut": "A"},
        per_stage(56, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)), 735_712, "90.91",
    ),
    "ResNet-110-A": (
        RESNET, {"depth": 110, "shortcut": "A"}, per_stage(110, (0.5, 0.0, 0.0), (36,)), 1_688_522, "212.78",
    ),
    "ResNet-110-B": (
        RESNET, {"depth": 110, "shortcut": "A"}, per_stage(110, (0.5, 0.4, 0.3), (36, 38, 74)), 1_168_424, "155.12",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("target", "arguments", "ratios", "parameters", "macs"), PFEC.values(), ids=PFEC)
def test_published_sizes_of_pfec(target, arguments, ratios, parameters, macs):
    model = network(target, resolution=32, classes=10, **arguments)
    small = surgery.cut(model, FilterPruning(ratios=ratios).prune(model, 0.5))
    assert count_parameters(small.model) == parameters
    assert f"{count_macs(small.model, (3, 32, 32)) / 1e6:.2f}" == macs
    assert small.masks.keep == {}


@pytest.fixture(scope="module")
def resnet34():
    return network("prune_cli.models.zoo.classifier", resolution=224, classes=1000, architecture="resnet34")


@pytest.mark.parametrize("row", ["resnet34_a", "resnet34_b", "resnet34_c"])
def test_rows_of_pfecs_resnet34_have_its_sizes(row, resnet34, compose):
    """As printed, to the 0.2 points by which our count differs: it has the projections of shortcuts too."""
    (table,) = (table for table in shipped_tables() if table.name == "pfec/resnet34_imagenet")
    settings = [override_line(*setting) for setting in table.rows[row].set.items()]
    method = build(compose("method=fp", "model=torchvision", "model.name=resnet34", *settings)).method
    small = surgery.cut(resnet34, method.prune(resnet34, 0.5)).model
    macs = 1 - count_macs(small, (3, 224, 224)) / count_macs(resnet34, (3, 224, 224))
    parameters = 1 - count_parameters(small) / count_parameters(resnet34)
    assert 100 * macs == pytest.approx(table.rows[row].paper.macs_removed, abs=0.2)
    assert 100 * parameters == pytest.approx(table.rows[row].paper.parameters_removed, abs=0.2)


def test_fine_tuning_of_the_paper_has_no_decay(compose):
    """PFEC, section 4: 40 epochs at the last learning rate of the training, constant."""
    finetune = build(compose("method=fp", "recipe=paper")).recipe.finetune
    assert (finetune.schedule, finetune.lr, finetune.epochs) == ("constant", 1e-3, 40)
