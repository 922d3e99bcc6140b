"""Records on disk become tables: seeds together, the paper beside, failures with their sentence."""

import base64
import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from prune_cli.commands.report import main
from prune_cli.errors import UserError
from prune_cli.pictures import packed
from prune_cli.published import PaperNumbers, Reference
from prune_cli.record import Latency, LayerChange, Record, StageResult, write_failure
from prune_cli.report.collect import collect
from prune_cli.report.counting import macs_removed, parameters_removed
from prune_cli.report.formats import show, to_latex, to_markdown
from prune_cli.report.layers import PIXELS
from prune_cli.report.page import to_html
from prune_cli.report.plots import plots
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


def test_latency_that_was_measured_once_stays(tmp_path):
    first = record()
    untimed = dataclasses.replace(first, stages=tuple(dataclasses.replace(s, latency=()) for s in first.stages))
    assert [row["latency_batch_1_ms"] for row in cells(written(tmp_path, first, untimed))] == ["1"]


def test_what_has_a_column_is_not_in_the_name(tmp_path):
    """A folder of runs of all kinds: a data set of its own brings settings of its own."""
    kinds = [
        ({"name": "digits", "pad": 1}, {"name": "short", "epochs": 20}), ({"name": "fmnist", "pad": 4}, {"name": "short", "epochs": 20}),
        ({"name": "fmnist", "pad": 4}, {"name": "smoke", "epochs": 2}), ({"name": "fmnist", "pad": 0}, {"name": "smoke", "epochs": 2}),
    ]  # fmt: skip
    runs = [record(i) for i in range(4)]
    runs = [dataclasses.replace(r, config={**r.config, "dataset": d, "recipe": p}) for r, (d, p) in zip(runs, kinds)]
    found = [(row["row"], row["dataset"], row["recipe"]) for row in cells(written(tmp_path, *runs))]
    assert found == [("fp", "digits", "short"), ("fp", "fmnist", "short"), ("fp pad=4", "fmnist", "smoke"), ("fp pad=0", "fmnist", "smoke")]


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


@pytest.mark.parametrize(("recipes", "said"), [
    (["short"], " (made with recipe short)"), (["smoke", "short"], " (made with recipe short and smoke)"), (["paper"], ""),
])  # fmt: skip
def test_a_scaled_recipe_is_in_every_title(recipes, said, tmp_path):
    runs = [record(i) for i in range(len(recipes))]
    runs = [dataclasses.replace(r, config={**r.config, "recipe": {"name": name}}) for r, name in zip(runs, recipes)]
    failed = dataclasses.replace(record(9), status="failed", failure="It broke.", stages=(), config={}, command="prune-cli x=1")
    (table,) = tables(collect([written(tmp_path, failed, *runs)]))
    assert table.title == "lenet on fmnist" + said
    own = dataclasses.replace(REFERENCE, source=None, recipe="short")
    run = dataclasses.replace(runs[0], reference=own, command="prune-cli experiment=own")
    (table,) = tables(collect([written(tmp_path / "own", run)]))
    assert table.title == "Merging, LeNet" + said.replace(" and smoke", "").replace("short", recipes[0])
    elsewhere = dataclasses.replace(run, config={**run.config, "dataset": {"name": "digits"}})
    (table,) = tables(collect([written(tmp_path / "elsewhere", elsewhere)]))
    assert table.title.startswith("Merging, LeNet (on digits, not on fmnist")


