"""Where compiled kernels and measured plans are kept: a folder of the user's, outside every run and model."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """PRUNE_CACHE, else prune-cli in the system's cache folder. May not exist yet."""
    if folder := os.environ.get("PRUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune-cli"


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or nothing, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)
