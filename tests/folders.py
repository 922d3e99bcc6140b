"""Folders of images for tests, and the data sets that read them."""

from pathlib import Path

import numpy as np
from PIL import Image
from splits import GREY

from prune_cli.datasets.folder import ImageFolder
from prune_cli.datasets.imagenet import StreamedFolder


def mixed(tmp_path: Path) -> Path:
    """root/pictures/{train,test}/{Äpfel,梨}: six and four images per class, of mixed modes and sizes; the root."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for class_name in ("Äpfel", "梨"):
            where = tmp_path / "pictures" / part / class_name
            where.mkdir(parents=True)
            for i in range(count):
                shape = [(8, 8), (8, 8, 3), (8, 8, 4), (12, 9, 3)][i % 4]
                Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(where / f"bild {i} ü.png")
            (where / "Thumbs.db").write_bytes(b"no image")
    return tmp_path


def pictures(**changes):
    return ImageFolder(**{**GREY, "name": "mine", "path": "pictures", "resolution": 8, **changes})


def streamed(**changes):
    return StreamedFolder(**{**GREY, "name": "mine", "path": "pictures", "resolution": 8, "resize": 10, **changes})


def bitmaps(folder, values):
    """One uncompressed image per class and part: all have one size, whatever they show."""
    for number, value in enumerate(values):
        where = folder / "bitmaps" / ("train", "test")[number // 2] / ("a", "b")[number % 2]
        where.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value, 0, 0)).save(where / "0.bmp")
    return pictures(path="bitmaps")
