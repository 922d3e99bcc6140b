"""The 8x8 handwritten digits that travel with the package: 1,437 for training, 360 for testing.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0. `digits.npz` is written by
scripts/make_digits.py and holds the split as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from prune_cli.datasets.tensors import Images, InMemoryDataset

FILE = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True)
class Digits(InMemoryDataset):
    """UCI digits: grey, 8x8, ten classes; needs no download. Pixel values are 0..16."""

    peak: ClassVar[int] = 16

    def read(self, data_root: Path) -> tuple[Images, Images]:
        """See `InMemoryDataset`; nothing is looked for under `data_root`."""
        with np.load(FILE, allow_pickle=False) as stored:
            pixels = torch.from_numpy(stored["images"]).unsqueeze(1)  # uint8 (1797, 1, 8, 8)
            labels = torch.from_numpy(stored["labels"]).long()
            test = torch.from_numpy(stored["test"])  # bool (1797,)
        return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])

    def fingerprint(self, data_root: Path) -> str:
        """Fixed, whatever the set is called in a config."""
        return "digits"
