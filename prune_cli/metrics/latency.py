"""Time of a forward pass, measured so that models can be compared with each other."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from prune_cli.errors import StageError
from prune_cli.evaluation import difference
from prune_cli.inference import for_inference
from prune_cli.metrics.accuracy import memory_format
from prune_cli.record import Latency
from prune_cli.settings import Kernel
from prune_cli.timing import alternate, autotuned, captured

TOLERANCE = 1e-2  # relative to the largest logit: a GPU may multiply in TensorFloat-32


def measure(
    models: Mapping[str, nn.Module],
    input_shape: tuple[int, int, int],
    batches: Sequence[int] = (1, 128),
    seconds: float = 1.0,
    device: torch.device | str = "cpu",
    kernel: Kernel = "auto",
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format | None = None,
) -> dict[str, tuple[Latency, ...]]:
    """Latency of each model at each batch size, by the names of `models`.

    Evaluation mode on `device`, for inputs (batch, C, H, W) with `input_shape` = (C, H, W), in the
    memory format `layout` or else that of the model's weights. The models take turns, so that a
    drift of the machine's speed hits all of them alike, until about `seconds` per model and batch
    size are spent. On a CUDA device a run is the replay of a CUDA graph, its algorithms chosen by
    measurement. Works on copies made for inference (see `for_inference`, which `kernel` is for): the
    models stay as they are.
    """
    device = torch.device(device)
    copies = {
        name: copy.deepcopy(model).to(device=device, dtype=torch.float32).eval()
        for name, model in models.items()
    }
    layouts = {name: layout or memory_format(model) for name, model in copies.items()}
    prepared = {
        name: for_inference(model, kernel).to(dtype=dtype, memory_format=layouts[name]) for name, model in copies.items()
    }
    results: dict[str, list[Latency]] = {name: [] for name in models}
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), autotuned():
        for batch in batches:
            x_nchw = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            inputs = {name: x_nchw.contiguous(memory_format=layouts[name]) for name in copies}
            runs = {name: partial(prepared[name], inputs[name]) for name in prepared}
            for name, run in runs.items() if dtype == torch.float32 else ():
                _check_same(name, copies[name](inputs[name]), run())
            synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
            if device.type == "cuda":
                runs = {name: captured(run, repeat=1) for name, run in runs.items()}
            for name, times in alternate(runs, seconds, synchronise).items():
                results[name].append(_summary(batch, times))
    return {name: tuple(latencies) for name, latencies in results.items()}


def _check_same(name: str, expected: Tensor, found: Tensor) -> None:
    """Raises StageError: what is timed is another network than the one that was measured."""
    if not (off := difference(expected, found)) <= TOLERANCE:
        raise StageError(
            f"{name}: the copy made for inference computes something else than the network, off by {off:.1e} relative; "
            "runtime.latency_seconds=0 measures no latency"
        )


def _summary(batch: int, times: Sequence[float]) -> Latency:
    """Median and quartiles of the times in seconds, as milliseconds."""
    low, median, high = (1e3 * q for q in statistics.quantiles(times, n=4, method="inclusive"))
    return Latency(batch=batch, median_ms=median, low_ms=low, high_ms=high, runs=len(times))
