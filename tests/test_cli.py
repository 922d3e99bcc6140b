"""The command line: one sentence and exit code 2 for whatever cannot be right, records for what failed."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prune_cli.pipeline
from prune_cli import cli, job
from prune_cli.errors import StageError, UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own; the handlers that main and Hydra set are taken back."""
    monkeypatch.chdir(tmp_path)
    terminate, handlers, level = signal.getsignal(signal.SIGTERM), logging.root.handlers[:], logging.root.level
    yield tmp_path
    signal.signal(signal.SIGTERM, terminate)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def ran(monkeypatch):
    """The experiments that the pipeline was asked to run; it trains nothing here."""
    experiments = []

    def run(experiment, run_dir, *, command):
        experiments.append(experiment)
        return SimpleNamespace(objective=0.9)

    monkeypatch.setattr(prune_cli.pipeline, "run", run)
    return experiments


@pytest.fixture
def fails(monkeypatch):
    """Let the pipeline raise: `fails(problem)`, only at `ratio` when one is given."""

    def arrange(problem, ratio=None):
        def run(experiment, run_dir, *, command):
            if ratio in (None, experiment.ratio):
                raise problem
            return SimpleNamespace(objective=0.9)

        monkeypatch.setattr(prune_cli.pipeline, "run", run)

    return arrange


def call(*arguments: str) -> int:
    """The exit code of `prune-cli` with these arguments."""
    argv, sys.argv = sys.argv, ["prune-cli", *arguments]
    try:
        return cli.main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv


def records(folder):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("outputs/runs/*/*/record.json"))]


KEYS = ["ratio", "method", "recipe.pretrain", "model.depth"]
WRONG = [
    ("modle=resnet20", "did you mean model?"),
    ("model=resnet2O", "there is no such model; did you mean"),
    ("method=strip", "there is no such method; did you mean stripe? (allowed: "),
    ("method=null", "there is no such method; allowed: "),
    ("method=[stripe,fp]", "there is no such method"),
    ("hydra/launcher=nosuch", "there is no such launcher; allowed: "),
    ("recipe.pretrain.epoch=3", "did you mean epochs?"),
    ("epochs=3", "did you mean recipe.pretrain.epochs"),
    ("method.treshold=1", "did you mean threshold?"),
    ("method={treshold:1}", "did you mean threshold?"),
    ("ratio.x=1", "there is no such setting"),
    ("recipe.pretrain.milestones.7=0.5", "there is no such setting"),
    ("hydra.run.dri=x", "did you mean dir?"),
    ("+key=1", "there is no such setting; allowed: "),
    ("+foo.bar=1", "there is no such setting"),
    ("++ratio=0.3", "write it without the +"),
    ("+method=fp", "write it without the +"),
    ("~ratio", "nothing can be removed"),
    ("~method", "nothing can be removed"),
    ("recipe@x=short", "cannot be moved with @"),
    ("ratio=[0.5", "cannot be read"),
    ("stripe", "for example method=stripe"),
    ("", "an override is written name=value"),
    ("ratio=0.3,0.5", "several values need -m"),
    ("ratio=abc", "must be a number"),
    ("ratio=1", "ratio=1: must be at least 0 and below 1"),
    ("ratio=-0.1", "must be at least 0 and below 1"),
    ("ratio=nan", "must be a finite number"),
    ("ratio=[0.5]", "must be a number"),
    ("ratio=${nosuch}", "'nosuch' not found"),
    ("ratio=${ratio}", "Recursive interpolation"),
    ("seed=1.5", "must be a whole number"),
    ("seed=???", "seed: Missing mandatory value"),
    ("recipe.pretrain.epochs=ten", "must be a whole number"),
    ("recipe.pretrain=5", "set one, as in recipe.pretrain.epochs"),
    ("runtime.device=gpu", "(allowed: auto, cpu, cuda)"),
    ("model.depth=21", "model.depth=21: "),
    ("model.channels=3", "there is no such setting"),
    ("model._target_=nowhere.Net", "cannot be imported"),
    ("method._target_=torch.nn.Linear", "must be a class derived from PruningMethod"),
    ("dataset._target_=torch.nn.Linear", "must be a class derived from Dataset"),
    ("method.name=../x", "method.name=../x: must be letters"),
    ("method={_target_:3}", "must be the dotted path"),
    ("--nosuch", "--help lists what there is"),
    ("--config-dir=/nosuch", "there is no such folder"),
    ("--config-path=/", "cannot be replaced"),
    ("--config-name=nosuch", "Cannot find primary config"),
]


