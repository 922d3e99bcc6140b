"""Time of a forward pass, measured so that models can be compared with each other."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from prune_cli.inference import for_inference
from prune_cli.metrics.accuracy import memory_format
from prune_cli.record import Latency
from prune_cli.timing import alternate


def measure(
    models: Mapping[str, nn.Module],
    input_shape: tuple[int, int, int],
    batches: Sequence[int] = (1, 128),
    seconds: float = 1.0,
    device: torch.device | str = "cpu",
    kernel: str = "auto",
) -> dict[str, tuple[Latency, ...]]:
    """Latency of each model at each batch size, by the names of `models`.

    Float32 in evaluation mode on `device`, for inputs (batch, C, H, W) with `input_shape` =
    (C, H, W), in the memory format of the model's weights. The models take turns, so that a drift
    of the machine's speed hits all of them alike, until about `seconds` per model and batch size
    are spent. Works on copies made for inference (see `for_inference`, which `kernel` is for): the
    models stay as they are.
    """
    device = torch.device(device)
    copies = {
        name: copy.deepcopy(model).to(device=device, dtype=torch.float32).eval()
        for name, model in models.items()
    }
    prepared = {name: for_inference(model, kernel) for name, model in copies.items()}
    results: dict[str, list[Latency]] = {name: [] for name in models}
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for batch in batches:
            x_nchw = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
            inputs = {
                name: x_nchw.to(device).contiguous(memory_format=memory_format(model)) for name, model in copies.items()
            }
            runs = {name: partial(prepared[name], inputs[name]) for name in prepared}
            for name, times in alternate(runs, seconds, partial(_synchronise, device)).items():
                results[name].append(_summary(batch, times))
    return {name: tuple(latencies) for name, latencies in results.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(batch: int, times: Sequence[float]) -> Latency:
    """Median and quartiles of the times in seconds, as milliseconds."""
    low, median, high = (1e3 * q for q in statistics.quantiles(times, n=4, method="inclusive"))
    return Latency(batch=batch, median_ms=median, low_ms=low, high_ms=high, runs=len(times))
