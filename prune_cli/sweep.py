"""`-m`: every combination of values is a job, and a job that fails leaves the others alone.

An experiment with a table is swept over its rows, with `-m` or without. At the end stands a table of
all jobs.

Hydra's own sweep composes all jobs beforehand and gives up at the first that is wrong. Its
launchers are used as they are.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from prune_cli.build import build
from prune_cli.compose import Composer, of_hydra, spelled
from prune_cli.errors import UserError
from prune_cli.job import RUNS, Failed, command_of, given, hydra_job, make_run_folder, record_failure, say
from prune_cli.rows import Rows, table_of


def sweep(composer: Composer, lines: Sequence[str]) -> int:
    """Run every job and return the exit code: 0, or 2 if the failures are all the user's, else 1.

    Raises UserError: every job is wrong for the same reason; nothing was run.
    """
    overrides = [composer.parse(line) for line in lines]
    shared = ["hydra.mode=MULTIRUN", *(o.input_line for o in overrides if of_hydra(o))]
    jobs = _jobs(composer, [o for o in overrides if not of_hydra(o)])
    if not jobs:
        raise UserError("-m: there are no values to sweep over")
    checks = [_check(composer, [*shared, *job]) for job in jobs]
    sentences = {sentence for _, sentence in checks}
    if len(sentences) == 1 and None not in sentences:
        raise UserError(sentences.pop())

    failures, before = [], set(RUNS.glob("*/*/record.json"))
    for job, (config, sentence) in zip(jobs, checks):
        if sentence is not None:
            _record_refusal(job, config or _place(composer, job), sentence)
            failures.append((job, 2))
    accepted = [job for job, (_, sentence) in zip(jobs, checks) if sentence is None]
    results = _launch(composer, shared, accepted) if accepted else []
    failures += [(job, code) for job, result in zip(accepted, results) if (code := _exit_code(result))]
    _end_with_table(set(RUNS.glob("*/*/record.json")) - before)
    if not failures:
        return 0
    configs = {tuple(job): config for job, (config, _) in zip(jobs, checks)}
    named = "; ".join(" ".join(given(job, configs[tuple(job)])) for job, _ in failures)
    say(f"{len(failures)} of {len(jobs)} jobs failed: {named}")
    return 2 if all(code == 2 for _, code in failures) else 1


def _jobs(composer: Composer, overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of every job: all combinations, and of an experiment with a table all its rows."""
    jobs = []
    for lines in _split([o for o in overrides if o.key_or_group == "experiment"]):
        rest = [*map(composer.parse, lines), *(o for o in overrides if o.key_or_group != "experiment")]
        table = table_of(composer, lines)
        rows = Rows(composer, table, rest) if table else None
        combinations = _split(rows.further if rows else rest)
        jobs += [rows.job(name, c) for c in combinations for name in rows.names] if rows else combinations
    return jobs


def _split(overrides: Sequence[Override]) -> list[list[str]]:
    return BasicSweeper.split_arguments(list(overrides), None)[0]


def _end_with_table(files: Collection[Path]) -> None:
    """What the jobs left, as one table. They may have run in other processes: records speak."""
    if files:
        from prune_cli.report.collect import collect
        from prune_cli.report.present import present

        present(collect(files))


def _check(composer: Composer, overrides: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The config of a job as far as it composes, and why the job cannot run (None: it can)."""
    config = {}
    try:
        config = composer.compose(overrides)
        build(config)
    except UserError as problem:
        return config, str(problem)
    return config, None


def _place(composer: Composer, job: Sequence[str]) -> dict[str, Any]:
    """What is left of the config of a row's job that does not compose: its place in the table."""
    row = next((line.partition("=")[2] for line in job if line.startswith("row=")), None)
    config = composer.chosen(job)
    return {"table": config["table"], "row": row, "recipe": {"name": config["recipe"]["name"]}} if row else {}


def _record_refusal(job: Sequence[str], config: dict[str, Any], sentence: str) -> None:
    """A job that never started may not even have a name: its record lies under `refused`."""
    say(sentence)
    folder = make_run_folder("refused")
    OmegaConf.save(OmegaConf.create(list(job)), folder / "overrides.yaml")
    record_failure(folder, sentence, config, command_of(given(job, config)))


def _launch(composer: Composer, shared: list[str], jobs: list[list[str]]) -> Sequence[JobReturn]:
    """Hand the jobs to the launcher that `hydra/launcher` names."""
    master = composer.loader.load_configuration(composer.config_name, shared, run_mode=RunMode.MULTIRUN)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=composer.loader, callbacks=Callbacks(master)),
        task_function=hydra_job,
        config=master,
    )
    return launcher.launch([[spelled(composer.parse(line)) for line in job] for job in jobs], initial_job_idx=0)


def _exit_code(result: JobReturn) -> int:
    """0 for a job that ended well."""
    if result.status is JobStatus.COMPLETED:
        return 0
    problem = result._return_value  # the public property prints a line of Hydra's
    if isinstance(problem, Failed):
        return problem.exit_code
    say(f"{type(problem).__name__}: {problem}")
    return 1
