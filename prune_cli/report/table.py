"""Records -> tables: a run that stands in a published table is shown in that table, beside the paper's
numbers; all other runs share one table.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from prune_cli.published import Reference
from prune_cli.record import Record
from prune_cli.report.collect import Run
from prune_cli.report.columns import Column, columns_of
from prune_cli.report.counting import NAMES
from prune_cli.report.rows import Row, dataset_of, name_of, rows_of
from prune_cli.report.stages import ENDINGS


@dataclass(frozen=True)
class ReportTable:
    """One table: `title` says what it shows and how it differs from the paper's, `notes` the rest."""

    title: str
    reference: Reference | None
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return any(row.failures for row in self.rows)


def tables(runs: Sequence[Run]) -> list[ReportTable]:
    """One table for each published one (and each way it was changed), one for all other runs."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        reference = run.record.reference
        groups.setdefault((reference.name, changes(run.record)) if reference else None, []).append(run)
    return [_table(group) for group in groups.values()]


def changes(record: Record) -> tuple[str, ...]:
    """The overrides of a table's command besides the row: what the user changed in the experiment."""
    words = shlex.split(record.command)[1:]
    kept = [w for w in words if not w.startswith(("experiment=", "row=", "seed=", "runtime.", "hydra", "-"))]
    return tuple(sorted(kept))


def _table(runs: Sequence[Run]) -> ReportTable:
    rows = rows_of(runs)
    reference = runs[0].record.reference
    columns = [c for c in columns_of(rows) if any(cell.text for cell in c.cells)]
    return ReportTable(_title(runs), reference, tuple(rows), tuple(columns), tuple(_notes(rows, reference)))


def _title(runs: Sequence[Run]) -> str:
    """What the table shows, and in brackets how it was made: with which scaled recipe, and of a published
    table what else was changed."""
    records = [run.record for run in runs if run.complete] or [run.record for run in runs]
    recipes = sorted({name_of(record, "recipe") for record in records} - {"", "paper"})
    how = [f"made with recipe {' and '.join(recipes)}"] if recipes else []
    title, reference = _shown(records), records[0].reference
    if reference is not None:
        title = reference.title
        if (dataset := dataset_of(records[0])) not in (reference.dataset, ""):
            whose = "the paper's " if reference.source else ""
            how.insert(0, f"on {dataset}, not on {whose}{reference.dataset}")
        told = ("recipe=", "dataset=", "debug=")
        how += [_without_folders(word) for word in changes(records[0]) if not word.startswith(told)]
    return title + (f" ({'; '.join(how)})" if how else "")


def _shown(records: Sequence[Record]) -> str:
    """The model and the data set that all have in common."""
    pairs = {(name_of(record, "model"), dataset_of(record)) for record in records}
    (pair, *others) = pairs
    return "Runs" if others or not all(pair) else " on ".join(pair)


def _without_folders(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={value.rpartition('/')[2]}"


def _notes(rows: Sequence[Row], reference: Reference | None) -> list[str]:
    notes = []
    for row in rows:
        for run in row.failures:
            seed = "" if run.record.seed is None else f", seed {run.record.seed},"
            what = ENDINGS.get(run.record.status, run.record.status)
            notes.append(f"{row.label}{seed} {what}: {run.record.failure}")
    if reference is not None and reference.source:
        notes.append(f"Paper: {reference.source}.")
    deviations = {row.deviation[1] for row in rows if row.deviation}
    if "accuracy" in deviations:
        notes.append("Deviation: our mean minus the paper's top-1, in points.")
    if "drop" in deviations:
        notes.append("Deviation of drop: the paper's drop minus ours, in points; above 0 = we lose less.")
    if reference is not None and reference.counting != "macs":
        notes.append(f"MACs, their way: {NAMES[reference.counting]}; ours: {NAMES['macs']}.")
    if reference is not None and reference.skeleton:
        notes.append("Params, their way: with the filter skeleton.")
    seeds = sorted({run.record.seed for row in rows for run in row.runs if run.record.seed is not None})
    if len(seeds) > 1:
        notes.append(f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation.")
    notes += sorted({where for row in rows for record in row.records if (where := _where(record))})
    return notes


def _where(record: Record) -> str:
    """Machine and versions of a run."""
    machine = record.machine
    device = machine.get("gpu") if machine.get("device", "cpu") != "cpu" else machine.get("cpu")
    threads = machine.get("threads")
    many = "" if threads == 1 else "s"
    return f"{device}, {threads} thread{many}, torch {record.versions.get('torch')}." if device else ""
