"""Files that come from outside: why one cannot be read, and whether it is larger unpacked than it is."""

import errno
import os
import stat
import zipfile
from pathlib import Path


def unreadable(path: Path | str) -> str | None:
    """Why `path` cannot be read as a file, as the predicate of a sentence; None when it can.

    Nothing is opened: opening a named pipe would wait for somebody to write into it.
    """
    if problem := _unreachable(path):
        return problem
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        return "is a folder, not a file"
    if not stat.S_ISREG(found.st_mode):
        return "is a pipe, a socket or a device, not a file"
    if not found.st_size:
        return "is empty"
    return None if os.access(path, os.R_OK) else "cannot be read (Permission denied)"


def not_a_folder(path: Path | str) -> str | None:
    """Why `path` cannot be looked into as a folder, as the predicate of a sentence; None when it can."""
    if problem := _unreachable(path):
        return problem
    if not os.path.isdir(path):
        return "is a file, not a folder"
    return None if os.access(path, os.R_OK | os.X_OK) else "cannot be read (Permission denied)"


def inflates(path: Path | str) -> bool:
    """Whether the file is a zip archive that says it unpacks to more than its own size. What torch.save and
    numpy.savez write never does: they store tensors as they are.

    Raises zipfile.BadZipFile, RuntimeError: it begins and ends like a zip archive, but is none.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path)


def _unreachable(path: Path | str) -> str | None:
    try:
        os.stat(path)
    except OSError as problem:
        if problem.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
            return "is a link that leads nowhere"
        missing = isinstance(problem, (FileNotFoundError, NotADirectoryError))
        return "does not exist" if missing else f"cannot be read ({problem.strerror})"
    except ValueError:  # a null character in the path
        return "does not exist"
    return None
