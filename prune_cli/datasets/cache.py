"""What is kept below the data root, to be read and decoded once: nothing here decides a result.

    <data root>/.prune-cli/<folders>.content           the digest of what image files hold, while their dates stay
    <data root>/.prune-cli/<content>-<C>x<H>x<W>.npz   their decoded pixels
"""

import hashlib
import logging
import os
import secrets
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from prune_cli.external_files import inflates, unreadable

log = logging.getLogger(__name__)

CACHE = ".prune-cli"  # below the data root
ABANDONED = 3600  # seconds after which what a killed process was writing is swept
# What numpy raises for damaged archives. Each array in one has a checksum (CRC-32), so that no flipped bit passes.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)


def recall_pixels(path: Path, shapes: list[tuple[int, ...]]) -> list[Tensor] | None:
    """The training and test pixels kept in `path`, None when it is absent, damaged or holds something else."""
    reason = unreadable(path)
    if reason == "does not exist":
        return None
    try:
        if reason or inflates(path):
            raise ValueError(reason or "it says that it unpacks to more than its size")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = [stored["train"], stored["test"]]
    except DAMAGED as problem:
        log.warning("%s cannot be read and will be written again (%s)", path, problem)
        return None
    if any(array.dtype != np.uint8 or array.shape != shape for array, shape in zip(arrays, shapes)):
        log.warning("%s holds something else and will be written again", path)
        return None
    return [torch.from_numpy(array) for array in arrays]


def keep_pixels(path: Path, stored: list[Tensor]) -> None:
    """Without room or permission there is no cache."""
    try:
        _put(path, lambda file: np.savez(file, train=stored[0].numpy(), test=stored[1].numpy()))
    except OSError as problem:
        log.info("the decoded images are not kept (%s): they will be decoded again next time", problem)


def recall_content(path: Path, dates: str) -> str | None:
    """The digest of the content of files with these dates, None when it is not known."""
    try:
        line = path.read_text() if unreadable(path) is None else ""
    except (OSError, ValueError):
        return None
    known, _, content = line.rpartition(" ")[0].partition(" ")
    return content if known == dates and line == _line(dates, content) else None


def keep_content(path: Path, dates: str, latest: int, content: str) -> None:
    """latest: when the last of the files was changed, in seconds since 1970. While that is not over for sure, a
    later change could bear the same date: nothing is kept then."""
    if latest > time.time() - 2:  # the coarsest dates of a file system have two seconds
        return
    try:
        _put(path, lambda file: file.write(_line(dates, content).encode()))
    except OSError as problem:
        log.info("the digest of the images is not kept (%s): they will be read again next time", problem)


def _line(dates: str, content: str) -> str:
    known = f"{dates} {content}"
    return f"{known} {hashlib.sha256(known.encode()).hexdigest()}"


def _put(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside and move it into place: what exists is whole, whoever else writes it. Its mode is what the
    umask gives, since a data root is often shared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    for part in folder.glob("*.part"):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
        except OSError:  # another's, or swept by another
            continue
