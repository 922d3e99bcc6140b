"""What a data set gives to the pipeline: three splits that yield batches on the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prune_cli.errors import UserError
from prune_cli.external_files import not_a_folder
from prune_cli.targets import source_hash


class Split(Protocol):
    """Some images with their labels."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of normalised float32 images (N, C, H, W) and int64 labels (N,), on the device.

        With a `seed` the order is shuffled and the images are augmented, both decided by the seed
        alone; without one the order is the stored order and nothing is augmented. The last batch
        may be smaller.
        """


@dataclass(frozen=True)
class Splits:
    """The loaded data set. `validation` is None when nothing was held out."""

    train: Split
    validation: Split | None
    test: Split
    channels: int
    resolution: int
    classes: int


@dataclass(frozen=True)
class Dataset(ABC):
    """A data set's settings; reading happens in `load`."""

    name: str

    @abstractmethod
    def load(
        self, data_root: Path, device: torch.device, *, validation: float, limit: int | None, workers: int
    ) -> Splits:
        """Read the data.

        data_root: folder that holds (or receives, for what can be downloaded) the files.
        validation: fraction of the training split held out, stratified by class, always the same
        images for the same fraction; 0 gives `Splits.validation = None`.
        limit: use only this many images of each split (stratified), None uses all.
        Raises UserError: data missing and not to be had, saying what, where it was looked for and
        how to get it.
        """

    def shape(self, data_root: Path) -> tuple[int, int, int]:
        """Channels, resolution and classes; where the settings do not say them, the data are read.

        Raises UserError as `load` does.
        """
        splits = self.load(data_root, torch.device("cpu"), validation=0, limit=None, workers=0)
        return splits.channels, splits.resolution, splits.classes

    def settings(self) -> dict[str, Any]:
        """The data set's identity and what it does with its content; part of every result's key.
        Where the files lie is not."""
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"target": target, "source": source_hash(target), **asdict(self)}

    def fingerprint(self, data_root: Path) -> str:
        """Identifies the content; part of every result's key. The name suffices for data sets
        whose content is fixed by the name; folders override it."""
        return self.name


def check_root(data_root: Path) -> None:
    """Raises UserError: the data root is there, but is no folder that can be looked into."""
    if (problem := not_a_folder(data_root)) not in (None, "does not exist"):
        raise UserError(
            f"runtime.data_root={data_root}: {problem}; give the folder that holds the data sets, or set PRUNE_DATA"
        )
