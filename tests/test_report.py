"""The final table at several widths, its sentences, and its Markdown."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from prune_cli.record import Latency, Record, StageResult
from prune_cli.report.stages import markdown, render, sentences, stage_table


def timed(*pairs: tuple[int, float]) -> tuple[Latency, ...]:
    return tuple(Latency(batch, ms, 0.97 * ms, 1.05 * ms, 50) for batch, ms in pairs)


def result(stage, accuracy, parameters, macs, latency=()) -> StageResult:
    return StageResult(stage, "key", accuracy, None, None, None, parameters, macs, 4 * parameters, latency)


NOTE = "The ranking of the skeleton is still noise [in 3 layers]."
RECORD = Record(
    name="stripe-resnet20-digits-0.5",
    status="complete",
    command="prune-cli method=stripe",
    config={},
    seed=7,
    ratio=0.5,
    unit="stripe",
    requested=0.5,
    obtained=0.5032,
    notes=(NOTE,),
    stages=(
        result("random", 0.1217, 141_000, 21_100_000),
        result("dense", 0.9861, 269_722, 40_814_000, timed((1, 0.4444), (128, 1023.4))),
        result("sparse", 0.98333, 14_982_474, 313_000_000),
        result("pruned", 0.9806, 140_000, 20_407_000, timed((1, 0.2222), (128, 1234.5))),
        result("finetuned", 0.9912, 140_000, 20_407_000),
    ),
    machine={"cpu": "Some CPU", "threads": 2, "device": "cpu", "gpu": None},
    versions={},
)


def shown(record: Record, width: int, paths=None) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render(record, console, paths)
    return console.file.getvalue()


def test_zeros_have_a_column_where_there_are_some():
    assert "nonzero" not in markdown(RECORD)
    stages = [dataclasses.replace(r, nonzero=r.parameters // 4) for r in RECORD.stages if r.stage != "sparse"]
    sparse = dataclasses.replace(RECORD, stages=(*stages, RECORD.stage("sparse")))
    assert markdown(sparse).count(" 25.00 |") == 4
    assert "nonzero %" in markdown(sparse)
    full = [dataclasses.replace(r, nonzero=r.parameters - 8) for r in RECORD.stages]
    assert "nonzero" not in markdown(dataclasses.replace(RECORD, stages=tuple(full)))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_nothing_is_truncated(width):
    text = shown(RECORD, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for cell in ("98.61", "269.7 k", "15.0 M", "40.8 M", "1.1 MB", "564.0 kB", "2.00x"):
        assert re.search(rf"(^|\s){re.escape(cell)}(\s|$)", text, re.M), cell
    assert "0.444 [0.431–0.467]" in text and "1234 [1197–1296]" in text
    assert text.count("stripe-resnet20-digits-0.5, seed 7") == 1


def test_one_table_where_it_fits_two_where_not():
    heads = {width: sum("stage" in line for line in shown(RECORD, width).splitlines()) for width in (80, 120)}
    assert heads == {80: 2, 120: 1}


def test_three_batch_sizes_fit_too():
    stages = [dataclasses.replace(r, latency=timed((1, 1.0), (32, 20.0), (128, 80.0))) for r in RECORD.stages]
    text = shown(dataclasses.replace(RECORD, stages=tuple(stages)), 80)
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert "batch 32" in text and "batch 128" in text


def test_rows_in_order_and_the_control_is_labelled():
    rows = [line.split("|")[1].strip() for line in markdown(RECORD).splitlines()[2:]]
    assert rows == ["dense", "sparse", "pruned", "random selection, same ratio", "finetuned"]


def test_markdown():
    lines = markdown(RECORD).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    pruned = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert pruned == [
        *("pruned", "98.06", "140.0 k", "20.4 M", "560.0 kB", "2.00x"),
        *("0.222 [0.216–0.233]", "2.00x", "1234 [1197–1296]", "0.83x"),
    ]
    finetuned = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert finetuned[-4:] == ["–"] * 4
    assert stage_table(RECORD).row_count == 5


def test_sentences():
    assert sentences(RECORD) == [
        "Removed 50.32% of the stripes, requested 50.00%.",
        "The pruned model is slower than the dense one at batch 128: 0.83x.",
        NOTE,
        "Latency in ms, median [25th–75th percentile], float32 on Some CPU, 2 threads.",
    ]
    gpu = dataclasses.replace(RECORD, machine={**RECORD.machine, "device": "cuda", "gpu": "Some GPU"})
    assert sentences(gpu)[-1].endswith("on Some GPU.")


def test_finetuned_speaks_for_pruned_where_only_it_was_timed():
    dense, finetuned = RECORD.stages[1], dataclasses.replace(RECORD.stages[4], latency=timed((128, 2046.8)))
    for stages in ((dense, finetuned), (dense, RECORD.stages[2], finetuned)):
        said = sentences(dataclasses.replace(RECORD, stages=stages))
        assert "The pruned model is slower than the dense one at batch 128: 0.50x." in said


def test_nothing_measured():
    stages = tuple(dataclasses.replace(r, latency=()) for r in RECORD.stages)
    text = shown(dataclasses.replace(RECORD, stages=stages), 80)
    assert "batch" not in text and "Latency" not in text and "98.61" in text


def test_failure_without_stages():
    failed = dataclasses.replace(RECORD, status="failed", failure="sparse: loss is NaN.", stages=(), notes=())
    failed = dataclasses.replace(failed, obtained=None)
    assert shown(failed, 80).strip() == "This run failed: sparse: loss is NaN."


def test_paths_are_whole_and_notes_are_not_markup():
    path = "/a/very/long/folder/" + "name/" * 20 + "record.json"
    text = shown(RECORD, 80, {"record": path, "weights": "x"})
    assert f"record   {path}\n" in text and "weights  x\n" in text
    assert "[in 3 layers]" in text.replace("\n", " ")


@pytest.mark.parametrize(("target", "named"), [("macs", "MACs"), ("params", "parameters")])
def test_what_was_removed_of_a_target_is_said_first(target, named):
    record = dataclasses.replace(RECORD, target=target, removed=0.4987, ratio=0.5, requested=0.3812, obtained=0.38)
    assert sentences(record)[:2] == [f"Removed 49.87% of the {named}, requested 50.00%.", "These are 38.00% of the stripes."]
