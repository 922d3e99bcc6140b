"""The files of a report: CSV, Markdown, LaTeX and one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from prune_cli.report.formats import to_csv, to_latex, to_markdown
from prune_cli.report.page import to_html
from prune_cli.report.table import ReportTable


def write(tables: Sequence[ReportTable], folder: Path) -> list[Path]:
    """Write report.csv, .md, .tex and .html to `folder` and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.csv": to_csv(tables),
        "report.md": "\n".join(to_markdown(table) for table in tables),
        "report.tex": "\n".join(to_latex(table) for table in tables),
        "report.html": to_html(tables),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]
