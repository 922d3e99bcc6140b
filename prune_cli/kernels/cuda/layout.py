"""What the CUDA kernel is given: the surviving stripes laid out for it, and its tiles of the image.

Pure arithmetic on the CPU; `stripe_conv.cu` explains the computation.
"""

from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_cli.kernels.operation import Operation

ROW_BYTES = 64  # the same constants as in stripe_conv.cu
STAGES = 4
WARP = 32
MATHS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILTERS_PER_STRIPE = 2  # most filters of a group, as a multiple of its most stripes: empty ones cost time as well


@dataclass(frozen=True)
class Tuning:
    """How the kernel computes; macros of stripe_conv.cu.

    warps     of a block, 32 threads each
    m_tiles   a warp multiplies 16 * m_tiles pixels
    stripes   most stripes of a block, a multiple of 16
    convert   whether the input is made channels_last first
    """

    warps: int
    m_tiles: int
    stripes: int
    convert: bool = False

    @property
    def pixels(self) -> int:
        """Of a tile."""
        return 16 * self.m_tiles * self.warps

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def turn(self) -> int:
        """Outputs that a warp gathers at once."""
        return WARP * (4 if self.pixels >= 128 else 2 if self.pixels >= 64 else 1)


@dataclass(frozen=True)
class Packed:
    """The surviving stripes of an operation, in groups of whole filters that a block can hold.

    weights   (chunks, S, channels of a chunk): 64 bytes per stripe and chunk, zero beyond the last channel
    bias      (O,) float32
    tables    int32, the tables of stripe_conv.cu behind each other
    """

    weights: Tensor
    bias: Tensor
    tables: Tensor
    groups: int
    phases: int

    @property
    def chunks(self) -> int:
        return self.weights.shape[0]


