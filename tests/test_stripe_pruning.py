"""Stripe-wise pruning is the paper's, trap by trap (METHODS, section 1)."""

import math

import pytest
import torch
from torch import nn
from toys import network

from prune_cli import surgery
from prune_cli.errors import UserError
from prune_cli.hooks import Progress
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.methods.stripe import StripePruning

RESNET, LENET = "prune_cli.models.resnet.CifarResNet", "prune_cli.models.lenet"
NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)


def skeletons(model: nn.Module) -> dict[str, SkeletonConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SkeletonConv2d)}


def prepared(target: str = "tiny.TinyVGG", seed: int = 0, arguments=(), **settings):
    """A method and a network whose skeleton values differ."""
    method = StripePruning(**{"alpha": 0.1, **settings})
    model = method.prepare(network(target, **dict(arguments))).train()
    generator = torch.Generator().manual_seed(seed)
    for layer in skeletons(model).values():
        layer.skeleton.data.uniform_(0.1, 1, generator=generator)
    return method, model


def test_a_prepared_network_computes_the_same():
    for target in ("tiny.TinyVGG", "tiny.TinyResNet", "toys.Kernels", "toys.Concat"):
        model = network(target)
        x = torch.randn(2, *model.input_shape)
        assert torch.allclose(StripePruning().prepare(model)(x), model(x), atol=1e-5)


def test_every_kernel_larger_than_1x1_has_a_skeleton_of_ones():
    model = StripePruning().prepare(network(RESNET, depth=20, shortcut="B"))
    found = skeletons(model)
    assert set(found) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    for layer in found.values():
        assert layer.skeleton.shape == (layer.out_channels, 3, 3)
        assert (layer.skeleton == 1).all()
        assert layer.alive.all()


def test_the_skeleton_is_trained_and_decayed_like_the_weights():
    """Trap 1: weight decay on the skeleton is what shrinks it most. No group of its own."""
    model = StripePruning().prepare(network("tiny.TinyVGG"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    layer = model.features[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    model.zero_grad()
    sum(p.sum() * 0 for p in model.parameters()).backward()
    optimizer.step()
    assert torch.allclose(layer.skeleton, torch.full_like(layer.skeleton, 0.95))


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 0.3])
def test_the_penalty_is_the_subgradient_of_the_paper(alpha):
    method, model = prepared(alpha=alpha)
    layer = model.features[3]
    layer.skeleton.data[0] *= -1
    layer.skeleton.data[1] = 0
    terms = method.penalty(model, NOW)
    total = sum(float(layer.skeleton.detach().abs().sum()) for layer in skeletons(model).values())
    assert list(terms) == ["skeleton_l1"]
    assert float(terms["skeleton_l1"].detach()) == pytest.approx(alpha * total, rel=1e-5)
    terms["skeleton_l1"].backward()
    for layer in skeletons(model).values():
        assert torch.allclose(layer.skeleton.grad, alpha * layer.skeleton.sign())
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("skeleton"))


def test_a_dead_stripe_stays_dead_under_momentum():
    """A stripe that dies at full speed, and whose gradient goes on pulling, moves no more."""
    method, model = prepared("tiny.TinyResNet", alpha=0.0, threshold=0.05)
    layer = model.block1.conv1
    layer.skeleton.data[2, 1, 1] = 0.02
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = torch.full_like(layer.skeleton, 5.0)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, *model.input_shape)).square().sum().backward()
        if step == 2:
            optimizer.state[layer.skeleton]["momentum_buffer"] += buffer  # a kick that would revive it
        if step:
            optimizer.step()
        method.after_step(model, NOW)
        assert not layer.alive[2, 1, 1]
        assert layer.skeleton[2, 1, 1] == 0
    assert layer.skeleton[layer.alive].any()


def test_a_stripe_dies_at_the_threshold_in_every_layer():
    method, model = prepared(threshold=0.25)
    before = {name: layer.skeleton.detach().clone() for name, layer in skeletons(model).items()}
    before["features.0"][0, 0, 0] = model.features[0].skeleton.data[0, 0, 0] = 0.25
    before["features.0"][0, 0, 1] = model.features[0].skeleton.data[0, 0, 1] = -0.9
    method.after_step(model, NOW)
    for name, layer in skeletons(model).items():
        alive = before[name].abs() > 0.25
        assert torch.equal(layer.alive, alive)
        assert torch.equal(layer.skeleton, before[name] * alive)
    assert all(torch.equal(s, before[n].abs() * (before[n].abs() > 0.25)) for n, s in method.watch(model).items())


