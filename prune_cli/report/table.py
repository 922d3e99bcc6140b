"""Records -> tables of rows: one per setting, its runs over the seeds taken together.

A run that stands in a published table is shown in that table, beside the paper's numbers; all other
runs share one table.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from prune_cli.published import PaperNumbers, Reference
from prune_cli.record import Record, StageResult
from prune_cli.report.collect import Run
from prune_cli.report.counting import NAMES, last, macs_removed, parameters_removed
from prune_cli.report.stages import DENSE, ENDINGS, ORDER, TARGETS, measured_speedup, theoretical_speedup
from prune_cli.report.summary import spread

Figures = tuple[float, ...]  # one value per seed


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only. `label` names what sets them apart from other rows."""

    label: str
    runs: tuple[Run, ...]
    failures: tuple[Run, ...]

    @property
    def records(self) -> list[Record]:
        return [run.record for run in self.runs]

    @property
    def first(self) -> Record:
        return (self.runs or self.failures)[0].record

    @property
    def series(self) -> str:
        """What rows have in common that differ in how much is removed: prune_50 and prune_60."""
        return re.sub(r"[_ ]?\d+$", "", self.label) or self.label

    @property
    def paper(self) -> PaperNumbers | None:
        return self.first.reference.paper if self.first.reference else None

    def over_seeds(self, figure: Callable[[Record], float | None]) -> Figures | None:
        """The figure of every run; None unless all have it."""
        values = tuple(figure(record) for record in self.records)
        return None if not values or None in values else values

    def accuracy(self, stage: str) -> Figures | None:
        """Top-1 of a stage, percent."""
        return self.over_seeds(lambda record: _percent(result.accuracy) if (result := record.stage(stage)) else None)

    @property
    def final(self) -> Figures | None:
        """Top-1 of the smaller network at the end, percent."""
        return self.over_seeds(lambda record: _percent(record.objective))

    @property
    def drop(self) -> Figures | None:
        """Points lost from the dense network to the end."""
        return self.over_seeds(
            lambda record: 100 * (dense.accuracy - record.objective)
            if (dense := record.stage("dense")) and record.objective is not None else None
        )  # fmt: skip

    @property
    def on_the_papers_data(self) -> bool:
        """Whether the paper prints an accuracy that ours can be compared with."""
        printed = self.paper is not None and self.paper.accuracy is not None
        return printed and _dataset(self.first) == self.first.reference.dataset

    @property
    def deviation(self) -> tuple[float, str] | None:
        """Our mean against the paper's number in points, above 0 = better, and what was compared:
        the accuracy on the paper's data set, elsewhere (or where that is all it prints) the drop."""
        paper = self.paper
        if paper is None or self.final is None:
            return None
        if self.on_the_papers_data:
            return mean(self.final) - paper.accuracy, "accuracy"
        lost = paper_drop(paper)
        return None if lost is None or self.drop is None else (lost - mean(self.drop), "drop")


@dataclass(frozen=True)
class Cell:
    """`text` for people; mean and standard deviation for programs, None where that is no number."""

    text: str = ""
    mean: float | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class Column:
    """`name` with its unit for programs, `header` for people; `part`: run, accuracy, size, latency or
    paper."""

    name: str
    header: str
    part: str
    cells: tuple[Cell, ...]


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


def paper_drop(paper: PaperNumbers) -> float | None:
    """Points that the paper's network lost, as printed, or from its two accuracies."""
    if paper.drop is not None or paper.dense is None or paper.accuracy is None:
        return paper.drop
    return paper.dense - paper.accuracy


def _table(runs: Sequence[Run]) -> ReportTable:
    rows = _rows(runs)
    reference = runs[0].record.reference
    columns = [c for c in _columns(rows) if any(cell.text for cell in c.cells)]
    return ReportTable(_title(runs), reference, tuple(rows), tuple(columns), tuple(_notes(rows, reference)))


def _rows(runs: Sequence[Run]) -> list[Row]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_setting(run.record), []).append(run)
    labels = _labels([group[0].record for group in groups.values()])
    rows = []
    for label, group in zip(labels, groups.values(), strict=True):
        by_seed = sorted(group, key=lambda run: -1 if run.record.seed is None else run.record.seed)
        complete, failed = [r for r in by_seed if r.complete], [r for r in by_seed if not r.complete]
        rows.append(Row(label, tuple(complete), tuple(failed)))
    return sorted(rows, key=lambda row: row.first.reference.position if row.first.reference else 0)


def _setting(record: Record) -> str:
    """The same for runs that differ in their seed only."""
    if record.reference:
        return record.reference.row
    if record.status != "complete":
        return " ".join(word for word in shlex.split(record.command) if not word.startswith("seed=")) or record.name
    return json.dumps([record.name, *_flat(record).items()], sort_keys=True)


