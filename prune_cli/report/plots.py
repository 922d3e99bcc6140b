"""The plots of a report, as SVG text that can stand inside a page."""

import io
from collections.abc import Callable, Sequence
from statistics import mean, stdev

from prune_cli.record import Record
from prune_cli.report.columns import milliseconds
from prune_cli.report.counting import macs_removed
from prune_cli.report.rows import Figures, Row
from prune_cli.report.table import ReportTable

COLORS = ("#3b6fb6", "#d1682f", "#3f8f5b", "#a04b8f", "#8a6d3b", "#c23b4e", "#4d9aa6", "#6b6b6b", "#b59a2c", "#5b4fb0")


def plots(table: ReportTable) -> dict[str, str]:
    """SVG by name: accuracy against `macs`, and against latency at every batch size that was measured
    (`latency_batch_1`)."""
    batches = sorted({t.batch for row in table.rows for r in row.records for s in r.stages for t in s.latency})
    found = {"macs": _plot(table, "MACs left, % of the dense network", lambda row: row.over_seeds(_macs_left))}
    for batch in batches:
        found[f"latency_batch_{batch}"] = _plot(
            table, f"latency at batch {batch}, ms",
            lambda row, batch=batch: row.over_seeds(lambda record: milliseconds(record, batch)),
            lambda row, batch=batch: row.over_seeds(lambda record: milliseconds(record, batch, "dense")),
        )  # fmt: skip
    return {name: svg for name, svg in found.items() if svg}


def _macs_left(record: Record) -> float | None:
    removed = macs_removed(record)
    return None if removed is None else 100 * (1 - removed)


def _plot(
    table: ReportTable, label: str, of: Callable[[Row], Figures | None],
    of_dense: Callable[[Row], Figures | None] = lambda row: (100.0,),
) -> str:
    """Top-1 of every row over a figure of its network, the dense networks and the paper's accuracies
    for comparison; error bars are standard deviations over seeds. Empty where there is nothing to plot."""
    points = [(row, of(row)) for row in table.rows if of(row) and row.final]
    if not points:
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same records give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "prune-cli", "font.size": 10, "font.family": "sans-serif"}
    with pyplot.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.7), layout="constrained")
        for name, color, rows in _series(points):
            x, dx = zip(*(_spread(values) for _, values in rows))
            y, dy = zip(*(_spread(row.final) for row, _ in rows))
            axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o-", color=color, label=name, capsize=2, lw=1.4, ms=5, alpha=0.9)
            printed = [(at, row.paper.accuracy) for at, (row, _) in zip(x, rows) if row.on_the_papers_data]
            if printed:
                axes.plot(*zip(*printed), "x", color=color, ms=6, mew=1.6)
        dense = {(of_dense(row), row.accuracy("dense")) for row, _ in points}
        dense = {(_spread(x)[0], _spread(y)[0]) for x, y in dense if x and y}
        if dense:
            axes.plot(*zip(*sorted(dense)), "s", color="#222222", ms=6, label="dense", mfc="none")
        if any(row.on_the_papers_data for row, _ in points):
            axes.plot([], [], "x", color="#555555", label="the paper")
        axes.set(xlabel=label, ylabel="top-1 %")
        axes.grid(alpha=0.25, lw=0.6)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _series(points: Sequence[tuple[Row, Figures]]) -> list[tuple[str, str, list[tuple[Row, Figures]]]]:
    """Rows of one method, network and data set are one line, from the smallest network to the largest."""
    groups: dict[tuple[str, ...], list[tuple[Row, Figures]]] = {}
    for row, values in points:
        groups.setdefault(row.series, []).append((row, values))
    differs = [len(set(parts)) > 1 for parts in zip(*groups)]
    names = [" ".join([key[0], *(part for part, shown in zip(key[1:], differs[1:]) if shown)]) for key in groups]
    return [
        (name, COLORS[i % len(COLORS)], sorted(rows, key=lambda point: _spread(point[1])[0]))
        for i, (name, rows) in enumerate(zip(names, groups.values()))
    ]


def _spread(values: Figures) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0
