"""Every measured number in README comes from a committed record."""

import subprocess
import sys
from pathlib import Path

import pytest

from prune_cli.record import Record

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/publish.py"
# A benchmark has files of its own.
RECORDS = sorted(p for p in (ROOT / "outputs/published").glob("*/*.json") if p.name != "env.json")


def test_readme_shows_what_the_records_say():
    done = subprocess.run([sys.executable, SCRIPT, "readme", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_main_job_keeps_its_promise():
    """Within one point of dense before any fine-tuning, random selection far below, three seeds."""
    records = [Record.read(path) for path in (ROOT / "outputs/published/stripe_digits").glob("*.json")]
    assert sorted(record.seed for record in records) == [0, 1, 2]
    mean = {s: sum(r.stage(s).accuracy for r in records) / len(records) for s in ("dense", "pruned", "random")}
    assert mean["pruned"] > mean["dense"] - 0.01
    assert mean["random"] < mean["pruned"] - 0.3
    assert all(record.obtained >= record.requested for record in records)


def test_the_authors_checkpoint_gives_the_authors_numbers():
    """To the printed digit, in every row."""
    records = [Record.read(path) for path in (ROOT / "outputs/published/lenet_checkpoint").glob("*.json")]
    assert len(records) == 8
    for record in records:
        paper = record.reference.paper
        assert round(100 * record.stage("dense").accuracy, 2) == paper.dense
        assert round(100 * record.objective, 2) == paper.accuracy


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)
def test_published_records_are_complete_and_say_where_they_come_from(path):
    record = Record.read(path)
    assert record.status == "complete"
    assert record.machine["cpu"] and record.versions["torch"] and record.versions["git_commit"]
