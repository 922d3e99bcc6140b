"""The compiled backend: hands a layer and its images to the C++ kernels."""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from prune_cli.kernels.compiler import CannotBuild, library
from prune_cli.kernels.operation import Implementation, Operation, memory_format

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their numbers in the library


@dataclass(frozen=True)
class Tuning:
    """How the kernel computes; `Tuning` in cpp/layer.h.

    layout          0: pixels are the lanes, 1: images are the lanes; 2 and 3: the same, multiplied in bfloat16
                    by matrix tiles of 32 filters x 32 lanes, where the processor has them
    block           what is summed in registers: 0: 12 filters x 1 register, 1: 6 x 4, 2: 3 x 8,
                    3: 1 x 8 over all positions of a filter, which is then written once; in tiles 0: position
                    after position, 3: all positions
    tile            pixels of a tile
    channel_block   input channels multiplied between loading and storing the sums; tiles take all
    filter_blocks   parts of the filters that threads share
    """

    layout: int
    block: int
    tile: int
    channel_block: int
    filter_blocks: int

    @property
    def in_tiles(self) -> bool:
        return self.layout in (2, 3)


def compiled(operation: Operation, tuning: Tuning, variant: str | None = None) -> Implementation:
    """The operation on the CPU, summed in float32. Half precision is read and written as it is where the
    processor has AVX-512, and converted outside elsewhere. Matrix tiles take bfloat16 only, and round the
    weights to it, as a dense convolution in bfloat16 does.

    Raises CannotBuild.
    """
    kernels = library(variant)
    if tuning.in_tiles and not kernels.has_tiles():
        raise CannotBuild("this processor has no matrix tiles for bfloat16")
    types = TYPES if kernels.has_halves() else TYPES[:1]
    layer = _Held(_prepare(kernels, operation, tuning), kernels.release_layer)
    calls: dict[tuple, tuple] = {}

    def run(x: Tensor) -> Tensor:
        if tuning.in_tiles and x.dtype != torch.bfloat16:
            raise TypeError(f"matrix tiles multiply bfloat16, not {x.dtype}")
        if x.dtype not in types:
            return run(x.float()).to(x.dtype)
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads())
        call = calls.get(key)
        if call is None:
            call = calls[key] = _arrange(kernels, layer, operation, x)
        size, layout, arranged, dense = call
        x = x if dense else x.contiguous()
        y = torch.empty(size, dtype=x.dtype, memory_format=layout)
        if y.numel():
            kernels.run(arranged.address, x.data_ptr(), y.data_ptr())
        return y

    return run


class _Held:
    """An object of the library's, released with this one; it may need others that are held."""

    def __init__(self, address: int, release: Callable[[int], None], *needs: "_Held") -> None:
        self.address, self.needs = address, needs
        weakref.finalize(self, release, address)


def _prepare(kernels: ctypes.CDLL, operation: Operation, tuning: Tuning) -> int:
    pattern = operation.pattern.to("cpu", torch.uint8).contiguous()
    stripes = operation.stripes.detach().to("cpu", torch.float32).contiguous()
    bias = operation.bias.detach().to("cpu", torch.float32).contiguous()
    shape = _integers(
        operation.channels, operation.filters, *operation.kernel, *operation.stride, *operation.padding
    )
    return kernels.prepare(
        shape, _integers(*astuple(tuning)), pattern.data_ptr(), stripes.data_ptr(), bias.data_ptr()
    )


def _arrange(kernels: ctypes.CDLL, layer: _Held, operation: Operation, x: Tensor) -> tuple:
    """Size and layout of the output, the call as the library has arranged it, whether x can be read as it is."""
    number, _, height, width = x.shape
    size = operation.output_size(height, width)
    layout = memory_format(x)
    channels_last = layout == torch.channels_last
    images = _integers(
        number, height, width, *size, int(channels_last), int(operation.relu), TYPES.index(x.dtype), torch.get_num_threads()
    )
    call = _Held(kernels.arrange(layer.address, images), kernels.release_call, layer)
    return (number, operation.filters, *size), layout, call, x.is_contiguous() or channels_last


def _integers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)
