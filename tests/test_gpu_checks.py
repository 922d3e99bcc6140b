"""The script for a GPU goes through all its steps; what it would measure here means nothing."""

import json
import subprocess

import pytest
from programs import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("gpu_checks")


def test_every_step_leaves_its_result(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path / "cache"))
    for name in ("SCREENING", "FINAL"):
        monkeypatch.setattr(f"prune_cli.kernels.plan.{name}", 0)
    monkeypatch.setattr(script, "tests", lambda options: {"tests": 0})
    options = "--device cpu --kernel torch --networks resnet56 --dtypes float32 --batches 1 --network-batches 1 --ratios 0.9 --seconds 0"
    assert script.main([*options.split(), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_checks.json").read_text())
    assert not [step for step in found["steps"].values() if "failed" in step["result"]]
    assert len(found["steps"]["layers resnet56 float32 channels_last batch 1"]["result"]) == 6
    assert found["steps"]["networks float32"]["result"]["random"]["batch 1"]["speedup"] > 0
    assert any(key.endswith("90% removed") for key in found["summary"])


def test_a_step_that_fails_does_not_end_the_rest(script, tmp_path):
    report = script.Report(tmp_path / "found.json", script._parser().parse_args(["--output", "x", "--device", "cpu"]))
    report.step("bad", lambda: 1 / 0)
    report.step("good", lambda: {"fine": 1})
    steps = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert "ZeroDivisionError" in steps["bad"]["result"]["failed"] and steps["good"]["result"] == {"fine": 1}


def test_the_tree_has_the_hash_that_git_gives_it(script, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a.py", "a/one", "a/b/two"):
        (tmp_path / name).write_text(name)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    expected = subprocess.run([*git, "write-tree", "--prefix=a/"], check=True, capture_output=True, text=True).stdout
    assert script.tree_hash(tmp_path / "a") == expected.strip()
