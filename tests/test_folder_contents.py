"""What lies in a folder besides images, and folders that are none: named, or passed over and counted."""

import os
import shutil

import pytest
from folders import pictures, streamed
from splits import load, sentence

from prune_cli.errors import UserError


def in_the_way(folder, thing):
    """Something of that kind among the pears; its path."""
    path = folder / "pictures/train/梨/z.png"
    match thing:
        case "pipe":
            os.mkfifo(path)
        case "leads nowhere":
            path.symlink_to("/nonexistent.png")
        case "to itself":
            path.symlink_to(path)
    return path


@pytest.mark.parametrize("dataset", [pictures(), streamed()], ids=["memory", "streamed"])
@pytest.mark.parametrize(
    ("thing", "words"),
    [("pipe", "is a pipe"), ("leads nowhere", "is a link that leads nowhere"), ("to itself", "is a link that leads nowhere")],
)
def test_an_image_that_is_no_file_is_named(dataset, thing, words, folder):
    path = in_the_way(folder, thing)
    for use in (lambda: load(dataset, folder), lambda: dataset.fingerprint(folder)):
        with pytest.raises(UserError) as problem:
            use()
        sentence(problem, "mine", str(path), words, "replace it or remove it")


@pytest.mark.parametrize("to", [".", "..", "../..", "../../.."])
def test_a_link_back_to_a_folder_above_is_not_followed(folder, to, caplog):
    (folder / "pictures/train/梨/again").symlink_to(to)
    assert len(load(pictures(), folder).train) == 12
    assert "links to a folder above them (1)" in caplog.text


def test_a_link_to_another_folder_is_followed_and_so_is_a_folder_named_like_an_image(folder):
    shutil.move(folder / "pictures/train/梨", folder / "elsewhere")
    (folder / "pictures/train/梨").symlink_to(folder / "elsewhere")
    (folder / "elsewhere/more.png").mkdir()
    shutil.move(folder / "elsewhere/bild 0 ü.png", folder / "elsewhere/more.png")
    splits = load(pictures(), folder)
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("dataset", [pictures(), streamed()], ids=["memory", "streamed"])
def test_what_is_passed_over_is_counted_once_when_the_data_are_read(dataset, folder, caplog):
    pears = folder / "pictures/train/梨"
    for name in ("a.gif", "b.GIF", "c.jp2", "README", ".hidden.gif"):
        (pears / name).write_bytes(b"")
    (pears / "notes.txt").symlink_to("/nonexistent.txt")
    (folder / "pictures/train/beside.png").write_bytes(b"")
    dataset.fingerprint(folder)
    assert not caplog.text
    load(dataset, folder)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"mine: passed over in {folder}/pictures/train and {folder}/pictures/test: " in message
    expected = {".db": 4, ".gif": 2, ".jp2": 1, ".png outside the class folders": 1, "files without a suffix": 1,
                "links that lead nowhere": 1}  # fmt: skip
    assert ", ".join(f"{what} ({count})" for what, count in expected.items()) + "; read are .bmp .jpeg" in message


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch):
    """The superuser may read everything: the system's answer is made up."""

    def denied(path, scandir=os.scandir):
        if str(path).endswith("梨"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError) as problem:
        load(pictures(), folder)
    sentence(problem, "mine", str(folder / "pictures/train/梨"), "cannot be read (Permission denied)")


@pytest.mark.parametrize("dataset", [pictures(), streamed()], ids=["memory", "streamed"])
def test_a_file_that_goes_after_it_was_listed_is_named(dataset, folder, monkeypatch):
    gone = f"{folder}/pictures/train/梨/bild 2 ü.png"

    def stat(path, *rest, real=os.stat, **more):
        return real("/nonexistent" if path == gone else path, *rest, **more)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError) as problem:
        dataset.fingerprint(folder)
    sentence(problem, "mine", gone, "cannot be read (No such file or directory)")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 300, "File name too long"), ("a file", "is a file, not a folder"), ("broken", "is a link that leads nowhere"),
        ("nul\0l", "there is no folder train"), ("~nobody-of-this-name/x", "there is no folder train"),
    ],
)  # fmt: skip
def test_a_path_that_leads_to_no_folder(folder, path, words):
    (folder / "a file").write_text("")
    (folder / "broken").symlink_to("/nonexistent")
    with pytest.raises(UserError) as problem:
        load(pictures(path=path), folder)
    sentence(problem, "mine", words)


@pytest.mark.parametrize("root", ["a file", "broken", "x" * 300])
def test_a_data_root_that_is_no_folder(folder, root):
    (folder / "a file").write_text("")
    (folder / "broken").symlink_to("/nonexistent")
    with pytest.raises(UserError) as problem:
        load(pictures(), folder / root)
    sentence(problem, f"runtime.data_root={folder / root}", "PRUNE_DATA")
    assert len(load(pictures(path=str(folder / "pictures")), folder / root).train) == 12  # nothing is looked for there
