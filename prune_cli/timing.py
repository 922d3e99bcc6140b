"""Times of things that are to be compared: they take turns, so that a drift hits all of them alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

ROUNDS = 5  # turns that every run gets at least
TURN = 0.02  # longest turn, seconds; short against the drift of a machine's clock speed
WARM_UP = 3  # runs before the first one that counts: allocations, choice of kernels


def alternate(
    runs: Mapping[str, Callable[[], object]], seconds: float,
    synchronise: Callable[[], None] = lambda: None, rounds: int = ROUNDS, warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Times of single runs in seconds, by name, until about `seconds` per run are spent."""
    for run in runs.values():
        for _ in range(warm_up):
            _timed(run, synchronise)
    # A turn holds several short runs: what others evicted from the caches costs only the first.
    turn = min(TURN, seconds / rounds)
    times: dict[str, list[float]] = {name: [] for name in runs}
    done, start = 0, time.perf_counter()
    while done < rounds or time.perf_counter() - start < seconds * len(runs):
        for name, run in runs.items():
            end = time.perf_counter() + turn
            while True:
                times[name].append(_timed(run, synchronise))
                if time.perf_counter() >= end:
                    break
        done += 1
    return times


def captured(run: Callable[[], object], repeat: int) -> Callable[[], None]:
    """`repeat` runs in a row as one CUDA graph, which is launched at once."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what a first run compiles, loads or chooses cannot be captured
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            run()
    return graph.replay


@contextmanager
def autotuned() -> Iterator[None]:
    """cuDNN measures its algorithms and takes the fastest, as the plans of our kernels are chosen."""
    import torch

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _timed(run: Callable[[], object], synchronise: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start
