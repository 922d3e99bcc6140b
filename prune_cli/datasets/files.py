"""Image folders on disk: what is in them, and one image of them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from prune_cli.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
# What Pillow raises for files that are not, or not wholly, an image.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFiles:
    """The images below one folder of class folders, in a fixed order: by class, then by path."""

    root: Path
    paths: list[str]  # relative to root
    labels: Tensor  # int64 (N,), positions in classes
    classes: list[str]  # sorted by name


def scan(root: Path, name: str) -> ImageFiles:
    """List `root`/<class>/**/<image>. Hidden files and other kinds of files are passed over.

    Raises UserError, with `name` for the data set: no class folder, a class without an image.
    """
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise UserError(f"{name}: {root} has no class folders; it needs one folder of images per class")
    paths, labels = [], []
    for label, class_name in enumerate(classes):
        found = sorted(_images_below(root / class_name))
        if not found:
            raise UserError(f"{name}: the class folder {root / class_name} holds no image; fill it or remove it")
        paths += [f"{class_name}/{path}" for path in found]
        labels += [label] * len(found)
    return ImageFiles(root, paths, torch.tensor(labels), classes)


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.relpath(os.path.join(where, file), folder).replace(os.sep, "/")
        for where, _, files in os.walk(folder, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
    ]


def scan_pair(data_root: Path, path: str, name: str) -> tuple[ImageFiles, ImageFiles]:
    """The training images in `path`/train and the test images in `path`/test (or /val).

    path: relative to `data_root`, or absolute, or below the home folder (~).
    Raises UserError: a folder is missing, or the two disagree about the classes.
    """
    folder = data_root / Path(path).expanduser()
    train = scan(_subfolder(folder, name, "train"), name)
    test = scan(_subfolder(folder, name, "test", "val"), name)
    alone = set(train.classes) ^ set(test.classes)
    if alone:
        raise UserError(
            f"{name}: the class {min(alone)} is in only one of {train.root} and {test.root}; both need the same classes"
        )
    return train, test


def _subfolder(folder: Path, name: str, *names: str) -> Path:
    """The first of `names` that is a folder inside `folder`, else UserError."""
    for found in (folder / wanted for wanted in names):
        if found.is_dir():
            return found
    raise UserError(
        f"{name}: there is no folder {' or '.join(names)} in {folder}; put one folder of images per class there, "
        f"or set dataset.path, runtime.data_root or PRUNE_DATA"
    )


def digest(*parts: ImageFiles) -> str:
    """Hash over the relative names and the sizes of all files; their dates have no say."""
    state = hashlib.sha256()
    for files in parts:
        root = os.fspath(files.root)
        for path in files.paths:
            state.update(os.fsencode(f"{path}\0{os.stat(f'{root}/{path}').st_size}\0"))
        state.update(b"\0")
    return state.hexdigest()


def open_image(files: ImageFiles, index: int, channels: int, name: str) -> Image.Image:
    """Image `index`, decoded to grey (channels=1) or RGB (3), whatever the file holds.

    Transparency is dropped, as torchvision's loader does. Raises UserError: not an image.
    """
    path = files.root / files.paths[index]
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except UNREADABLE as problem:
        raise UserError(f"{name}: {path} cannot be decoded as an image; replace it or remove it") from problem


def pixels(image: Image.Image) -> Tensor:
    """uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)
