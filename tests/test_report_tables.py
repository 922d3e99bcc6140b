"""Records on disk become tables: seeds together, the paper beside, failures with their sentence."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from prune_cli.commands.report import main
from prune_cli.errors import UserError
from prune_cli.published import PaperNumbers, Reference
from prune_cli.record import Latency, LayerChange, Record, StageResult, write_failure
from prune_cli.report.collect import collect
from prune_cli.report.counting import macs_removed, parameters_removed
from prune_cli.report.formats import show, to_latex, to_markdown
from prune_cli.report.present import present
from prune_cli.report.table import tables

REFERENCE = Reference("nm/lenet", "prune_50", 1, "Merging, LeNet", "README", "fmnist", "paper", "flops", False,
                      PaperNumbers(dense=89.8, accuracy=88.4, accuracy_std=0.2, macs_removed=50.0))  # fmt: skip


def stage(name: str, accuracy: float, parameters: int = 100, macs: int = 1000, ms: float | None = None) -> StageResult:
    latency = () if ms is None else (Latency(1, ms, ms, ms, 5),)
    extra = {"batch_norm": 20, "relu": 10, "pool": 0}
    return StageResult(name, "key", accuracy, None, None, None, parameters, macs, 1, latency, 0.0, False, None, extra)


def record(seed=0, accuracy=0.89, method="fp", ratio=0.5, reference=None, settings=None, **changes) -> Record:
    settings = {"target": f"m.{method}", "lam": 1e-4, **(settings or {})}
    config = {"method_name": method, "method": settings, "ratio": ratio, "seed": seed}
    config |= {"model": {"name": "lenet"}, "dataset": {"name": "fmnist"}, "recipe": {"name": "paper"}, "runtime": {"x": seed}}
    stages = (stage("dense", 0.898, ms=2.0), stage("pruned", accuracy, 50, 400, 1.0))
    stages = tuple(dataclasses.replace(s, key=json.dumps([s.stage, config])) for s in stages)
    made = Record(
        f"{method}-lenet-fmnist-{ratio}", "complete", f"prune-cli method={method} ratio={ratio} seed={seed}", config, seed,
        ratio, "filter", ratio, ratio, (), stages, {"cpu": "C", "threads": 2, "device": "cpu"}, {"torch": "2"},
        (LayerChange("conv1", (1000, 400), (100, 50), (36, 18), {"kept": 1, "total": 2, "positions": [[0.5, 1.0], [0.0, 1.0]]}),),
        reference,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def written(folder, *records):
    for i, one in enumerate(records):
        one.write(folder / one.name / f"2026-01-0{i + 1}_00-00-00" / "record.json")
    return folder


def shown(folder) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables(collect([folder])):
        show(table, console)
    return console.file.getvalue()


def cells(folder) -> list[dict[str, str]]:
    from prune_cli.report.formats import to_csv

    return list(csv.DictReader(io.StringIO(to_csv(tables(collect([folder]))))))


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    rows = cells(written(tmp_path, record(0, 0.88), record(1, 0.90), record(0, 0.80, ratio=0.7)))
    assert [(row["n"], row["ratio_percent"]) for row in rows] == [("2", "50"), ("1", "70")]
    assert float(rows[0]["pruned_percent"]) == pytest.approx(89)
    assert float(rows[0]["pruned_percent_std"]) == pytest.approx(2**0.5)
    assert float(rows[0]["drop_points"]) == pytest.approx(0.8)
    assert (rows[0]["parameters_removed_percent"], rows[0]["macs_removed_percent"]) == ("50", "60")
    assert (rows[0]["speedup_batch_1"], rows[1]["pruned_percent_std"]) == ("2", "")


def test_a_method_with_the_runs_seed_differs_by_seed_only(tmp_path):
    runs = [record(seed, method="random", settings={"seed": seed}) for seed in (0, 1)]
    assert [row["n"] for row in cells(written(tmp_path, *runs))] == ["2"]


def test_a_command_given_twice_counts_once(tmp_path):
    assert [row["n"] for row in cells(written(tmp_path, record(), record()))] == ["1"]


def test_rows_are_called_after_what_differs(tmp_path):
    other = record(settings={"lam": 0.5})
    assert [r["row"] for r in cells(written(tmp_path, record(), other))] == ["fp lam=0.0001", "fp lam=0.5"]


def test_the_papers_number_and_the_deviation(tmp_path):
    (row,) = cells(written(tmp_path, record(accuracy=0.8845, reference=REFERENCE)))
    assert (row["row"], row["paper_accuracy_percent"], row["paper_drop_points"]) == ("prune_50", "88.4", "1.4")
    assert float(row["deviation_points"]) == pytest.approx(0.05)
    # 2 x 1000 + 2 x 20 + 10 before, 2 x 400 + the same after
    assert float(row["macs_removed_as_published_percent"]) == pytest.approx(100 * 1200 / 2050, rel=1e-4)
    text = shown(tmp_path)
    assert "+0.05" in text and "88.40 ± 0.20" in text and "Paper: README." in text


def test_another_data_set_or_recipe_is_in_the_title_and_compares_the_drop(tmp_path):
    run = record(accuracy=0.70, reference=REFERENCE, command="prune-cli experiment=nm/lenet row=prune_50 a.b=/x/y/z seed=0")
    config = {**run.config, "dataset": {"name": "fmnist-jpeg"}, "recipe": {"name": "short"}}
    (table,) = tables(collect([written(tmp_path, dataclasses.replace(run, config=config))]))
    assert table.title == "Merging, LeNet (on fmnist-jpeg, not on the paper's fmnist; made with recipe short; a.b=z)"
    assert table.rows[0].deviation == (pytest.approx(1.4 - 19.8), "drop")


def test_failures_are_rows_and_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "runs", record())
    folder = tmp_path / "runs/fp-lenet-fmnist-0.9/2026-01-09_00-00-00"
    write_failure(folder, "The device is gone.", config={"seed": 3, "ratio": 0.9}, command="prune-cli ratio=0.9 seed=3")
    assert main(["runs"]) == 1
    out = capsys.readouterr().out
    assert "seed 3, failed: The device is gone." in out and "89.00" in out
    # The same command, ended well: nothing failed.
    later = record(3, ratio=0.9, command="prune-cli ratio=0.9 seed=3")
    later.write(tmp_path / "runs/x/2026-01-10_00-00-00/record.json")
    assert main(["runs"]) == 0


def test_a_damaged_record_leaves_the_others(tmp_path):
    written(tmp_path, record())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/record.json").write_text("{")
    (table,) = tables(collect([tmp_path]))
    assert table.failed and len(table.rows) == 2


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_no_records_is_a_sentence(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.json").write_text("{}")
    with pytest.raises(UserError):
        main([path])


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value[:1] != "#"]


def test_the_files_of_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [record(s, 0.88 + s / 100, reference=REFERENCE, notes=("<b>&",)) for s in (0, 1)]
    runs += [record(ratio=0.7, method="a_b"), record(ratio=0.3, method="a_b")]
    assert present(collect([written(tmp_path / "runs", *runs)]), tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert page.links == [], "the page needs nothing else"
    assert page.tags.count("section") == 2 and page.tags.count("details") == 3 and page.tags.count("figure") == 3
    text = (tmp_path / "out/report.html").read_text()
    assert "&lt;b&gt;&amp;" in text and "MACs left" in text and "latency at batch 1" in text and "method=a_b" in text
    present(collect([tmp_path / "runs"]), tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert file.read_text() == (tmp_path / "again" / file.name).read_text(), "the same records, the same report"


def test_markdown_and_latex_are_well_formed(tmp_path):
    (table,) = tables(collect([written(tmp_path, record(reference=REFERENCE))]))
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 3
    latex = to_latex(table)
    assert r"prune\_50" in latex and r"$\pm$" in latex and "_" not in latex.replace(r"\_", "")
    assert latex.count("&") % latex.count(r" \\") == 0


def test_a_narrow_terminal_gets_several_tables(tmp_path):
    runs = collect([written(tmp_path, record(reference=REFERENCE))])
    console = Console(file=io.StringIO(), width=80)
    show(tables(runs)[0], console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.startswith("prune_50") for line in lines) > 1


LAYERS = tuple(
    LayerChange(name, (macs, macs), (1, 1), (9 if name != "fc" else 0,) * 2)
    for name, macs in [("conv1", 100), ("layer1.0.conv1", 100), ("layer1.0.conv2", 100), ("layer1.1.conv1", 100),
                       ("layer1.1.conv2", 100), ("layer1.0.shortcut.conv", 900), ("fc", 900)]
)  # fmt: skip


def test_the_closed_form_of_sfp_and_fpgm():
    """The stem reads the image, a block's first convolution the whole stream, except the very first."""
    kept = 0.6 + 0.36 + 0.36 + 0.6 + 0.36
    assert macs_removed(record(ratio=0.4, layers=LAYERS), "ideal") == pytest.approx(1 - kept / 5)


def test_a_skeleton_counts_as_parameters():
    assert parameters_removed(record(), skeleton=True) == pytest.approx(1 - (50 + 18) / (100 + 36))
    assert parameters_removed(dataclasses.replace(record(), layers=()), skeleton=True) is None


def test_records_without_what_a_count_needs_leave_it_out(tmp_path):
    run = record(reference=REFERENCE)
    run = dataclasses.replace(run, stages=tuple(dataclasses.replace(s, elementwise=None) for s in run.stages))
    assert "macs_removed_as_published_percent" not in cells(written(tmp_path, run))[0]


def test_a_report_waits_for_neither_torch_nor_hydras_composing(tmp_path):
    written(tmp_path / "runs", record())
    code = "import sys; sys.argv = ['prune-cli', 'report', 'runs']; from prune_cli.cli import main; main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert json.loads((tmp_path / "runs/fp-lenet-fmnist-0.5/2026-01-01_00-00-00/record.json").read_text())
