"""Experiments with a table: every row composes, the command line narrows them, the run ends with the table."""

import csv
import json

import pytest

from prune_cli.build import build
from prune_cli.compose import CONF, Composer, loader, shipped_tables
from prune_cli.published import PaperNumbers, Row, Table, override_line
from prune_cli.report.rows import paper_drop
from prune_cli.rows import Rows, table_of

TABLES = shipped_tables()
EXAMPLE = "neuron_merging/lenet_fashion_mnist"


@pytest.fixture
def run(tmp_path, monkeypatch, command):
    """`prune-cli` in a folder of its own, on made-up images: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNE_STORE", str(tmp_path / "store"))
    return command


# Networks can be narrower, and shallower where no row names their layers: each row composes as it is in a test of its own.
# Of ImageNet's, one table has its own network; the others have one for small images with layers of the same names.
SMALLER = {
    "densenet_cifar100": ["model.depth=10"],
    **dict.fromkeys(["vgg19", "pass_1", "stripe/vgg16"], ["model.depth=11", "model.width=0.25"]),
    **dict.fromkeys(["neuron_merging/vgg16", "vgg16_a"], ["model.width=0.25"]),
    **dict.fromkeys(["resnet56_cifar10", "skeleton_only"], ["model.depth=20"]),
    **dict.fromkeys(["fpgm/imagenet", "resnet18_imagenet"], ["model=resnet20"]),
    "resnet34_imagenet": ["model=resnet20", "model.depth=44"],
}
QUICK = ["debug=default", "dataset=synthetic", "dataset.resolution=8", "recipe.limit=16", "runtime.latency_seconds=0"]


def test_every_experiment_file_is_listed_under_its_name(run):
    names = sorted(str(file.relative_to(CONF / "experiment").with_suffix("")) for file in CONF.glob("experiment/**/*.yaml"))
    assert sorted(table.name for table in TABLES) == names
    code, out, _ = run("report", "--tables")
    assert code == 0 and all(name in out for name in names)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_row_composes_and_builds(table, composer):
    rows = Rows(composer, table, [composer.parse(f"experiment={table.name}")])
    assert rows.names == list(table.rows)
    for name in rows.names:
        experiment = build(composer.compose(rows.job(name, [f"experiment={table.name}"])))
        assert experiment.recipe.name == table.recipe and experiment.dataset.name == table.dataset
        assert experiment.reference.row == name and experiment.reference.paper == table.rows[name].paper


@pytest.mark.parametrize("name", ["fpgm/cifar10", "fpgm/imagenet"])
def test_from_the_trained_network_fpgm_takes_a_tenth_of_the_learning_rate(name, composer):
    (table,) = (table for table in TABLES if table.name == name)
    rows, starts = Rows(composer, table, [composer.parse(f"experiment={name}")]), set()
    for row in rows.names:
        experiment = build(composer.compose(rows.job(row, [f"experiment={name}"])))
        tenth = 0.1 if experiment.method.start == "dense" else 1
        assert experiment.recipe.sparsify.lr == pytest.approx(tenth * experiment.recipe.pretrain.lr), row
        starts.add(experiment.method.start)
    assert starts == {"init", "dense"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_row_of_every_experiment_runs(table, run):
    row = next(iter(table.rows))
    small = [line for name, lines in SMALLER.items() if name in f"{table.name}/{row}" for line in lines]
    code, out, err = run(f"experiment={table.name}", f"row={row}", *QUICK, *small)
    assert code == 0, err
    whose = "the paper's " if table.source else ""
    title = f"{table.title} (on synthetic, not on {whose}{table.dataset}; made with recipe debug"
    assert title in " ".join(out.split())


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_papers_numbers_do_not_contradict_themselves(table):
    for name, row in table.rows.items():
        paper = row.paper or PaperNumbers()
        assert -2 < (paper_drop(paper) or 0) < 35, f"{name}: neither gains nor losses like that are printed"
        assert paper.dense is None or paper.dense > 60


def jobs(composer, *lines):
    from prune_cli.sweep import _jobs

    return _jobs(composer, [composer.parse(line) for line in (f"experiment={EXAMPLE}", *lines)])


def rows_of(found):
    return [next(line[4:] for line in job if line.startswith("row=")) for job in found]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ["prune_50", "merge_50", "prune_60", "merge_60", "prune_70", "merge_70", "prune_80", "merge_80"]),
        (["ratio=0.5"], ["prune_50", "merge_50"]),
        (["ratio=0.5,0.8", "method.merge=true"], ["merge_50", "merge_80"]),
        (["row=merge_60"], ["merge_60"]),
        (["row=merge_60,prune_60", "seed=1"], ["merge_60", "prune_60"]),
        (["row=merge_60,prune_70", "ratio=0.7", "seed=0,1"], ["prune_70", "prune_70"]),
        (["ratio=0.6", "seed=range(0,2)"], ["prune_60", "merge_60"] * 2),
    ],
)
def test_overrides_narrow_the_rows_or_multiply_them(lines, expected, composer):
    assert rows_of(jobs(composer, *lines)) == expected


def test_the_published_schedule_holds_under_its_recipe_only(composer):
    assert "recipe.pretrain.epochs=200" in jobs(composer)[0]
    assert not any(line.startswith("recipe.") for line in jobs(composer, "recipe=short")[0])
    assert [line for line in jobs(composer, "recipe.pretrain.epochs=5")[0] if "epochs" in line] == ["recipe.pretrain.epochs=5"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ratio=0.55"], "ratio=0.55: no row of neuron_merging/lenet_fashion_mnist has it; rows have 0.5, 0.6"),
        (["row=merge_6"], "has no such row; did you mean merge_60"),
        (["sed=0"], "sed=0: there is no such setting; did you mean seed?"),
        (["model=resnet20O"], "there is no such model"),
    ],
)
def test_what_cannot_be_right_is_one_sentence(arguments, sentence, run, tmp_path):
    code, out, err = run(f"experiment={EXAMPLE}", *arguments)
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_an_experiment_is_a_sentence(run):
    assert run("row=merge_50")[2].startswith("prune-cli: row=merge_50: rows are those of an experiment's table")


def test_another_sweeper_needs_one_row(composer):
    from prune_cli.errors import UserError
    from prune_cli.rows import of_one_row

    with pytest.raises(UserError, match="8 rows; choose one, as in row=prune_50"):
        of_one_row(composer, [f"experiment={EXAMPLE}"], "hydra/sweeper")
    assert "ratio=0.6" in of_one_row(composer, [f"experiment={EXAMPLE}", "row=merge_60", "seed=3"], "hydra/sweeper")


def test_the_settings_of_a_row_can_be_seen(run):
    code, out, _ = run("--cfg", "job", f"experiment={EXAMPLE}", "row=merge_80")
    assert code == 0 and "\nratio: 0.8\n" in out and "  merge: true\n" in out and "  - override" not in out


def test_a_table_ends_with_itself_and_its_rows_run_alone(run, tmp_path):
    small = ["dataset.channels=1", "seed=0,1", "ratio=0.5"]
    code, out, err = run(f"experiment={EXAMPLE}", *QUICK, *small)
    assert code == 0, err
    (report,) = (tmp_path / "outputs/reports").iterdir()
    rows = list(csv.DictReader((report / "report.csv").read_text().splitlines()))
    assert [(row["row"], row["n"], row["paper_accuracy_percent"]) for row in rows] == [("prune_50", "2", "88.4"), ("merge_50", "2", "88.69")]
    assert "deviation_points" in rows[0] and "Neuron merging, LeNet-300-100" in out
    records = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/runs/*/*/record.json")]
    commands = {record["command"] for record in records}
    quick = " ".join([*QUICK, "dataset.channels=1"])
    assert f"prune-cli experiment={EXAMPLE} row=merge_50 {quick} seed=1" in commands and len(commands) == 4
    # The command of a row gives the same numbers, from the store.
    assert run(*f"experiment={EXAMPLE} row=merge_50 {quick} seed=1".split())[0] == 0
    twice = [json.loads(f.read_text()) for f in tmp_path.glob("outputs/runs/*/*/record.json")]
    twice = [r for r in twice if r["command"].endswith("seed=1") and "merge_50" in r["command"]]
    assert len(twice) == 2 and twice[0]["stages"][1]["accuracy"] == twice[1]["stages"][1]["accuracy"]


def test_a_failed_row_stands_in_the_table_with_its_sentence(run):
    code, out, err = run(f"experiment={EXAMPLE}", *QUICK, "dataset.channels=1", "ratio=0.5", "method.lam=0.5,7")
    assert code == 2 and "2 of 4 jobs failed" in err
    assert "prune_50, seed 0, failed: method.lam=7: must be at least 0 and at most 1" in out


@pytest.mark.parametrize(
    ("value", "line"),
    [(0.5, "x=0.5"), (True, "x=true"), (None, "x=null"), ([0.3, 1], "x=[0.3,1]"), ({"a.b*": 0.5}, "x={a.b*:0.5}"),
     ("resnet20", "x=resnet20"), ("it's", r"x='it\'s'")],
)  # fmt: skip
def test_values_are_written_as_the_command_line_reads_them(value, line, composer):
    assert override_line("x", value) == line
    assert composer.parse(line).value() == value


def test_a_table_of_the_users_own(tmp_path, composer):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ntable: {name: mine, title: T, source: S, dataset: digits, recipe: short,\n"
        "  rows: {a: {set: {seed: 1}}, b: {set: {seed: 2}, paper: {accuracy: 101}}}}\n"
    )
    own = Composer(loader(str(tmp_path)), "config")
    with pytest.raises(Exception, match="table.rows.b.paper.accuracy=101: must be at least 0 and at most 100"):
        table_of(own, ["experiment=mine"])


def test_of_two_settings_the_rows_wins():
    table = Table(name="n", title="t", dataset="d", rows={"a": Row({"ratio": 0.3})}, set={"ratio": 0.5, "recipe.precision": "float32"})
    assert table.overrides("a", "paper") == {"ratio": 0.3, "recipe.precision": "float32"}
    assert table.overrides("a", "short") == {"ratio": 0.3}
