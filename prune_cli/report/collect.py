"""Runs found on disk: every record below some folders, each result once."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prune_cli.errors import UserError
from prune_cli.record import SCHEMA, Record


@dataclass(frozen=True)
class Run:
    """A record and the file it was read from; beside it lies what else the run left."""

    record: Record
    path: Path

    @property
    def complete(self) -> bool:
        return self.record.status == "complete"


def collect(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders (all the way down) and files, oldest first.

    A command given twice finds its stages in the store and leaves a second record of the same
    result: the younger one counts, unless latency was measured for the older one only. A failure counts
    until the same command has ended well.
    Raises UserError: a path that is not there, or nothing but other files.
    """
    runs = [run for path in paths for run in _runs(Path(path))]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no record.json there; finished runs leave one in outputs/runs")
    found: dict[object, Run] = {}
    for run in sorted({run.path: run for run in runs}.values(), key=lambda run: (run.path.parent.name, run.path)):
        if run.complete:
            found.pop(("failed", run.record.command), None)
        before = found.get(_identity(run.record))
        if before is None or not _timed(before) or _timed(run):
            found[_identity(run.record)] = run
    return list(found.values())


def _identity(record: Record) -> object:
    if record.status != "complete":
        return "failed", record.command
    return record.name, record.reference, tuple((result.stage, result.key) for result in record.stages)


def _timed(run: Run) -> bool:
    return any(result.latency for result in run.record.stages)


def _runs(path: Path) -> Iterator[Run]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        if file.name == "record.json" or not path.is_dir() or _holds_record(file):
            yield Run(_read(file), file.absolute())


def _read(file: Path) -> Record:
    """The record, or one of a failure that says why it cannot be read: the others are still good."""
    try:
        return Record.read(file)
    except UserError as problem:
        nothing = dict.fromkeys(("seed", "ratio", "unit", "requested", "obtained"))
        return Record(
            file.absolute().parent.name, "failed", "", {}, **nothing, notes=(), stages=(), machine={}, versions={},
            failure=str(problem),
        )  # fmt: skip


def _holds_record(file: Path) -> bool:
    """Published records have names of their own, and stand among other JSON."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("schema") == SCHEMA and "stages" in values and "command" in values
