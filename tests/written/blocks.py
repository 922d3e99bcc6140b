"""Blocks of well-known networks, written as their repositories write them."""

import torch
from torch import nn
from torch.nn import functional as F
from written.parts import Net, layer


class C2f(Net):
    """YOLOv8: a split, bottlenecks on one part, all parts side by side."""

    pruned = "stem.0 blocks.0.0.0 blocks.0.1.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = layer(8, 8, 1), layer(12, 8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(layer(4, 4), layer(4, 4)) for _ in range(1))

    def features(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class CSP(Net):
    """YOLOv5's C3: two branches, a residual bottleneck in one of them."""

    pruned = "stem.0 left.0 right.0 inner.0.0 inner.1.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.left, self.right, self.last = layer(8, 6, 1), layer(8, 4, 1), layer(10, 8, 1)
        self.inner = nn.Sequential(layer(6, 4), layer(4, 6))

    def features(self, x):
        left = self.left(x)
        return self.last(torch.cat((left + self.inner(left), self.right(x)), dim=1))


class FeaturePyramid(Net):
    """Lateral 1x1 convolutions and a top-down sum."""

    pruned = "stem.0 down1.0 down2.0 lateral1 lateral2 smooth"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes, width=6)
        self.down1, self.down2 = layer(8, 8, stride=2), layer(8, 10, stride=2)
        self.lateral1, self.lateral2, self.smooth = nn.Conv2d(8, 6, 1), nn.Conv2d(10, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def features(self, x):
        fine = self.down1(x)
        coarse = self.lateral2(self.down2(fine))
        return self.smooth(self.lateral1(fine) + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest"))


class RepVGG(Net):
    """Three branches that are summed: 3x3, 1x1 and the identity, each with a norm."""

    pruned = "stem.0 dense point last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.dense, self.point = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last = layer(8, 8)

    def features(self, x):
        return self.last(torch.relu(self.norm1(self.dense(x)) + self.norm2(self.point(x)) + self.norm3(x)))


class Ghost(Net):
    """Half of the maps from a cheap depthwise convolution of the other half, cut to the width that was asked for."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.primary, self.cheap, self.last = layer(8, 4, 1), layer(4, 4, groups=4), layer(7, 8)

    def features(self, x):
        first = self.primary(x)
        return self.last(torch.cat([first, self.cheap(first)], dim=1)[:, :7, :, :])


class GhostWhole(Ghost):
    """The same where nothing is cut off."""

    pruned = "stem.0 primary.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.last = layer(8, 8)

    def features(self, x):
        first = self.primary(x)
        return self.last(torch.cat([first, self.cheap(first)], dim=1))


class UNet(Net):
    """Transposed convolutions up, the maps of the way down beside them."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.down, self.up, self.last = layer(8, 12, stride=2), nn.ConvTranspose2d(12, 6, 2, stride=2), layer(14, 8)

    def features(self, x):
        return self.last(torch.cat([x, self.up(self.down(x))], dim=1))


class UNetBilinear(UNet):
    """The same with interpolation."""

    pruned = "stem.0 down.0 up.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.up = layer(12, 6)

    def features(self, x):
        coarse = F.interpolate(self.down(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(torch.cat([x, self.up(coarse)], dim=1))


class SubPixel(Net):
    """Channels become pixels."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.expand, self.last = nn.Conv2d(8, 16, 3, padding=1), layer(4, 8)

    def features(self, x):
        return self.last(F.pixel_shuffle(self.expand(x), 2))


class Focus(Net):
    """Pixels become channels, by slices."""

    pruned = "stem.0 after.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.after = layer(32, 8)

    def features(self, x):
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.after(torch.cat(parts, 1))


class Inception(Net):
    """Branches of several kernels and a pooling, side by side."""

    pruned = "stem.0 one.0 three.0.0 three.1.0 five.0 pool.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.one, self.three, self.five = layer(8, 4, 1), nn.Sequential(layer(8, 3, 1), layer(3, 5)), layer(8, 3, 5)
        self.pool, self.last = layer(8, 2, 1), layer(14, 8)

    def features(self, x):
        pooled = self.pool(F.avg_pool2d(x, 3, stride=1, padding=1))
        return self.last(torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1))


class Dense(Net):
    """Every layer reads all before it."""

    pruned = "stem.0 first.0 second.0 third.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.second, self.third = layer(8, 4), layer(12, 4), layer(16, 8)

    def features(self, x):
        maps = [x]
        for block in (self.first, self.second):
            maps.append(block(torch.cat(maps, dim=1)))
        return self.third(torch.cat(maps, dim=1))


class Res2Net(Net):
    """Parts of a split, each transformed with the one before added."""

    pruned = "stem.0 parts.1.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = layer(8, 9, 1), layer(9, 8, 1)
        self.parts = nn.ModuleList([layer(3, 3), layer(3, 3)])

    def features(self, x):
        first, *rest = torch.split(self.first(x), 3, 1)
        made = [first]
        for part, block in zip(rest, self.parts):
            made.append(block(part + made[-1]))
        return self.last(torch.cat(made, 1))


class ResNeXt(Net):
    """Grouped convolution between two 1x1, and a residual sum."""

    pruned = "stem.0 inner.0.0 inner.2.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.inner = nn.Sequential(layer(8, 12, 1), layer(12, 12, groups=3), layer(12, 8, 1))

    def features(self, x):
        return x + self.inner(x)


class InvertedResidual(Net):
    """MobileNetV2: expand, depthwise, project, add."""

    pruned = "stem.0 expand.0 project"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.expand, self.depthwise = layer(8, 16, 1), layer(16, 16, groups=16)
        self.project, self.norm = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def features(self, x):
        return x + self.norm(self.project(self.depthwise(self.expand(x))))


class ConvNeXt(Net):
    """Depthwise 7x7, a layer norm with the channels last, two linear layers, a scale per channel."""

    pruned = "wide"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8, eps=1e-6)
        self.wide, self.narrow, self.gamma = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(1e-6 * torch.ones(8))

    def features(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXtV2(ConvNeXt):
    """With a response norm over the channels."""

    pruned = ""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.beta, self.scale = nn.Parameter(torch.zeros(1, 1, 1, 16)), nn.Parameter(torch.zeros(1, 1, 1, 16))

    def features(self, x):
        y = F.gelu(self.wide(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        length = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = self.scale * (y * length / (length.mean(dim=-1, keepdim=True) + 1e-6)) + self.beta + y
        return x + self.narrow(y).permute(0, 3, 1, 2)


class PreActivation(Net):
    """Norm and ReLU before the convolutions, the sum untouched."""

    pruned = "stem.0 conv1 conv2"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 8, 3, padding=1, bias=False)

    def features(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ShortcutOfZeros(Net):
    """Option A written with functions."""

    pruned = "inner.0.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes, width=12)
        self.inner = nn.Sequential(layer(8, 6, stride=2), layer(6, 12))

    def features(self, x):
        return self.inner(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)


class SpatialPyramid(Net):
    """SPPF: poolings of poolings, side by side."""

    pruned = "stem.0 reduce.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.reduce, self.pool, self.last = layer(8, 4, 1), nn.MaxPool2d(5, stride=1, padding=2), layer(12, 8, 1)

    def features(self, x):
        x = self.reduce(x)
        y = self.pool(x)
        return self.last(torch.cat((x, y, self.pool(y)), 1))


class ChannelShuffle(Net):
    """Between two grouped convolutions channels change places."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = layer(8, 8, 1, groups=2), layer(8, 8, 1)

    def features(self, x):
        n, c, h, w = x.shape
        x = self.first(x)
        return self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w))


class Asymmetric(Net):
    """1x3 and 3x1, dilated, strided in one direction, padded by reflection, even kernels."""

    pruned = "stem.0 wide tall dilated strided even"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.wide, self.tall = nn.Conv2d(8, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 6, (3, 1), padding=(1, 0))
        self.dilated = nn.Conv2d(6, 7, 3, padding=2, dilation=2, padding_mode="reflect")
        self.strided, self.even = nn.Conv2d(7, 6, 3, stride=(1, 2)), nn.Conv2d(6, 8, 2)

    def features(self, x):
        x = F.relu(self.tall(F.relu(self.wide(x))))
        return F.relu(self.even(F.relu(self.strided(F.relu(self.dilated(x))))))


class Norms(Net):
    """Instance norm, group norm, layer norm over maps and local response norm: the last three mix channels."""

    pruned = "stem.0 conv1"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.conv1, self.instance = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8)
        self.conv2, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.conv3, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm([8, resolution, resolution])
        self.conv4, self.local = nn.Conv2d(8, 8, 3, padding=1), nn.LocalResponseNorm(3)

    def features(self, x):
        x = torch.relu(self.instance(self.conv1(x)))
        x = torch.relu(self.group(self.conv2(x)))
        return torch.relu(self.local(self.conv4(torch.relu(self.norm(self.conv3(x))))))