def test_a_failed_row_says_which_one_it_is(tmp_path):
    done = record(0, command="prune-cli method=fp ratio=0.5 seed=0")
    folder = tmp_path / "fp-lenet-fmnist-0.7/2026-01-09_00-00-00"
    for name, line in (("a", "method=fp ratio=0.7 recipe.lr=9"), ("b", "method=fp ratio=0.9 recipe.lr=9 recipe.x=y")):
        config = {**done.config, "ratio": float(line.split()[1][6:])}
        write_failure(folder.with_name(name), "Loss is NaN.", config=config, command=f"prune-cli {line} seed=0")
    write_failure(tmp_path / "refused/x", "There is no such method.", config={}, command="prune-cli method=f ratio=0.5 seed=0")
    write_failure(tmp_path / "refused/y", "No, there is not.", config={}, command="prune-cli method=fp ratio=0.5 seed=1")
    rows = {row["row"]: row for row in cells(written(tmp_path, done))}
    assert {label: (row["ratio_percent"], row["n"]) for label, row in rows.items()} == {
        "fp": ("50", "1"), "fp recipe.lr=9": ("70", "0"), "fp recipe.lr=9 recipe.x=y": ("90", "0"),
        "refused method=f ratio=0.5": ("", "0"), "refused method=fp ratio=0.5": ("", "0"),
    }  # fmt: skip
    assert rows["fp recipe.lr=9"]["failure"] == "Loss is NaN." and rows["fp"]["failure"] == ""
    assert "model" not in rows["fp"] and "dataset" not in rows["fp"], "what all rows have in common that say it"
    assert shown(tmp_path).count("failed") == 4 + 4, "in the row, and with its sentence below"


def test_a_row_that_failed_for_one_seed_only(tmp_path):
    runs = [record(seed, reference=REFERENCE, command=f"prune-cli experiment=e row=prune_50 seed={seed}") for seed in (0, 1)]
    folder = written(tmp_path, runs[0])
    failed = dataclasses.replace(runs[1], status="failed", failure="The device is gone.", stages=())
    failed.write(folder / "fp/2026-01-09_00-00-00/record.json")
    (row,) = cells(folder)
    assert (row["n"], row["pruned_percent"], row["failures"], row["failure"]) == ("1", "89", "1", "The device is gone.")
    assert "1, 1 failed" in shown(folder)


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


KEPT = np.random.default_rng(0).random((17, 3, 3)) > 0.5
SKELETON = {"kept": int(KEPT.sum()), "total": KEPT.size, "positions": KEPT.mean(0).tolist(), "skeleton": packed(KEPT)}


