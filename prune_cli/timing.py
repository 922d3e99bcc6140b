"""Times of things that are to be compared: they take turns, so that a drift hits all of them alike."""

import time
from collections.abc import Callable, Mapping

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


def _timed(run: Callable[[], object], synchronise: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start
