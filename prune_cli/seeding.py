"""Random seeds that depend on what they are for, not on what ran before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example derive(0, "sparsify", round, epoch).

    A stage that is found in the store and one that is computed leave the next stage the same
    randomness; and an epoch draws the same batches whether or not the run was interrupted.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers on the CPU and on `device` follow from `seed` inside, and go on
    outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
