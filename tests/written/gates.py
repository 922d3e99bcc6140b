"""Gates, attention and activations."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from written.parts import Net, layer


class _Scaled(Net):
    """A convolution, what a subclass makes of its maps, a convolution that reads them."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = layer(8, 12), layer(12, 8)

    def features(self, x):
        return self.last(self.scaled(self.first(x)))


class SqueezeLinear(_Scaled):
    """Squeeze-and-excitation with linear layers between two views."""

    pruned = "stem.0 first.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.fc = nn.Sequential(nn.Linear(12, 4), nn.ReLU(inplace=True), nn.Linear(4, 12), nn.Sigmoid())

    def scaled(self, x):
        n, c = x.shape[:2]
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1).expand_as(x)


class SqueezeIndexed(SqueezeLinear):
    """The same with indexing by None."""

    def scaled(self, x):
        return x * self.fc(x.mean(dim=[2, 3]))[:, :, None, None]


class SqueezeUnsqueezed(SqueezeLinear):
    """The same with unsqueeze and expand, in place."""

    def scaled(self, x):
        gate = self.fc(x.flatten(2).mean(-1)).unsqueeze(-1).unsqueeze(-1)
        x = x.clone()
        x *= gate.expand(-1, -1, x.shape[2], x.shape[3])
        return x


class SqueezeReshaped(SqueezeLinear):
    """The same with reshape and a residual of the gate."""

    def scaled(self, x):
        gate = self.fc(x.amax((2, 3))).reshape(len(x), -1, 1, 1)
        return x + x * gate


class SqueezeConvolved(_Scaled):
    """MobileNetV3's, with 1x1 convolutions, written-out hard sigmoid and hard swish."""

    pruned = "stem.0 first.0 reduce last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.reduce, self.expand = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def scaled(self, x):
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        x = x * (F.relu6(gate + 3) / 6)
        return x * F.relu6(x + 3) / 6


class CBAM(_Scaled):
    """Attention to channels, from two poolings through one perceptron, then to places, which mixes channels."""

    pruned = "stem.0 mlp.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.mlp = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 12, 1, bias=False))
        self.places = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def scaled(self, x):
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.places(maps))


class ChannelAttention(CBAM):
    """The first half of it alone."""

    pruned = "stem.0 first.0 mlp.0 last.0"

    def scaled(self, x):
        return x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))


class EfficientAttention(_Scaled):
    """ECA: a convolution along the channels."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def scaled(self, x):
        y = self.along(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class ResidualAttention(_Scaled):
    """(1 + mask) * features, the mask from a branch of its own."""

    pruned = "stem.0 first.0 inner.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.inner, self.mask = layer(12, 6), nn.Conv2d(6, 12, 1)

    def scaled(self, x):
        return (1 + torch.sigmoid(self.mask(self.inner(x)))) * x


class GatedConvolution(_Scaled):
    """PixelCNN's tanh(a) * sigmoid(b)."""

    pruned = "stem.0 first.0 a last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)

    def scaled(self, x):
        return torch.tanh(self.a(x)) * torch.sigmoid(self.b(x))


class Bilinear(GatedConvolution):
    """a * b: a channel is zero where either is."""

    pruned = "stem.0 first.0 a b last.0"

    def scaled(self, x):
        return self.a(x) * self.b(x)


class GLU(_Scaled):
    """Halves by F.glu."""

    pruned = "stem.0 first.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.both = nn.Conv2d(12, 24, 3, padding=1)

    def scaled(self, x):
        return F.glu(self.both(x), dim=1)


class SoftmaxOverChannels(_Scaled):
    """Softmax2d."""

    pruned = "stem.0 last.0"

    def scaled(self, x):
        return x * F.softmax(x, dim=1)


class MishByHand(_Scaled):
    pruned = "stem.0 first.0 last.0"

    def scaled(self, x):
        return x * torch.tanh(F.softplus(x))


class SwishByHand(_Scaled):
    pruned = "stem.0 first.0 last.0"

    def scaled(self, x):
        return x.mul(x.sigmoid())


class GeluByHand(_Scaled):
    pruned = "stem.0 first.0 last.0"

    def scaled(self, x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class Activations(_Scaled):
    """Those that make nothing of a zero, one after another."""

    pruned = "stem.0 first.0 last.0"

    def scaled(self, x):
        for activation in (F.elu, F.selu, F.silu, F.hardswish, F.leaky_relu, F.relu6, F.gelu, F.softsign, torch.tanh, torch.square):
            x = activation(x)
        return x.sign() * x.abs().sqrt()


class _OfZero(_Scaled):
    """Something comes of a zero."""

    pruned = "stem.0 last.0"


class SigmoidActivation(_OfZero):
    def scaled(self, x):
        return torch.sigmoid(x)


class Shifted(_OfZero):
    def scaled(self, x):
        return x + 1


class Clamped(_OfZero):
    def scaled(self, x):
        return x.clamp(min=0.1)


class Exponential(_OfZero):
    def scaled(self, x):
        return torch.exp(-x)


class Cosine(_OfZero):
    def scaled(self, x):
        return torch.cos(x) * 2


class SigmoidBeforeNorm(_Scaled):
    """Something comes of a zero, but a norm of its own takes it away again."""

    pruned = "stem.0 first.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.norm = nn.BatchNorm2d(12)

    def scaled(self, x):
        return self.norm(torch.sigmoid(x))


class ConcatenatedReLU(Net):
    """CReLU: a channel and its negative."""

    pruned = "stem.0 first.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.first, self.last = layer(8, 6), layer(12, 8)

    def features(self, x):
        x = self.first(x)
        return self.last(F.relu(torch.cat([x, -x], 1)))


class Maxout(Net):
    """The largest of neighbouring channels."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.pieces, self.last = nn.Conv2d(8, 12, 3, padding=1), layer(6, 8)

    def features(self, x):
        n, c, h, w = self.pieces(x).shape
        return self.last(self.pieces(x).view(n, c // 2, 2, h, w).max(2).values)


class Slopes(_Scaled):
    """PReLU with one slope, and with one for each channel."""

    pruned = "stem.0 first.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.one, self.each = nn.PReLU(), nn.PReLU(12)

    def scaled(self, x):
        return self.each(self.one(x) - 0.5 * x)


class NonLocal(_Scaled):
    """Every place attends to every other: three 1x1 convolutions and two products."""

    pruned = "stem.0 first.0 out last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.query, self.key, self.value = (nn.Conv2d(12, 6, 1) for _ in range(3))
        self.out, self.gamma = nn.Conv2d(6, 12, 1), nn.Parameter(torch.zeros(1))

    def scaled(self, x):
        n, _, h, w = x.shape
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
        return x + self.gamma * self.out(torch.bmm(value, attention.transpose(1, 2)).view(n, 6, h, w))


class SelfAttention(_Scaled):
    """Heads by hand, from one linear layer for all three."""

    pruned = "stem.0 last.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def scaled(self, x):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return (tokens + self.out(mixed)).transpose(1, 2).view(n, c, h, w)