def pictures(page: str) -> list[np.ndarray]:
    """The PNG files inside the page, as RGB."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_the_page_shows_the_skeleton_of_every_filter(tmp_path):
    change = LayerChange("layer1.0.conv1", (1000, 400), (100, 50), (36, 18), SKELETON)
    run = dataclasses.replace(record(seed=4, method="stripe", layers=(change,)), unit="stripe")
    page = to_html(tables(collect([written(tmp_path, run)])))
    positions, filters = pictures(page)
    assert np.array_equal(positions[..., 0], np.rint(255 * KEPT.mean(0)))
    assert "Skeletons, seed 4: one tile for each filter, white where its stripe is kept" in page
    side = 3 * PIXELS + 1
    for i, kept in enumerate(KEPT):
        y, x = 1 + i // 5 * side, 1 + i % 5 * side
        tile = filters[y : y + side - 1, x : x + side - 1]
        assert np.array_equal(tile[PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS], np.repeat(255 * kept[..., None], 3, 2))
    assert len(page) < 60_000


def test_the_page_of_a_large_network_is_small(tmp_path):
    """Ten rows, each with the skeletons of a VGG-16."""
    random = np.random.default_rng(0)
    kept = [random.random((width, 3, 3)) > 0.5 for width in (64, 64, 128, 128, *[256] * 3, *[512] * 6)]
    layers = tuple(
        LayerChange(f"features.conv{i}", (9, 4), (9, 4), (9, 4),
                    {"kept": 1, "total": k.size, "positions": k.mean(0).tolist(), "skeleton": packed(k)})
        for i, k in enumerate(kept)
    )  # fmt: skip
    runs = [record(ratio=ratio / 10, method="stripe", layers=layers) for ratio in range(10)]
    assert len(to_html(tables(collect([written(tmp_path, *runs)])))) < 1_000_000


def test_rows_of_one_name_are_told_apart_on_the_page(tmp_path):
    versions = [{"torch": "2.11"}, {"torch": "2.12", "git_dirty": True}]
    runs = [record(seed, ratio=0.3, versions=v) for seed, v in enumerate(versions)] + [record(ratio=0.5)]
    page = to_html(tables(collect([written(tmp_path, *runs)])))
    assert "fp <span>ratio 30.00 %, 2 runs</span>" in page and "fp <span>ratio 50.00 %, 1 run</span>" in page
    assert "<p>torch 2.11</p><p>torch 2.12, git_dirty</p>" in page
    assert all(f"<code>prune-cli method=fp ratio=0.3 seed={seed}</code>" in page for seed in (0, 1))


def test_a_line_of_a_plot_is_one_method_network_and_data_set(tmp_path):
    runs = [record(ratio=r, settings={"lam": lam}) for r in (0.3, 0.5) for lam in (0.1, 0.5)]
    other = record(ratio=0.5)
    other = dataclasses.replace(other, config={**other.config, "dataset": {"name": "digits"}})
    (table,) = tables(collect([written(tmp_path, *runs, other)]))
    lines = re.findall(r">(fp[^<]*)</text>", plots(table)["macs"])
    assert lines == ["fp lam=0.1 fmnist", "fp lam=0.5 fmnist", "fp digits"]
    published = [record(reference=dataclasses.replace(REFERENCE, row=row)) for row in ("vgg16_50", "vgg16_2.5", "vgg19", "vgg_l1")]
    (table,) = tables(collect([written(tmp_path / "published", *published)]))
    assert re.findall(r">(vgg[^<]*)</text>", plots(table)["macs"]) == ["vgg16", "vgg19", "vgg_l1"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))]


def test_the_files_of_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [record(s, 0.88 + s / 100, reference=REFERENCE, notes=("<b>&",)) for s in (0, 1)]
    runs += [record(ratio=0.7, method="a_b"), record(ratio=0.3, method="a_b")]
    assert present(collect([written(tmp_path / "runs", *runs)]), tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert page.links == [], "the page needs nothing else"
    assert page.tags.count("section") == 2 and page.tags.count("details") == 3 and page.tags.count("figure") == 3 and page.tags.count("img") == 3
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


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("row", ["prune_50", "a row with a very long name that fits into no table at all of 80 characters and is wrapped"])
def test_a_narrow_terminal_gets_several_tables(row, width, tmp_path):
    """And loses nothing: means with deviations make a part wider than the terminal."""
    times = [(Latency(1, ms, ms, ms, 5), Latency(128, 100 * ms, ms, ms, 5)) for ms in (1.25, 2.5)]
    reference = dataclasses.replace(REFERENCE, row=row)
    runs = [
        dataclasses.replace(run, stages=tuple(dataclasses.replace(s, latency=latency) for s in run.stages))
        for run, latency in zip([record(s, 0.8 + s / 100, reference=reference) for s in (0, 1)], times)
    ]
    runs[1] = dataclasses.replace(runs[1], stages=(stage("dense", 0.88, ms=2.0), runs[1].stages[1]))
    console = Console(file=io.StringIO(), width=width)
    show(tables(collect([written(tmp_path, *runs)]))[0], console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert "1.88 ± 0.88" in text and "187.50 ± 88.39" in text and "88.40 ± 0.20" in text
    assert sum(line.startswith(row[:8]) for line in text.splitlines()) > 1


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
    written(tmp_path / "runs", record(layers=(LayerChange("conv1", (9, 4), (9, 4), (9, 4), SKELETON),)))
    code = "import sys; sys.argv = ['prune-cli', 'report', 'runs']; from prune_cli.cli import main; main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert json.loads((tmp_path / "runs/fp-lenet-fmnist-0.5/2026-01-01_00-00-00/record.json").read_text())


@pytest.mark.parametrize("command", ["report --tables", "report runs", "--help"])
def test_a_reader_may_stop_reading(command, tmp_path):
    """As in `prune-cli report runs | head -1`."""
    written(tmp_path / "runs", *(record(ratio=i / 100) for i in range(60)))
    code = f"import sys; sys.argv = ['prune-cli', *'{command}'.split()]; from prune_cli.cli import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-u", "-c", code], cwd=tmp_path, **pipes) as started:
        started.stdout.close()
        assert started.stderr.read() == b"" and started.wait() == 1
