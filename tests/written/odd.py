"""Modules that are not what they seem: shared, hooked, parametrized, with a forward or tensors of their own."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from written.parts import Net, layer


class _Two(Net):
    """Two more convolutions, `first` with 12 filters."""

    pruned = "stem.0 first last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = nn.Conv2d(8, 12, 3, padding=1), layer(12, 8)

    def features(self, x):
        return self.last(torch.relu(self.first(x)))


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation: over all inputs, so that none of them can go."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, self.stride, self.padding)


class WeightStandardised(_Two):
    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last[0] = StandardisedConv2d(8, 12, 3, padding=1), StandardisedConv2d(12, 8, 3, padding=1)


class SamePaddedConv2d(nn.Conv2d):
    """TensorFlow's padding, computed from the input."""

    def forward(self, x):
        along = [max((-(-s // t) - 1) * t + k - s, 0) for s, k, t in zip(x.shape[-2:], self.kernel_size, self.stride)]
        x = F.pad(x, (along[1] // 2, along[1] - along[1] // 2, along[0] // 2, along[0] - along[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class SamePadded(_Two):
    """As in ports of EfficientNet: channels go, parts of filters do not."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first = SamePaddedConv2d(8, 12, 3, stride=2)


class ActivatedNorm(nn.BatchNorm2d):
    """Batch norm and activation in one module."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


class InPlaceNorm(_Two):
    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.norm = ActivatedNorm(12)

    def features(self, x):
        return self.last(self.norm(self.first(x)))


class FrozenNorm(nn.Module):
    """A batch norm whose four tensors are buffers."""

    def __init__(self, width):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class Frozen(_Two):
    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.norm = FrozenNorm(12)

    def features(self, x):
        return self.last(self.norm(self.first(x)).relu())


class WeightNormed(_Two):
    """The weight is computed from two parameters: it stays whole, and so does what it reads."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first = parametrizations.weight_norm(self.first)


class SpectralNormed(_Two):
    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first = parametrizations.spectral_norm(self.first)


class Hooked(_Two):
    """A hook that changes what the convolution emits."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first.register_forward_hook(_halve)
        self.last[1].register_forward_pre_hook(_halve_input)


def _halve(module, inputs, output):
    return output / 2


def _halve_input(module, inputs):
    return (inputs[0] / 2,)


class Tied(_Two):
    """Two convolutions with one weight."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first = nn.Conv2d(12, 12, 3, padding=1)
        self.zeroth, self.again = layer(8, 12), nn.Conv2d(12, 12, 3, padding=1)
        self.again.weight = self.first.weight

    def features(self, x):
        x = torch.relu(self.first(self.zeroth(x)))
        return self.last(torch.relu(self.again(x)))


class TwoNames(Net):
    """Layers that have a name of their own and are collected in a Sequential as well."""

    pruned = "stem.0 stem.3"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, nn.ReLU())

    def features(self, x):
        return x


class Recurrent(_Two):
    """One convolution, three times."""

    pruned = "stem.0 first last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), layer(8, 8)

    def features(self, x):
        for _ in range(3):
            x = torch.relu(self.first(x))
        return self.last(x)


class SharedHead(_Two):
    """One head for maps of two sizes."""

    def features(self, x):
        both = [self.last(torch.relu(self.first(y))) for y in (x, F.avg_pool2d(x, 2))]
        return both[0] + F.interpolate(both[1], scale_factor=2)


class Borrowed(_Two):
    """The weights of a layer, used by a function as well."""

    def features(self, x):
        y = torch.relu(self.first(x))
        return self.last(y + F.conv2d(x, self.first.weight, padding=1))


class Generated(_Two):
    """Kernels that another layer makes of the image, one for each."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.make = nn.Linear(8, 12 * 8)

    def features(self, x):
        kernels = self.make(x.mean((2, 3))).view(-1, 8, 1, 1)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x)).view(len(x), 12, *x.shape[2:])
        return self.last(torch.relu(y))


class Mixed(_Two):
    """CondConv: a mixture of kernels by weights that depend on the image."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.kernels, self.route = nn.Parameter(torch.randn(2, 12, 8, 3, 3) * 0.1), nn.Linear(8, 2)

    def features(self, x):
        shares = torch.sigmoid(self.route(x.mean((2, 3))))
        made = [share.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1) * F.conv2d(x, k, padding=1) for share, k in zip(shares.T, self.kernels)]
        return self.last(torch.relu(sum(made)))


class ParametersOfItsOwn(_Two):
    """A scale per channel, a scalar, and a bias by position."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.scale, self.factor = nn.Parameter(torch.ones(1, 12, 1, 1)), nn.Parameter(torch.ones(()))

    def features(self, x):
        return self.last(torch.relu(self.factor * self.scale * self.first(x)))


class FixUp(_Two):
    """Scalars before and behind a convolution: a bias makes something of a zero."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.before, self.behind, self.scale = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def features(self, x):
        return self.last(torch.relu(self.first(x + self.before) * (1 + self.scale) + self.behind))


class Scalars(_Two):
    """Scalars that only scale."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.scale = nn.Parameter(torch.ones(1))

    def features(self, x):
        return self.last(torch.relu(self.first(x) * self.scale)) * self.scale


class Positions(_Two):
    """A table by position, the same for all channels, and one for each of them."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.register_buffer("rows", torch.linspace(0, 1, resolution).view(1, 1, -1, 1))
        self.register_buffer("table", torch.randn(1, 12, resolution, resolution))

    def features(self, x):
        return self.last(torch.relu(self.first(x + self.rows) + self.table))


class Multiplied(_Two):
    """A window over the places: nothing comes of a zero."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.register_buffer("window", torch.hann_window(resolution).view(1, 1, -1, 1))

    def features(self, x):
        return self.last(torch.relu(self.first(x)) * self.window)


class CoordinatesFirst(_Two):
    """CoordConv with the constant channels before, between and behind the others."""

    pruned = "stem.0 first last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.last = layer(12 + 8 + 3, 8)

    def features(self, x):
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
        ones = torch.ones(n, 1, h, w)
        return self.last(torch.cat([rows, torch.relu(self.first(x)), ones, x, rows], 1))


class WrittenIntoSlices(_Two):
    """A concatenation as an assignment."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.last = layer(20, 8)

    def features(self, x):
        y = torch.relu(self.first(x))
        both = torch.empty(len(x), 20, *x.shape[2:])
        both[:, :8], both[:, 8:] = x, y
        return self.last(both)


class CopiedIntoSlices(WrittenIntoSlices):
    """The same with a method."""

    def features(self, x):
        both = torch.zeros(len(x), 20, *x.shape[2:])
        both.narrow(1, 0, 8).copy_(x)
        both[:, 8:].add_(torch.relu(self.first(x)))
        return self.last(both)


class Selected(_Two):
    """Channels picked by a tensor of indices, and a mask."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.register_buffer("order", torch.randperm(12))

    def features(self, x):
        y = torch.relu(self.first(x))
        return self.last(y[:, self.order] + torch.index_select(y, 1, self.order.flip(0)))


class Asserting(_Two):
    """It checks its own width."""

    pruned = "stem.0 last.0"

    def features(self, x):
        y = torch.relu(self.first(x))
        assert y.shape[1] == 12, "twelve channels are expected here"
        return self.last(y)


class BlurPool(_Two):
    """A fixed kernel for every channel: one that is made for their number, and one that grows with it."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (kernel[:, None] * kernel / 16)[None, None])
        self.register_buffer("eight", self.kernel.repeat(8, 1, 1, 1))

    def features(self, x):
        x = F.conv2d(x, self.eight, padding=1, groups=8)
        y = torch.relu(self.first(x))
        return self.last(F.conv2d(y.flatten(0, 1).unsqueeze(1), self.kernel, stride=2).view(len(y), -1, 3, 3))


class Detached(_Two):
    """A gate that is computed without a gradient."""

    pruned = "stem.0 last.0"

    def features(self, x):
        y = torch.relu(self.first(x))
        with torch.no_grad():
            gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return self.last(y * gate)


class InPlace(_Two):
    """Sums and activations in the memory of what was there."""

    pruned = "stem.0 first last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), layer(8, 8)
        self.stem[2] = nn.ReLU(inplace=True)

    def features(self, x):
        y = self.first(x)
        y += x
        F.relu_(y)
        return self.last(y.add(1).sub_(1))


class Code(_Two):
    """Attributes with the names of fx.GraphModule's own."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.code, self.graph = nn.Parameter(torch.ones(8)), 3

    def forward(self, images):
        return self.head(self.features(self.stem(images)).mean((2, 3)) * self.code)

    pruned = "stem.0 first"


class Scripted(_Two):
    """A part that is compiled: nothing can be seen inside."""

    pruned = "last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.first = torch.jit.script(self.first)


class Loops(Net):
    """Layers in a dictionary and a list, activations as attributes."""

    pruned = "stem.0 layers.a.0 layers.b.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.layers = nn.ModuleDict({"a": layer(8, 10), "b": layer(10, 8)})
        self.activations = [torch.relu, F.silu]

    def features(self, x):
        for block, activation in zip(self.layers.values(), self.activations):
            x = activation(block(x))
        return x


class NeverCalled(_Two):
    """A layer that is there and never used."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.unused = nn.Conv2d(8, 8, 3)


class OneChannel(_Two):
    """Layers of one filter, which cannot lose it."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = nn.Conv2d(8, 1, 1), layer(1, 8)
