"""Files of weights that are none, damaged or forged: a sentence, and nothing in them is run."""

import contextlib
import os
import re
import subprocess
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prune_cli.errors import UserError
from prune_cli.foreign import fill
from prune_cli.weight_files import read_weights


def saved(tmp_path, content) -> str:
    torch.save(content, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def load_foreign(model: nn.Module, path: str) -> None:
    fill(model, read_weights(path), path)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_damaged_or_absent(suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    for content, sentence in (
        (None, "does not exist"), (b"", "is empty"), (b"neither of the two", "damaged or holds no tensors"),
        (b"\x80\x02}q\x00.", "damaged or holds no tensors|holds no state dict"),
    ):  # fmt: skip
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_weights(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Path.mkdir, "is a folder, not a file"), (os.mkfifo, "is a pipe, a socket or a device"),
        (lambda path: path.symlink_to("/nonexistent"), "is a link that leads nowhere"),
        (lambda path: path.symlink_to(path), "is a link that leads nowhere"),
    ],
    ids=["folder", "pipe", "broken link", "link to itself"],
)  # fmt: skip
def test_what_is_no_file_is_a_sentence(make, sentence, suffix, tmp_path):
    make(tmp_path / f"weights{suffix}")
    with pytest.raises(UserError, match=re.escape(f"model.checkpoint={tmp_path}/weights{suffix}: {sentence}")):
        read_weights(f"{tmp_path}/weights{suffix}")


@pytest.mark.parametrize(("path", "sentence"), [("x" * 300, "File name too long"), ("a\0b", "does not exist"), ("", "does not exist")])
def test_a_path_that_can_be_none_is_a_sentence(path, sentence):
    with pytest.raises(UserError, match=sentence):
        read_weights(path)


class Runs:
    """Runs a command when it is unpickled, the way a forged file does."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "older"])
@pytest.mark.parametrize("function", [os.system, eval, print, subprocess.getoutput], ids=lambda f: f.__name__)
def test_nothing_in_a_file_is_run(function, form, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argument = "open('ran', 'w')" if function is eval else "touch ran"
    content = {"state_dict": layers().state_dict(), "more": Runs(function, argument)}
    torch.save(content, tmp_path / "forged.pth", _use_new_zipfile_serialization=form == "zip")
    with contextlib.suppress(UserError):
        load_foreign(layers(), "forged.pth")
    assert not (tmp_path / "ran").exists() and capfd.readouterr().out == ""


def test_a_sparse_tensor_beyond_its_shape_is_damage(tmp_path):
    """One column too far: still inside the tensor's memory, so that a version that does not look ends with a value."""
    beyond = torch.sparse_coo_tensor(torch.tensor([[0], [3]]), torch.ones(1), (2, 3), check_invariants=False)
    with pytest.raises(UserError, match="damaged or holds no tensors"):
        read_weights(saved(tmp_path, {"weight": beyond}))


def test_a_script_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="is a TorchScript program, of which nothing is run"):
        read_weights(str(tmp_path / "script.pt"))


def test_a_file_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path):
    small, large = tmp_path / "small.pth", tmp_path / "large.pth"
    torch.save({"weight": torch.zeros(2**20)}, small)
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as forged:
        for name in source.namelist():
            forged.writestr(name, source.read(name))
    with pytest.raises(UserError, match="unpacks to more than its own size"):
        read_weights(str(large))


def test_a_dictionary_in_itself_and_a_network_in_itself_are_looked_into_once(tmp_path):
    state = layers().state_dict()
    ring = {"state_dict": None, "weights": state}
    ring["state_dict"] = ring["again"] = ring
    load_foreign(layers(), saved(tmp_path, ring))
    network = layers()
    network._modules["5"] = network
    assert read_weights(saved(tmp_path, network)).keys() == state.keys()


@pytest.mark.parametrize("suffix", [".pth", ".t7", ".safetensors"])
def test_a_damaged_file_is_a_sentence_or_other_numbers(suffix, tmp_path):
    """Never another error: bytes are changed all over the file."""
    path, state = tmp_path / f"w{suffix}", nn.Linear(2, 2).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(len(whole), size=random.integers(1, 4))] = random.integers(256)
        path.write_bytes(damaged[: len(whole) if random.random() < 0.8 else random.integers(len(whole))].tobytes())
        with contextlib.suppress(UserError):
            load_foreign(nn.Linear(2, 2), str(path))
