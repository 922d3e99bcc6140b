#!/usr/bin/env python3
"""Write prune_cli/datasets/digits.npz from scikit-learn's copy of the UCI digits.

    python scripts/make_digits.py          needs scikit-learn, which prune-cli itself does not

images uint8 (1797, 8, 8) with values 0..16, labels uint8 (1797,), test bool (1797,): 360 images,
stratified by class, fixed for good. The same input gives the same bytes.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, licensed CC BY 4.0; changed only in
its container and by the added split.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TARGET = Path(__file__).resolve().parent.parent / "prune_cli" / "datasets" / "digits.npz"

if __name__ == "__main__":
    digits = load_digits()
    indices = np.arange(len(digits.target))
    _, held_out = train_test_split(indices, test_size=360, stratify=digits.target, random_state=0)
    np.savez_compressed(
        TARGET,
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.uint8),
        test=np.isin(indices, held_out),
    )
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, test images per class {np.bincount(digits.target[held_out])}")
