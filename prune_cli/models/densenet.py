"""DenseNets for CIFAR (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 3)."""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from prune_cli.errors import UserError
from prune_cli.settings import Count, checked

Norm = Literal["before", "after"]


class DenseNet(nn.Module):
    """A 3x3 stem of 2 * growth channels and three dense blocks, in which every layer reads what all
    layers before it wrote and adds `growth` channels; between blocks a 1x1 convolution and pooling.

    depth       layers with weights: 3n + 4, with a bottleneck 6n + 4
    bottleneck  a 1x1 convolution to 4 * growth channels before each 3x3 one; the transitions then
                halve the channels (DenseNet-BC)
    norm        `before`: BN - ReLU - convolution, as in the paper and in network slimming (Liu et
                al., ICCV 2017; its BN scales start at 0.5); `after`: convolution - BN - ReLU, as in
                model_compression's densenet_small

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes).
    Raises UserError: a depth of another form, an unknown norm, a resolution below 4.
    """

    def __init__(
        self, channels: Count, resolution: Count, classes: Count, depth: Count, growth: Count = 12,
        bottleneck: bool = False, norm: Norm = "before",
    ):  # fmt: skip
        super().__init__()
        layers = 6 if bottleneck else 3
        if depth <= 4 or (depth - 4) % layers:
            example = 100 if bottleneck else 40
            raise UserError(f"depth={depth}: DenseNet has {layers}n + 4 layers, for example {example}")
        if resolution < 4:
            raise UserError(f"resolution={resolution}: DenseNet needs images of at least 4x4 pixels")
        first = checked(norm, Norm, "norm") == "before"
        width = 2 * growth
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False) if first else _unit(channels, width, 3, norm)
        for number in (1, 2, 3):
            blocks = [DenseLayer(width + n * growth, growth, bottleneck, norm) for n in range((depth - 4) // layers)]
            width += len(blocks) * growth
            self.add_module(f"block{number}", nn.Sequential(*blocks))
            if number < 3:
                out_channels = width // 2 if bottleneck else width
                transition = OrderedDict(unit=_unit(width, out_channels, 1, norm), pool=nn.AvgPool2d(2))
                self.add_module(f"transition{number}", nn.Sequential(transition))
                width = out_channels
        self.bn = nn.BatchNorm2d(width) if first else nn.Identity()
        self.relu = nn.ReLU() if first else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            _initialise(module, scale=0.5 if first else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.stem(x)))
        x = self.transition2(self.block2(x))
        x = self.relu(self.bn(self.block3(x)))
        return self.fc(self.flatten(self.pool(x)))


class DenseLayer(nn.Module):
    """(N, in_channels, H, W) -> (N, in_channels + growth, H, W): the input, and what is made of it."""

    def __init__(self, in_channels: int, growth: int, bottleneck: bool, norm: Norm):
        super().__init__()
        width = 4 * growth if bottleneck else in_channels
        self.bottleneck = _unit(in_channels, width, 1, norm) if bottleneck else nn.Identity()
        self.unit = _unit(width, growth, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.unit(self.bottleneck(x))], 1)


def _unit(in_channels: int, out_channels: int, kernel: int, norm: Norm) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    if norm == "before":
        return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=conv))
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


def _initialise(module: nn.Module, scale: float) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, scale)
