"""`-m`: every combination of values is a job, and a job that fails leaves the others alone.

Hydra's own sweeper composes all jobs beforehand and gives up at the first that is wrong.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from prune_cli.build import build
from prune_cli.compose import Composer
from prune_cli.errors import UserError
from prune_cli.job import Failed, command_of, make_run_folder, record_failure, say


class EachJob(BasicSweeper):
    """Checks each job, records the ones that cannot be right, hands the rest to the launcher."""

    __module__ = "hydra_plugins.prune_cli"  # Hydra takes plugins from this namespace only

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Run all jobs. Raises UserError: every job is wrong for the same reason, nothing was run;
        SystemExit: at least one job failed."""
        composer = Composer(self.hydra_context.config_loader, self.config.hydra.job.config_name)
        overrides = [composer.parse(line) for line in self._parse_config() + list(arguments)]
        jobs = self.split_arguments(overrides, None)[0]
        fixed = list(self.config.hydra.overrides.hydra)
        checks = [_check(composer, fixed + job) for job in jobs]
        sentences = {sentence for _, sentence in checks}
        if not jobs:
            raise UserError("-m: there are no values to sweep over")
        if len(sentences) == 1 and None not in sentences:
            raise UserError(sentences.pop())

        failures = []
        for job, (config, sentence) in zip(jobs, checks):
            if sentence is not None:
                _record_refusal(job, config, sentence)
                failures.append((job, 2))
        accepted = [job for job, (_, sentence) in zip(jobs, checks) if sentence is None]
        returns = []
        for batch in self.split_overrides_to_chunks(accepted, self.max_batch_size) if accepted else ():
            returns.extend(self.launcher.launch(batch, initial_job_idx=len(returns)))
        failures += [(job, code) for job, result in zip(accepted, returns) if (code := _exit_code(result))]
        if failures:
            listed = "; ".join(" ".join(job) for job, _ in failures)
            say(f"{len(failures)} of {len(jobs)} jobs failed: {listed}")
            raise SystemExit(2 if all(code == 2 for _, code in failures) else 1)
        return returns


def _check(composer: Composer, overrides: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The config of a job as far as it composes, and why the job cannot run (None: it can)."""
    config = {}
    try:
        config = composer.compose(overrides)
        build(config)
    except UserError as problem:
        return config, str(problem)
    return config, None


def _record_refusal(job: Sequence[str], config: dict[str, Any], sentence: str) -> None:
    """A job that never started has no name of its own: its record lies under `refused`."""
    say(sentence)
    folder = make_run_folder("refused")
    OmegaConf.save(OmegaConf.create(list(job)), folder / "overrides.yaml")
    record_failure(folder, sentence, config, command_of(job))


def _exit_code(result: JobReturn) -> int:
    """0 for a job that ended well."""
    if result.status is JobStatus.COMPLETED:
        return 0
    problem = result._return_value  # its property prints a line of Hydra's
    if isinstance(problem, Failed):
        return problem.exit_code
    say(f"{type(problem).__name__}: {problem}")
    return 1
