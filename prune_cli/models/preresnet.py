"""The pre-activation ResNets for CIFAR (He et al., "Identity Mappings in Deep Residual Networks",
ECCV 2016, section 5), with the details of network slimming (Liu et al., ICCV 2017)."""

from typing import Literal

from torch import Tensor, nn

from prune_cli.settings import Count, checked

Depth = Literal[11, 20, 29, 56, 110, 164]
EXPANSION = 4  # channels between blocks over channels inside


class PreResNet(nn.Module):
    """A 3x3 stem and three stages of (depth - 2) / 9 bottleneck blocks with 16, 32 and 64 channels
    inside and four times as many between them. BN scales start at 0.5, as network slimming has them.

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes); any resolution.
    Raises UserError: unknown depth.
    """

    def __init__(self, channels: Count, resolution: Count, classes: Count, depth: Depth):
        super().__init__()
        blocks = (checked(depth, Depth, "depth") - 2) // 9
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16 * EXPANSION, 32, 2, blocks)
        self.layer3 = _stage(32 * EXPANSION, 64, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * EXPANSION)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64 * EXPANSION, classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        return self.fc(self.flatten(self.pool(x)))


class PreActivationBottleneck(nn.Module):
    """BN and ReLU before each of three convolutions (1x1, 3x3, 1x1), added to the stream as it came
    in; where its shape changes, a 1x1 convolution without BN is the shortcut.

    Shapes: (N, in_channels, H, W) -> (N, 4 * width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = EXPANSION * width
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        y = self.conv3(self.relu3(self.bn3(y)))
        return y + self.shortcut(x)


def _stage(in_channels: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    first = PreActivationBottleneck(in_channels, width, stride)
    rest = [PreActivationBottleneck(EXPANSION * width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, 0.5)
