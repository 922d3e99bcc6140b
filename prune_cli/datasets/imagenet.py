"""Image folders too large for memory: decoded by worker processes while the network trains."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from prune_cli.datasets.dataset import Dataset, Splits
from prune_cli.datasets.decoding import open_image, pixels
from prune_cli.datasets.files import ImageFiles, digest, say_passed_over, scan_pair
from prune_cli.datasets.subsets import limited, partition
from prune_cli.datasets.tensors import Normalisation
from prune_cli.errors import UserError
from prune_cli.settings import Count, Fraction, Positive
from prune_cli.vision import torchvision

Key = tuple[int, int]  # which image, and the seed of its random crop


@dataclass(frozen=True)
class Decoder:
    """What a worker does. Batches come as uint8 (N, C, H, W): a quarter of float32 to hand over."""

    files: ImageFiles
    folder: "StreamedFolder"
    augment: bool

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor] | UserError:
        """Images and labels of one batch. A UserError is returned, not raised: DataLoader would
        wrap a traceback around its sentence."""
        transform = self.folder.transform(self.augment)  # not a field: it might be pickled for a worker
        try:
            images = torch.stack([self._image(transform, *key) for key in keys])
        except UserError as problem:
            return problem
        return images, self.files.labels[[index for index, _ in keys]]

    def _image(self, transform: Callable[[Image.Image], Image.Image], index: int, seed: int) -> Tensor:
        image = open_image(self.files, index, 3)
        with torch.random.fork_rng(devices=[]):  # torchvision's crops draw from the global generator
            torch.manual_seed(seed)
            return pixels(transform(image))


@dataclass(frozen=True)
class StreamedSplit:
    """A `Split` read from disk in every epoch. `indices`, int64 (N,), select among the files.

    `augmented` decodes training batches (those with a seed), `plain` all others.
    """

    indices: Tensor
    augmented: Decoder
    plain: Decoder
    normalise: Normalisation
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split`. Each image has a seed of its own: the number of workers changes nothing."""
        loader = DataLoader(
            self.plain if seed is None else self.augmented,
            batch_sampler=self._keys(batch_size, seed),
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = (values.to(self.device, non_blocking=True) for values in batch)
            yield self.normalise(images), labels

    def _keys(self, batch_size: int, seed: int | None) -> Iterator[list[Key]]:
        order, seeds = self.indices, torch.zeros(len(self), dtype=torch.int64)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = order[torch.randperm(len(self), generator=generator)]
            seeds = torch.randint(2**62, (len(self),), generator=generator)
        for indices, image_seeds in zip(order.split(batch_size), seeds.split(batch_size)):
            yield list(zip(indices.tolist(), image_seeds.tolist()))


def _unchanged(batch):
    return batch


@dataclass(frozen=True, kw_only=True)
class StreamedFolder(Dataset):
    """ImageNet, or any train/ and val/ (or test/) pair of folders with one folder per class, in RGB.

    path: relative to the data root, or absolute. resolution: height and width given to the network.
    Training draws a crop of at least `min_area` of the image (3:4 to 4:3) and mirrors every other
    one if `flip`; evaluation resizes the shorter side to `resize` and cuts the centre. Images are turned as their
    EXIF orientation says, which torchvision's ImageNet does not.
    """

    path: str
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    resolution: Count = 224
    resize: Count = 256
    min_area: Fraction = 0.08
    flip: bool = True

    def load(
        self, data_root: Path, device: torch.device, *, validation: float, limit: int | None, workers: int
    ) -> Splits:
        """See `Dataset.load`; only the file names are read here. A damaged image raises UserError
        when its batch comes."""
        if self.resize < self.resolution:
            raise UserError(f"dataset.resize={self.resize}: must be at least dataset.resolution={self.resolution}")
        Normalisation.check(self.name, self.mean, self.std, 3)
        train, test = scan_pair(data_root, self.path, self.name)
        say_passed_over(self.name, train, test)
        normalise = Normalisation(self.mean, self.std, device)

        def split(files: ImageFiles, indices: Tensor) -> StreamedSplit:
            augmented, plain = (Decoder(files, self, augment) for augment in (True, False))
            return StreamedSplit(indices, augmented, plain, normalise, device, workers)

        kept, held_out = partition(train.labels, validation, limit)
        return Splits(
            train=split(train, kept),
            validation=None if held_out is None else split(train, held_out),
            test=split(test, limited(torch.arange(len(test.labels)), test.labels, limit)),
            channels=3,
            resolution=self.resolution,
            classes=len(train.classes),
        )

    def settings(self) -> dict[str, Any]:
        """All but where the images lie: they may be moved."""
        return {name: value for name, value in super().settings().items() if name != "path"}

    def fingerprint(self, data_root: Path) -> str:
        """Hash of the names and sizes of all files: to read all of ImageNet before each run takes too long, so that a
        file edited to the same size goes unnoticed here."""
        return digest(*scan_pair(data_root, self.path, self.name))

    def transform(self, augment: bool) -> Callable[[Image.Image], Image.Image]:
        """PIL image -> PIL image of `resolution`."""
        T = torchvision().transforms
        if not augment:
            return T.Compose([T.Resize(self.resize), T.CenterCrop(self.resolution)])
        crop = T.RandomResizedCrop(self.resolution, scale=(self.min_area, 1.0))
        return T.Compose([crop, T.RandomHorizontalFlip()]) if self.flip else crop
