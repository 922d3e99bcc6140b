"""Training in tests: tiny networks on images that are mostly noise, and what listens meanwhile."""

from collections import Counter

import torch
from rich.console import Console
from tiny import TinyResNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune_cli.datasets.dataset import Splits
from prune_cli.hooks import TrainingHooks
from prune_cli.journal import Journal
from prune_cli.settings import FitSettings
from prune_cli.store import Store
from prune_cli.trainer import fit
from prune_cli.workshop import Workshop

SETTINGS = FitSettings(
    epochs=3, batch_size=8, optimizer="sgd", lr=0.05, momentum=0.9, nesterov=False, weight_decay=1e-3, schedule="one_cycle"
)  # fmt: skip
CLASSES = 4


class Noise:
    """A split of random images whose class is a shift of their brightness."""

    def __init__(self, images: int, seed: int = 0, resolution: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(images) % CLASSES
        self.x = torch.randn(images, 2, resolution, resolution, generator=generator) + self.y.view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, batch_size, seed=None):
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for chosen in order.split(batch_size):
            yield self.x[chosen], self.y[chosen]


def noise_splits(train: int = 32, validation: int | None = 12) -> Splits:
    """So many images to train with and to hold out, and a dozen to test with."""
    held_out = None if validation is None else Noise(validation, 1)
    return Splits(Noise(train), held_out, Noise(12, 2), channels=2, resolution=8, classes=CLASSES)


class Dropout(nn.Module):
    """Random numbers in every step, and no convolution."""

    def __init__(self, channels, resolution, classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * resolution**2, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes)
        )

    def forward(self, x):
        return self.layers(x)


def untrained(kind=TinyResNet) -> nn.Module:
    """A network for the images of Noise, every time the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(2, 8, CLASSES)
    model.input_shape = (2, 8, 8)
    return model


class Memory:
    """A checkpoint that is always empty, and a monitor that listens."""

    def __init__(self):
        self.events, self.epochs = [], []

    def save(self, state):
        self.events.append("save")

    def load(self):
        return None

    def resumed(self, history):
        self.events.append("resumed")

    def step(self):
        pass

    def epoch(self, epoch, values, tensors=None):
        self.events.append("epoch")
        self.epochs.append((epoch, dict(values), dict(tensors or {})))


def run_fit(model, settings=SETTINGS, hooks=None, *, splits=None, checkpoint=None, monitor=None, precision="float32", **more):
    """The history of `fit`, of which a test says only what matters to it."""
    memory = Memory()
    return fit(
        model, splits or noise_splits(), settings, hooks or TrainingHooks(), precision=precision, seed=0, stage="dense",
        checkpoint=checkpoint or memory, monitor=monitor or memory, **more,
    )  # fmt: skip


def state_of(model):
    """A copy of all weights and statistics."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def workshop_of(experiment):
    """What the stages of a run share, for stages that are called one by one."""
    return Workshop(experiment, Store(experiment.runtime.store), Journal(None, Console(quiet=True)))


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stops(Memory):
    """Ctrl-C after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def step(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
