"""The MAC formula agrees with PyTorch's own FLOP counter, and disturbs nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from prune_cli.metrics.macs import count_elementwise, count_macs, count_parameters, layer_macs
from prune_cli.models.lenet import LeNet5, LeNet300100
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG

DENSE = {
    "LeNet-300-100": (LeNet300100, {}),
    "LeNet-5": (LeNet5, {}),
    **{f"VGG-{d} {c}": (VGG, {"depth": d, "classifier": c}) for d in (11, 13, 16, 19) for c in ("single", "double")},
    **{f"ResNet-{d} {s}": (CifarResNet, {"depth": d, "shortcut": s}) for d in (20, 32, 44, 56, 110) for s in "AB"},
}


def flop_counter_macs(model: nn.Module, shape: tuple[int, ...]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model.eval()(torch.zeros(1, *shape))
    return flops.get_total_flops() / 2


@pytest.mark.parametrize(("network", "arguments"), DENSE.values(), ids=DENSE)
def test_agrees_with_the_flop_counter(network, arguments):
    shape = (1, 28, 28)  # reaches odd sizes, where rounding would show
    model = network(channels=1, resolution=28, classes=10, **arguments)
    assert count_macs(model, shape) == flop_counter_macs(model, shape)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=50)
@given(
    groups=st.integers(1, 3), fan_in=st.integers(1, 3), fan_out=st.integers(1, 3), kernel=pairs, stride=pairs,
    dilation=pairs, padding=pairs, bias=st.booleans(), side=st.tuples(st.integers(7, 12), st.integers(7, 12)),
)  # fmt: skip
def test_agrees_on_any_convolution(groups, fan_in, fan_out, kernel, stride, dilation, padding, bias, side):
    channels, width = groups * fan_in, groups * fan_out
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    model = nn.Sequential(
        nn.Conv2d(channels, width, kernel, groups=groups, bias=bias, **geometry),
        nn.ReLU(),
        nn.Conv2d(width, 4, 1),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    assert count_macs(model, (channels, *side)) == flop_counter_macs(model, (channels, *side))


class HalfConv(nn.Conv2d):
    """Claims to run every second multiplication, as a sparse layer would."""

    def macs(self, output):
        return output.numel() * self.weight[0].numel() // 2


class PlainSubclass(nn.Conv2d):
    pass


class Wrapped(nn.Module):
    """Its inner layer belongs to it and is not counted again."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)

    def macs(self, output):
        return 7


def test_a_layer_counts_itself():
    dense, half = nn.Conv2d(2, 4, 3), HalfConv(2, 4, 3)
    assert count_macs(nn.Sequential(half), (2, 8, 8)) * 2 == count_macs(nn.Sequential(dense), (2, 8, 8))
    assert count_macs(half, (2, 8, 8)) * 2 == count_macs(dense, (2, 8, 8))
    assert count_macs(nn.Sequential(Wrapped(), nn.Linear(4, 3)), (4,)) == 7 + 12


def test_a_subclass_counts_as_its_base():
    parametrized = parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
    for layer in (PlainSubclass(2, 4, 3), parametrized):
        assert count_macs(nn.Sequential(layer), (2, 8, 8)) == 6 * 6 * 4 * 2 * 9


def test_a_layer_called_twice_counts_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert count_macs(model, (4,)) == 2 * 16
    assert count_parameters(model) == 20


def test_a_layer_without_a_formula_is_counted_as_it_runs():
    assert count_macs(nn.Sequential(nn.ConvTranspose2d(2, 4, 3)), (2, 8, 8)) == 2 * 8 * 8 * 4 * 9
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    tokens = layer_macs(Tokens(attention), (6, 5, 1))
    # query, key, value and output; scores and their use
    assert tokens == {"inner": 4 * 5 * 6 * 6 + 2 * 5 * 5 * 6, "inner.out_proj": 0}


class Tokens(nn.Module):
    """Pixels as a sequence for one layer that returns a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        return (self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x))[0]


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_a_recurrent_layer_meets_its_weights_at_every_step(kind, gates):
    both = kind(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    first, second = 2 * gates * 4 * (6 + 4), 2 * gates * 4 * (8 + 4)
    assert count_macs(Tokens(both), (6, 5, 1)) == 5 * (first + second)


class ByHand(nn.Module):
    """A product in the network's own forward, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 7))

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2) @ self.mix


def test_products_outside_of_layers_belong_to_the_module_that_executes_them():
    assert layer_macs(ByHand(), (3, 2, 2)) == {"conv": 4 * 4 * 3, "": 4 * 4 * 7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype(dtype):
    model = LeNet5(channels=1, resolution=28, classes=10)
    assert count_macs(model.to(dtype), (1, 28, 28)) == 2_293_000


def test_the_model_is_left_as_it_was():
    model = CifarResNet(channels=1, resolution=8, classes=10, depth=20).train()
    model.layer1.eval()  # frozen statistics stay frozen
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, (1, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_forward_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError):
        count_macs(model, (5,))
    assert model.training
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(("depth", "flops"), [(19, 797.30), (16, 627.36)])
def test_the_flops_of_network_slimming_and_stripe_wise_pruning(depth, flops):
    """2 MACs + 2 BN + ReLU + pooling: what their scripts print for VGG-19 and VGG-16, in millions."""
    vgg = VGG(3, 32, 10, depth=depth).eval()
    extra = count_elementwise(vgg, (3, 32, 32))
    total = 2 * count_macs(vgg, (3, 32, 32)) + 2 * extra["batch_norm"] + extra["relu"] + extra["pool"]
    assert total / 1e6 == pytest.approx(flops, abs=0.011)