def test_no_layer_loses_its_last_stripe():
    method, model = prepared(threshold=5.0)
    best = {name: layer.skeleton.detach().argmax() for name, layer in skeletons(model).items()}
    for _ in range(3):
        method.after_step(model, NOW)
        for name, layer in skeletons(model).items():
            assert layer.alive.flatten().nonzero().tolist() == [[best[name]]]
            assert layer.skeleton.count_nonzero() == 1
    layer = model.features[0]
    layer.skeleton.data.zero_()  # even when the last one's value is nothing: the dead do not return
    method.after_step(model, NOW)
    assert layer.alive.flatten().nonzero().tolist() == [[best["features.0"]]]


def kill(layer: SkeletonConv2d, filters: list[int]) -> None:
    layer.skeleton.data[filters] = 0


def norm_is_dead(norm: nn.Module) -> list[int]:
    return ((norm.weight == 0) & (norm.bias == 0)).nonzero().flatten().tolist()


def test_in_a_vgg_every_norm_dies_with_its_filters():
    method, model = prepared()
    for n, layer in enumerate(skeletons(model).values()):
        kill(layer, [n, n + 3])
    model.features[3].bias.data.fill_(1)
    method.after_step(model, NOW)
    assert [norm_is_dead(model.features[n]) for n in (1, 4, 7)] == [[0, 3], [1, 4], [2, 5]]
    assert (model.features[3].bias == 0).nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_in_a_resnet_only_the_inner_norms_die(shortcut):
    """Traps 10 and 7: stem, second convolutions and shortcuts keep their constants."""
    method, model = prepared(RESNET, arguments={"depth": 20, "shortcut": shortcut}.items())
    for layer in skeletons(model).values():
        kill(layer, [1, 2])
    method.after_step(model, NOW)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert norm_is_dead(module) == ([1, 2] if name.endswith(".bn1") else []), name


def test_biases_die_with_their_filters_but_not_inside_a_residual_sum():
    """Otherwise a dead filter's constant would vanish at the cut only, without training to mend it."""
    method, model = prepared("toys.BiasedSum")
    for layer in skeletons(model).values():
        kill(layer, [0, 4])
    method.after_step(model, NOW)
    dead = {name: (layer.bias == 0).nonzero().flatten().tolist() for name, layer in skeletons(model).items()}
    assert dead == {"stem": [], "inner": [0, 4], "outer": []}


@pytest.mark.parametrize("target", ["toys.Concat", "toys.Kernels", "toys.Grouped"])
def test_unusual_norms_survive_training(target):
    """A norm over several branches, and one without weights."""
    arguments = {"groups": 6} if target == "toys.Grouped" else {}
    method, model = prepared(target, arguments=arguments.items())
    for layer in skeletons(model).values():
        kill(layer, [0])
    method.after_step(model, NOW)
    method.penalty(model, NOW)["skeleton_l1"].backward()
    masks = method.prune(model, 0.4)
    surgery.verify(surgery.mask(model, masks), surgery.cut(model, masks))


