"""One job: a composed config becomes a run with its own folder, and ends in a number or a sentence."""

import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prune_cli.build import build
from prune_cli.errors import StageError, UserError
from prune_cli.published import override_line, table_in

RUNS = Path("outputs/runs")
INTERRUPTED = "interrupted; the same command resumes from the last finished epoch"


class Failed(Exception):
    """A job ended badly and has said so; what is left is its exit code."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


def say(sentence: str) -> None:
    """One line on stderr, whatever the sentence quotes."""
    line = "".join(c if c.isprintable() else " " for c in sentence)
    print("prune-cli:", " ".join(line.split()), file=sys.stderr, flush=True)


def run_job(config: Mapping[str, Any], overrides: Sequence[str]) -> float:
    """Run one experiment and return its objective, the accuracy of the network at the end.

    Raises Failed after the sentence has been printed and recorded, KeyboardInterrupt after it has
    been recorded. A config that cannot be right leaves no folder.
    """
    command = command_of(overrides)
    try:
        experiment = build(config)
    except UserError as problem:
        say(str(problem))
        raise Failed(2) from problem
    folder = make_run_folder(experiment.name)
    _write_inputs(folder, config, overrides)
    with _recorded(folder, config, command):
        from prune_cli.pipeline import run  # imports torch, which what came before does without

        return run(experiment, folder, command=command).objective


def hydra_job(config: DictConfig) -> float:
    """What Hydra calls, in this process or in one of a launcher's."""
    hydra = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    written = [line.removeprefix("++") for line in hydra.overrides.task]  # as the user writes them
    overrides = given(written, plain)
    sweeping = hydra.mode is RunMode.MULTIRUN
    if sweeping:
        print(f"job {hydra.job.num + 1}: {command_of(overrides)}", flush=True)
    try:
        return run_job(plain, overrides)
    except Failed as failure:
        if sweeping:
            raise  # Hydra hands it to the sweeper
        raise SystemExit(failure.exit_code) from failure  # of other exceptions Hydra prints a line


def given(overrides: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The overrides without those that the job's row of a table makes itself."""
    table, row = table_in(config), config.get("row")
    if table is None or row is None:
        return list(overrides)
    made = {override_line(*item) for item in table.overrides(row, config["recipe"]["name"]).items()}
    return [line for line in overrides if line not in made]


def command_of(overrides: Sequence[str]) -> str:
    """The command line that runs this job alone."""
    return shlex.join(["prune-cli", *overrides])


def make_run_folder(name: str) -> Path:
    """outputs/runs/<name>/<date>_<time>, made by this call alone: numbered when it is taken."""
    parent = RUNS / name
    stem = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = parent / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def record_failure(
    folder: Path, sentence: str, config: Mapping[str, Any], command: str, status: str = "failed"
) -> None:
    """Leave a record.json that says why there is no result."""
    from prune_cli.record import write_failure

    write_failure(folder, sentence, config=config, command=command, status=status)


def _write_inputs(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    OmegaConf.save(OmegaConf.create(dict(config)), folder / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(overrides)), folder / "overrides.yaml")


@contextmanager
def _recorded(folder: Path, config: Mapping[str, Any], command: str) -> Iterator[None]:
    """Turn the ways a run can end badly into a record, a sentence and an exit code."""
    try:
        yield
        return
    except KeyboardInterrupt:
        record_failure(folder, INTERRUPTED, config, command, status="interrupted")
        raise
    except (UserError, StageError) as problem:
        failure, sentence, exit_code = problem, str(problem), 2 if isinstance(problem, UserError) else 1
    except Exception as problem:
        log = folder / "run.log"
        if not log.exists():  # else the journal was open and has written the traceback
            log.write_text(traceback.format_exc(), encoding="utf-8")
        failure, sentence, exit_code = problem, f"{type(problem).__name__} ended the run; the traceback is in {log}", 1
    record_failure(folder, sentence, config, command)
    say(sentence)
    raise Failed(exit_code) from failure
