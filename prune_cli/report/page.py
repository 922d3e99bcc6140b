"""The report as one HTML page that needs nothing else: tables, plots, and what lies behind each row."""

from collections.abc import Sequence
from html import escape

from prune_cli.record import Record
from prune_cli.report import layers
from prune_cli.report.columns import Cell, Column
from prune_cli.report.plots import plots
from prune_cli.report.rows import Row
from prune_cli.report.table import ReportTable

STYLE = """
:root { --ink: #1d2433; --quiet: #687085; --line: #e3e6ee; --paper: #fff; --ground: #f4f5f9; --accent: #3b6fb6;
        --gone: #d1682f; --bad: #b3261e; }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1560px; margin: 0 auto; padding: 40px 24px 80px }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 28px 32px;
          margin-bottom: 28px; box-shadow: 0 1px 3px rgb(20 30 60 / .05) }
h1 { font-size: 15px; letter-spacing: .08em; text-transform: uppercase; color: var(--quiet); margin: 0 0 16px }
h2 { font-size: 22px; line-height: 1.3; margin: 0 0 18px; text-wrap: balance }
h3 { font-size: 13px; color: var(--quiet); font-weight: 600; margin: 18px 0 6px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th { text-align: right; vertical-align: bottom; font-weight: 600; font-size: 12px; color: var(--quiet);
     padding: 4px 8px 8px; border-bottom: 2px solid var(--line); white-space: pre-line; line-height: 1.25 }
td { text-align: right; padding: 7px 8px; border-bottom: 1px solid var(--line); white-space: nowrap }
tr:last-child td { border-bottom: 0 } tbody tr:hover { background: #f8f9fc }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td:first-child { font-weight: 600 }
td.paper, th.paper { color: var(--accent) } td small { color: var(--quiet); font-size: 12px }
tr.failed td, details p.failed { color: var(--bad) }
ul.notes { color: var(--quiet); font-size: 13px; margin: 16px 0 0; padding: 0; list-style: none }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 18px; margin: 22px 0 8px }
.plots svg { width: 100%; height: auto }
details { border-top: 1px solid var(--line); padding: 9px 0 } details:first-of-type { margin-top: 18px }
summary { cursor: pointer; font-weight: 600; font-size: 14px } summary span { color: var(--quiet); font-weight: 400 }
code { display: block; background: var(--ground); border-radius: 8px; padding: 10px 14px; margin: 8px 0;
       font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
details p { color: var(--quiet); font-size: 13px; margin: 4px 0 }
"""


def to_html(tables: Sequence[ReportTable]) -> str:
    """The page; opens from disk, without a network."""
    title = tables[0].title if len(tables) == 1 else "Pruning report"
    sections = "\n".join(_section(table) for table in tables)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}{layers.STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>prune-cli report</h1>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _section(table: ReportTable) -> str:
    drawn = "".join(f"<div>{svg}</div>" for svg in plots(table).values())
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    details = "\n".join(_details(row, _names(table, i)) for i, row in enumerate(table.rows))
    return (
        f'<section>\n<h2>{escape(table.title)}</h2>\n<div class="scroll">{_table(table)}</div>\n'
        f'<ul class="notes">{notes}</ul>\n<div class="plots">{drawn}</div>\n{details}\n</section>'
    )


def _table(table: ReportTable) -> str:
    header = "".join(f"<th{_class(column)}>{escape(column.header)}</th>" for column in table.columns)
    body = []
    for i, row in enumerate(table.rows):
        failed = ' class="failed"' if row.failures else ""
        body.append(f"<tr{failed}>{''.join(_td(column, column.cells[i]) for column in table.columns)}</tr>")
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _td(column: Column, cell: Cell) -> str:
    mean, sign, deviation = escape(cell.text or "–").partition(" ± ")
    return f"<td{_class(column)}>{mean}{f' <small>± {deviation}</small>' if sign else ''}</td>"


def _class(column: Column) -> str:
    return ' class="paper"' if column.part == "paper" else ""


def _details(row: Row, names: Sequence[str]) -> str:
    """Commands, versions, notes and layers of a row that has these `names`."""
    shown, said = row.first, []
    for run in (*row.runs, *row.failures):
        said.append(f"<code>{escape(run.record.command)}</code>")
        if run.record.failure:
            said.append(f'<p class="failed">{escape(run.record.failure)}</p>')
    said += [f"<p>{escape(versions)}</p>" for versions in dict.fromkeys(map(_versions, row.records)) if versions]
    said += [f"<p>{escape(note)}</p>" for note in shown.notes]
    if shown.obtained is not None:
        said.append(f"<p>Removed {100 * shown.obtained:.2f}% of the {escape(str(shown.unit))}s.</p>")
    of = "" if shown.seed is None else f", seed {shown.seed}"
    said.append(layers.layers(shown.layers, shown.unit, of))
    label, *others = map(escape, names)
    return f"<details><summary>{label} <span>{', '.join(others)}</span></summary>{''.join(said)}</details>"


def _names(table: ReportTable, i: int) -> list[str]:
    """What tells row number `i` from the others."""
    cells = {column.name: column.cells[i].text for column in table.columns if column.part == "run"}
    if cells.get("ratio_percent"):
        cells["ratio_percent"] = f"ratio {cells['ratio_percent']} %"
    del cells["n"]
    done, failed = len(table.rows[i].runs), len(table.rows[i].failures)
    counts = [f"{done} run{'s' if done != 1 else ''}"] * bool(done) + [f"{failed} failed"] * bool(failed)
    return [text for text in cells.values() if text] + counts


def _versions(record: Record) -> str:
    return ", ".join(
        name if value is True else f"{name} {value}" for name, value in record.versions.items() if value not in (None, False)
    )
