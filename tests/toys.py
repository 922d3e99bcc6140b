"""Small networks with one difficulty each, built as a user's own module is: (channels, resolution, classes)."""

import torch
from tiny import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.masks import UNIT_AXES, Masks
from prune_cli.models.spec import ModelSpec


class Kernels(nn.Module):
    """5x5, strided, 1x1 and unpadded convolutions, with and without bias; a norm without weights."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 7, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(7, affine=False)
        self.point = nn.Conv2d(7, 6, 1, bias=False)
        self.act = nn.PReLU(6)
        self.bare = nn.Conv2d(6, 5, (3, 2), padding="valid")
        self.same = nn.Conv2d(5, 9, 3, padding="same")
        self.fc = nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.point(torch.relu(self.norm(self.wide(x)))))
        return self.fc(torch.relu(self.same(torch.relu(self.bare(x)))).mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, one of them twice, under one batch norm."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(channels, 4, 3, padding=1)
        self.right = nn.Conv2d(channels, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(13)
        self.next = nn.Conv2d(13, 6, 3)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        x = torch.relu(self.bn(torch.cat([left, self.right(x), left], 1)))
        return self.fc(torch.relu(self.next(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A 1x1 convolution before one with groups; `groups=6` is depthwise."""

    def __init__(self, channels: int, resolution: int, classes: int, groups: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 6, 1)
        self.spread = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        self.bn = nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.spread(self.expand(x))))
        return self.fc(torch.relu(self.project(x)).mean((2, 3)))


class Cardinal(nn.Module):
    """The block of ResNeXt and RegNet: a 1x1 convolution, one with groups, another 1x1, a norm behind each."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.spread, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(12)
        self.project, self.bn3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.spread(torch.relu(self.bn1(self.expand(x))))))
        return self.fc(torch.relu(self.bn3(self.project(x))).mean((2, 3)))


class GroupNormed(nn.Module):
    """A norm whose statistics mix channels, so that none of them can go unnoticed."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.next = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.next(torch.relu(self.norm(self.conv(x))))).mean((2, 3)))


class BiasedSum(nn.Module):
    """A residual sum of convolutions with biases and no norm."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 7, 3, padding=1)
        self.outer = nn.Conv2d(7, 6, 3, padding=1)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


class Pointwise(nn.Module):
    """1x1 convolutions without bias, each with a norm of its own."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 6, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 12, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.relu(self.bn1(self.stem(x))), 3, stride=1, padding=1, count_include_pad=False)
        x = torch.relu(self.bn2(self.reduce(x)))
        return self.fc(F.relu6(self.bn3(self.expand(x))).mean((2, 3)))


class _Stages(nn.Module):
    """A stem, what a subclass makes of its six channels, a convolution that reads it, a classifier."""

    def __init__(self, channels: int, resolution: int, classes: int, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.next = nn.Conv2d(width, 5, 3)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.next(self.between(torch.relu(self.stem(x))))).mean((2, 3)))


class Shuffled(_Stages):
    """Channels change places between two reshapes, as in ShuffleNet."""

    def between(self, x: Tensor) -> Tensor:
        y = torch.relu(self.branch(x))
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Padded(_Stages):
    """Option A written with functions: half of the channels is cut off, then zeros are added."""

    def between(self, x: Tensor) -> Tensor:
        return F.pad(x[:, 3:], (0, 0, 0, 0, 0, 3)) + self.branch(x)


