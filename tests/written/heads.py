"""What comes behind the convolutions, and what is flattened on the way."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from written.parts import Net, layer


class _Head(Net):
    """A second convolution, and a head of the subclass's own."""

    pruned = "stem.0 second.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.second = layer(8, 8)

    def forward(self, images):
        return self.classified(self.second(self.stem(images)))


class GRUHead(_Head):
    """A GRU over the columns."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.rnn = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, classes)

    def classified(self, x):
        return self.head(self.rnn(x.mean(2).transpose(1, 2))[0][:, -1])


class LSTMHead(_Head):
    """An LSTM over rows of all channels, its last state."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.rnn = nn.LSTM(8 * resolution, 8, num_layers=2)

    def classified(self, x):
        _, (hidden, _) = self.rnn(x.permute(2, 0, 1, 3).flatten(2))
        return self.head(hidden[-1])


class CellHead(_Head):
    """A recurrent cell, step by step."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.cell = nn.GRUCell(8, 8)

    def classified(self, x):
        state = x.new_zeros(len(x), 8)
        for column in x.mean(2).unbind(-1):
            state = self.cell(column, state)
        return self.head(state)


class ClassToken(_Head):
    """A token of its own, positions, and PyTorch's attention."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, resolution**2 + 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def classified(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.places
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0])


class Transformer(_Head):
    """PyTorch's encoder layer over the pixels."""

    pruned = "stem.0 encoder.linear1"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def classified(self, x):
        return self.head(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))


class ViewToFlatten(_Head):
    """The most common line of all, and a norm of flat features."""

    pruned = "stem.0 second.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.fc, self.norm = nn.Linear(8 * (resolution // 2) ** 2, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, classes)

    def classified(self, x):
        x = F.max_pool2d(x, 2)
        return self.head(F.dropout(F.relu(self.norm(self.fc(x.view(x.size(0), -1)))), training=self.training))


class FixedView(_Head):
    """A number instead of a size."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.fc, self.size = nn.Linear(8 * (resolution // 2) ** 2, 12), 8 * (resolution // 2) ** 2
        self.head = nn.Linear(12, classes)

    def classified(self, x):
        return self.head(F.relu(self.fc(F.max_pool2d(x, 2).view(-1, self.size))))


class ChannelsLast(_Head):
    """Flattened with the channels last: the pixels of a channel are no neighbours."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.head = nn.Linear(8 * resolution**2, classes)

    def classified(self, x):
        return self.head(x.permute(0, 2, 3, 1).reshape(len(x), -1))


class Pyramid(_Head):
    """Several poolings, flattened, side by side: a channel has its places in several parts."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.head = nn.Linear(8 * 5, classes)

    def classified(self, x):
        return self.head(torch.cat([F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2)], dim=1))


class TwoPoolings(_Head):
    """Mean and maximum side by side."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.head = nn.Linear(16, classes)

    def classified(self, x):
        return self.head(torch.cat([x.mean((2, 3)), x.amax(dim=(2, 3))], 1))


class SecondOrder(_Head):
    """Bilinear pooling: the products of all pairs of channels."""

    pruned = "stem.0"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.head = nn.Linear(64, classes)

    def classified(self, x):
        x = x.flatten(2)
        return self.head(torch.einsum("ncp,ndp->ncd", x, x).flatten(1))


class Cosine(_Head):
    """Features of length one, compared with weights of length one."""

    pruned = "stem.0"

    def classified(self, x):
        return 10 * F.linear(F.normalize(x.mean((2, 3))), F.normalize(self.head.weight))


class ConvolutionalHead(_Head):
    """A 1x1 convolution gives the scores."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.head = nn.Conv2d(8, classes, 1)

    def classified(self, x):
        return F.adaptive_avg_pool2d(self.head(x), 1).squeeze(-1).squeeze(-1)


class EarlyExit(_Head):
    """Scores of two depths, summed."""

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.early = nn.Linear(8, classes)

    def forward(self, images):
        x = self.stem(images)
        return self.early(x.mean((2, 3))) + self.head(self.second(x).mean((2, 3)))


class DeepSupervision(EarlyExit):
    """The early scores exist while training only, where tracing does not look."""

    pruned = "second.0"

    def forward(self, images):
        x = self.stem(images)
        scores = self.head(self.second(x).mean((2, 3)))
        return scores + 0.3 * self.early(x.mean((2, 3))) if self.training else scores


class Recomputed(_Head):
    """Activation checkpointing."""

    def classified(self, x):
        x = checkpoint(self.second, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class StochasticDepth(_Head):
    """A block that is left out at random while training."""

    def classified(self, x):
        if not self.training or torch.rand(()) < 0.8:
            x = x + self.second(x)
        return self.head(x.mean((2, 3)))


class Spectrum(_Head):
    """Filtered in the frequency domain."""

    def classified(self, x):
        spectrum = torch.fft.rfft2(x)
        return self.head(torch.fft.irfft2(spectrum * 0.5, s=x.shape[-2:]).mean((2, 3)))


class Patches(_Head):
    """Unfolded patches through a linear layer."""

    pruned = "stem.0 patches"

    def __init__(self, channels, resolution, classes):
        super().__init__(channels, resolution, classes)
        self.patches = nn.Linear(8 * 4, 8)

    def classified(self, x):
        return self.head(F.relu(self.patches(F.unfold(x, 2, stride=2).transpose(1, 2))).mean(1))
