"""One image file as pixels: 8 bits, grey or RGB, the right way up, whatever the file holds."""

import contextlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prune_cli.datasets.files import ImageFiles
from prune_cli.errors import UserError, one_line
from prune_cli.external_files import unreadable

# What a file may hold, whatever its name ends in. Not all that Pillow reads: on what begins like EPS it runs a program.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's modes of 8 bits or less, which its `convert` brings to grey and to RGB without loss of range.
EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"})
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def open_image(files: ImageFiles, index: int, channels: int) -> Image.Image:
    """Image `index`, decoded to grey (channels=1) or RGB (3), turned as its EXIF orientation says.

    16-bit values are divided by 256, those of 12 bits by 16. Transparency is dropped, as torchvision's loader does.
    Raises UserError: not an image, or one whose values have no known range.
    """
    path = files.root / files.paths[index]
    try:
        # Opened here: by its path Pillow maps a TIFF into memory, and garbles it when it has an orientation.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # metadata are damaged more often than pixels
                ImageOps.exif_transpose(image, in_place=True)
    except Exception as problem:  # whatever the parsers of a dozen formats trip over
        unknown = isinstance(problem, UnidentifiedImageError)  # which would name the file once more
        reason = f"it is none of {', '.join(FORMATS)}" if unknown else one_line(problem)
        why = unreadable(path) or f"cannot be decoded as an image ({reason})"
        raise UserError(f"{files.name}: {path} {why}; replace it or remove it") from problem
    grey = _grey(image)
    if grey is None and image.mode not in EIGHT_BITS:
        kind = {"F": "floating-point", "I": "32-bit or signed"}.get(image.mode, "other")
        raise UserError(
            f"{files.name}: {path} holds {kind} values (Pillow's mode {image.mode}), of which nothing says what is "
            f"black and what is white; save it with 8 or 16 bits per value"
        )
    image = grey or image
    image.info.pop("transparency", None)  # Pillow would look for its colour, and warn
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only one that it can be converted to
    return image.convert("L" if channels == 1 else "RGB")


def pixels(image: Image.Image) -> Tensor:
    """uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)


def _grey(image: Image.Image) -> Image.Image | None:
    """The upper 8 bits of 16-bit grey values, as Pillow itself reads 16-bit RGB, and of 12-bit ones in TIFF theirs;
    None for all else."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):  # PGM is scaled to 16 bits
        return None
    tags = getattr(image, "tag_v2", {})
    values = (np.asarray(image) >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
    return Image.fromarray(~values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values)