@pytest.mark.parametrize(("argument", "sentence"), WRONG, ids=[argument or "empty" for argument, _ in WRONG])
def test_what_cannot_be_right_is_one_sentence(argument, sentence, ran, capsys, here):
    assert call(argument) == 2
    out, err = capsys.readouterr()
    assert err.startswith("prune-cli: ") and err.count("\n") == 1
    assert sentence in err
    assert (out, ran, list(here.iterdir())) == ("", [], [])


def test_what_the_terminal_cannot_show_stays_one_line(ran, capsys):
    assert call("a\nb\x1b[31m=1") == 2
    assert capsys.readouterr().err.count("\n") == 1


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("ratio=" + "9" * 5000)
@example("seed=-0")
@example("hydra={}")
@example("hydra=null")
@example("recipe={}")
@example("a.b.c={d:{e:1}}")
@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
    | st.builds("{}={}".format, st.sampled_from(KEYS), st.text("0.5e-[]{}:,'$a+~", max_size=8))
)
def test_no_override_ends_in_a_traceback(ran, override):
    if override.startswith("-"):
        return  # an option
    assert call(override) in (0, 2)


def test_a_run_has_its_inputs_in_a_folder_of_its_own(ran, here):
    assert call("ratio=0.3", "seed=2") == 0
    (experiment,) = ran
    assert (experiment.ratio, experiment.seed, experiment.name) == (0.3, 2, "stripe-resnet20-digits-0.3")
    (folder,) = (here / "outputs/runs/stripe-resnet20-digits-0.3").iterdir()
    assert (folder / "overrides.yaml").read_text() == "- ratio=0.3\n- seed=2\n"
    assert "ratio: 0.3" in (folder / "config.yaml").read_text()
    assert "${" not in (folder / "config.yaml").read_text()
    assert [p.name for p in here.iterdir()] == ["outputs"]
    assert [p.name for p in (here / "outputs").iterdir()] == ["runs"]


