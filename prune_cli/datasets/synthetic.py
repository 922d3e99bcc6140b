"""Images made up on the spot: what a network needs to run and to learn, without any file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from prune_cli.datasets.tensors import Images, InMemoryDataset
from prune_cli.errors import UserError
from prune_cli.settings import Count, Natural, NonNegative


@dataclass(frozen=True, kw_only=True)
class Synthetic(InMemoryDataset):
    """Each class is a fixed random pattern of 4x4 coloured tiles, each image that pattern and noise.

    noise: standard deviation of the pixel noise, in units of the patterns' own contrast. seed:
    decides patterns and noise; it belongs to the data, not to the run. Classes are balanced.
    """

    channels: Count = 3
    resolution: Count = 32
    classes: Count = 10
    train_size: Count = 512
    test_size: Count = 256
    noise: NonNegative = 1.0
    seed: Natural = 0

    def read(self, data_root: Path) -> tuple[Images, Images]:
        """See `InMemoryDataset`; nothing is looked for under `data_root`.
        Raises UserError: fewer training images than classes."""
        if self.train_size < self.classes:
            raise UserError(f"dataset.train_size={self.train_size}: must be at least dataset.classes={self.classes}")
        generator = torch.Generator().manual_seed(self.seed)
        tiles = torch.randn(self.classes, self.channels, 4, 4, generator=generator)
        tile = torch.arange(self.resolution) * 4 // self.resolution  # the tile that a row or column is in
        patterns = tiles[:, :, tile][..., tile]  # (classes, channels, resolution, resolution)

        def images(size: int) -> Images:
            labels = torch.arange(size) % self.classes
            noise = torch.randn(size, *patterns.shape[1:], generator=generator)
            values = 128 + 32 * (patterns[labels] + self.noise * noise)
            return Images(values.round_().clamp_(0, 255).to(torch.uint8), labels)

        return images(self.train_size), images(self.test_size)

    def shape(self, data_root: Path) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.classes

    def fingerprint(self, data_root: Path) -> str:
        """Every setting that decides the pixels."""
        decisive = ("channels", "resolution", "classes", "train_size", "test_size", "noise", "seed")
        return "synthetic " + " ".join(f"{setting}={getattr(self, setting):g}" for setting in decisive)
