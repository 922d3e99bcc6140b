"""A report on the terminal and in files: CSV, Markdown, LaTeX and one HTML page."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from prune_cli.report.collect import Run
from prune_cli.report.formats import show, to_csv, to_latex, to_markdown
from prune_cli.report.page import to_html
from prune_cli.report.table import ReportTable, tables

OUTPUT = Path("outputs/reports")


def present(runs: Sequence[Run], folder: Path | None = None) -> bool:
    """Show the tables of these runs, write them to `folder` (a new one in OUTPUT); whether all ended well."""
    found, console = tables(runs), Console()
    for table in found:
        show(table, console)
    folder = folder or OUTPUT / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    write(found, folder)
    print(f"report  {folder / 'report.html'} (and .csv, .md, .tex)")
    return not any(table.failed for table in found)


def write(tables: Sequence[ReportTable], folder: Path) -> None:
    """Write report.csv, .md, .tex and .html to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "csv": to_csv(tables),
        "md": "\n".join(to_markdown(table) for table in tables),
        "tex": "\n".join(to_latex(table) for table in tables),
        "html": to_html(tables),
    }
    for suffix, text in contents.items():
        (folder / f"report.{suffix}").write_text(text, encoding="utf-8")
