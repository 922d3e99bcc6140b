"""The CUDA backend: hands a layer and its images to the CUDA kernel, through CuPy.

CuPy compiles the source for the device on first use and keeps the result on disk. Memory is torch's:
the kernel is given plain addresses and runs on torch's current stream, so that nothing is copied,
nothing waits, and a CUDA graph can hold it (after a first run, which compiles).
"""

import weakref
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import numpy
import torch
from torch import Tensor

from prune_cli.kernels.compiler import CannotBuild
from prune_cli.kernels.cuda.layout import Geometry, Packed, Tuning, fits, pack, tiles
from prune_cli.kernels.cuda.source import defines, source
from prune_cli.kernels.operation import Operation, memory_format

LARGE = (Tuning(8, 2, 128), Tuning(8, 2, 64), Tuning(4, 2, 128), Tuning(4, 2, 64))
SMALL = (Tuning(4, 2, 64), Tuning(4, 1, 64), Tuning(2, 1, 32), Tuning(1, 1, 32))
MANY_PIXELS = 2**14  # from here on large tiles are enough of them for every multiprocessor


@dataclass(frozen=True)
class Call:
    """What is the same in every run on inputs of one shape, memory format and type.

    layout     memory format that the kernel reads
    arguments  of the kernel, behind the addresses of input and output
    """

    kernel: Any
    layout: torch.memory_format
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


class Layer:
    """The operation on the CUDA device where its tensors are; an Implementation."""

    def __init__(self, operation: Operation, tuning: Tuning) -> None:
        self.operation, self.tuning = operation, tuning
        self.handle = str(next(_handles))  # torch.compile would make a number symbolic
        _layers[self.handle] = self
        self._packed: dict[str, Packed] = {}
        self._calls: dict[tuple, Call] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.prune_cli.stripe_conv(x, self.handle)
        return self.launch(x)

    def launch(self, x: Tensor) -> Tensor:
        """Put the kernel on torch's current stream."""
        y = self.output(x)
        if not y.numel():
            return y
        math = math_of(x.dtype)
        key = (x.shape, x.stride(), math)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._prepare(x, math)
        x = x.contiguous(memory_format=call.layout)
        if x.data_ptr() % 16:  # a view that begins somewhere within other memory
            x = x.clone()
        cuda = _cupy().cuda
        stream = cuda.Stream.from_external(_Stream(torch.cuda.current_stream(x.device).cuda_stream))
        with cuda.Device(x.device.index), stream:
            call.kernel(
                (call.blocks,), (call.threads,), (x.data_ptr(), y.data_ptr(), *call.arguments),
                shared_mem=call.shared_bytes,
            )  # fmt: skip
        return y

    def output(self, x: Tensor) -> Tensor:
        """Memory for the result, in the input's memory format."""
        size = (len(x), self.operation.filters, *self.operation.output_size(*x.shape[2:]))
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))

    def _prepare(self, x: Tensor, math: str) -> Call:
        packed = self._packed.get(math)
        if packed is None:
            host = pack(self.operation.to(torch.device("cpu")), self.tuning, math)
            on_device = {name: getattr(host, name).to(x.device) for name in ("weights", "bias", "tables")}
            packed = self._packed[math] = replace(host, **on_device)
        layout, vector, geometry = shaped(self.operation, packed, self.tuning, x)
        kernel = compiled(tuple(defines(math, self.tuning, vector)), x.device.index)
        addresses = (packed.weights.data_ptr(), packed.bias.data_ptr(), packed.tables.data_ptr())
        numbers = map(numpy.int32, geometry.arguments)
        return Call(
            kernel, layout, geometry.blocks, self.tuning.threads, geometry.shared_bytes, (*addresses, *numbers)
        )


def math_of(dtype: torch.dtype) -> str:
    """One of layout.MATHS; float32 is multiplied as torch multiplies it in convolutions."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "float32"
    return {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]


def shaped(
    operation: Operation, packed: Packed, tuning: Tuning, x: Tensor
) -> tuple[torch.memory_format, bool, Geometry]:
    """(memory format that the kernel reads, whether in whole 16 bytes, the tiles)"""
    last = tuning.convert or x.is_contiguous(memory_format=torch.channels_last)
    vector = last and operation.channels * x.element_size() % 16 == 0
    number, _, height, width = x.shape
    out_last = memory_format(x) == torch.channels_last
    geometry = tiles(operation, packed, tuning, (number, height, width), last, out_last)
    return torch.channels_last if last else torch.contiguous_format, vector, geometry


def tunings(operation: Operation, x: Tensor) -> list[Tuning]:
    """Those worth a measurement for inputs like x; empty where no block can hold a filter or the halo."""
    height, width = operation.output_size(*x.shape[2:])
    wanted = LARGE if len(x) * height * width >= MANY_PIXELS else SMALL
    limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    host = operation.to(torch.device("cpu"))
    fitting = []
    for tuning in wanted:
        if fits(host, tuning):
            _, _, geometry = shaped(host, pack(host, tuning, math_of(x.dtype)), tuning, x)
            if geometry.shared_bytes <= limit:
                fitting.append(tuning)
    if x.is_contiguous(memory_format=torch.channels_last):
        return fitting
    return [replace(tuning, convert=convert) for tuning in fitting for convert in (False, True)]


def check() -> None:
    """Raises CannotBuild where the kernel cannot run; compiles it once to know."""
    if not torch.cuda.is_available():
        raise CannotBuild("torch finds no CUDA device")
    compiled(tuple(defines("float32", SMALL[-1], vector=True)), torch.cuda.current_device())


@cache
def _cupy() -> Any:
    """Imported on first use: it takes a second, and most machines have none."""
    try:
        import cupy
    except ImportError as problem:
        raise CannotBuild("CuPy cannot be imported (pip install cupy-cuda13x, or cupy-cuda12x)") from problem
    return cupy


@cache
def compiled(options: tuple[str, ...], device: int) -> Any:
    """The kernel of one configuration, allowed all the shared memory that a block can have."""
    cupy = _cupy()
    try:
        with cupy.cuda.Device(device):
            kernel = cupy.RawModule(code=source(), options=("-std=c++17", *options)).get_function("stripe_conv")
            kernel.max_dynamic_shared_size_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    except Exception as problem:  # of NVRTC, the driver, or a library that CuPy does not find
        said = " ".join(str(problem).split())[:300]
        raise CannotBuild(f"CuPy cannot compile the kernel ({said})") from problem
    return kernel


class _Stream:
    """torch's stream for CuPy, in the CUDA stream protocol."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


_layers: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()
_handles = count()


@torch.library.custom_op("prune_cli::stripe_conv", mutates_args=())
def _stripe_conv(x: Tensor, layer: str) -> Tensor:
    """One step for torch.compile, which does not look inside."""
    return _layers[layer].launch(x)


@_stripe_conv.register_fake
def _(x: Tensor, layer: str) -> Tensor:
    return _layers[layer].output(x)
