"""One image file as pixels: every depth, mode and orientation, scaled and turned, or refused by name."""

import io
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from splits import sentence

from prune_cli.datasets.decoding import EIGHT_BITS, open_image, pixels
from prune_cli.datasets.files import ImageFiles
from prune_cli.errors import UserError

RAMP = np.array([[0, 1, 16, 100], [128, 200, 254, 255]], dtype=np.uint8)


@pytest.fixture
def decoded(tmp_path):
    """What a file with this content is read as, uint8 (C, H, W)."""

    def decode(content: bytes, channels: int = 1) -> np.ndarray:
        (tmp_path / "x.png").write_bytes(content)
        files = ImageFiles("mine", tmp_path, ["x.png"], torch.tensor([0]), ["a"], Counter())
        return pixels(open_image(files, 0, channels)).numpy()

    return decode


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: bytes, bits: int, kind: int = 1, black: int = 1, width: int = 4, height: int = 2) -> bytes:
    """A TIFF of one strip. kind: 1 unsigned, 2 signed. black: 1 = zero is black, 0 = zero is white."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, black), (273, 134), (277, 1), (278, height),
            (279, len(values)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("low", [0, 1, 255], ids=["times 256", "times 257", "full"])
def test_16_bits_are_scaled(kind, low, decoded):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 256 + (RAMP if low == 1 else low))
    assert (decoded(saved(deep, kind)) == RAMP).all()
    assert (decoded(saved(deep, kind), channels=3) == RAMP).all()


def test_the_depth_that_the_file_states_is_its_own(decoded):
    twelve = RAMP.astype(np.uint16) * 16
    packed = bytes(b for one, two in twelve.reshape(-1, 2) for b in (one >> 4, (one & 15) << 4 | two >> 8, two & 255))
    assert (decoded(tiff(packed, 12)) == RAMP).all()
    pgm = b"P5 4 2 4095\n" + (RAMP.astype(np.float64) / 255 * 4095).round().astype(">u2").tobytes()
    assert np.abs(decoded(pgm)[0].astype(int) - RAMP).max() <= 1
    assert (decoded(tiff((65535 - RAMP.astype(np.uint16) * 256).tobytes(), 16, black=0)) == RAMP).all()


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "F"),
        (saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "I"),
        (tiff(RAMP.astype(np.int16).tobytes(), 16, kind=2), "I"),
        (b"Pf 2 1 -1.0\n" + np.array([0.5, 1], "<f4").tobytes(), "F"),
    ],
    ids=["float", "32 bits", "signed 16 bits", "PFM"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_known_range_are_refused_by_name(content, mode, channels, decoded, tmp_path):
    with pytest.raises(UserError) as problem:
        decoded(content, channels)
    sentence(problem, "mine", str(tmp_path / "x.png"), f"mode {mode}", "save it with 8 or 16 bits")


FILES = {  # one for every mode that Pillow opens a file in
    "1": ("PNG", {}), "L": ("PNG", {}), "LA": ("PNG", {}), "P": ("PNG", {"transparency": bytes(range(256))}), "PA": ("TIFF", {}),
    "RGB": ("BMP", {}), "RGBA": ("PNG", {}), "RGBX": ("TIFF", {}), "CMYK": ("TIFF", {}), "YCbCr": ("TIFF", {}), "LAB": ("TIFF", {}),
}  # fmt: skip


@pytest.mark.parametrize("mode", sorted(EIGHT_BITS))
def test_every_mode_of_8_bits_keeps_its_range(mode, decoded):
    """Grey pixels come out as they were, in grey and in RGB, without a warning."""
    grey = Image.fromarray(RAMP)
    if mode == "1":
        image, expected = grey.convert("1", dither=Image.Dither.NONE), np.where(RAMP < 128, 0, 255)
    elif mode == "LAB":  # its lightness is not linear in grey; black and white are what they are
        expected, neutral = np.where(RAMP < 128, 0, 255), np.full_like(RAMP, 128)
        image = Image.merge("LAB", [Image.fromarray(values.astype(np.uint8)) for values in (expected, neutral, neutral)])
    else:
        through = {"PA": "LA", "CMYK": "RGB", "YCbCr": "RGB", "RGBX": "RGB"}.get(mode, mode)
        image, expected = grey.convert(through).convert(mode), RAMP
    kind, options = FILES[mode]
    content = saved(image, kind, **options)
    for channels in (1, 3):
        found = decoded(content, channels)
        assert found.shape == (channels, 2, 4) and np.abs(found.astype(int) - expected).max() <= 1


STORED = {  # by the standard: where the upright image's edges are that the first row and the first column show
    1: lambda image: image,  # top, left
    2: lambda image: image[:, ::-1],  # top, right
    3: lambda image: image[::-1, ::-1],  # bottom, right
    4: lambda image: image[::-1],  # bottom, left
    5: lambda image: image.T,  # left, top
    6: lambda image: image[:, ::-1].T,  # right, top
    7: lambda image: image[::-1, ::-1].T,  # right, bottom
    8: lambda image: image[::-1].T,  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("kind", "depth"), [("PNG", 8), ("PNG", 16), ("JPEG", 8), ("TIFF", 8), ("WEBP", 8)])
def test_images_are_turned_as_their_orientation_says(orientation, kind, depth, decoded):
    upright = np.kron(np.array([[0, 255, 0], [128, 128, 255]], dtype=np.uint8), np.ones((16, 16), np.uint8))
    lying = STORED[orientation](upright)
    image = Image.fromarray(lying.astype(np.uint16) * 257 if depth == 16 else np.ascontiguousarray(lying))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))[0]
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's
@pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_metadata_do_not_hide_the_pixels(exif, decoded):
    found = decoded(saved(Image.fromarray(np.full((16, 16), 90, np.uint8)), "JPEG", exif=exif))
    assert np.abs(found.astype(int) - 90).max() <= 1


def test_a_file_may_hold_another_format_than_it_is_named_for_but_no_program(decoded, tmp_path):
    assert (decoded(saved(Image.fromarray(RAMP), "GIF")) == RAMP).all()
    eps = saved(Image.fromarray(RAMP), "EPS")
    with pytest.raises(UserError) as problem:
        decoded(eps)
    sentence(problem, str(tmp_path / "x.png"), "it is none of BMP, GIF")


def test_more_pixels_than_pillow_decodes_are_refused_with_its_reason(decoded):
    with pytest.raises(UserError) as problem:
        decoded(b"P5 20000 20000 255\n" + bytes(4))
    sentence(problem, "exceeds limit", "replace it or remove it")
