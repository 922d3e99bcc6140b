"""The command line, killed and called again: nothing is lost, nothing is trained twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.pipeline import run

ROOT = Path(__file__).parents[1]
# A user's own small network. An epoch of SMALL takes long enough to die in its middle.
MODEL = "name: tiny\n_target_: tiny.TinyResNet\n"
SMALL = [
    "model=tiny", "recipe=smoke", "recipe.limit=400", "recipe.pretrain.batch_size=8", "recipe.pretrain.epochs=4",
    "runtime.latency_seconds=0.01",
]  # fmt: skip
QUICK = ["model=tiny", "debug=default"]


class Place:
    """A folder to run in, with a store."""

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.folder, self.store = folder, store or folder / "store"
        (folder / "conf/model").mkdir(parents=True, exist_ok=True)
        (folder / "conf/model/tiny.yaml").write_text(MODEL)

    def start(self, *overrides: str) -> subprocess.Popen:
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PRUNE_STORE": str(self.store),
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "prune_cli", "--config-dir", "conf", *overrides], cwd=self.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs the tests behind
        )  # fmt: skip

    def run(self, *overrides: str) -> str:
        """The output of a run that has to end well."""
        job = self.start(*overrides)
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        assert err == ""
        return out

    def stop(self, when: str, how: signal.Signals, *overrides: str) -> tuple[int, str, str]:
        """Send a signal in the middle of the epoch after the line that begins with `when`."""
        job = self.start(*overrides)
        seen = []
        for line in job.stdout:
            seen.append(line)
            if line.startswith(when):
                break
        time.sleep(0.05)
        assert job.poll() is None, job.stderr.read()
        job.send_signal(how)
        out, err = job.communicate(timeout=60)
        return job.returncode, "".join(seen) + out, err

    def weights(self) -> dict[str, dict]:
        """By stage and key."""
        files = [file for file in self.store.glob("*/*/*.safetensors") if ".damaged-" not in file.parent.name]
        return {str(file.relative_to(self.store)): load_file(file) for file in files}

    def artifacts(self) -> dict[str, int]:
        return {str(f.relative_to(self.store)): f.stat().st_mtime_ns for f in self.store.glob("*/*/*")}

    def records(self) -> list[dict]:
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("outputs/runs/*/*/record.json"))]

    def leftovers(self) -> list[str]:
        return [f.name for f in self.store.glob("*/*") if f.suffix in (".partial", ".tmp", ".new")]


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys() and all(bool((a[file][n] == b[file][n]).all()) for n in a[file]) for file in a
    )


def _table(out: str) -> str:
    """What is printed from the title of the table on, without the run's own folder."""
    return re.sub(r"\d{4}-\d\d-\d\d_[\d-]+(_\d+)?", "TIME", out[out.index("stripe-") :])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Place:
    """An uninterrupted run."""
    place = Place(tmp_path_factory.mktemp("whole"))
    place.out = place.run(*SMALL)
    return place


def test_killed_twice_in_the_middle_of_an_epoch_and_resumed_is_the_same(whole, tmp_path):
    place = Place(tmp_path)
    for stage in ("dense", "sparse"):
        code, out, _ = place.stop(f"{stage}  epoch 2/4", signal.SIGKILL, *SMALL)
        assert code == -signal.SIGKILL and f"{stage}  epoch 4/4" not in out
        assert [name.partition(".")[2] for name in place.leftovers() if name.endswith("partial")] == ["partial"]
    assert place.weights().keys() == {name for name in whole.weights() if name.startswith("dense")}
    out = place.run(*SMALL)
    assert "dense: found in the store" in out and re.search(r"sparse: resumed after epoch [23] of 4", out)
    assert _same(whole.weights(), place.weights()) and place.leftovers() == []
    ours, theirs = place.records()[-1], whole.records()[0]
    for stage, expected in zip(ours["stages"], theirs["stages"], strict=True):
        same = set(stage) - {"seconds", "latency", "cached"}
        assert {name: stage[name] for name in same} == {name: expected[name] for name in same}
    # The run folder is as whole as that of a run without interruption.
    mine, other = (min(p.folder.glob("outputs/runs/*/*/record.json")).with_name("metrics.csv") for p in (place, whole))
    assert mine.read_text() == other.read_text()


def test_a_second_run_trains_nothing_and_prints_the_same(whole):
    before = whole.artifacts()
    out = whole.run(*SMALL)
    assert "epoch" not in out and out.count("found in the store") == 4
    assert _table(out) == _table(whole.out)
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
        assert _same({"": files[0]}, {"": files[1]})
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
    code, out, err = place.stop("dense  epoch 2/4", signal.SIGINT, *SMALL)
    assert code == 130
    assert err == "prune-cli: interrupted; the same command resumes from the last finished epoch\n"
    assert "Traceback" not in out and "interrupted" not in out
    (record,) = place.records()
    assert record["status"] == "interrupted" and "same command" in record["failure"]
    assert "partial" in {name.partition(".")[2] for name in place.leftovers()} and not place.weights()


def test_a_sweep_over_ratios_ends_where_a_fresh_run_ends(tmp_path):
    warm, cold = Place(tmp_path / "warm"), Place(tmp_path / "cold")
    warm.run(*QUICK, "-m", "ratio=0.5,0.3")
    (record,) = [record for record in warm.records() if record["ratio"] == 0.3]
    assert {s["stage"]: s["cached"] for s in record["stages"]} == {
        "dense": True, "sparse": True, "pruned": False, "random": False,
    }  # fmt: skip
    cold.run(*QUICK, "ratio=0.3")
    fresh, reused = cold.weights(), warm.weights()
    assert len(fresh) == 9 and _same(fresh, {file: reused[file] for file in fresh})


def test_two_of_the_same_at_once_train_once(tmp_path):
    place = Place(tmp_path)
    jobs = [place.start(*QUICK) for _ in range(2)]
    outs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outs
    trained = [line for out, _ in outs for line in out.splitlines() if re.match(r"(dense|sparse)  epoch", line)]
    assert sorted(line.split()[0] for line in trained) == ["dense", "sparse"]
    assert _table(outs[0][0]) == _table(outs[1][0])
    first, second = place.records()
    assert sorted(a["cached"] + b["cached"] for a, b in zip(first["stages"], second["stages"])) == [1, 1, 1, 1]
    assert len(list(place.folder.glob("outputs/runs/*/*"))) == 2


def test_a_damaged_artifact_is_shown_and_made_again(whole, tmp_path):
    place = Place(tmp_path)
    shutil.copytree(whole.store, place.store)
    (model,) = place.store.glob("pruned/*/model.safetensors")
    model.write_bytes(model.read_bytes()[:-10])
    (line,) = [line for line in place.run(*SMALL).splitlines() if "set aside" in line]
    assert line.startswith(f"Warning: {model.parent}") and "model.safetensors has changed; set aside as " in line
    (log,) = place.folder.glob("outputs/runs/*/*/run.log")
    assert "set aside" in log.read_text()
    assert _same(place.weights(), whole.weights())


def test_a_device_that_is_not_there_is_refused_before_anything_else(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    experiment = build(compose("runtime.device=cuda"))
    with pytest.raises(UserError, match="runtime.device=cuda: torch finds no CUDA device here"):
        run(experiment, tmp_path / "run", command="test")
    assert not any(Path(experiment.runtime.store).iterdir())
