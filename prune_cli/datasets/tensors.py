"""Data sets that fit in memory: pixels live on the device and are batched by tensor operations."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_cli.datasets.dataset import Dataset, Splits
from prune_cli.datasets.subsets import limited, partition
from prune_cli.errors import UserError
from prune_cli.settings import Natural, Positive


class Images(NamedTuple):
    """What reading gives: pixels uint8 (N, C, H, W) and labels int64 (N,), on the CPU."""

    pixels: Tensor
    labels: Tensor


class Normalisation:
    """uint8 pixels -> (pixels / peak - mean) / std, per channel, in float32.

    Agrees with torchvision's ToTensor and Normalize to float32's rounding, not to the last bit: it
    is folded into one product and one sum, which takes less than half the time.
    mean, std: one value per channel, or one for all.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, peak: int = 255):
        centre, spread = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        self.scale = (1 / (peak * spread)).to(device, torch.float32)
        self.shift = (-centre / spread).to(device, torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.mul(pixels, self.scale).add_(self.shift)

    @staticmethod
    def check(name: str, mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
        """UserError unless `mean` and `std` fit images with that many channels."""
        for setting, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise UserError(f"dataset.{setting}: {len(values)} values, but {name} has {channels} channel(s)")


def random_crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Each image framed by `pad` zeros and cut to its old size at its own place.

    images (N, C, H, W); offsets int64 (N, 2), row and column of the cut, each in 0..2*pad. Zeros
    are black pixels because this happens before normalisation, as in torchvision's
    RandomCrop(H, padding=pad) on PIL images.
    """
    N, C, H, W = images.shape
    framed = F.pad(images, (pad, pad, pad, pad))
    image, channel, row, _ = framed.stride()
    # One overlapping view of all windows, numbered by the address of their first pixel: selecting
    # from it copies whole rows, ten times faster on a CPU than indexing image, row and column.
    starts = (N - 1) * image + 2 * pad * (row + 1) + 1
    windows = framed.as_strided((starts, C, H, W), (1, channel, row, 1))
    return windows.index_select(0, _numbers(images) * image + offsets[:, 0] * row + offsets[:, 1])


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (N, C, H, W), those with True in `chosen` (N,) flipped left to right."""
    both = torch.cat((images, images.flip(3)))  # and a selection: `where` is slow on bytes
    return both.index_select(0, _numbers(images) + len(images) * chosen)


def _numbers(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


class TensorSplit:
    """A `Split` of pixels uint8 (N, C, H, W) and labels int64 (N,) that lie on one device.

    pad: random crop after a frame of that many black pixels, 0 for none; flip: mirror every other
    image at random. Both act on training batches only (those with a seed).
    """

    def __init__(self, images: Images, normalise: Normalisation, pad: int = 0, flip: bool = False):
        self.pixels, self.labels = images
        self.normalise, self.pad, self.flip = normalise, pad, flip

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split`. The random numbers of an epoch are drawn at once from a CPU generator of
        their own: neither the device nor the batch size nor any other generator has a say."""
        if seed is None:
            for pixels, labels in zip(self.pixels.split(batch_size), self.labels.split(batch_size)):
                yield self.normalise(pixels), labels
            return
        for order, offsets, chosen in zip(*(drawn.split(batch_size) for drawn in self._draw(seed))):
            pixels = self.pixels.index_select(0, order)
            if self.pad:
                pixels = random_crop(pixels, offsets, self.pad)
            if self.flip:
                pixels = mirror(pixels, chosen)
            yield self.normalise(pixels), self.labels.index_select(0, order)

    def _draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Order int64 (N,), crop offsets int64 (N, 2) and flips bool (N,) of one epoch."""
        generator, N = torch.Generator().manual_seed(seed), len(self)
        order = torch.randperm(N, generator=generator)
        offsets = torch.randint(0, 2 * self.pad + 1, (N, 2), generator=generator)
        chosen = torch.rand(N, generator=generator) < 0.5
        return tuple(drawn.to(self.pixels.device) for drawn in (order, offsets, chosen))


@dataclass(frozen=True)
class InMemoryDataset(Dataset):
    """A data set whose pixels fit in memory; a subclass says how they are read.

    mean, std: normalisation after division by the largest pixel value, one value per channel or
    one for all. pad, flip: the augmentation of training batches, see `TensorSplit`.
    """

    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    pad: Natural = 0
    flip: bool = False

    peak: ClassVar[int] = 255  # the largest pixel value

    @abstractmethod
    def read(self, data_root: Path) -> tuple[Images, Images]:
        """Training and test images, all of them. Raises UserError when they are not to be had."""

    def load(
        self, data_root: Path, device: torch.device, *, validation: float, limit: int | None, workers: int
    ) -> Splits:
        """See `Dataset.load`; `workers` is not needed here."""
        train, test = self.read(data_root)
        channels, resolution = train.pixels.shape[1:3]
        Normalisation.check(self.name, self.mean, self.std, channels)
        normalise = Normalisation(self.mean, self.std, device, self.peak)

        def split(images: Images, indices: Tensor, **augmentation) -> TensorSplit:
            if len(indices) < len(images.labels):
                images = Images(*(values[indices] for values in images))
            return TensorSplit(Images(*(values.to(device) for values in images)), normalise, **augmentation)

        kept, held_out = partition(train.labels, validation, limit)
        return Splits(
            train=split(train, kept, pad=self.pad, flip=self.flip),
            validation=None if held_out is None else split(train, held_out),
            test=split(test, limited(torch.arange(len(test.labels)), test.labels, limit)),
            channels=channels,
            resolution=resolution,
            classes=int(train.labels.max()) + 1,
        )
