"""The ResNets for CIFAR (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
section 4.2)."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from prune_cli.layers.shortcut import ShortcutA
from prune_cli.settings import Count, checked

Depth = Literal[20, 32, 44, 56, 110]
Shortcut = Literal["A", "B"]


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels.

    shortcut   where the width changes: `A` subsamples and adds zero channels (the paper's CIFAR
               experiments, PFEC, SFP, FPGM); `B` is a 1x1 convolution with BN (stripe-wise
               pruning, neuron merging). Elsewhere it is the identity

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes); any resolution.
    Raises UserError: unknown depth or shortcut.
    """

    def __init__(self, channels: Count, resolution: Count, classes: Count, depth: Depth, shortcut: Shortcut = "B"):
        super().__init__()
        blocks = (checked(depth, Depth, "depth") - 2) // 6
        checked(shortcut, Shortcut, "shortcut")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, blocks, shortcut)
        self.layer2 = _stage(16, 32, 2, blocks, shortcut)
        self.layer3 = _stage(32, 64, 2, blocks, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return self.relu2(residual + self.shortcut(x))


def _shortcut(in_channels: int, out_channels: int, stride: int, option: Shortcut) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return ShortcutA(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = [BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    """He et al., "Delving Deep into Rectifiers", ICCV 2015; BN and the classifier as PyTorch has them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
