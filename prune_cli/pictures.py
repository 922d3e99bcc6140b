"""Pictures of what a method removes."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

BORDER = (38, 70, 110)  # RGB between filters of a picture: no shade of grey, so no value
PICTURE = 256  # about the width of a picture of skeletons, pixels


def skeleton_picture(skeleton: Tensor) -> Tensor:
    """Skeletons (O, K, K) as a picture (height, width, 3) of uint8: one tile per filter.

    Black is zero, white the strongest of the layer (or kept, for booleans); tiles stand row by row
    in a grid as square as possible, separated by lines one pixel wide.
    """
    strength = skeleton.detach().float().abs().cpu()
    strength = strength / strength.max().clamp_min(torch.finfo(torch.float32).tiny)
    filters, kernel = strength.shape[0], strength.shape[-1]
    columns = math.ceil(math.sqrt(filters))
    rows = math.ceil(filters / columns)
    scale = max(2, min(16, PICTURE // (columns * kernel)))
    tiles = strength.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    # -1 marks what belongs to no filter: a line right of and below each tile, then unused tiles.
    tiles = pad(tiles, (0, 1, 0, 1, 0, rows * columns - filters), value=-1.0)
    side = kernel * scale + 1
    grid = tiles.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(rows * side, columns * side)
    grid = pad(grid, (1, 0, 1, 0), value=-1.0).unsqueeze(-1)
    border = torch.tensor(BORDER, dtype=torch.uint8)
    return torch.where(grid < 0, border, (255 * grid.clamp_min(0)).round().to(torch.uint8))
