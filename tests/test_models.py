"""The networks have the sizes that the papers print, and run on every data set's shape."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from prune_cli.errors import UserError
from prune_cli.layers.shortcut import ShortcutA
from prune_cli.metrics.macs import count_macs, count_parameters
from prune_cli.models.densenet import DenseNet
from prune_cli.models.lenet import LeNet5, LeNet300100
from prune_cli.models.preresnet import PreResNet
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG
from prune_cli.models.wide_resnet import WideResNet
from prune_cli.settings import typed
from prune_cli.targets import resolve

CONFIGS = sorted(Path(__file__).parents[1].glob("conf/model/*.yaml"))
NAMED = [path for path in CONFIGS if path.stem not in ("torchvision", "custom")]  # one network each
SHAPES = {"digits": (1, 8, 10), "mnist": (1, 28, 10), "cifar100": (3, 32, 100)}

# (network, parameters, MACs in millions), measured on the authors' models at (3, 32, 32)
GOLDEN = {
    "slimming VGG-19": (VGG, {"depth": 19}, 10, 20_035_018, "398.14"),
    "slimming VGG-16": (VGG, {"depth": 16}, 10, 14_724_042, "313.20"),
    "PFEC VGG-16": (VGG, {"depth": 16, "classifier": "double"}, 10, 14_987_722, "313.46"),
    "neuron merging VGG-16": (VGG, {"depth": 16, "classifier": "double"}, 100, 15_033_892, "313.51"),
    "PFEC ResNet-56": (CifarResNet, {"depth": 56, "shortcut": "A"}, 10, 853_018, "125.49"),
    "PFEC ResNet-110": (CifarResNet, {"depth": 110, "shortcut": "A"}, 10, 1_727_962, "252.89"),
    "neuron merging ResNet-56": (CifarResNet, {"depth": 56, "shortcut": "B"}, 10, 855_770, "125.75"),
    "neuron merging WRN-40-4": (WideResNet, {"depth": 40, "width": 4}, 10, 8_949_210, "1298.58"),
    # The authors' networks hold an index per channel of every batch norm that a selection follows: in
    # PreResNet-164 those of the stream (8,080 of 1,711,338), in DenseNet-40 all of them (9,360 of 1,068,658).
    "slimming PreResNet-164": (PreResNet, {"depth": 164}, 10, 1_711_338 - 8_080, "247.65"),
    "slimming DenseNet-40": (DenseNet, {"depth": 40}, 10, 1_068_658 - 9_360, "282.92"),
    # its README prints 0.78M
    "model_compression densenet_small": (
        DenseNet, {"depth": 100, "bottleneck": True, "norm": "after"}, 100, 782_368, "287.96",
    ),
    # the paper prints 0.8M
    "DenseNet-BC": (DenseNet, {"depth": 100, "bottleneck": True}, 10, 769_162, "287.93"),
}


@pytest.mark.parametrize(("network", "arguments", "classes", "parameters", "macs"), GOLDEN.values(), ids=GOLDEN)
def test_published_sizes(network, arguments, classes, parameters, macs):
    model = network(channels=3, resolution=32, classes=classes, **arguments)
    assert count_parameters(model) == parameters
    assert f"{count_macs(model, (3, 32, 32)) / 1e6:.2f}" == macs


@pytest.mark.parametrize(
    ("depth", "macs"), [(20, "4.055e+07"), (32, "6.886e+07"), (56, "1.255e+08"), (110, "2.529e+08")]
)
def test_convolution_macs_of_he_et_al(depth, macs):
    """SFP and FPGM count convolutions only."""
    model = CifarResNet(channels=3, resolution=32, classes=10, depth=depth, shortcut="A")
    convolutions = count_macs(model, (3, 32, 32)) - model.fc.weight.numel()
    assert f"{convolutions:.3e}" == macs


@pytest.mark.parametrize(("network", "parameters"), [(LeNet300100, 266_610), (LeNet5, 431_080)])
def test_lenet_sizes_of_han_et_al(network, parameters):
    assert count_parameters(network(channels=1, resolution=28, classes=10)) == parameters


def build(config: Path, channels: int, resolution: int, classes: int):
    values = yaml.safe_load(config.read_text())
    assert values.pop("name") == config.stem
    target = resolve(values.pop("_target_"))
    shape = {"channels": channels, "resolution": resolution, "classes": classes}
    return target(**typed(target, {**shape, **values}, "model"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("config", NAMED, ids=lambda path: path.stem)
def test_runs_on_every_shape(config, shape):
    channels, resolution, classes = shape
    model = build(config, *shape).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, channels, resolution, resolution))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("resolution", [8, 28, 32, 64])
def test_vgg_pools_down_to_2x2_at_most(resolution):
    model = VGG(channels=1, resolution=resolution, classes=10, depth=11).eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 1, resolution, resolution))
    assert features.shape[2:] == {8: (2, 2), 28: (3, 3), 32: (2, 2), 64: (4, 4)}[resolution]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_explained(config):
    head, *keys = config.read_text().splitlines()
    assert head.startswith("# ")
    assert all("  # " in line for line in keys)


GRADIENTS = {
    "LeNet-300-100": (LeNet300100, {}),
    "LeNet-5": (LeNet5, {}),
    "VGG-11 single": (VGG, {"depth": 11, "classifier": "single"}),
    "VGG-11 double": (VGG, {"depth": 11, "classifier": "double"}),
    "ResNet-20 A": (CifarResNet, {"depth": 20, "shortcut": "A"}),
    "ResNet-20 B": (CifarResNet, {"depth": 20, "shortcut": "B"}),
    "PreResNet-20": (PreResNet, {"depth": 20}),
    "WRN-10-2": (WideResNet, {"depth": 10, "width": 2}),
    "DenseNet-10": (DenseNet, {"depth": 10}),
    "DenseNet-BC after": (DenseNet, {"depth": 10, "bottleneck": True, "norm": "after"}),
}


@pytest.mark.parametrize(("network", "arguments"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradient_reaches_every_parameter(network, arguments):
    torch.manual_seed(0)
    model = network(channels=1, resolution=8, classes=10, **arguments)
    F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    # a bias before BN is cancelled by it, so only the weights must feel something
    assert [name for name, p in model.named_parameters() if name.endswith("weight") and not p.grad.any()] == []


@pytest.mark.parametrize("side", [4, 5])
def test_shortcut_a_subsamples_and_adds_zero_channels(side):
    shortcut = ShortcutA(2, 5, stride=2)
    x = torch.randn(3, 2, side, side, requires_grad=True)
    out = shortcut(x)
    half = (side + 1) // 2
    assert out.shape == (3, 5, half, half)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()
    out.sum().backward()
    assert x.grad.sum() == 3 * 2 * half**2
    assert not list(shortcut.parameters())


def test_shortcut_a_by_hand():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert ShortcutA(1, 2, stride=2)(x).tolist() == [[[[0, 2], [6, 8]], [[0, 0], [0, 0]]]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: VGG(3, 32, 10, depth=12),
        lambda: VGG(3, 32, 10, depth=16, classifier="triple"),
        lambda: CifarResNet(3, 32, 10, depth=18),
        lambda: CifarResNet(3, 32, 10, depth=20, shortcut="C"),
        lambda: LeNet5(1, 3, 10),
        lambda: PreResNet(3, 32, 10, depth=18),
        lambda: WideResNet(3, 32, 10, depth=12, width=4),
        lambda: DenseNet(3, 32, 10, depth=40, norm="behind"),
        lambda: DenseNet(3, 32, 10, depth=41),
        lambda: DenseNet(3, 32, 10, depth=37, bottleneck=True),
        lambda: DenseNet(3, 3, 10, depth=40),
        lambda: ShortcutA(4, 2),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(wrong):
    with pytest.raises(UserError, match="="):
        wrong()


def test_a_vgg_of_another_width_keeps_its_shape():
    full, quarter = (VGG(3, 32, 10, depth=11, classifier="double", width=width) for width in (None, 0.25))
    wide, narrow = ([m.out_channels for m in v.modules() if isinstance(m, nn.Conv2d)] for v in (full, quarter))
    assert wide == [4 * channels for channels in narrow]
    assert quarter(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
