"""The small published data sets, read (and downloaded when absent) by torchvision's own loaders."""

import contextlib
import hashlib
import http.client
import io
import logging
import pickle
import re
import socket
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prune_cli.datasets.dataset import check_root
from prune_cli.datasets.tensors import Images, InMemoryDataset
from prune_cli.errors import UserError
from prune_cli.external_files import unreadable
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
# SHA-256 of the published files of those sets of which torchvision checks the downloaded archives only.
PUBLISHED = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
# What torchvision's parsers raise for files that are not what their names say.
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AssertionError, EOFError, RuntimeError, MemoryError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TorchvisionSet(InMemoryDataset):
    """One of torchvision's data sets. `source` is the name of its class in torchvision.datasets.

    Under the name of the source (mnist, fashion_mnist ...) the published files are read and no others. MNIST-like
    files of another content need a name of their own.
    """

    source: Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"]

    def read(self, data_root: Path) -> tuple[Images, Images]:
        """See `InMemoryDataset`. Raises UserError: absent and not to be downloaded, damaged, or not what was
        published under this name."""
        check_root(data_root)
        folder = data_root / FOLDERS[self.source]
        for file in self._published:
            if (problem := unreadable(folder / file)) not in (None, "does not exist"):
                raise UserError(f"{self.name}: {folder / file} {problem}; mend it or delete it")
        parts = self._part(data_root, train=True), self._part(data_root, train=False)
        if self._published and not self._own_name:
            self._check_published(parts, folder)
        return parts

    def shape(self, data_root: Path) -> tuple[int, int, int]:
        return super().shape(data_root) if self._published and self._own_name else SHAPES[self.source]

    def fingerprint(self, data_root: Path) -> str:
        """The source, and a hash of the content where that is not the published one."""
        if not self._published or not self._own_name:
            return self.source
        found = _digests(self.read(data_root))
        if found == list(self._published.values()):
            return self.source
        log.warning("%s: these are not the published images of %s", self.name, self.source)
        return f"{self.source} {hashlib.sha256(' '.join(found).encode()).hexdigest()}"

    def _check_published(self, parts: tuple[Images, Images], folder: Path) -> None:
        for (file, digest), found in zip(self._published.items(), _digests(parts)):
            if found != digest:
                raise UserError(
                    f"{self.name}: what {folder} holds as {file} is not what was published (SHA-256 {found[:8]}..., "
                    f"not {digest[:8]}...); delete {folder.parent} to have it downloaded again, or give changed data "
                    f"a name of their own, dataset.name=my_{self.name}"
                )

    @property
    def _published(self) -> dict[str, str]:
        """The files to be checked here; none for a set whose checksums torchvision compares whenever it reads it."""
        return PUBLISHED.get(self.source, {})

    @property
    def _own_name(self) -> bool:
        return re.sub(r"[\W_]", "", self.name).lower() != self.source.lower()

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


def _digests(parts: tuple[Images, Images]) -> list[str]:
    """SHA-256 of what the MNIST-like files must have held to be read as this: of what is trained on, whichever file
    torchvision took it from, and in the order of PUBLISHED."""
    return [_idx_digest(values) for pixels, labels in parts for values in (pixels.squeeze(1), labels)]


def _idx_digest(values: Tensor) -> str:
    """Of values 0..255 in an idx file: type and number of dimensions, their sizes, the bytes."""
    state = hashlib.sha256(struct.pack(f">{1 + values.ndim}i", 0x0800 + values.ndim, *values.shape))
    state.update(values.to(torch.uint8).contiguous().numpy())
    return state.hexdigest()


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
    if pixels.dtype != torch.uint8:
        raise ValueError(f"its pixels are {pixels.dtype}, not bytes")
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