@dataclass(frozen=True)
class Geometry:
    """Struct Geometry of stripe_conv.cu, field by field."""

    images: int
    channels: int
    filters: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    stripes: int
    groups: int
    phases: int
    positions: int
    chunks: int
    tile_images: int
    tile_rows: int
    tile_columns: int
    tiles_h: int
    tiles_w: int
    first_h: int
    last_h: int
    first_w: int
    last_w: int
    capacity: int
    sums_at: int
    sources_at: int
    targets_at: int
    x_channels_last: int
    y_channels_last: int
    relu: int

    @property
    def blocks(self) -> int:
        tiles = -(-self.images // self.tile_images) * self.tiles_h * self.tiles_w
        return tiles * self.groups

    @property
    def shared_bytes(self) -> int:
        return self.targets_at + 8 * self.capacity

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        return astuple(self)


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis: `count` of `size` rows of a phase, overlapping by the halo.

    first, last   least and largest shift of the kernel positions, in rows of a phase
    """

    size: int
    count: int
    first: int
    last: int

    def most_outputs(self, total: int) -> int:
        """Of one tile, where all have `total`; the limits are those of `Tile::range` in stripe_conv.cu."""
        fresh = self.size - (self.last - self.first)
        limits = [min(total, max(0, index * fresh - self.first)) for index in range(1, self.count)]
        return max(end - begin for begin, end in pairwise([0, *limits, total]))


def fits(operation: Operation, tuning: Tuning) -> bool:
    """Whether a block can hold every filter, and a tile an output with its halo."""
    (first_h, last_h), (first_w, last_w) = _shifts(operation)
    largest = int(operation.pattern.flatten(1).sum(1).max())
    return largest <= tuning.stripes and (last_h - first_h + 1) * (last_w - first_w + 1) <= tuning.pixels


def pack(operation: Operation, tuning: Tuning, math: str) -> Packed:
    """The operation (on the CPU) for the kernel that multiplies as `math` says, one of MATHS."""
    alive = operation.pattern.permute(1, 2, 0).nonzero().tolist()
    phases = sorted({_phase(operation, i, j) for i, j, _ in alive})
    of_filter: list[list[_Stripe]] = [[] for _ in range(operation.filters)]
    for number, (i, j, o) in enumerate(alive):
        of_filter[o].append(_Stripe(number, i * operation.kernel[1] + j, phases.index(_phase(operation, i, j))))

    groups, entries, order = [], [], []
    for first, end in _groups([len(stripes) for stripes in of_filter], tuning.stripes):
        by_filter = [stripe for stripes in of_filter[first:end] for stripe in stripes]
        members = sorted(by_filter, key=lambda stripe: stripe.phase)
        starts = [sum(stripe.phase < phase for stripe in members) for phase in range(len(phases) + 1)]
        groups.append([first, end, len(order), *starts])
        row = {stripe.number: at for at, stripe in enumerate(members)}
        entries += [row[stripe.number] + (stripe.position << 16) for stripe in by_filter]
        order += [stripe.number for stripe in members]

    starts = accumulate((len(stripes) for stripes in of_filter), initial=0)
    positions = [
        number for i in range(operation.kernel[0]) for j in range(operation.kernel[1])
        for number in (*_shift(operation, i, j), *_phase(operation, i, j))
    ]  # fmt: skip
    tables = [*chain.from_iterable(groups), *starts, *entries, *positions, *chain.from_iterable(phases)]
    weights = _in_chunks(operation.stripes[order], math)
    return Packed(weights, operation.bias, torch.tensor(tables, dtype=torch.int32), len(groups), len(phases))


def tiles(
    operation: Operation, packed: Packed, tuning: Tuning, size: tuple[int, int, int], x_channels_last: bool,
    y_channels_last: bool,
) -> Geometry:
    """The tiles of images (N, H, W) = `size`, as few as possible."""
    number, height, width = size
    (first_h, last_h), (first_w, last_w) = _shifts(operation)
    rows, columns = -(-height // operation.stride[0]), -(-width // operation.stride[1])  # of the largest phase
    out_height, out_width = operation.output_size(height, width)

    def cover(across: Axis) -> tuple[int, Axis] | None:
        """Images of a tile and its rows, beside these columns."""
        down = _axis(min(rows, tuning.pixels // across.size), rows, first_h, last_h)
        if down is None:
            return None
        whole = down.count == across.count == 1
        return (min(number, tuning.pixels // (down.size * across.size)) if whole else 1), down

    found = []
    for wide in range(min(columns, tuning.pixels), 0, -1):
        if (across := _axis(wide, columns, first_w, last_w)) and (covered := cover(across)):
            images, down = covered
            found.append((-(-number // images) * down.count * across.count, len(found), images, down, across))
    _, _, images, down, across = min(found)
    most = images * down.most_outputs(out_height) * across.most_outputs(out_width)
    capacity = -(-most // tuning.turn) * tuning.turn
    stages = STAGES * (tuning.pixels + tuning.stripes) * ROW_BYTES
    # With a single phase nothing is copied any more when the partial sums come: they lie over the stages.
    sums_at = stages if packed.phases > 1 else 0
    sources_at = max(stages, sums_at + 4 * tuning.stripes * (tuning.pixels + 4))
    positions = operation.pattern[0].numel()
    return Geometry(
        number, operation.channels, operation.filters, height, width, out_height, out_width, *operation.stride,
        len(operation.stripes), packed.groups, packed.phases, positions, packed.chunks,
        images, down.size, across.size, down.count, across.count, first_h, last_h, first_w, last_w, capacity,
        sums_at, sources_at, sources_at + 2 * positions * capacity, x_channels_last, y_channels_last, operation.relu,
    )  # fmt: skip


class _Stripe(NamedTuple):
    number: int  # in operation.stripes
    position: int  # in the kernel
    phase: int


def _groups(stripes: list[int], most: int) -> list[tuple[int, int]]:
    """[first, end) of consecutive filters with at most `most` stripes together; where it can be had
    they begin at multiples of four, which the kernel writes at once."""
    found, first, held, o = [], 0, 0, 0
    while o < len(stripes):
        step = 4 if o % 4 == 0 and sum(stripes[o : o + 4]) <= most else 1
        more = sum(stripes[o : o + step])
        if o > first and (held + more > most or o - first >= FILTERS_PER_STRIPE * most):
            found.append((first, o))
            first, held = o, 0
        o, held = min(o + step, len(stripes)), held + more
    return [*found, (first, len(stripes))]


def _in_chunks(stripes: Tensor, math: str) -> Tensor:
    """(S, C) to (chunks, S, channels of a chunk)."""
    dtype = MATHS[math]
    if math == "tf32":  # to the nearest; the hardware would cut
        stripes = ((stripes.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    channels = ROW_BYTES // dtype.itemsize
    padded = F.pad(stripes.to(dtype), (0, -stripes.shape[1] % channels))
    return padded.unflatten(1, (-1, channels)).transpose(0, 1).contiguous()


def _axis(size: int, rows: int, first: int, last: int) -> Axis | None:
    """Tiles of `size` that cover `rows`; None where the halo leaves nothing of them."""
    if size >= rows:
        return Axis(rows, 1, first, last)
    fresh = size - (last - first)
    return Axis(size, -(-(rows - size) // fresh) + 1, first, last) if fresh > 0 else None


def _phase(operation: Operation, i: int, j: int) -> tuple[int, int]:
    """Remainder of the rows and columns that kernel position (i, j) reads."""
    (p, q), (s, t) = operation.padding, operation.stride
    return (i - p) % s, (j - q) % t


def _shift(operation: Operation, i: int, j: int) -> tuple[int, int]:
    """Output (h, w) reads pixel (h + shift) of the phase at kernel position (i, j)."""
    (p, q), (s, t) = operation.padding, operation.stride
    return (i - p) // s, (j - q) // t


def _shifts(operation: Operation) -> tuple[tuple[int, int], tuple[int, int]]:
    """Least and largest shift of the positions that survive anywhere, in rows and in columns."""
    shifts = [_shift(operation, i, j) for i, j in operation.pattern.any(0).nonzero().tolist()] or [(0, 0)]
    return tuple((min(along), max(along)) for along in zip(*shifts, strict=True))
