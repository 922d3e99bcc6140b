"""What `prune-cli bench` shows and leaves behind: a table, its summary, a CSV file and a plot."""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from prune_cli.commands.measure import WHOLE, Row, layout_name, speedups
from prune_cli.environment import gpu_state, machine, versions, write_env

HEADER = ("layer", "count", "batch", "pattern", "ratio", "dense ms", "ours ms", "speedup", "floor ms", "plan")


def show(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the table and what it comes to."""
    console = Console()
    table = Table(*HEADER, box=box.SIMPLE_HEAD, pad_edge=False, title=f"bench {options.what}", title_justify="left")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[4:9]:
        column.justify = "right"
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row.layer == WHOLE else None)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=500), table).maximum)
    console.print(table)
    for sentence in summary(rows, options):
        print(sentence)


def summary(rows: list[Row], options: argparse.Namespace) -> list[str]:
    """Geometric means with and without the dense plans, their share, and where it was measured."""
    said = []
    for batch, ratio, found in speedups(rows):
        sparse = [row.speedup for row in found if not row.plan.startswith("dense")]
        removed = "" if ratio is None else f", {ratio:.0%} removed"
        means = f"{geometric_mean([row.speedup for row in found]):.2f}x"
        without = f"{geometric_mean(sparse):.2f}x" if sparse else "none"
        said.append(
            f"batch {batch}{removed}: geometric mean {means}, without dense plans {without}; "
            f"dense plans {1 - len(sparse) / len(found):.0%}; slowest layer {min(row.speedup for row in found):.2f}x"
        )
    here, made = machine(), versions()
    on_gpu = here["gpu"] and options.device != "cpu"
    where = f"{here['gpu']} ({gpu_state()}), CUDA graphs" if on_gpu else f"{here['cpu']}, {here['threads']} threads"
    said.append(f"{options.dtype}, {where}, torch {made['torch']}. Shortest times of runs that take turns;")
    said.append(f"dense: the faster memory format; ours: {layout_name(options)} to {layout_name(options)}. Floor: arithmetic")
    said.append("at the rate of a matrix product, or one copy of input, output and stripes, whichever takes longer.")
    return said


def write(rows: list[Row], options: argparse.Namespace, folder: Path) -> None:
    """table.csv, speedup.png and env.json in `folder`, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"dtype": options.dtype, "memory_format": layout_name(options)}
    lines = [{**asdict(row), "speedup": row.speedup, **numbers} for row in rows]
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    plot(rows, folder / "speedup.png")
    on_gpu = options.device != "cpu" and machine()["gpu"]
    write_env(folder / "env.json", "cuda" if on_gpu else "cpu")
    print(folder / "table.csv", folder / "speedup.png", sep="\n")


def plot(rows: list[Row], path: Path) -> None:
    """Speedup of every layer, one line per ratio and batch size, against the dense convolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    for batch, ratio, found in speedups(rows):
        label = f"batch {batch}" if ratio is None else f"batch {batch}, {ratio:.0%} removed"
        axes.plot([row.layer for row in found], [row.speedup for row in found], "o-", label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(yscale="log", ylabel="dense time / our time")
    axes.tick_params(axis="x", rotation=90)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cells(row: Row) -> list[str]:
    floor = "–" if row.floor_ms is None else f"{row.floor_ms:.3g}"
    times = (f"{row.dense_ms:.3g}", f"{row.ours_ms:.3g}", f"{row.speedup:.2f}x", floor)
    return [row.layer, str(row.count), str(row.batch), row.pattern, f"{row.ratio:.2f}", *times, row.plan]