def test_runs_of_the_same_second_do_not_share_a_folder(here):
    assert len({job.make_run_folder("x") for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("problem", "exit_code", "sentence"),
    [
        (UserError("no data"), 2, "no data"),
        (StageError("finetune: NaN"), 1, "finetune: NaN"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError ended the run; the traceback is in outputs/runs/"),
    ],
)
def test_a_failed_run_leaves_its_sentence(problem, exit_code, sentence, fails, capsys, here):
    fails(problem)
    assert call() == exit_code
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    (record,) = records(here)
    assert record["status"] == "failed" and sentence in record["failure"]
    assert (record["command"], record["config"]["seed"]) == ("prune-cli", 0)


def test_an_unexpected_failure_is_traced_in_the_log(fails, here):
    fails(ZeroDivisionError("oops"))
    call()
    (log,) = here.glob("outputs/runs/*/*/run.log")
    assert "Traceback" in log.read_text() and "oops" in log.read_text()


def test_an_interrupted_run_says_how_to_resume(fails, capsys, here):
    fails(KeyboardInterrupt())
    assert call() == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert [record["status"] for record in records(here)] == ["interrupted"]


def test_sigterm_is_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(prune_cli.pipeline, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert call() == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_sweep_runs_every_combination(ran, here):
    assert call("-m", "ratio=0.3,0.5", "seed=range(0,2)") == 0
    assert [(e.ratio, e.seed) for e in ran] == [(0.3, 0), (0.3, 1), (0.5, 0), (0.5, 1)]
    assert len(list(here.glob("outputs/runs/*/*/config.yaml"))) == 4
    assert [p.name for p in here.iterdir()] == ["outputs"]


def test_a_sweep_goes_on_after_a_job_that_cannot_be_right(ran, capsys, here):
    assert call("-m", "method=stripe,nosuch", "ratio=0.3,1.5") == 2
    assert [(e.method_name, e.ratio) for e in ran] == [("stripe", 0.3)]
    assert sorted(r["failure"].partition(":")[0] for r in records(here)) == ["method=nosuch"] * 2 + ["ratio=1.5"]
    assert {r["status"] for r in records(here)} == {"failed"}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prune-cli: 3 of 4 jobs failed: method=stripe ratio=1.5; method=nosuch")


def test_a_sweep_goes_on_after_a_job_that_fails(fails, capsys, here):
    fails(StageError("collapse"), ratio=0.3)
    assert call("-m", "ratio=0.1,0.3,0.5") == 1
    assert [r["failure"] for r in records(here)] == ["collapse"]
    assert capsys.readouterr().err.splitlines()[-1] == "prune-cli: 1 of 3 jobs failed: ratio=0.3"


def test_an_interrupt_ends_the_sweep(fails, here):
    fails(KeyboardInterrupt(), ratio=0.1)
    assert call("-m", "ratio=0.1,0.3") == 130
    assert len(list(here.glob("outputs/runs/*"))) == 1


@pytest.mark.parametrize("override", ["recpie=short", "recipe=shrt", "method.select=x", "ratio=range(1,1)", "stripe"])
def test_a_sweep_that_is_wrong_as_a_whole_is_refused(override, ran, capsys, here):
    assert call("-m", override, "seed=0,1") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (ran, list(here.iterdir())) == ([], [])


def test_a_setting_of_swept_methods_need_not_exist_in_the_default_one(ran):
    assert call("-m", "method=fp", "method.criterion=l1,l2") == 0
    assert [e.method.criterion for e in ran] == ["l1", "l2"]


def test_a_folder_of_the_user_adds_options(ran, here):
    (here / "mine/recipe").mkdir(parents=True)
    (here / "mine/recipe/own.yaml").write_text("defaults: [short]\nname: own\n")
    assert call("--config-dir=mine", "recipe=own") == 0
    assert call("recipe=own", "--config-dir=mine", "-m", "seed=1") == 0
    assert [e.recipe.name for e in ran] == ["own", "own"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--cfg", "job", "ratio=0.3"], "ratio: 0.3"),
        (["--cfg", "job", "--resolve"], "store: "),
        (["--info", "defaults"], "recipe/short"),
        (["--info"], "Defaults List"),
        (["--hydra-help"], "--multirun"),
        (["-sc", "install=bash"], "complete"),
    ],
)
def test_hydra_options_work(arguments, shown, ran, capsys, here):
    assert call(*arguments) == 0
    out, err = capsys.readouterr()
    assert shown in out and not err
    assert (ran, list(here.iterdir())) == ([], [])


def test_shell_completion_knows_the_options(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "prune-cli recipe=")
    monkeypatch.setenv("COMP_POINT", "17")
    assert call("-sc", "query=bash") == 0
    assert "recipe=short" in capsys.readouterr().out


def test_help_lists_every_group_and_its_options(capsys):
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert "paper, short, smoke" in out and "ratio:" in out and "hydra/" not in out
    examples = [line.split("  ")[0] for line in map(str.strip, out.splitlines()) if line.startswith("prune-cli ")]
    assert len([e for e in examples if "=" in e and "[" not in e]) == 4


def fresh(*arguments: str) -> subprocess.CompletedProcess:
    """prune-cli in an interpreter of its own, with the names of all imported modules on stderr."""
    command = [sys.executable, "-W", "error", "-X", "importtime", "-m", "prune_cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(prune_cli.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("argument", "exit_code"), [("--help", 0), ("modle=resnet20", 2), ("ratio=1", 2), ("method.treshold=1", 2)]
)
def test_quick_answers_do_not_wait_for_torch(argument, exit_code):
    done = fresh(argument)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "hydra" in imported and "torch" not in imported
    assert done.returncode == exit_code
    assert len(said) == bool(exit_code) and "Traceback" not in done.stderr
