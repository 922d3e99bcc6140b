"""Wide ResNets for CIFAR (Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, section 2)."""

from typing import Literal

from torch import Tensor, nn

from prune_cli.settings import Count, checked

Depth = Literal[10, 16, 22, 28, 34, 40]


class WideResNet(nn.Module):
    """A 3x3 stem of 16 channels and three stages of (depth - 4) / 6 pre-activation blocks with 16, 32
    and 64 channels, each times `width`.

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes); any resolution.
    Raises UserError: unknown depth.
    """

    def __init__(self, channels: Count, resolution: Count, classes: Count, depth: Depth, width: Count):
        super().__init__()
        blocks = (checked(depth, Depth, "depth") - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * width, 1, blocks)
        self.layer2 = _stage(16 * width, 32 * width, 2, blocks)
        self.layer3 = _stage(32 * width, 64 * width, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64 * width, classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        return self.fc(self.flatten(self.pool(x)))


class WideBlock(nn.Module):
    """BN and ReLU before each of two 3x3 convolutions. Where the number of channels changes, a 1x1
    convolution is the shortcut, and reads what the first of them reads; elsewhere the stream itself.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
