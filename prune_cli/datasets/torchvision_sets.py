"""The small published data sets, read (and downloaded when absent) by torchvision's own loaders."""

import contextlib
import http.client
import io
import logging
import pickle
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from prune_cli.datasets.tensors import Images, InMemoryDataset
from prune_cli.errors import UserError
from prune_cli.vision import torchvision

log = logging.getLogger(__name__)

# Where torchvision expects the files, below the data root.
FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "SVHN": "",
}
SHAPES = {  # channels, resolution, classes
    "MNIST": (1, 28, 10), "FashionMNIST": (1, 28, 10),
    "CIFAR10": (3, 32, 10), "CIFAR100": (3, 32, 100), "SVHN": (3, 32, 10),
}  # fmt: skip
# What torchvision's parsers raise for files that are not what their names say.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AssertionError, EOFError, RuntimeError, pickle.UnpicklingError)


@dataclass(frozen=True, kw_only=True)
class TorchvisionSet(InMemoryDataset):
    """One of torchvision's data sets. `source` is the name of its class in torchvision.datasets."""

    source: Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"]

    def read(self, data_root: Path) -> tuple[Images, Images]:
        """See `InMemoryDataset`. Raises UserError: absent and not to be downloaded, or damaged."""
        return self._part(data_root, train=True), self._part(data_root, train=False)

    def shape(self, data_root: Path) -> tuple[int, int, int]:
        return SHAPES[self.source]

    def fingerprint(self, data_root: Path) -> str:
        """Fixed by torchvision's checksums, whatever the set is called in a config."""
        return self.source

    def _part(self, data_root: Path, train: bool) -> Images:
        which = {"split": "train" if train else "test"} if self.source == "SVHN" else {"train": train}
        folder = data_root / FOLDERS[self.source]
        loader = getattr(torchvision().datasets, self.source)
        try:
            return _images(loader(data_root, **which))
        except ImportError as problem:  # SVHN is a MATLAB file, scipy reads it
            raise UserError(f"{self.name}: reading it needs {problem.name}; pip install {problem.name}") from problem
        except UNREADABLE as problem:
            if "not found" not in str(problem):
                raise UserError(
                    f"{self.name}: the files in {folder} cannot be read ({_cause(problem)}); "
                    f"delete them and start again"
                ) from problem
        log.info("%s: downloading to %s", self.name, folder)
        try:
            with _quietly():
                return _images(loader(data_root, download=True, **which))
        except (*UNREADABLE, http.client.HTTPException, tarfile.TarError) as problem:
            raise UserError(
                f"{self.name}: not found (or damaged) in {folder} and the download failed ({_cause(problem)}); "
                f"put the files there or set runtime.data_root or PRUNE_DATA to the folder that has them"
            ) from problem


def _images(loaded: Any) -> Images:
    """The tensors inside a torchvision data set, whichever of its layouts it has."""
    pixels = torch.as_tensor(loaded.data)
    labels = torch.as_tensor(np.asarray(loaded.labels if hasattr(loaded, "labels") else loaded.targets)).long()
    if pixels.ndim == 3:  # MNIST: (N, H, W)
        pixels = pixels.unsqueeze(1)
    elif pixels.shape[-1] == 3 != pixels.shape[1]:  # CIFAR: (N, H, W, C)
        pixels = pixels.permute(0, 3, 1, 2)
    if len(pixels) != len(labels) or not len(labels):
        raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
    return Images(pixels.contiguous(), labels)


def _cause(problem: BaseException) -> str:
    """The cause in one line: torchvision's own messages run over several, the last says most."""
    lines = [line.strip(" <>") for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__


@contextlib.contextmanager
def _quietly(seconds: float = 30) -> Iterator[None]:
    """No prints and progress bars, and no waiting forever behind a firewall that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
