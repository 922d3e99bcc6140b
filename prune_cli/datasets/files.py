"""Image folders on disk: what is in them."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prune_cli.datasets.dataset import check_root
from prune_cli.errors import UserError
from prune_cli.external_files import not_a_folder, unreadable

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
# Raised when the same files decode to other pixels than before; it is in the keys of all results with image folders.
# 2: images are turned as their EXIF orientation says, and 16-bit values are scaled instead of clipped.
DECODING = 2


@dataclass(frozen=True)
class ImageFiles:
    """The images below one folder of class folders, in a fixed order: by class, then by path.

    name         the data set's, for sentences about them
    passed_over  how many of what else lies there, by what it is
    """

    name: str
    root: Path
    paths: list[str]  # relative to root
    labels: Tensor  # int64 (N,), positions in classes
    classes: list[str]  # sorted by name
    passed_over: Counter[str]


def scan(root: Path, name: str) -> ImageFiles:
    """List `root`/<class>/**/<image>. Hidden files and other kinds of files are passed over, and so are links back
    to a folder above them.

    Raises UserError, with `name` for the data set: no class folder, a class without an image, a folder that cannot
    be listed, an image that is no file or a link that leads nowhere.
    """
    passed_over: Counter[str] = Counter()
    entries = [entry for entry in _looked_into(str(root), name)[1] if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if os.path.isdir(entry))
    if not classes:
        raise UserError(f"{name}: {root} has no class folders; it needs one folder of images per class")
    passed_over.update(_kind(entry.path) for entry in entries if not os.path.isdir(entry))
    paths, labels = [], []
    for label, class_name in enumerate(classes):
        found = sorted(_images_below(root / class_name, name, passed_over))
        if not found:
            raise UserError(f"{name}: the class folder {root / class_name} holds no image; fill it or remove it")
        paths += [f"{class_name}/{path}" for path in found]
        labels += [label] * len(found)
    return ImageFiles(name, root, paths, torch.tensor(labels), classes, passed_over)


def _images_below(folder: Path, name: str, passed_over: Counter[str]) -> Iterator[str]:
    """Paths relative to `folder`; what is passed over is counted."""
    parents = {_identity(parent) for at in (folder.absolute(), folder.resolve()) for parent in at.parents}
    waiting, start = [(str(folder), parents)], len(str(folder)) + 1
    while waiting:
        where, above = waiting.pop()
        here, entries = _looked_into(where, name)
        if here in above:
            passed_over["links to a folder above them"] += 1
            continue
        for entry in entries:
            if _is_image(entry.name) and _is_file(entry):
                yield entry.path[start:].replace(os.sep, "/")
            elif os.path.isdir(entry):
                waiting.append((entry.path, above | {here}))
            elif _is_image(entry.name):
                raise UserError(f"{name}: {entry.path} {unreadable(entry.path)}; replace it or remove it")
            elif not entry.name.startswith("."):
                passed_over[_kind(entry.path)] += 1


def _looked_into(folder: str, name: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """Which folder it is, and what is in it."""
    try:
        with os.scandir(folder) as entries:
            return _identity(folder), list(entries)
    except OSError as problem:
        raise UserError(f"{name}: the folder {folder} cannot be read ({problem.strerror})") from problem


def _identity(folder: Path | str) -> tuple[int, int]:
    """The same for all paths of a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Costs no look at the disk, unless it is a link."""
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")


def _kind(path: str) -> str:
    """What a file that is passed over is counted as."""
    if not os.path.exists(path):
        return "links that lead nowhere"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES:
        return f"{suffix} outside the class folders"
    return suffix or "files without a suffix"


def scan_pair(data_root: Path, path: str, name: str) -> tuple[ImageFiles, ImageFiles]:
    """The training images in `path`/train and the test images in `path`/test (or /val).

    path: relative to `data_root`, or absolute, or below the home folder (~).
    Raises UserError: a folder is missing or cannot be read, or the two disagree about the classes.
    """
    inside = os.path.expanduser(path)
    if not os.path.isabs(inside):
        check_root(data_root)
    folder = data_root / inside
    train = scan(_subfolder(folder, name, "train"), name)
    test = scan(_subfolder(folder, name, "test", "val"), name)
    alone = set(train.classes) ^ set(test.classes)
    if alone:
        raise UserError(
            f"{name}: the class {min(alone)} is in only one of {train.root} and {test.root}; both need the same classes"
        )
    return train, test


def say_passed_over(name: str, *parts: ImageFiles) -> None:
    """One warning about all that was passed over, where there is something: it may have been meant to be used."""
    counts = sum((files.passed_over for files in parts), Counter())
    if counts:
        listed = ", ".join(f"{what} ({count})" for what, count in sorted(counts.items()))
        where = " and ".join(str(files.root) for files in parts)
        log.warning("%s: passed over in %s: %s; read are %s", name, where, listed, " ".join(sorted(SUFFIXES)))


def _subfolder(folder: Path, name: str, *names: str) -> Path:
    """The first of `names` that is a folder inside `folder`, else UserError."""
    for found in (folder / wanted for wanted in names):
        if os.path.isdir(found):
            return found
    for there in (folder, *(folder / wanted for wanted in names)):  # what stands in the way, if anything does
        if (problem := not_a_folder(there)) not in (None, "does not exist"):
            raise UserError(f"{name}: {there} {problem}; there must be train/ and test/, with a folder per class")
    raise UserError(
        f"{name}: there is no folder {' or '.join(names)} in {folder}; put one folder of images per class there, "
        f"or set dataset.path, runtime.data_root or PRUNE_DATA"
    )


def digest(*parts: ImageFiles) -> str:
    """Hash over the relative names and the sizes of all files; neither their dates nor what is in them has a say."""
    return _hash(parts, lambda path: f"{os.stat(path).st_size}\0".encode())


def content_digest(*parts: ImageFiles) -> str:
    """Hash over the relative names and the content of all files: 60,000 small ones are read in half a second."""
    return _hash(parts, _size_and_bytes)


def dates(*parts: ImageFiles) -> tuple[str, int]:
    """Hash over names, sizes and the times at which the files were written or changed, which another one follows
    whenever somebody writes to one of them; and the latest of the times, in seconds since 1970."""
    latest = 0

    def times(path: str) -> bytes:
        nonlocal latest
        found = os.stat(path)
        latest = max(latest, found.st_mtime_ns, found.st_ctime_ns)
        return f"{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0".encode()

    return _hash(parts, times), latest // 10**9


def _hash(parts: tuple[ImageFiles, ...], of: Callable[[str], bytes]) -> str:
    """SHA-256 over the relative name of each file and what `of` says about it.

    Raises UserError: a file that cannot be read, or has gone since it was listed.
    """
    state = hashlib.sha256(f"decoding {DECODING}\0".encode())
    for files in parts:
        root = os.fspath(files.root)
        for path in files.paths:
            try:
                state.update(os.fsencode(f"{path}\0") + of(f"{root}/{path}"))
            except OSError as problem:
                raise UserError(f"{files.name}: {root}/{path} cannot be read ({problem.strerror})") from problem
        state.update(b"\0")
    return state.hexdigest()


def _size_and_bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        content = file.read()
    return f"{len(content)}\0".encode() + content
