"""Folders of images, in memory and streamed: what is read, what is said when it fails."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from folders import pictures, streamed
from splits import epoch, load, same, sentence

from prune_cli.errors import UserError
from prune_cli.vision import torchvision


def test_folder_reads_images_of_every_mode_and_size(folder):
    splits = load(pictures(), folder)
    assert (len(splits.train), len(splits.test), splits.channels, splits.classes) == (12, 8, 3, 2)
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 6
    file = folder / "pictures/train/Äpfel/bild 1 ü.png"
    assert np.array_equal(splits.train.pixels[1].permute(1, 2, 0), np.asarray(Image.open(file)))
    grey = load(pictures(channels=1, resolution=6, path=str(folder / "pictures")), folder / "elsewhere")
    assert grey.train.pixels.shape == (12, 1, 6, 6)


def test_folder_accepts_val_for_test(folder):
    (folder / "pictures/test").rename(folder / "pictures/val")
    assert len(load(pictures(), folder).test) == 8


def test_folder_content_decides_its_fingerprint(folder):
    before = pictures().fingerprint(folder)
    shutil.copytree(folder / "pictures", folder / "copy")
    assert pictures(path="copy", name="other").fingerprint(folder) == before
    assert streamed(path="copy").fingerprint(folder) == streamed().fingerprint(folder)
    prints = {before, streamed().fingerprint(folder)}
    (folder / "pictures/train/梨/bild 0 ü.png").rename(folder / "pictures/train/梨/anders.png")
    prints |= {pictures().fingerprint(folder), streamed().fingerprint(folder)}
    assert len(prints) == 4


@pytest.mark.parametrize("dataset", [pictures(), streamed()], ids=["memory", "streamed"])
def test_folder_says_what_is_missing(dataset, folder):
    with pytest.raises(UserError) as problem:
        load(dataset, folder / "empty")
    sentence(problem, "mine", "train", str(folder / "empty/pictures"), "PRUNE_DATA")
    (folder / "pictures/train/leer").mkdir()
    with pytest.raises(UserError) as problem:
        load(dataset, folder)
    sentence(problem, "leer", "no image")
    shutil.copy(next((folder / "pictures/test/梨").glob("*.png")), folder / "pictures/train/leer")
    with pytest.raises(UserError) as problem:
        load(dataset, folder)
    sentence(problem, "leer", "only one of")
    shutil.rmtree(folder / "pictures/test")
    with pytest.raises(UserError) as problem:
        load(dataset, folder)
    sentence(problem, "test or val", str(folder / "pictures"))
    shutil.rmtree(folder / "pictures/train")
    (folder / "pictures/train").mkdir()
    with pytest.raises(UserError) as problem:
        load(dataset, folder)
    sentence(problem, "no class folders")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"no image", "cannot be decoded"), (None, "cannot be decoded")], ids=["empty", "text", "truncated"],
)  # fmt: skip
def test_a_damaged_image_is_named(folder, content, words):
    file = folder / "pictures/train/梨/bild 3 ü.png"
    file.write_bytes(file.read_bytes()[:150] if content is None else content)
    with pytest.raises(UserError) as problem:
        load(pictures(), folder)
    sentence(problem, str(file), words)
    with pytest.raises(UserError) as problem:
        epoch(load(streamed(), folder, workers=int(content is None)).train, seed=0)
    sentence(problem, str(file), words)


def test_a_folder_beyond_memory_is_to_be_streamed(folder):
    with pytest.raises(UserError) as problem:
        load(pictures(resolution=1_000_000), folder)
    sentence(problem, "GiB", "dataset=imagenet")


def test_streamed_batches_depend_on_the_seed_and_not_on_the_workers(folder):
    splits = load(streamed(), folder, validation=0.5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 6, 8)
    assert (splits.channels, splits.resolution, splits.classes) == (3, 8, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = epoch(splits.train, 4, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert first[0].shape == (6, 3, 8, 8) and first[0].dtype == torch.float32
    assert same(first, epoch(load(streamed(), folder, validation=0.5, workers=1).train, 4, seed=5))
    assert same(first, epoch(splits.train, 3, seed=5)) and not same(first, epoch(splits.train, 4, seed=6))
    images, labels = epoch(splits.test)
    assert labels.tolist() == [0] * 4 + [1] * 4 and same((images, labels), epoch(splits.test))


def test_streamed_evaluation_is_resize_and_central_crop(folder):
    T = torchvision().transforms
    expected = T.Compose([T.Resize(10), T.CenterCrop(8), T.ToTensor(), T.Normalize(0.5, 0.5)])
    image = Image.open(folder / "pictures/test/Äpfel/bild 3 ü.png")
    torch.testing.assert_close(epoch(load(streamed(), folder).test)[0][3], expected(image))
    with pytest.raises(UserError) as problem:
        load(streamed(resize=7), folder)
    sentence(problem, "dataset.resize=7")
