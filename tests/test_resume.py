"""The command line, killed and called again: nothing is lost, nothing is trained twice."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from places import SMALL, Place, same_files, table_in
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Place:
    """An uninterrupted run."""
    place = Place(tmp_path_factory.mktemp("whole"))
    place.out = place.run(*SMALL)
    return place


def test_killed_twice_in_the_middle_of_an_epoch_and_resumed_is_the_same(whole, tmp_path):
    place = Place(tmp_path)
    for stage in ("dense", "sparse"):
        code, out, _ = place.stop(f"{stage}  epoch 1/3", signal.SIGKILL, *SMALL)
        assert code == -signal.SIGKILL and f"{stage}  epoch 3/3" not in out
        assert [name.partition(".")[2] for name in place.leftovers() if name.endswith("partial")] == ["partial"]
    assert place.weights().keys() == {name for name in whole.weights() if name.startswith("dense")}
    out = place.run(*SMALL)
    assert "dense: found in the store" in out and re.search(r"sparse: resumed after epoch [12] of 3", out)
    assert same_files(whole.weights(), place.weights()) and place.leftovers() == []
    ours, theirs = place.records()[-1], whole.records()[0]
    for stage, expected in zip(ours["stages"], theirs["stages"], strict=True):
        same = set(stage) - {"seconds", "latency", "cached"}
        assert {name: stage[name] for name in same} == {name: expected[name] for name in same}
    # The run folder is as whole as that of a run without interruption.
    mine, other = (min(p.folder.glob("outputs/runs/*/*/record.json")).with_name("metrics.csv") for p in (place, whole))
    assert mine.read_text() == other.read_text()


def test_a_second_run_trains_nothing_and_prints_the_same(whole, command, monkeypatch):
    before = whole.artifacts()
    out = whole.run_here(command, monkeypatch, *SMALL)
    assert "epoch" not in out and out.count("found in the store") == 4
    assert table_in(out) == table_in(whole.out)
    assert whole.artifacts() == before
    first, second = whole.records()
    assert [s["cached"] for s in first["stages"]] == [False] * 4 and [s["cached"] for s in second["stages"]] == [True] * 4
    for record in (first, second):
        for stage in record["stages"]:
            del stage["cached"]
    assert first == second
    runs = sorted((whole.folder / "outputs/runs").glob("*/*"))
    assert len(runs) == 2
    for name in ("dense", "sparse", "pruned", "random"):
        files = [load_file(run / "checkpoints" / f"{name}.safetensors") for run in runs]
        assert same_files({"": files[0]}, {"": files[1]})
    for name in ("metrics.csv", "config.yaml", "overrides.yaml"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    tags = [_tags(run / "tensorboard") for run in runs]
    assert tags[0] == tags[1] and any(tag.startswith("skeleton/") for tag in tags[1]["sparse"] & tags[1]["pruned"])
    for run in runs:  # each line of the log once
        lines = (run / "run.log").read_text().splitlines()
        assert lines and len(set(lines)) == len(lines) and not any("Traceback" in line for line in lines)


def _tags(folder: Path) -> dict[str, set[str]]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = {stage.name: EventAccumulator(str(stage)).Reload().Tags() for stage in folder.iterdir() if stage.name != "hparams"}
    return {stage: {*tags["images"], *tags["scalars"], *tags["histograms"]} for stage, tags in found.items()}


def test_ctrl_c_says_once_that_the_same_command_resumes(tmp_path):
    place = Place(tmp_path)
    code, out, err = place.stop("dense  epoch 1/3", signal.SIGINT, *SMALL)
    assert code == 130
    assert err == "prune-cli: interrupted; the same command resumes from the last finished epoch\n"
    assert "Traceback" not in out and "interrupted" not in out
    (record,) = place.records()
    assert record["status"] == "interrupted" and "same command" in record["failure"]
    assert "partial" in {name.partition(".")[2] for name in place.leftovers()} and not place.weights()


def test_a_damaged_artifact_is_shown_and_made_again(whole, tmp_path, command, monkeypatch):
    place = Place(tmp_path)
    shutil.copytree(whole.store, place.store)
    (model,) = place.store.glob("pruned/*/model.safetensors")
    model.write_bytes(model.read_bytes()[:-10])
    (line,) = [line for line in place.run_here(command, monkeypatch, *SMALL).splitlines() if "set aside" in line]
    assert line.startswith(f"Warning: {model.parent}") and "model.safetensors has changed; set aside as " in line
    (log,) = place.folder.glob("outputs/runs/*/*/run.log")
    assert "set aside" in log.read_text()
    assert same_files(place.weights(), whole.weights())