@pytest.mark.parametrize("strength", [0.9, 1.3, 2.7])
@pytest.mark.parametrize(
    ("decay", "momentum", "nesterov"), [(1e-3, 0.9, False), (0.0, 0.9, False), (5e-3, 0.0, False), (1e-3, 0.8, True)]
)
def test_the_derived_penalty_lets_an_unused_stripe_just_die(strength, decay, momentum, nesterov):
    """The closed form against a simulation of SGD: an unused stripe reaches zero after 1 / strength
    of the schedule's travel."""
    steps = 2000
    rates = [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    travel = sum(rates) / (1 - momentum)
    progress = Progress(0, 1, 0, steps, travel, decay)
    alpha = StripePruning(strength=strength).penalty_weight(progress)
    value = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([value], 0.1, momentum, weight_decay=decay, nesterov=nesterov and momentum > 0)
    died, travelled = None, 0.0
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        value.grad = alpha * value.detach().sign()
        optimizer.step()
        travelled += rate / (1 - momentum)
        if died is None and float(value.detach()) <= 0:
            died = travelled / travel
    if strength < 1:
        assert died is None
        assert 0 < float(value.detach()) < 0.5
    else:
        assert died == pytest.approx(1 / strength, rel=0.03)


def test_the_published_setting_in_our_terms():
    """VGG-16 and ResNet-56 of the paper: alpha 1e-5 over 160 epochs of 782 steps, divided by ten twice."""
    travel = 782 * (80 * 0.1 + 40 * 0.01 + 40 * 0.001) / (1 - 0.9)
    progress = Progress(0, 160, 0, 160 * 782, travel, 1e-4)
    assert StripePruning(strength=2.7).penalty_weight(progress) == pytest.approx(1e-5, rel=0.06)
    assert StripePruning(alpha=2e-5, strength=9.0).penalty_weight(progress) == 2e-5
    endless = Progress(0, 1, 0, 1, 1e9, 1e-4)
    assert StripePruning().penalty_weight(endless) == pytest.approx(0)


def test_training_the_skeleton_alone():
    """The paper's second experiment: the random network stays what it is."""
    method, model = prepared("tiny.TinyResNet", train="skeleton", threshold=0.0, alpha=0.01)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.skeleton" for n in skeletons(model)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, 0.9)
    loss = model(torch.randn(8, *model.input_shape)).square().mean()
    (loss + method.penalty(model, NOW)["skeleton_l1"]).backward()
    optimizer.step()
    method.after_step(model, NOW)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"{name}.skeleton" for name in skeletons(model)}
    masks = method.prune(model, 0.5)
    surgery.verify(surgery.mask(model, masks), surgery.cut(model, masks))


def test_a_ratio_removes_the_weakest_stripes_of_the_network():
    method, model = prepared(threshold=0.0)
    method.after_step(model, NOW)
    masks = method.prune(model, 0.5)
    total = sum(layer.skeleton.numel() for layer in skeletons(model).values())
    assert masks.unit == "stripe"
    assert sum(int((~keep).sum()) for keep in masks.keep.values()) == round(0.5 * total)
    kept = torch.cat([layer.skeleton[masks.keep[name]] for name, layer in skeletons(model).items()])
    gone = torch.cat([layer.skeleton[~masks.keep[name]] for name, layer in skeletons(model).items()])
    assert gone.max() <= kept.min()


def test_more_dead_stripes_than_asked_for():
    method, model = prepared(threshold=0.5)
    method.after_step(model, NOW)
    dead = sum(int((~layer.alive).sum()) for layer in skeletons(model).values())
    masks = method.prune(model, 0.1)
    assert sum(int((~keep).sum()) for keep in masks.keep.values()) == dead
    assert masks.requested == 0.1
    assert masks.obtained > 0.3
    assert masks.notes == ()


def test_a_threshold_removes_what_the_paper_removes():
    """Strictly above, whatever the ratio; also what moved below since the last step (trap 3)."""
    method, model = prepared(select="threshold", threshold=0.3)
    method.after_step(model, NOW)
    model.features[0].skeleton.data[0] = 0.3
    masks = method.prune(model, 0.99)
    for name, layer in skeletons(model).items():
        assert torch.equal(masks.keep[name], layer.skeleton.abs() > 0.3)


def test_a_ranking_of_noise_is_called_noise():
    """METHODS 1.3, item 13: values within a few percent of each other say nothing."""
    method, model = prepared(threshold=0.0)
    for layer in skeletons(model).values():
        layer.skeleton.data.uniform_(0.41, 0.43)
    [note] = method.prune(model, 0.5).notes
    assert "not separated" in note
    assert "0.4" in note
    for layer in skeletons(model).values():
        layer.skeleton.data[:, 1:] *= 0.01
    assert method.prune(model, 0.5).notes == ()
    assert method.prune(model, 0.0).notes == ()


class Unprunable(nn.Module):
    """Convolutions without stripes: 1x1, dilated, grouped, padded otherwise."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, groups=2),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 2, padding="same"),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's own, for even kernels
@pytest.mark.parametrize("target", ["test_stripe_pruning.Unprunable", f"{LENET}.LeNet300100"])
def test_a_network_without_stripes_is_refused(target):
    with pytest.raises(UserError, match="^method: the model has nothing that it could prune; "):
        StripePruning().prepare(network(target))
