"""A report table for the terminal, as CSV, as Markdown and as LaTeX."""

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from prune_cli.report.columns import Column
from prune_cli.report.table import ReportTable

PARTS = ("accuracy", "paper", "size", "latency")  # how a table is divided that is too wide


def show(table: ReportTable, console: Console) -> None:
    """Print the table, in parts where the console is narrow, and its notes."""
    names = [column for column in table.columns if column.part == "run"]
    parts = [[c for c in table.columns if c.part == part] for part in PARTS]
    for i, columns in enumerate(_fitting(names, [part for part in parts if part], console)):
        console.print()
        if i == 0:
            console.print(Text(f"{table.title}\n", style="bold"))
        console.print(_rich(columns))
    console.print()
    for note in table.notes:
        console.print(Text(note))


def to_csv(tables: Sequence[ReportTable]) -> str:
    """All tables in one, with full precision: of each number the mean, and the deviation over seeds."""
    rows = []
    for table in tables:
        for i, row in enumerate(table.rows):
            values = {"table": table.title}
            for column in table.columns:
                cell = column.cells[i]
                values[column.name] = cell.text if cell.mean is None else f"{cell.mean:.8g}"
                if cell.deviation is not None:
                    values[f"{column.name}_std"] = f"{cell.deviation:.8g}"
            rows.append({**values, "failures": len(row.failures), "command": row.first.command})
            if row.failures:
                rows[-1]["failure"] = "; ".join(run.record.failure or "" for run in row.failures)
    fields = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(table: ReportTable, level: int = 2) -> str:
    """Title, table and notes; `level` of the heading, 0 = none."""
    lines = [[_one_line(column.header) for column in table.columns]]
    lines.append(["---" if column.name == "row" else "---:" for column in table.columns])
    lines += [[cell.text or "–" for cell in cells] for cells in zip(*(c.cells for c in table.columns), strict=True)]
    heading = f"{'#' * level} {table.title}\n\n" if level else ""
    body = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return heading + body + "\n" + "  \n".join(table.notes) + "\n"


def to_latex(table: ReportTable) -> str:
    """A table environment of the package booktabs."""
    alignment = "".join("l" if column.name == "row" else "r" for column in table.columns)
    header = " & ".join(_latex(_one_line(column.header)) for column in table.columns)
    body = [
        " & ".join(_latex(cell.text or "–") for cell in cells) + r" \\"
        for cells in zip(*(column.cells for column in table.columns), strict=True)
    ]
    notes = " ".join(map(_latex, table.notes))
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.title)}. {notes}}}",
        rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", header + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _fitting(names: list[Column], parts: list[list[Column]], console: Console) -> list[list[Column]]:
    """The fewest tables that are narrow enough, each with the names in front."""
    def width(columns: list[Column]) -> int:
        return Measurement.get(console, console.options.update(width=1000), _rich(columns)).maximum

    found = [list(names)]

    def add(columns: list[Column]) -> None:
        if len(found[-1]) > len(names) and width(found[-1] + columns) > console.width:
            found.append(list(names))
        found[-1] += columns

    for part in parts:
        if width(names + part) <= console.width:
            add(part)
        else:  # too wide even alone
            for column in part:
                add([column])
    return found


def _rich(columns: list[Column]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        named = column.name == "row"  # a name too long for any table is wrapped, a number never is
        table.add_column(
            Text(column.header), justify="left" if named else "right", no_wrap=not named, overflow="fold"
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell.text or "–") for cell in cells))
    return table


def _one_line(header: str) -> str:
    return header.replace("-\n", "").replace("\n", " ")


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
