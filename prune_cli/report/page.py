"""The report as one HTML page that needs nothing else: tables, plots, and what lies behind each row."""

from collections.abc import Iterable, Sequence
from html import escape

from prune_cli.record import LayerChange, Record
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
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 28px 32px;
          margin-bottom: 28px; box-shadow: 0 1px 3px rgb(20 30 60 / .05) }
h1 { font-size: 15px; letter-spacing: .08em; text-transform: uppercase; color: var(--quiet); margin: 0 0 16px }
h2 { font-size: 22px; line-height: 1.3; margin: 0 0 18px; text-wrap: balance }
h3 { font-size: 13px; color: var(--quiet); font-weight: 600; margin: 18px 0 6px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th { text-align: right; vertical-align: bottom; font-weight: 600; font-size: 12px; color: var(--quiet);
     padding: 4px 10px 8px; border-bottom: 2px solid var(--line); white-space: pre-line; line-height: 1.25 }
td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap }
tr:last-child td { border-bottom: 0 } tbody tr:hover { background: #f8f9fc }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td:first-child { font-weight: 600 }
td.paper, th.paper { color: var(--accent) } td small { color: var(--quiet); font-size: 12px }
tr.failed td { color: var(--bad) }
ul.notes { color: var(--quiet); font-size: 13px; margin: 16px 0 0; padding: 0; list-style: none }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 18px; margin: 22px 0 8px }
.plots svg { width: 100%; height: auto }
details { border-top: 1px solid var(--line); padding: 9px 0 } details:first-of-type { margin-top: 18px }
summary { cursor: pointer; font-weight: 600; font-size: 14px } summary span { color: var(--quiet); font-weight: 400 }
code { display: block; background: var(--ground); border-radius: 8px; padding: 10px 14px; margin: 8px 0;
       font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
details p { color: var(--quiet); font-size: 13px; margin: 4px 0 }
.bars { display: block; width: 100%; height: 96px } .key { display: inline-block; width: 10px; height: 10px;
        border-radius: 2px; margin: 0 4px 0 12px }
.skeletons { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; text-align: center }
figcaption { font-size: 10px; color: var(--quiet) }
"""


def to_html(tables: Sequence[ReportTable]) -> str:
    """The page; opens from disk, without a network."""
    title = tables[0].title if len(tables) == 1 else "Pruning report"
    sections = "\n".join(_section(table) for table in tables)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>prune-cli report</h1>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _section(table: ReportTable) -> str:
    drawn = "".join(f"<div>{svg}</div>" for svg in plots(table).values())
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    details = "\n".join(_details(row) for row in table.rows)
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


def _details(row: Row) -> str:
    """Commands, versions, notes and layers of a row."""
    shown = row.first
    said = [f"<code>{escape(run.record.command)}</code>" for run in (*row.runs, *row.failures)]
    said += [f"<p>{escape(note)}</p>" for note in shown.notes]
    if shown.versions:
        versions = ", ".join(f"{name} {value}" for name, value in shown.versions.items() if value not in (None, False))
        said.append(f"<p>{escape(versions)}</p>")
    if shown.obtained is not None:
        said.append(f"<p>Removed {100 * shown.obtained:.2f}% of the {escape(str(shown.unit))}s.</p>")
    said += [_layers(shown), _skeletons(shown.layers)]
    count = f"{len(row.runs)} run{'s' if len(row.runs) != 1 else ''}"
    return f"<details><summary>{escape(row.label)} <span>{count}</span></summary>{''.join(said)}</details>"


def _layers(record: Record) -> str:
    """One group of bars for each layer: how much of its parameters and MACs is gone."""
    layers = [layer for layer in record.layers if layer.parameters[0]]
    if not layers:
        return ""
    step, height = 24, 80
    bars = []
    for i, layer in enumerate(layers):
        bars.append(f'<rect x="{i * step}" y="0" width="{step - 4}" height="{height}" fill="#eceef4"/>')
        told = [layer.name]
        for j, (what, color) in enumerate((("parameters", "var(--gone)"), ("macs", "var(--accent)"))):
            before, after = getattr(layer, what)
            gone = 1 - after / before if before else 0.0
            told.append(f"{gone:.0%} of the {what.replace('macs', 'MACs')} removed")
            size = max(0.0, gone) * height
            bars.append(
                f'<rect x="{i * step + 10 * j}" y="{height - size:.1f}" width="10" height="{size:.1f}" fill="{color}"/>'
            )
        told = escape(f"{told[0]}: {', '.join(told[1:])}")
        box = f'x="{i * step}" y="0" width="{step - 4}" height="{height}"'
        bars.append(f'<rect {box} fill="transparent"><title>{told}</title></rect>')
    seed = "" if record.seed is None else f", seed {record.seed}"
    return (
        f'<h3>Removed from each layer{seed}<span class="key" style="background:var(--gone)"></span>parameters'
        f'<span class="key" style="background:var(--accent)"></span>MACs</h3>'
        f'<svg class="bars" viewBox="0 0 {max(len(layers), 12) * step} {height}" preserveAspectRatio="none">'
        f"{''.join(bars)}</svg>"
    )


def _skeletons(layers: Iterable[LayerChange]) -> str:
    """Of units that have a place in the kernel: how many stay at each, black none, white all."""
    drawn = []
    for layer in layers:
        positions = (layer.units or {}).get("positions")
        if not positions:
            continue
        side = len(positions)
        cells = "".join(
            f'<rect x="{x}" y="{y}" width="1" height="1" fill="{_grey(kept)}"><title>{kept:.0%}</title></rect>'
            for y, line in enumerate(positions) for x, kept in enumerate(line)
        )  # fmt: skip
        drawn.append(
            f'<figure><svg width="48" height="48" viewBox="-.1 -.1 {side + .2} {side + .2}">'
            f'<rect x="-.1" y="-.1" width="{side + .2}" height="{side + .2}" fill="#26466e"/>{cells}</svg>'
            f"<figcaption>{escape(layer.name.replace('layer', '').replace('features.', ''))}</figcaption></figure>"
        )
    if not drawn:
        return ""
    heading = "<h3>What is kept at each position of the kernel, white = in every filter</h3>"
    return f'{heading}<div class="skeletons">{"".join(drawn)}</div>'


def _grey(strength: float) -> str:
    """Black at 0, white at 1."""
    return "#" + 3 * f"{round(255 * strength):02x}"
