"""What is kept of a folder of images: the digest of its content and its pixels, checked whenever they are read back."""

import logging
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from folders import bitmaps, pictures
from splits import load, same

from prune_cli.datasets.cache import CACHE
from prune_cli.datasets.folder import ImageFolder


def test_a_file_edited_to_the_same_size_is_noticed(tmp_path):
    before = bitmaps(tmp_path, [10, 20, 30, 40]).fingerprint(tmp_path)
    assert load(bitmaps(tmp_path, [10, 20, 30, 40]), tmp_path).test.pixels[1, 0, 0, 0] == 40
    edited = bitmaps(tmp_path, [10, 20, 30, 41])
    assert load(edited, tmp_path).test.pixels[1, 0, 0, 0] == 41 and edited.fingerprint(tmp_path) != before


def test_files_are_read_again_only_when_their_dates_have_changed(tmp_path, monkeypatch):
    dataset = bitmaps(tmp_path, [10, 20, 30, 40])
    monkeypatch.setattr(time, "time", lambda now=time.time(): now + 60)  # the files are no news
    before = dataset.fingerprint(tmp_path)
    (known,) = (tmp_path / CACHE).iterdir()
    read = []
    monkeypatch.setattr("prune_cli.datasets.folder.content_digest", lambda *_: read.append(1) or "0" * 64)
    assert dataset.fingerprint(tmp_path) == before and not read
    whole = known.read_bytes()
    for at in range(0, len(whole), 9):  # a flipped bit is no content
        known.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert dataset.fingerprint(tmp_path) != before
    known.write_bytes(whole)
    assert dataset.fingerprint(tmp_path) == before
    bitmaps(tmp_path, [10, 20, 30, 41])
    assert dataset.fingerprint(tmp_path) != before and len(read) == len(range(0, len(whole), 9)) + 1


def test_cache_is_written_used_and_survives_damage(folder, monkeypatch, caplog):
    fresh = load(pictures(), folder)
    (cache,) = (folder / CACHE).iterdir()
    monkeypatch.setattr(ImageFolder, "_decoded", lambda *_: pytest.fail("decoded although cached"))
    cached = load(pictures(), folder)
    assert torch.equal(fresh.train.pixels, cached.train.pixels) and torch.equal(fresh.test.pixels, cached.test.pixels)
    monkeypatch.undo()
    whole = cache.read_bytes()
    for damage in (whole[:-40], b"", whole[:400] + bytes(200) + whole[600:]):
        cache.write_bytes(damage)
        assert torch.equal(load(pictures(), folder).train.pixels, fresh.train.pixels)
        assert "cannot be read" in caplog.text and cache.read_bytes() == whole
        caplog.clear()
    np.savez(cache, train=np.zeros(3), test=np.zeros(3))
    assert torch.equal(load(pictures(), folder).train.pixels, fresh.train.pixels)


def test_no_flipped_bit_of_the_cache_is_trained_on(tmp_path, caplog):
    dataset = bitmaps(tmp_path, [10, 20, 30, 40])
    fresh = load(dataset, tmp_path)
    (cache,) = (tmp_path / CACHE).glob("*.npz")
    whole = cache.read_bytes()
    for at in range(0, len(whole), 13):
        cache.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        got = load(dataset, tmp_path)
        assert same((fresh.train.pixels, fresh.test.pixels), (got.train.pixels, got.test.pixels))


def test_a_cache_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path, caplog):
    dataset = bitmaps(tmp_path, [10, 20, 30, 40])
    fresh = load(dataset, tmp_path)
    (cache,) = (tmp_path / CACHE).glob("*.npz")
    with zipfile.ZipFile(cache, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", bytes(2**20))
        archive.writestr("test.npy", bytes(2**20))
    assert torch.equal(load(dataset, tmp_path).train.pixels, fresh.train.pixels)
    assert "more than its size" in caplog.text


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_the_cache_is_as_private_as_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        load(bitmaps(tmp_path, [10, 20, 30, 40]), tmp_path)
    finally:
        os.umask(before)
    (cache,) = (tmp_path / CACHE).glob("*.npz")
    assert cache.stat().st_mode & 0o777 == 0o666 & ~umask


def test_readers_at_once_leave_one_cache_and_sweep_what_a_killed_one_left(folder):
    (folder / CACHE).mkdir()
    left = [folder / CACHE / f"{name}.part" for name in ("old", "new")]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda _: load(pictures(), folder), range(4)))
    assert all(torch.equal(read[0].train.pixels, one.train.pixels) for one in read)
    assert {path.suffix for path in (folder / CACHE).iterdir()} == {".npz", ".part"}
    assert not left[0].exists() and left[1].exists()


def test_no_cache_where_none_can_be_written(folder, caplog):
    (folder / CACHE).write_text("in the way")
    with caplog.at_level(logging.INFO):
        assert len(load(pictures(), folder).train) == 12
    assert "not kept" in caplog.text
