"""Runs that meet in one store: what one has made, the others find."""

import re

from places import QUICK, Place, same_files, table_in


def test_a_sweep_over_ratios_ends_where_a_fresh_run_ends(tmp_path, command, monkeypatch):
    warm, cold = Place(tmp_path / "warm"), Place(tmp_path / "cold")
    warm.run_here(command, monkeypatch, *QUICK, "-m", "ratio=0.5,0.3")
    (record,) = [record for record in warm.records() if record["ratio"] == 0.3]
    assert {s["stage"]: s["cached"] for s in record["stages"]} == {
        "dense": True, "sparse": True, "pruned": False, "random": False,
    }  # fmt: skip
    cold.run_here(command, monkeypatch, *QUICK, "ratio=0.3")
    fresh, reused = cold.weights(), warm.weights()
    assert len(fresh) == 9 and same_files(fresh, {file: reused[file] for file in fresh})


def test_two_of_the_same_at_once_train_once(tmp_path):
    place = Place(tmp_path)
    jobs = [place.start(*QUICK) for _ in range(2)]
    outs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outs
    trained = [line for out, _ in outs for line in out.splitlines() if re.match(r"(dense|sparse)  epoch", line)]
    assert sorted(line.split()[0] for line in trained) == ["dense", "sparse"]
    assert table_in(outs[0][0]) == table_in(outs[1][0])
    first, second = place.records()
    assert sorted(a["cached"] + b["cached"] for a, b in zip(first["stages"], second["stages"])) == [1, 1, 1, 1]
    assert len(list(place.folder.glob("outputs/runs/*/*"))) == 2