class Squeezed(_Stages):
    """Squeeze-and-excitation: a gate per channel."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))


class Attended(_Stages):
    """Spatial attention: the mean over channels scales all of them."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes)
        self.attention = nn.Conv2d(1, 1, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return y * torch.sigmoid(self.attention(y.mean(1, keepdim=True)))


class Sigmoids(_Stages):
    """An activation that makes a half of a removed channel."""

    def between(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.branch(x))


class AddedToInput(nn.Module):
    """A residual sum with the images themselves, behind a depthwise convolution that reads them."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.next = nn.Conv2d(channels, 5, 3)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.next(x + self.mix(self.depthwise(x)))).mean((2, 3)))


class Twice(_Stages):
    """A convolution and an activation that are called twice, the second time on their own output."""

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(torch.relu(self.branch(x))))


class OnMaps(nn.Module):
    """Linear layers on maps with the channels last, as in ConvNeXt, beside a norm that mixes channels."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.next = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1)))))
        return self.fc(torch.relu(self.next(x + y.permute(0, 3, 1, 2))).mean((2, 3)))


class Halves(_Stages):
    """A gated unit: one half of the channels scales the other."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes, width=3)

    def between(self, x: Tensor) -> Tensor:
        values, gates = self.branch(x).chunk(2, dim=1)
        return values * torch.sigmoid(gates)


class SplitAndAdded(_Stages):
    """One part of a split is added to the other, transformed, and concatenated with it, as in Res2Net."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes)
        self.part = nn.Conv2d(3, 3, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        first, second = torch.split(torch.relu(self.branch(x)), 3, dim=1)
        return torch.cat([first, torch.relu(self.part(first + second))], dim=1)


class SumOfConcatenation(_Stages):
    """A residual sum over a concatenation: one layer writes the channels of two others."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes, width=12)
        self.mix = nn.Conv2d(12, 12, 1)

    def between(self, x: Tensor) -> Tensor:
        both = torch.cat([x, torch.relu(self.branch(x))], dim=1)
        return torch.relu(both + self.mix(both))


class Stacked(_Stages):
    """A concatenation along the height: the channels stay what they are."""

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.branch(x))], dim=2)


class AlongTheWidth(_Stages):
    """A linear layer on maps that works on their last axis, which is as long as there are channels."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes, width=resolution)
        self.stem = nn.Conv2d(channels, resolution, 3, padding=1)
        self.rows = nn.Linear(resolution, resolution)
        self.branch = nn.Conv2d(resolution, resolution, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x + self.rows(x)))


class Functional(_Stages):
    """The weights of a layer that is never called itself."""

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.branch.weight, self.branch.bias, padding=1)


class Tempered(_Stages):
    """A scalar of its own making times the maps, then parts that are asked for by name."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes)
        self.temperature = nn.Parameter(torch.zeros(()))

    def between(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.temperature) * self.branch(x)
        return torch.cat(torch.split(tensor=x, split_size_or_sections=3, dim=1), dim=1)


class Unseen(_Stages):
    """A gate that is computed without a gradient, where autograd shows nothing."""

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.branch(x))
        return x * gate


class PixelsFirst(nn.Module):
    """Maps with the channels last that are flattened: a channel's pixels are not neighbours."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2)
        self.fc = nn.Linear(5 * ((resolution - 1) // 2) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.next(torch.relu(self.stem(x)))).permute(0, 2, 3, 1).flatten(1))


def network(target: str, channels: int = 3, resolution: int = 8, classes: int = 4, **arguments) -> nn.Module:
    """A network of tests or of prune_cli.models, every constant of it random, in evaluation mode."""
    torch.manual_seed(0)
    spec = ModelSpec("toy", target, arguments)
    return randomise(spec.build(channels, resolution, classes)).eval()


def random_masks(model: nn.Module, unit: str, kept: float, seed: int = 0, only: tuple[str, ...] = ()) -> Masks:
    """Of every convolution (or of `only` these layers) a random fraction is kept, at least one unit."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, module in model.named_modules():
        if name in only or (not only and isinstance(module, nn.Conv2d) and module.groups == 1):
            shape = [size for axis, size in enumerate(module.weight.shape) if axis in UNIT_AXES[unit]]
            keep[name] = torch.rand(shape, generator=generator) < kept
            keep[name].view(-1)[int(torch.randint(keep[name].numel(), (), generator=generator))] = True
    return Masks(unit, keep, 1 - kept)
