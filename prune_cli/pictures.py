"""Pictures of what a method removes, and the text as which a record keeps it. No torch: reports draw them too."""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

BORDER = (90, 135, 190)  # RGB between filters of a picture: no shade of grey, so no value
PICTURE = 256  # about the width of a picture of skeletons, pixels


def skeleton_picture(skeleton: np.ndarray, scale: int | None = None) -> np.ndarray:
    """Skeletons (O, KH, KW) as a picture (height, width, 3) of uint8: one tile per filter.

    Black is zero, white the strongest of the layer (or kept, for booleans); tiles stand row by row
    in a grid with about as many rows as columns, separated by lines one pixel wide. A position of the
    kernel is `scale` pixels wide, by default as many as make the picture about PICTURE wide.
    """
    strength = np.abs(skeleton.astype(np.float32))
    strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
    filters = len(strength)
    columns = math.ceil(math.sqrt(filters))
    rows = math.ceil(filters / columns)
    scale = scale or max(2, min(16, PICTURE // (columns * strength.shape[2])))
    tiles = strength.repeat(scale, axis=1).repeat(scale, axis=2)
    # -1 marks what belongs to no filter: a line right of and below each tile, then unused tiles.
    tiles = np.pad(tiles, ((0, rows * columns - filters), (0, 1), (0, 1)), constant_values=-1.0)
    height, width = tiles.shape[1:]
    grid = tiles.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    grid = np.pad(grid, ((1, 0), (1, 0)), constant_values=-1.0)[..., None]
    return np.where(grid < 0, np.uint8(BORDER), np.rint(255 * grid.clip(0)).astype(np.uint8))


def packed(skeleton: np.ndarray) -> str:
    """Booleans (O, KH, KW), True = kept, as text: one bit each, in base64."""
    return base64.b64encode(np.packbits(skeleton)).decode("ascii")


def unpacked(units: Mapping[str, Any]) -> np.ndarray | None:
    """Booleans (O, KH, KW) that `packed` made the `skeleton` of a record's layer from; None = it has none."""
    if "skeleton" not in units:
        return None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(units["skeleton"]), np.uint8), count=units["total"])
    return bits.astype(bool).reshape(-1, *np.shape(units["positions"]))
