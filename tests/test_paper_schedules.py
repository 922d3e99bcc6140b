"""The script that runs the papers' schedules: its jobs can be given as they stand, and it stops and goes on."""

import json
import tarfile
import time
from types import SimpleNamespace

import pytest
from programs import load_script

from prune_cli.build import build

script = load_script("paper_schedules")


@pytest.mark.parametrize("job", script.JOBS)
def test_a_job_composes_and_builds(job, compose):
    experiment = build(compose(*script.command(job)))
    assert experiment.dataset.name == "cifar10-jpeg" and experiment.recipe.name == "paper"
    assert experiment.recipe.pretrain.epochs >= 160


def test_jobs_end_fail_or_are_interrupted_and_what_they_left_is_kept(tmp_path, monkeypatch):
    long = "method=fp model=lenet_300_100 recipe.pretrain.epochs=100000"
    commands = {"bad": ["method=nothing"], "good": ["--help"], "long": long.split()}

    def clock() -> float:  # the time is over as soon as there is something to go on from
        return 1e9 if list(tmp_path.glob("store/dense/*.partial")) else 0

    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    options = script._parser().parse_args(["--output", str(tmp_path / "out"), "--work", str(tmp_path)])
    options.jobs, options.command, options.processes = list(commands), commands.get, 1
    states = {job: found["state"] for job, found in script.run(options).items()}
    assert states == {"bad": "failed, exit code 2", "good": "complete", "long": "interrupted"}
    assert "there is no such method" in (tmp_path / "logs/bad.log").read_text()
    (record,) = tmp_path.glob("outputs/runs/**/record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert record in script.results(tmp_path)


def test_the_store_is_carried_away_in_parts_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PART_BYTES", 1000)
    store = tmp_path / "store"
    for name, size in {"a": 600, "b": 300, "c": 500, "large": 5000}.items():
        (store / "dense" / name).mkdir(parents=True)
        (store / "dense" / name / "file").write_bytes(bytes(size))
    (store / "dense" / "d.lock").touch()
    made = [[path.parent.name for path in part] for part in script.parts(store)]
    assert made == [["b", "c"], ["a"]]
    script.keep(tmp_path / "part.tar", store, script.parts(store)[0])
    with tarfile.open(tmp_path / "part.tar") as archive:
        assert sorted(archive.getnames()) == ["dense/b/file", "dense/c/file"]
