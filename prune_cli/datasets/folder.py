"""Any pair of image folders that fits in memory: decoded once, then kept as one file of pixels."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from prune_cli.datasets.cache import CACHE, keep_content, keep_pixels, recall_content, recall_pixels
from prune_cli.datasets.decoding import open_image, pixels
from prune_cli.datasets.files import ImageFiles, content_digest, dates, say_passed_over, scan_pair
from prune_cli.datasets.tensors import Images, InMemoryDataset
from prune_cli.errors import UserError
from prune_cli.settings import Count


@dataclass(frozen=True, kw_only=True)
class ImageFolder(InMemoryDataset):
    """`path`/train/<class>/* and `path`/test/<class>/* (or val/), brought to one size.

    path: relative to the data root, or absolute. resolution: height and width in pixels; images of
    another size are cut to the largest centred square and resized. channels: 3 for RGB, 1 for grey.
    Images are turned as their EXIF orientation says, which torchvision's ImageFolder does not. The decoded
    pixels are cached below the data root, in a file named by the content.
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
        say_passed_over(self.name, *parts)
        shape = (self.channels, self.resolution, self.resolution)
        cache = data_root / CACHE / f"{_content(data_root, parts)[:32]}-{'x'.join(map(str, shape))}.npz"
        stored = recall_pixels(cache, [(len(files.paths), *shape) for files in parts])
        if stored is None:
            stored = [self._decoded(files, shape) for files in parts]
            keep_pixels(cache, stored)
        return Images(stored[0], train.labels), Images(stored[1], test.labels)

    def settings(self) -> dict[str, Any]:
        """All but where the images lie: they may be moved."""
        return {name: value for name, value in super().settings().items() if name != "path"}

    def fingerprint(self, data_root: Path) -> str:
        """Hash of the names and the content of all files."""
        return _content(data_root, scan_pair(data_root, self.path, self.name))

    def _decoded(self, files: ImageFiles, shape: tuple[int, ...]) -> Tensor:
        """uint8 (N, C, H, W). Pillow decodes outside the interpreter lock, so threads suffice."""
        result = torch.empty(len(files.paths), *shape, dtype=torch.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + 256, len(result))):
                image = open_image(files, index, self.channels)
                if image.size != (self.resolution, self.resolution):
                    image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
                result[index] = pixels(image)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(result), 256)))
        return result


def _content(data_root: Path, parts: tuple[ImageFiles, ImageFiles]) -> str:
    """`content_digest`, read anew only where a date or a size has changed."""
    roots = hashlib.sha256(os.fsencode("\0".join(os.path.realpath(files.root) for files in parts))).hexdigest()
    known, (dated, latest) = data_root / CACHE / f"{roots[:32]}.content", dates(*parts)
    content = recall_content(known, dated)
    if content is None:
        content = content_digest(*parts)
        keep_content(known, dated, latest, content)
    return content


def _memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
