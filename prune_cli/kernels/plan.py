"""The plan of a layer: which backend computes it, chosen by measurement once per machine.

A choice holds for one operation (its pattern included) on inputs of one shape, type and memory
format. It is kept in the cache under the machine's fingerprint, never in the model.

    dense, dense-channels_last   the dense convolution      boxes   clusters of filters, see torch_plans
    positions                    a product per position     cpp:..., cupy:...  the compiled kernels and their tuning
"""

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from functools import cache
from hashlib import sha256

import torch
from torch import Tensor

from prune_cli.environment import fingerprint, machine
from prune_cli.errors import UserError
from prune_cli.kernels import cupy_backend, torch_plans
from prune_cli.kernels.cache import cache_folder, write_whole
from prune_cli.kernels.compiled import Tuning, compiled
from prune_cli.kernels.compiler import CannotBuild, library, source_hash
from prune_cli.kernels.cuda import layout
from prune_cli.kernels.cuda.source import source_hash as cuda_source_hash
from prune_cli.kernels.operation import Implementation, Operation, memory_format
from prune_cli.settings import Kernel
from prune_cli.timing import alternate, captured

log = logging.getLogger(__name__)

VERSION = 2  # raised when the candidates change
SCREENING = 0.004  # seconds for each candidate in the first heat,
FINAL = 0.012  # and for each that is nearly the fastest in the second
NEARLY = 1.25
CLOSE = 1.05  # and for each that is closer still in two more
FEW_FOR_TILES = 8  # channels; a matrix tile multiplies 32, or as many zeros
REPEAT = 10  # runs in one CUDA graph: what is measured is the device, not the launches
TORCH_PLANS = {
    "dense": torch_plans.dense,
    "dense-channels_last": lambda operation: torch_plans.dense(operation, channels_last=True),
    "positions": torch_plans.positions,
    "boxes": torch_plans.boxes,
}


def make(plan: str, operation: Operation) -> Implementation:
    """The implementation that the plan's name describes. Raises CannotBuild."""
    backend, _, arguments = plan.partition(":")
    if backend == "cpp":
        return compiled(operation, Tuning(*map(int, arguments.split(","))))
    if backend == "cupy":
        warps, m_tiles, stripes, convert = map(int, arguments.split(","))
        return cupy_backend.Layer(operation, layout.Tuning(warps, m_tiles, stripes, bool(convert)))
    return TORCH_PLANS[plan](operation)


def require(kernel: Kernel, device: torch.device) -> None:
    """Raises UserError when the named backend cannot compute on this device."""
    if kernel == "cpp":
        if device.type != "cpu":
            raise UserError("runtime.kernel=cpp computes on the CPU; use kernel=auto or device=cpu")
        can_compile(required=True)
    if kernel == "cupy":
        can_launch(required=True)
        if device.type != "cuda":
            raise UserError("runtime.kernel=cupy computes on a CUDA device; use kernel=auto or device=cuda")


def choose(operation: Operation, x: Tensor, kernel: Kernel = "auto") -> tuple[str, Implementation]:
    """The fastest plan for inputs like x, with its implementation.

    kernel   `torch`, `cpp` or `cupy` allow those backends only, `auto` all that the machine has
    """
    names = candidates(operation, x, kernel)
    if len(names) == 1:
        return names[0], make(names[0], operation)
    path = cache_folder() / "plans" / _fingerprint(torch.get_num_threads(), str(x.device)) / _key(operation, x, names)
    with suppress(OSError, ValueError, KeyError, TypeError):  # not measured yet, or damaged
        plan = json.loads(path.read_text(encoding="utf-8"))["plan"]
        if plan in names:
            return plan, make(plan, operation)
    times = measure(operation, x, names)
    plan = min(times, key=times.get)
    try:
        write_whole(path, json.dumps({"plan": plan, "ms": {n: 1e3 * t for n, t in times.items()}}).encode())
    except OSError as problem:
        log.info("The plan of a layer is not kept: %s", problem)
    return plan, make(plan, operation)


def measure(operation: Operation, x: Tensor, names: list[str]) -> dict[str, float]:
    """Shortest time of each plan, seconds. Those that are nearly the fastest run again, in turns, and
    those that are still too close to call twice more: another process may have been in the way."""
    heats = [(SCREENING, 3, math.inf), (FINAL, 8, NEARLY), (FINAL, 8, CLOSE), (FINAL, 8, CLOSE)]
    times = dict.fromkeys(names, math.inf)
    with torch.inference_mode():
        runs = {name: _bound(make(name, operation), x) for name in names}
        repeat, synchronise = 1, lambda: None
        if x.is_cuda:
            repeat, synchronise = REPEAT, torch.cuda.synchronize
            runs = {name: captured(run, repeat) for name, run in runs.items()}
        for seconds, rounds, margin in heats:
            fastest = min(times.values())
            runs = {name: run for name, run in runs.items() if times[name] <= margin * fastest}
            if len(runs) > 1:
                for name, found in alternate(runs, seconds, synchronise, rounds, warm_up=1).items():
                    times[name] = min(times[name], *found)
    return {name: time / repeat for name, time in times.items()}


