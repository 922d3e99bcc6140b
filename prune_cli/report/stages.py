"""The table that ends a run: one row per stage, and what to know about it in plain sentences.

No torch: a finished run's table is printed from its record alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prune_cli.record import Latency, Record, StageResult

ORDER = (
    "dense", "base", "sparse", "pruned", "random", "finetuned", "learning_rate", "rewind", "scratch_e", "scratch_b",
    "random_finetuned",
)  # fmt: skip
LABELS = {  # of what is no stage of the method, mostly controls
    "base": "base, from which\nthis run goes on",
    "random": "random selection,\nsame ratio",
    "learning_rate": "learning rate\nrewound",
    "rewind": "weights rewound",
    "scratch_e": "from scratch,\nequal epochs",
    "scratch_b": "from scratch,\nequal MACs",
    "random_finetuned": "random selection,\nfinetuned",
}
ENDINGS = {"failed": "failed", "interrupted": "was interrupted"}  # of a run, by its status
MISSING = "–"
TARGETS = {"macs": "MACs", "params": "parameters"}  # by the record's name
DENSE = 0.99  # fraction of nonzero parameters from which a network is not called sparse


@dataclass(frozen=True)
class Column:
    """Header and cells, one per row of the table; `timed`: batch size of a measurement, or None."""

    header: str
    cells: tuple[str, ...]
    timed: int | None


def stage_table(record: Record) -> Table:
    """The whole table, nearly 120 characters wide."""
    return _table(_columns(record), _title(record))


def render(record: Record, console: Console, paths: Mapping[str, Path] | None = None) -> None:
    """Print the table, the sentences, and `paths`: what was written where, by its name.

    Where the table is too wide for the console it becomes two, accuracy and size above latency.
    """
    for table in _fitting(record, console) if record.stages else ():
        console.print()
        console.print(table)
    console.print()
    for sentence in sentences(record):
        console.print(Text(sentence))
    width = max((len(name) for name in paths or ()), default=0)
    for name, path in (paths or {}).items():
        # Unwrapped, so that a terminal lets the path be clicked and copied.
        console.print(Text(f"{name:<{width}}  {path}"), soft_wrap=True)


def markdown(record: Record) -> str:
    """The same table in Markdown."""
    columns = _columns(record)
    lines = [
        [column.header for column in columns],
        ["---", *("---:" for _ in columns[1:])],
        *zip(*(column.cells for column in columns), strict=True),
    ]
    return "".join("| " + " | ".join(line).replace("\n", " ") + " |\n" for line in lines)


def sentences(record: Record) -> list[str]:
    """What a reader of the table has to know besides its numbers."""
    said = []
    if record.failure:
        said.append(f"This run {ENDINGS.get(record.status, record.status)}: {record.failure}")
    if record.removed is not None:
        target = TARGETS[record.target]
        said.append(f"Removed {_percent(record.removed)}% of the {target}, requested {_percent(record.ratio)}%.")
        said.append(f"These are {_percent(record.obtained)}% of the {record.unit}s.")
    elif record.obtained is not None and record.requested is not None:
        said.append(
            f"Removed {_percent(record.obtained)}% of the {record.unit}s, "
            f"requested {_percent(record.requested)}%."
        )
    if base := record.config.get("base"):
        said.append(f"Goes on from {base}; the dense network is the one that came before it.")
    said += _slower(record)
    said += record.notes
    if any(result.latency for result in record.stages):
        said.append(_measured_on(record.machine))
    return said


def measured_speedup(record: Record, result: StageResult, batch: int) -> float | None:
    """Dense time / this stage's time at one batch size, None where either is missing."""
    dense = record.stage("dense")
    ours, theirs = result.at(batch), dense and dense.at(batch)
    return theirs.median_ms / ours.median_ms if ours and theirs and ours.median_ms else None


def theoretical_speedup(record: Record, result: StageResult) -> float | None:
    """Dense MACs / this stage's MACs, None where either is missing."""
    dense = record.stage("dense")
    return dense.macs / result.macs if dense and result.macs else None


