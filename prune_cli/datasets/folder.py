"""Any pair of image folders that fits in memory: decoded once, then kept as one file of pixels."""

import logging
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prune_cli.datasets.files import ImageFiles, digest, open_image, pixels, scan_pair
from prune_cli.datasets.tensors import Images, InMemoryDataset
from prune_cli.errors import UserError
from prune_cli.settings import Count

log = logging.getLogger(__name__)

CACHE = ".prune-cli"  # below the data root


@dataclass(frozen=True, kw_only=True)
class ImageFolder(InMemoryDataset):
    """`path`/train/<class>/* and `path`/test/<class>/* (or val/), brought to one size.

    path: relative to the data root, or absolute. resolution: height and width in pixels; images of
    another size are cut to the largest centred square and resized. channels: 3 for RGB, 1 for grey.
    The decoded pixels are cached below the data root, in a file named by the content.
    """

    path: str
    resolution: Count
    channels: Literal[1, 3] = 3

    def read(self, data_root: Path) -> tuple[Images, Images]:
        """See `InMemoryDataset`. Raises UserError: a missing or empty folder, a damaged image, or
        more pixels than memory."""
        train, test = parts = scan_pair(data_root, self.path, self.name)
        size = sum(len(files.paths) for files in parts) * self.channels * self.resolution**2
        if size > _memory():
            raise UserError(
                f"{self.name}: the decoded images take {size / 2**30:.0f} GiB, more than this machine's memory; "
                f"stream them with dataset=imagenet dataset.path={self.path}"
            )
        shape = (self.channels, self.resolution, self.resolution)
        cache = data_root / CACHE / f"{digest(*parts)[:32]}-{'x'.join(map(str, shape))}.npz"
        stored = _recall(cache, [(len(files.paths), *shape) for files in parts])
        if stored is None:
            stored = [self._decoded(files, shape) for files in parts]
            _keep(cache, stored)
        return Images(stored[0], train.labels), Images(stored[1], test.labels)

    def settings(self) -> dict[str, Any]:
        """All but where the images lie: they may be moved."""
        return {name: value for name, value in super().settings().items() if name != "path"}

    def fingerprint(self, data_root: Path) -> str:
        """Hash of the names and sizes of all files: a file edited to the same size goes unnoticed."""
        return digest(*scan_pair(data_root, self.path, self.name))

    def _decoded(self, files: ImageFiles, shape: tuple[int, ...]) -> Tensor:
        """uint8 (N, C, H, W). Pillow decodes outside the interpreter lock, so threads suffice."""
        result = torch.empty(len(files.paths), *shape, dtype=torch.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + 256, len(result))):
                image = open_image(files, index, self.channels, self.name)
                if image.size != (self.resolution, self.resolution):
                    image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
                result[index] = pixels(image)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(result), 256)))
        return result


def _memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _recall(cache: Path, shapes: list[tuple[int, ...]]) -> list[Tensor] | None:
    """The training and test pixels kept in `cache`, None when it is absent or damaged."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = [stored["train"], stored["test"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        log.warning("%s cannot be read and will be written again (%s)", cache, problem)
        return None
    if any(array.dtype != np.uint8 or array.shape != shape for array, shape in zip(arrays, shapes)):
        log.warning("%s holds something else and will be written again", cache)
        return None
    return [torch.from_numpy(array) for array in arrays]


def _keep(cache: Path, stored: list[Tensor]) -> None:
    """Write the cache aside and move it into place; without room or permission there is none."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".part", delete=False) as part:
            try:
                np.savez(part, train=stored[0].numpy(), test=stored[1].numpy())
                part.close()
                os.chmod(part.name, 0o644)  # a data root is often shared
                os.replace(part.name, cache)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as problem:
        log.info("the decoded images are not kept (%s): they will be decoded again next time", problem)
