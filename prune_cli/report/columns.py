"""Rows -> the columns of a table: what is shown of each row, for people and for programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from prune_cli.published import PaperNumbers
from prune_cli.record import Record, StageResult
from prune_cli.report.counting import last, macs_removed, parameters_removed
from prune_cli.report.rows import Figures, Row, method_of, name_of, paper_drop, percent
from prune_cli.report.stages import DENSE, ORDER, TARGETS, measured_speedup, theoretical_speedup
from prune_cli.report.summary import spread


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


def columns_of(rows: Sequence[Row]) -> list[Column]:
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
        number("ratio_percent", "ratio\n%", "run", _ratios),
        text("ratio_of", "of", "run", lambda row: TARGETS.get(row.first.target, "") if row.runs else ""),
        Column("n", "n", "run", tuple(_count(row) for row in rows)),
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


def milliseconds(record: Record, batch: int, stage: str | None = None) -> float | None:
    """Median latency of a stage, by default of the smaller network at the end; None = not measured."""
    result = record.stage(stage) if stage else _timed_stage(record)
    latency = result.at(batch) if result else None
    return latency.median_ms if latency else None


def _names(rows: Sequence[Row], text: Callable[..., Column], referenced: bool) -> list[Column]:
    """The method where the row has a name of its own, and what not all rows have in common."""
    parts = [("method", method_of)] if referenced else []
    parts += [(part, lambda record, part=part: name_of(record, part)) for part in ("model", "dataset", "recipe")]
    apart = [(part, of) for part, of in parts if len({of(row.first) for row in rows} - {""}) > 1]
    return [text(part, part, "run", lambda row, of=of: of(row.first)) for part, of in apart]


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


def _timed_stage(record: Record) -> StageResult | None:
    """Fine-tuning does not change what runs: the pruned network speaks where only it was timed."""
    stages = [record.stage("finetuned"), record.stage("pruned")]
    return next((result for result in stages if result and result.latency), None)


def _removed(fraction: Callable[[Record], float | None]) -> Callable[[Row], Figures | None]:
    return lambda row: row.over_seeds(lambda record: percent(fraction(record)))


def _nonzero(row: Row) -> Figures | None:
    """Shown where zeros were left in: networks that are smaller rather than sparse have next to none."""
    def fraction(record: Record) -> float | None:
        result = last(record)
        sparse = result and result.nonzero is not None and result.nonzero < DENSE * result.parameters
        return 100 * result.nonzero / result.parameters if sparse else None

    return row.over_seeds(fraction)


def _ratios(row: Row) -> Figures | None:
    """The fraction that was to go, percent: of the units as selected, where ratios differ by layer too; else of
    the target. Of a run that failed, as it was asked for."""
    if row.runs:
        return row.over_seeds(lambda r: percent(r.requested if r.target == "units" else r.ratio))
    asked = row.first.ratio
    return (percent(asked),) if isinstance(asked, (int, float)) else None


def _count(row: Row) -> Cell:
    """How many runs the row's numbers come from, and how many there should be."""
    done, failed = len(row.runs), len(row.failures)
    text = f"{done}, {failed} failed" if done and failed else "failed" if failed else str(done)
    return Cell(text, done)


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


def _signless(value: float) -> float:
    """Without the minus sign of a zero."""
    return 0.0 if abs(value) < 0.005 else value