def _columns(record: Record) -> list[Column]:
    """All columns of the table; the first holds the labels."""
    rows = sorted(record.stages, key=_place)
    batches = sorted({latency.batch for result in rows for latency in result.latency})

    def column(header, cell, timed=None):
        return Column(header, tuple(cell(result) for result in rows), timed)

    def latency(batch):
        return column(f"ms at\nbatch {batch}", lambda r: _latency(r.at(batch)), timed=batch)

    def speedup(batch):
        return column(f"speedup\nbatch {batch}", lambda r: _factor(measured_speedup(record, r, batch)), timed=batch)

    def nonzero(result):
        return MISSING if result.nonzero is None else _percent(result.nonzero / result.parameters)

    # Networks that are smaller rather than sparse have next to no zeros: nothing to show.
    sparse = any(r.nonzero is not None and r.nonzero < DENSE * r.parameters for r in rows)
    return [
        column("stage", _label),
        column("top-1\n%", lambda r: _percent(r.accuracy)),
        column("params", lambda r: _scaled(r.parameters)),
        *([column("nonzero\n%", nonzero)] if sparse else []),
        column("MACs", lambda r: _scaled(r.macs)),
        column("file\nsize", lambda r: _scaled(r.file_bytes, "B")),
        column("speedup\ntheory", lambda r: _factor(theoretical_speedup(record, r))),
        *(make(batch) for batch in batches for make in (latency, speedup)),
    ]


def _place(result: StageResult) -> tuple[int, int]:
    """Where its row stands: by round, then as a run makes the stages."""
    return result.round or 0, ORDER.index(result.stage) if result.stage in ORDER else len(ORDER)


def _label(result: StageResult) -> str:
    label = LABELS.get(result.stage, result.stage)
    return label if result.round is None or result.stage in LABELS else f"{label}, round {result.round}"


def _fitting(record: Record, console: Console) -> list[Table]:
    """The whole table, or the fewest parts of it that are narrow enough for the console."""
    labels, *columns = _columns(record)
    sizes, *timed = (
        [column for column in columns if column.timed == batch]
        for batch in dict.fromkeys(column.timed for column in columns)
    )

    def width(parts):
        table = _table([labels, *sum(parts, [])], title=None)
        return Measurement.get(console, console.options.update(width=1000), table).maximum

    if width([sizes, *timed]) <= console.width:
        return [_table([labels, *columns], _title(record))]
    tables = [[sizes], []]
    for part in timed:
        if tables[-1] and width([*tables[-1], part]) > console.width:
            tables.append([])
        tables[-1].append(part)
    return [_table([labels, *sum(t, [])], None if i else _title(record)) for i, t in enumerate(tables) if t]


def _table(columns: list[Column], title: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.title, table.title_justify, table.title_style = title and f"{title}\n", "left", "bold"
    for i, column in enumerate(columns):
        table.add_column(column.header, justify="right" if i else "left", no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells, style="dim" if cells[0] in LABELS.values() else None)
    return table


def _title(record: Record) -> str:
    return record.name if record.seed is None else f"{record.name}, seed {record.seed}"


def _slower(record: Record) -> list[str]:
    """A sentence for every batch size at which pruning made the network slower."""
    # Fine-tuning does not change what runs, so it speaks where the pruned network was not timed.
    smaller = [result for name in ("pruned", "finetuned") if (result := record.stage(name)) and result.latency]
    speedups = {t.batch: measured_speedup(record, result, t.batch) for result in smaller[:1] for t in result.latency}
    return [
        f"The pruned model is slower than the dense one at batch {batch}: {speedup:.2f}x."
        for batch, speedup in speedups.items()
        if speedup is not None and round(speedup, 2) < 1
    ]


def _measured_on(machine: Mapping) -> str:
    """Where the latencies come from."""
    on_gpu = machine.get("device", "cpu") != "cpu"
    threads = machine.get("threads")
    where = machine.get("gpu") if on_gpu else machine.get("cpu")
    with_threads = "" if on_gpu or threads is None else f", {threads} thread{'s' if threads != 1 else ''}"
    return f"Latency in ms, median [25th–75th percentile], float32 on {where or 'an unnamed machine'}{with_threads}."


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _factor(speedup: float | None) -> str:
    return MISSING if speedup is None else f"{speedup:.2f}x"


def _scaled(count: int, unit: str = "") -> str:
    """One decimal and a decimal prefix: 41.0 M, 269.7 kB, 512."""
    value, prefix = float(count), ""
    for larger in "kMGT":
        if round(value, 1) < 1000:
            break
        value, prefix = value / 1000, larger
    return (f"{value:.1f} {prefix}{unit}" if prefix else f"{count} {unit}").rstrip()


def _latency(latency: Latency | None) -> str:
    """Median with quartiles, all with the digits that give the median three."""
    if latency is None:
        return MISSING
    decimals = next((d for d, limit in ((3, 1), (2, 10), (1, 100)) if latency.median_ms < limit), 0)
    median, low, high = (f"{ms:.{decimals}f}" for ms in (latency.median_ms, latency.low_ms, latency.high_ms))
    return f"{median} [{low}–{high}]"
