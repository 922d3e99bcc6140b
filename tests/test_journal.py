"""The journal: what reaches the terminal, run.log, metrics.csv and TensorBoard."""

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console

from prune_cli.journal import Journal
from prune_cli.pictures import BORDER, packed, skeleton_picture, unpacked

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tensorboard's own
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

VALUES = {"loss": 0.5, "accuracy": 0.25, "lr": 0.1, "penalty/skeleton": 3.0}


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)


def events(run_dir, stage: str) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard" / stage), size_guidance={"scalars": 0, "histograms": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accumulator.Reload()


def rows(run_dir) -> list[list[str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_plain_lines_csv_and_scalars(tmp_path):
    out = console()
    with Journal(tmp_path / "run", out) as journal:
        with journal.stage("sparse", epochs=2, steps_per_epoch=3) as stage:
            for epoch in (1, 2):
                for _ in range(3):
                    stage.step()
                stage.epoch(epoch, VALUES | {"loss": 1 / epoch}, {"skeleton": torch.arange(9.0)})
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("sparse  epoch 2/2  loss 0.5  accuracy 25.00%  lr 0.1  ")
    assert rows(tmp_path / "run")[:2] == [["stage", "epoch", "name", "value"], ["sparse", "1", "loss", "1.0"]]
    assert rows(tmp_path / "run")[-1] == ["sparse", "2", "penalty/skeleton", "3.0"]
    log = events(tmp_path / "run", "sparse")
    assert [(e.step, e.value) for e in log.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert log.Histograms("skeleton")[1].histogram_value.num == 9
    assert "sparse  epoch 2/2" in (tmp_path / "run" / "run.log").read_text()


def test_terminal_shows_a_bar_and_keeps_one_line():
    out = console(terminal=True)
    with Journal(None, out) as journal, journal.stage("dense", epochs=2, steps_per_epoch=2) as stage:
        for epoch in (1, 2):
            stage.step()
            stage.epoch(epoch, VALUES)
    text = out.file.getvalue()
    assert "━" in text and "epoch 2/2" in text
    assert text.count("dense  epoch 2/2  loss 0.5") == 1 and "dense  epoch 1/2  loss" not in text


def test_what_takes_a_while_is_shown_until_it_is_done_on_a_terminal_only():
    out, plain = console(terminal=True), console()
    for shown in (out, plain):
        with Journal(None, shown) as journal, journal.busy("Reading [many] images"):
            pass
    assert "Reading [many] images" in out.file.getvalue()
    assert plain.file.getvalue() == ""


def test_no_run_dir_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Journal(None, console()) as journal:
        with journal.stage("dense", 1, 1) as stage:
            stage.epoch(1, VALUES, {"w": torch.ones(2)})
        journal.replay("sparse", [VALUES])
        journal.skeletons("sparse", {"a": torch.ones(2, 3, 3)})
        journal.hyperparameters({"a": 1}, {"accuracy": 1.0})
        journal.layer_sparsity("sparse", {"a": 0.5})
    assert os.listdir(tmp_path) == []


def test_replay_logs_what_training_would_have(tmp_path):
    out = console()
    history = [VALUES, VALUES | {"loss": 0.1}]
    with Journal(tmp_path / "warm", out) as journal:
        journal.replay("dense", history)
    with Journal(tmp_path / "cold", console()) as journal, journal.stage("dense", 2, 1) as stage:
        for epoch, values in enumerate(history, 1):
            stage.epoch(epoch, values)
    assert out.file.getvalue() == "dense: found in the store, nothing to train\n"
    assert rows(tmp_path / "warm") == rows(tmp_path / "cold")
    warm, cold = ([(e.step, e.value) for e in events(tmp_path / d, "dense").Scalars("loss")] for d in ("warm", "cold"))
    assert warm == cold


def test_resumed_stage_has_the_whole_history(tmp_path):
    out = console()
    with Journal(tmp_path, out) as journal, journal.stage("dense", 2, 1) as stage:
        stage.resumed([{"loss": 2.0}])
        stage.epoch(2, {"loss": 1.0})
    assert [row[1:] for row in rows(tmp_path)[1:]] == [["1", "loss", "2.0"], ["2", "loss", "1.0"]]
    assert out.file.getvalue().startswith("dense: resumed after epoch 1 of 2\n")


def test_finished_epochs_survive_a_kill(tmp_path):
    code = (
        "import sys, os, signal; from pathlib import Path; from rich.console import Console\n"
        "from prune_cli.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), Console()) as journal, journal.stage('dense', 3, 1) as stage:\n"
        "    stage.epoch(1, {'loss': 0.5}); stage.step(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert rows(tmp_path) == [["stage", "epoch", "name", "value"], ["dense", "1", "loss", "0.5"]]


def test_an_exception_is_logged_and_handlers_are_removed(tmp_path):
    handlers = list(logging.getLogger().handlers)
    for _ in range(2):  # the second run appends
        with pytest.raises(RuntimeError), Journal(tmp_path, console()) as journal:
            with journal.stage("dense", 2, 1) as stage:
                stage.epoch(1, {"loss": 0.5})
                raise RuntimeError("out of luck")
    assert logging.getLogger().handlers == handlers
    assert "RuntimeError: out of luck" in (tmp_path / "run.log").read_text()
    assert [row[0] for row in rows(tmp_path)] == ["stage", "dense", "dense"]


def test_notes_and_warnings(tmp_path, capsys):
    out = console()
    with Journal(tmp_path, out) as journal:
        journal.note("The store is [new].")
        journal.warn("The ranking is noise.")
    assert out.file.getvalue() == "The store is [new].\nWarning: The ranking is noise.\n"
    log = (tmp_path / "run.log").read_text()
    assert "INFO The store is [new]." in log and "WARNING The ranking is noise." in log
    with Journal(None, out) as journal:
        journal.warn("Once.")
    assert capsys.readouterr() == ("", "")


def test_the_name_of_a_file_that_is_no_text_is_shown_and_logged(tmp_path):
    name = os.fsdecode(b"bild-\xff.png")
    out = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=100)
    with Journal(tmp_path, out) as journal:
        journal.warn(name)
    out.file.seek(0)
    assert "bild-\\udcff.png" in out.file.read() and "bild-\\udcff.png" in (tmp_path / "run.log").read_text()


def test_histograms_of_what_is_not_finite_or_has_no_bin(tmp_path):
    odd = {"nan": torch.tensor([1.0, float("nan")]), "none": torch.zeros(0), "bf16": torch.ones(3).bfloat16()}
    odd |= {"huge": torch.full((3,), 1e30), "large": torch.tensor([1e30, 1e19])}
    with Journal(tmp_path, console()) as journal:
        journal.histograms("sparse", 1, odd)
    assert events(tmp_path, "sparse").Tags()["histograms"] == ["nan", "bf16", "large"]


def test_skeletons_are_pictures(tmp_path):
    from PIL import Image

    skeleton = torch.rand(5, 3, 3) > 0.5
    with Journal(tmp_path, console()) as journal:
        journal.skeletons("pruned", {"layer1.conv": skeleton})
        journal.layer_sparsity("pruned", {"layer1.conv": 0.5})
    log = events(tmp_path, "pruned")
    stored = Image.open(io.BytesIO(log.Images("skeleton/layer1.conv")[0].encoded_image_string))
    assert np.array_equal(np.asarray(stored), skeleton_picture(skeleton.numpy()))
    assert log.Scalars("sparsity/layer1.conv")[0].value == 0.5


@pytest.mark.parametrize(("filters", "kernel"), [(1, (1, 1)), (5, (3, 3)), (16, (3, 3)), (512, (3, 3)), (6, (5, 5)), (5, (1, 7)), (7, (3, 2))])
def test_picture_shows_every_filter(filters, kernel):
    skeleton = torch.linspace(0, -2, filters * kernel[0] * kernel[1]).view(filters, *kernel)
    skeleton.view(-1)[-1] = -2  # also where there is only one value
    picture = torch.from_numpy(skeleton_picture(skeleton.numpy()))
    columns = int(np.ceil(np.sqrt(filters)))
    width = (picture.shape[1] - 1) // columns
    scale = (width - 1) // kernel[1]
    height = kernel[0] * scale + 1
    assert picture.dtype == torch.uint8 and picture.shape[0] == -(-filters // columns) * height + 1 and scale >= 2
    expected = (skeleton.abs() / 2 * 255).round().to(torch.uint8)
    for i in range(filters):
        y, x = 1 + i // columns * height, 1 + i % columns * width
        tile = picture[y : y + height - 1, x : x + width - 1]
        assert torch.equal(tile[scale // 2 :: scale, scale // 2 :: scale, 0], expected[i])
        assert torch.equal(tile[..., 0], tile[..., 2])
    border = torch.tensor(BORDER, dtype=torch.uint8)
    assert (picture[0] == border).all() and (picture[::height] == border).all() and (picture[:, ::width] == border).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 3), (3, 1, 7), (512, 3, 3)])
def test_a_record_keeps_a_skeleton_as_text(shape):
    kept = np.random.default_rng(0).random(shape) > 0.5
    units = {"kept": int(kept.sum()), "total": kept.size, "positions": kept.mean(0).tolist(), "skeleton": packed(kept)}
    assert np.array_equal(unpacked(json.loads(json.dumps(units))), kept)
    assert len(units["skeleton"]) <= 4 * (kept.size // 24 + 1)


def test_hparams_tab_compares_runs(tmp_path):
    """Columns of the tab are those of all runs, although methods have different settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.context import RequestContext
        from tensorboard.plugins.base_plugin import TBContext
        from tensorboard.plugins.hparams.backend_context import Context
    methods = {"a": {"name": "stripe", "penalty": 1e-5}, "b": {"name": "fp", "scope": "global", "n": None}}
    for name, method in methods.items():
        with Journal(tmp_path / name, console()) as journal:
            journal.hyperparameters({"ratio": 0.5, "method": method, "on": True}, {"accuracy/pruned": 0.9})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    request = RequestContext()
    runs = context.hparams_metadata(request, "")
    assert set(runs) == {"a/tensorboard/hparams", "b/tensorboard/hparams"}
    experiment = context.experiment_from_metadata(request, "", True, runs, [])
    names = {info.name for info in experiment.hparam_infos}
    assert names == {"ratio", "on", "method.name", "method.penalty", "method.scope"}
    assert [info.name.tag for info in experiment.metric_infos] == ["accuracy/pruned"]
