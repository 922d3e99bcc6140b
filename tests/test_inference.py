"""A network made for inference computes what it was made from."""

import copy

import pytest
import torch
from tiny import TinyResNet, TinyVGG, randomise
from torch import nn
from torch.nn import functional as F

import prune_cli
from prune_cli.inference import InferenceConv2d, for_inference
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG


def pruned(model: nn.Module, kept: float = 0.5) -> nn.Module:
    """Stripes of every convolution but the 1x1 ones removed at random."""
    torch.manual_seed(0)
    model = randomise(model).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            pattern = torch.rand(layer.out_channels, *layer.kernel_size) < kept
            model.set_submodule(name, StripeConv2d.from_conv(layer, pattern))
    return model


NETWORKS = {
    "tiny vgg": lambda: TinyVGG(3, 8, 10), "tiny resnet": lambda: TinyResNet(3, 8, 10),
    "vgg": lambda: VGG(3, 8, 10, depth=11, width=0.25), "resnet": lambda: CifarResNet(3, 8, 10, depth=20),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_computes_what_the_network_computes(network, kernel, monkeypatch):
    monkeypatch.setattr("prune_cli.kernels.plan.SCREENING", 0)
    monkeypatch.setattr("prune_cli.kernels.plan.FINAL", 0)
    model = pruned(NETWORKS[network]())
    before = copy.deepcopy(model.state_dict())
    fast = for_inference(model, kernel)
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms and any(isinstance(m, InferenceConv2d) for m in fast.modules())
    for images in (1, 3):
        x = torch.randn(images, 3, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_relu_is_fused_where_nothing_else_reads_the_convolution():
    fast = for_inference(pruned(CifarResNet(3, 8, 10, depth=20)), "torch")
    fused = {name for name, m in fast.named_modules() if isinstance(m, InferenceConv2d) and m.operation.relu}
    assert fused == {"conv1", *(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2))}
    assert not any(isinstance(m, nn.ReLU) for m in fast.modules())  # those behind sums work in place


class Functional(nn.Module):
    """ReLUs and sums as functions and methods; what is in place must not reach what is read again."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.scale = 2.0

    def forward(self, x):
        x = F.relu(self.conv1(x))
        y = torch.relu(self.conv2(x) + x)
        z = self.conv3(y)
        wide = (self.conv4(y) + z).relu()  # the sum is larger than its first term
        return x + y * self.scale, z + 1, wide, z.relu() + z


@pytest.mark.parametrize("stripes", [True, False])
def test_functions_and_sums_compute_what_they_did(stripes):
    model = pruned(Functional()) if stripes else randomise(Functional()).eval()
    fast, x = for_inference(model, "torch"), torch.rand(2, 3, 6, 6)
    kept = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    assert torch.equal(x, kept) and fast.scale == 2
    if stripes:
        assert fast.conv1.operation.relu and not any(getattr(fast, f"conv{k}").operation.relu for k in (2, 3, 4))


class Shared(nn.Module):
    """One batch norm after two convolutions, and a convolution whose output two layers read."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.conv2(x)
        return self.norm(self.conv1(x)) + self.norm(y) + self.relu(y) + y


class Untraceable(Shared):
    def forward(self, x):
        return self.norm(self.conv1(x)) if x.sum() > 0 else self.conv2(x)


@pytest.mark.parametrize("network", [Shared, Untraceable])
def test_what_cannot_be_folded_stays(network):
    model = pruned(network())
    fast = for_inference(model, "torch")
    assert isinstance(fast.norm, nn.BatchNorm2d)
    x = torch.rand(2, 3, 6, 6)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))


def test_it_is_copied_but_never_saved():
    fast = prune_cli.for_inference(pruned(TinyVGG(3, 8, 10)), "torch")
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))
    with pytest.raises(RuntimeError, match="not saved"):
        fast.state_dict()


def test_evaluation_without_it_builds_and_plans_nothing(monkeypatch):
    monkeypatch.setattr("prune_cli.kernels.plan.choose", None)
    with torch.inference_mode():
        assert pruned(TinyVGG(3, 8, 10))(torch.randn(2, 3, 8, 8)).shape == (2, 10)
