"""The published data sets: read by torchvision, checked against what was published, missed with a sentence."""

import hashlib
import os
import struct

import numpy as np
import pytest
from splits import GREY, load, sentence

from prune_cli.datasets.torchvision_sets import PUBLISHED, TorchvisionSet
from prune_cli.errors import UserError
from prune_cli.vision import torchvision

FASHION = TorchvisionSet("my_fashion", **GREY, source="FashionMNIST")  # as the files here are not the published ones


@pytest.fixture
def fashion(tmp_path):
    """Data root with a Fashion-MNIST of 6 training and 3 test images, in the format of the original."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = (np.arange(count * 784) % 251).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    return tmp_path


@pytest.fixture
def publish(fashion, monkeypatch):
    """Makes the files of the fixture the published ones."""
    raw = fashion / "FashionMNIST/raw"
    digests = {file: hashlib.sha256((raw / file).read_bytes()).hexdigest() for file in PUBLISHED["FashionMNIST"]}
    monkeypatch.setitem(PUBLISHED, "FashionMNIST", digests)


def test_fashion_mnist_is_read_by_torchvision(fashion):
    splits = load(FASHION, fashion)
    assert (len(splits.train), len(splits.test), splits.channels, splits.resolution) == (6, 3, 1, 28)
    assert splits.train.pixels.flatten()[:300].tolist() == [i % 251 for i in range(300)]
    assert splits.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "file, keep", [("train-images-idx3-ubyte", 500), ("t10k-labels-idx1-ubyte", 9), ("t10k-labels-idx1-ubyte", 2)]
)
def test_a_truncated_file_is_a_sentence(fashion, file, keep):
    path = fashion / "FashionMNIST/raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as problem:
        load(FASHION, fashion)
    sentence(problem, "my_fashion", str(path.parent), "delete them")


@pytest.mark.parametrize("name", ["fashion_mnist", "FashionMNIST", "fashion-mnist"])
@pytest.mark.parametrize("file", PUBLISHED["FashionMNIST"])
def test_under_its_own_name_a_set_is_the_published_one_or_none(name, file, fashion, publish):
    dataset = TorchvisionSet(name, **GREY, source="FashionMNIST")
    assert len(load(dataset, fashion).train) == 6 and dataset.fingerprint(fashion) == "FashionMNIST"
    path = fashion / "FashionMNIST/raw" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError) as problem:
        load(dataset, fashion)
    sentence(problem, name, file, str(path.parent), "not what was published", "delete", f"dataset.name=my_{name}")


def test_under_another_name_a_changed_set_has_another_key(fashion, publish, caplog):
    assert FASHION.fingerprint(fashion) == "FashionMNIST" and not caplog.text
    path = fashion / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    prints = []
    for last in (b"\7", b"\x08"):
        path.write_bytes(path.read_bytes()[:-1] + last)
        prints.append(FASHION.fingerprint(fashion))
        assert load(FASHION, fashion).test.pixels.flatten()[-1] == last[0]
    assert len({*prints, "FashionMNIST"}) == 3 and "my_fashion: these are not the published images" in caplog.text
    assert FASHION.shape(fashion) == (1, 28, 6)  # as many classes as these have


def test_the_published_digests_are_those_of_the_archives_that_torchvision_knows():
    """Of both sets, every file; that the values are right only the real files show."""
    datasets = torchvision().datasets
    for source, files in PUBLISHED.items():
        known = [name.removesuffix(".gz") for name, _ in getattr(datasets, source).resources]
        assert list(files) == known and all(len(digest) == 64 for digest in files.values())


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_raw_file_that_is_no_file_is_a_sentence(fashion, file):
    path = fashion / "FashionMNIST/raw" / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError) as problem:
        load(FASHION, fashion)
    sentence(problem, "my_fashion", str(path), "is a pipe")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_data_root_that_is_no_folder_is_a_sentence(kind, tmp_path):
    root = tmp_path / "root"
    root.write_text("") if kind == "file" else root.symlink_to("/nonexistent")
    with pytest.raises(UserError) as problem:
        load(FASHION, root)
    sentence(problem, f"runtime.data_root={root}: is a {kind}", "PRUNE_DATA")


@pytest.mark.parametrize("source", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_missing_and_no_network_is_a_sentence(source, tmp_path, monkeypatch, capfd):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError) as problem:
        load(TorchvisionSet("mine", **GREY, source=source), tmp_path)
    sentence(problem, "mine: not found", str(tmp_path), "Network is unreachable", "PRUNE_DATA")
    assert capfd.readouterr() == ("", "")


def test_layouts_of_torchvision_become_one():
    from prune_cli.datasets.torchvision_sets import _images

    class Cifar:
        data, targets = np.zeros((2, 32, 30, 3), np.uint8), [1, 0]

    class Svhn:
        data, labels = np.zeros((2, 3, 32, 30), np.uint8), np.array([1, 0])

    assert _images(Cifar).pixels.shape == _images(Svhn).pixels.shape == (2, 3, 32, 30)
    assert _images(Cifar).labels.tolist() == [1, 0]
