"""Random seeds that depend on what they are for, not on what ran before."""

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example derive(0, "sparsify", round, epoch).

    A stage that is found in the store and one that is computed leave the next stage the same
    randomness; and an epoch draws the same batches whether or not the run was interrupted.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
