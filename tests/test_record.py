"""The record: round trip, damage, and the record of a failure."""

import dataclasses
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prune_cli.errors import UserError
from prune_cli.published import PaperNumbers, Reference
from prune_cli.record import Latency, LayerChange, Record, StageResult, write_failure

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
settings_trees = st.dictionaries(st.text(), plain, max_size=3)
latencies = st.builds(Latency, counts, numbers, numbers, numbers, counts)
stage_results = st.builds(
    StageResult,
    stage=st.sampled_from(["dense", "sparse", "pruned", "random", "finetuned"]),
    key=st.text(),
    accuracy=numbers,
    validation=st.none() | numbers,
    best_validation=st.none() | numbers,
    best_epoch=st.none() | counts,
    parameters=counts,
    macs=counts,
    file_bytes=counts,
    latency=st.lists(latencies, max_size=2).map(tuple),
    seconds=numbers,
    cached=st.booleans(),
    nonzero=st.none() | counts,
    elementwise=st.none() | st.dictionaries(st.text(), counts),
)
pairs = st.tuples(counts, counts)
layer_changes = st.builds(LayerChange, st.text(), pairs, pairs, pairs, st.none() | settings_trees)
references = st.builds(
    Reference, *(st.text() for _ in range(2)), counts, *(st.text() for _ in range(4)), st.just("macs"), st.booleans(),
    st.none() | st.builds(PaperNumbers, dense=st.none() | numbers, accuracy=numbers),
)  # fmt: skip
records = st.builds(
    Record,
    name=st.text(),
    status=st.sampled_from(["complete", "failed", "interrupted"]),
    command=st.text(),
    config=settings_trees,
    seed=st.none() | counts,
    ratio=st.none() | numbers,
    unit=st.none() | st.text(),
    requested=st.none() | numbers,
    obtained=st.none() | numbers,
    notes=st.lists(st.text(), max_size=2).map(tuple),
    stages=st.lists(stage_results, max_size=3).map(tuple),
    machine=settings_trees,
    versions=settings_trees,
    layers=st.lists(layer_changes, max_size=2).map(tuple),
    reference=st.none() | references,
    failure=st.none() | st.text(),
    schema=st.just(1),
)


def result(stage: str, accuracy: float = 0.5) -> StageResult:
    return StageResult(stage, "k", accuracy, None, None, None, 1, 1, 1)


def record(*stages: StageResult) -> Record:
    return Record("r", "complete", "prune-cli", {}, 0, 0.5, "stripe", 0.5, 0.5, (), stages, {}, {})


SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(written=records)
def test_round_trip_is_exact(tmp_path, written):
    written.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == written


def test_a_record_from_before_zeros_were_counted(tmp_path):
    path = tmp_path / "record.json"
    record(result("dense")).write(path)
    values = json.loads(path.read_text())
    del values["stages"][0]["nonzero"], values["layers"], values["reference"]
    path.write_text(json.dumps(values))
    assert Record.read(path) == record(result("dense"))


def test_write_leaves_the_old_record_when_it_fails(tmp_path):
    path = tmp_path / "new" / "record.json"
    record(result("dense")).write(path)
    before = path.read_text()
    with pytest.raises(TypeError):
        dataclasses.replace(record(), config={"not": object()}).write(path)
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["record.json"]


FOREIGN = '{"schema": 1, "stages": [], "notes": [], "x": 0}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', FOREIGN])
def test_damage_is_a_sentence(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match="record.json: not a record"):
        Record.read(path)


def test_missing_and_foreign_records_are_sentences(tmp_path):
    with pytest.raises(UserError, match="no record can be read"):
        Record.read(tmp_path / "record.json")
    values = dataclasses.asdict(record()) | {"schema": 99}
    (tmp_path / "record.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="schema 99"):
        Record.read(tmp_path / "record.json")


def test_stage_at_and_objective():
    timed = dataclasses.replace(result("pruned", 0.7), latency=(Latency(8, 1.0, 0.9, 1.1, 5),))
    run = record(result("dense", 0.9), timed, result("random", 0.1))
    assert run.stage("dense").accuracy == 0.9 and run.stage("finetuned") is None
    assert timed.at(8).median_ms == 1.0 and timed.at(1) is None
    assert run.objective == 0.7
    assert record(*run.stages, result("finetuned", 0.8)).objective == 0.8
    assert record(result("dense")).objective is None


def test_write_failure(tmp_path):
    run_dir = tmp_path / "stripe-resnet20-digits-0.5" / "2026-01-01_00-00-00"
    config = {"ratio": 0.5, "seed": 3, "method": {"penalty": 1e-5}}
    write_failure(run_dir, "Stopped by Ctrl-C.", config=config, command="prune-cli seed=3", status="interrupted")
    run = Record.read(run_dir / "record.json")
    assert (run.name, run.status, run.failure) == ("stripe-resnet20-digits-0.5", "interrupted", "Stopped by Ctrl-C.")
    assert (run.seed, run.ratio, run.config, run.stages, run.objective) == (3, 0.5, config, (), None)
    write_failure(run_dir, "No.", config={}, command="prune-cli")
    assert Record.read(run_dir / "record.json").status == "failed"