def candidates(operation: Operation, x: Tensor, kernel: Kernel) -> list[str]:
    """Names of the plans worth a measurement."""
    require(kernel, x.device)
    in_torch = [name for name in TORCH_PLANS if name != "dense-channels_last" or memory_format(x) != torch.channels_last]
    if kernel == "torch":
        return in_torch
    if x.is_cuda:
        tuned = _names("cupy", cupy_backend.tunings(operation, x) if can_launch() else [])
        return tuned if kernel == "cupy" and tuned else [*in_torch, *tuned]  # no block can hold a filter of 200 stripes
    tuned = _names("cpp", _tunings(operation, x) if can_compile() else [])
    return tuned if kernel == "cpp" else [*in_torch, *tuned]


@cache
def can_compile(required: bool = False) -> bool:
    """Whether the compiled kernels can be had; said once. Raises UserError when they are required."""
    return _can(library, "cpp", required)


@cache
def can_launch(required: bool = False) -> bool:
    """Whether the CUDA kernel can be had; said once. Raises UserError when it is required."""
    return _can(cupy_backend.check, "cupy", required)


def _can(build: Callable[[], object], kernel: str, required: bool) -> bool:
    try:
        build()
    except CannotBuild as problem:
        if required:
            raise UserError(f"runtime.kernel={kernel}: {problem}; kernel=auto computes without") from problem
        log.warning("The stripe-wise convolution is computed by torch: %s", problem)
        return False
    return True


def _names(backend: str, tunings: list[Tuning] | list[layout.Tuning]) -> list[str]:
    return [f"{backend}:{','.join(str(int(number)) for number in astuple(tuning))}" for tuning in tunings]


def _tunings(operation: Operation, x: Tensor) -> list[Tuning]:
    """Few enough to be measured in a moment; each is the best for some layer of VGG-16 or ResNet-56."""
    threads, few = torch.get_num_threads(), operation.channels <= 64
    height, width = operation.output_size(*x.shape[2:])
    if len(x) * height * width > 1024:
        found = [Tuning(0, 1, tile, 128, 1) for tile in (64, 128, 256, 512)]
        # With few channels a whole image fits into the cache; with few pixels more filters share one load.
        found += [Tuning(0, 1, 1024, 16, 1), Tuning(0, 1, 1024, 64, 1), Tuning(0, 2, 256, 64, 1)] if few else []
        found += [Tuning(0, 3, tile, 64, 1) for tile in (256, 1024)] if few else []
        found += [Tuning(0, 0, tile, 128, 1) for tile in (64, 128)] if height * width <= 64 else []
    else:  # too few tiles for all threads: they share the filters
        blocks = [(1, 64), (1, 128)] if height * width > 32 else [(0, 16), (1, 64)]
        found = [Tuning(0, block, tile, 64, parts) for block, tile in blocks for parts in (1, threads, 2 * threads)]
    if len(x) >= 8 and height * width <= 64:
        parts = max(1, min(operation.filters // 32, 2 * threads))
        found += [Tuning(1, 0, 16, 128, parts), Tuning(1, 0, 32, 128, 1)]
        if len(x) > 16:
            found += [Tuning(1, 1, 16, 128, parts), Tuning(1, 1, 4, 128, parts), Tuning(1, 1, 32, 64, 1)]
    if x.dtype == torch.bfloat16 and operation.channels >= FEW_FOR_TILES and library().has_tiles():
        found += _tile_tunings(operation, len(x), height * width)
    return list(dict.fromkeys(found))


def _tile_tunings(operation: Operation, images: int, pixels: int) -> list[Tuning]:
    """Those in matrix tiles, for images whose outputs have so many pixels."""
    threads, channels = torch.get_num_threads(), operation.channels
    if images * pixels > 1024:
        found = [Tuning(2, block, tile, channels, 1) for block in (0, 3) for tile in (256, 512, 1024)]
        found += [Tuning(2, 0, 64, channels, 1)] if pixels <= 64 else []
    else:
        found = [Tuning(2, 0, tile, channels, parts) for tile in (32, 128) for parts in (1, threads, 2 * threads)]
    if images >= 8 and pixels <= 64:
        parts = max(1, min(operation.filters // 64, 2 * threads))
        found += [Tuning(3, 0, tile, channels, part) for tile in (4, 16) for part in (1, parts)]
    return found


@cache
def _fingerprint(threads: int, device: str) -> str:
    return fingerprint({**machine(device), "threads": threads})


def _key(operation: Operation, x: Tensor, names: list[str]) -> str:
    decisive = [VERSION, source_hash(), operation.identity, tuple(x.shape), x.dtype, memory_format(x), names]
    if x.is_cuda:
        decisive += [cuda_source_hash(), cupy_backend.math_of(x.dtype), torch.backends.cudnn.benchmark]
    return sha256(" ".join(map(str, decisive)).encode()).hexdigest()[:24] + ".json"


def _bound(implementation: Implementation, x: Tensor):
    return lambda: implementation(x)