def _flat(record: Record) -> dict[str, Any]:
    """The settings that decide the result, by dotted name; a method that is given the run's seed
    differs by seed as the run does."""
    def leaves(prefix: str, values: Mapping[str, Any]):
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from leaves(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}", value

    found = dict(leaves("", {k: v for k, v in record.config.items() if k not in ("runtime", "seed")}))
    if found.get("method.seed") == record.seed:
        found.pop("method.seed", None)
    return found


def _labels(records: Sequence[Record]) -> list[str]:
    """Row names of a published table, else the method and what differs between its rows."""
    if records[0].reference:
        return [record.reference.row for record in records]
    shown = ("method_name", "method.target", "method.ratio", "ratio", "model.name", "dataset.name", "name")
    settings = [_flat(record) if record.status == "complete" else {} for record in records]
    labels = []
    for record, own in zip(records, settings, strict=True):
        if not own:
            labels.append(_method(record) if record.config else record.name)
            continue
        same = [other for other in settings if other.get("method_name") == own.get("method_name")]
        apart = [key for key in own if key not in shown and any(other.get(key) != own[key] for other in same)]
        short = [f"{key.rpartition('.')[2]}={_plain(own[key])}" for key in apart if not key.endswith("target")]
        labels.append(" ".join([_method(record), *short[:3]]))
    return labels


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Every column there could be; those without a cell are left out later."""
    def text(name: str, header: str, part: str, of: Callable[[Row], str]) -> Column:
        return Column(name, header, part, tuple(Cell(of(row) or "") for row in rows))

    def number(name: str, header: str, part: str, of: Callable[[Row], Figures | None], unit: str = "") -> Column:
        return Column(name, header, part, tuple(_cell(of(row), unit) for row in rows))

    def of_paper(name: str, header: str, number: str, deviation: str = "") -> Column:
        return Column(name, header, "paper", tuple(_paper_cell(row.paper, number, deviation) for row in rows))

    referenced = any(row.first.reference for row in rows)
    stages = [stage for stage in ORDER if any(r.stage(stage) for row in rows for r in row.records)]
    batches = sorted({t.batch for row in rows for r in row.records for s in r.stages for t in s.latency})
    return [
        text("row", "row" if referenced else "method", "run", lambda row: row.label),
        *_names(rows, text, referenced),
        number("ratio_percent", "ratio\n%", "run", lambda row: row.over_seeds(lambda r: _percent(_ratio(r)))),
        text("ratio_of", "of", "run", lambda row: TARGETS.get(row.first.target, "") if row.runs else ""),
        text("n", "n", "run", lambda row: str(len(row.runs)) if row.runs else ""),
        *(
            number(f"{stage}_percent", f"{stage}\n%", "accuracy", lambda row, stage=stage: row.accuracy(stage))
            for stage in stages
        ),
        number("drop_points", "drop", "accuracy", lambda row: row.drop),
        of_paper("paper_accuracy_percent", "paper\n%", "accuracy", "accuracy_std"),
        of_paper("paper_pruned_percent", "paper,\npruned %", "pruned"),
        of_paper("paper_scratch_percent", "paper,\nscratch %", "scratch"),
        Column("paper_drop_points", "paper,\ndrop", "paper", tuple(_paper_drop_cell(row.paper) for row in rows)),
        Column("deviation_points", "devia-\ntion", "paper", tuple(_deviation_cell(row) for row in rows)),
        number("parameters_removed_percent", "params\nremoved %", "size", _removed(parameters_removed)),
        *_paper_way(rows, number),
        of_paper("paper_parameters_removed_percent", "paper,\nparams %", "parameters_removed"),
        number("macs_removed_percent", "MACs\nremoved %", "size", _removed(macs_removed)),
        of_paper("paper_macs_removed_percent", "paper,\nMACs %", "macs_removed"),
        number("nonzero_percent", "nonzero\n%", "size", _nonzero),
        number("theoretical_speedup", "speedup\ntheory", "latency",
               lambda row: row.over_seeds(lambda r: theoretical_speedup(r, last(r)) if last(r) else None), "x"),
        *(column for batch in batches for column in _timed(batch, number)),
    ]  # fmt: skip


def _names(rows: Sequence[Row], text: Callable[..., Column], referenced: bool) -> list[Column]:
    """The method where the row has a name of its own, and what not all rows have in common."""
    named = [("method", _method), ("model", lambda r: _name(r, "model")), ("dataset", _dataset)]
    apart = [
        (word, of) for word, of in named
        if len({of(row.first) for row in rows}) > 1 and (word != "method" or referenced)
    ]  # fmt: skip
    return [text(word, word, "run", lambda row, of=of: of(row.first)) for word, of in apart]


def _paper_way(rows: Sequence[Row], number: Callable[..., Column]) -> list[Column]:
    """What was removed, counted as the paper does, where that is another way than ours."""
    reference = rows[0].first.reference
    if reference is None:
        return []
    columns = []
    if reference.skeleton:
        columns.append(number("parameters_removed_as_published_percent", "params,\ntheir way %", "size",
                              _removed(lambda record: parameters_removed(record, skeleton=True))))
    if reference.counting != "macs":
        columns.append(number("macs_removed_as_published_percent", "MACs,\ntheir way %", "size",
                              _removed(lambda record: macs_removed(record, reference.counting))))
    return columns  # fmt: skip


def _timed(batch: int, number: Callable[..., Column]) -> list[Column]:
    def speedup(record: Record) -> float | None:
        result = _timed_stage(record)
        return measured_speedup(record, result, batch) if result else None

    return [
        number(f"latency_batch_{batch}_ms", f"ms at\nbatch {batch}", "latency",
               lambda row: row.over_seeds(lambda record: milliseconds(record, batch))),
        number(f"speedup_batch_{batch}", f"speedup\nbatch {batch}", "latency",
               lambda row: row.over_seeds(speedup), "x"),
    ]  # fmt: skip


def milliseconds(record: Record, batch: int, stage: str | None = None) -> float | None:
    """Median latency of a stage, by default of the smaller network at the end; None = not measured."""
    result = record.stage(stage) if stage else _timed_stage(record)
    latency = result.at(batch) if result else None
    return latency.median_ms if latency else None


def _timed_stage(record: Record) -> StageResult | None:
    """Fine-tuning does not change what runs: the pruned network speaks where only it was timed."""
    stages = [record.stage("finetuned"), record.stage("pruned")]
    return next((result for result in stages if result and result.latency), None)


def _removed(fraction: Callable[[Record], float | None]) -> Callable[[Row], Figures | None]:
    return lambda row: row.over_seeds(lambda record: _percent(fraction(record)))


def _nonzero(row: Row) -> Figures | None:
    """Shown where zeros were left in: networks that are smaller rather than sparse have next to none."""
    def fraction(record: Record) -> float | None:
        result = last(record)
        sparse = result and result.nonzero is not None and result.nonzero < DENSE * result.parameters
        return 100 * result.nonzero / result.parameters if sparse else None

    return row.over_seeds(fraction)


def _cell(values: Figures | None, unit: str) -> Cell:
    if values is None:
        return Cell()
    # Below 100 two decimals, as accuracies are printed everywhere.
    text = spread(values, unit=unit) if len(set(values)) > 1 else f"{_signless(values[0]):.2f}{unit}"
    return Cell(text, mean(values), stdev(values) if len(values) > 1 else None)


def _paper_cell(paper: PaperNumbers | None, number: str, deviation: str) -> Cell:
    value = getattr(paper, number) if paper else None
    if value is None:
        return Cell()
    spread_printed = getattr(paper, deviation) if deviation else None
    return Cell(f"{value:.2f}" + (f" ± {spread_printed:.2f}" if spread_printed else ""), value, spread_printed)


def _paper_drop_cell(paper: PaperNumbers | None) -> Cell:
    drop = paper_drop(paper) if paper else None
    return Cell() if drop is None else Cell(f"{_signless(drop):.2f}", drop)


def _deviation_cell(row: Row) -> Cell:
    if row.deviation is None:
        return Cell()
    points, of = row.deviation
    text = f"{points:+.2f}" if abs(points) >= 0.005 else "0.00"
    return Cell(text + (" of drop" if of == "drop" else ""), points)


def _title(runs: Sequence[Run]) -> str:
    record, reference = runs[0].record, runs[0].record.reference
    if reference is None:
        settings = {(_name(r.record, "model"), _dataset(r.record)) for r in runs if r.complete}
        return " on ".join(settings.pop()) if len(settings) == 1 else "Runs"
    said = []
    if (dataset := _dataset(record)) not in (reference.dataset, ""):
        said.append(f"on {dataset}, not on the paper's {reference.dataset}")
    if (recipe := _name(record, "recipe")) not in (reference.recipe, ""):
        said.append(f"made with recipe {recipe}")
    told = ("recipe=", "dataset=", "debug=")
    said += [_without_folders(word) for word in changes(record) if not word.startswith(told)]
    return reference.title + (f" ({'; '.join(said)})" if said else "")


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
    return f"{device}, {machine.get('threads')} threads, torch {record.versions.get('torch')}." if device else ""


def _ratio(record: Record) -> float | None:
    """The fraction that was to go: of the units as selected, where ratios differ by layer too; else of the target."""
    return record.requested if record.target == "units" else record.ratio


def _method(record: Record) -> str:
    name = record.config.get("method_name") or _name(record, "method")
    return name or record.name.partition("-")[0]


def _name(record: Record, part: str) -> str:
    values = record.config.get(part)
    return str(values.get("name", "")) if isinstance(values, Mapping) else ""


def _dataset(record: Record) -> str:
    return _name(record, "dataset")


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _signless(value: float) -> float:
    """Without the minus sign of a zero."""
    return 0.0 if abs(value) < 0.005 else value
