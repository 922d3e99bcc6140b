"""`prune-cli report OUTPUT_DIR...` and `prune-cli report --tables`: what finished runs come to.

    prune-cli report outputs/runs                 every run there, as tables on the terminal and in files
    prune-cli report RUN1 RUN2                    two runs side by side
    prune-cli report --tables                     the published tables that experiments reproduce
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from prune_cli.errors import UserError
from prune_cli.report.collect import collect
from prune_cli.report.present import OUTPUT, present


def main(arguments: Sequence[str]) -> int:
    """Run `prune-cli report ARGUMENTS`; the exit code is 1 where a run failed. Raises UserError."""
    options = _parser().parse_args(arguments)
    if options.tables:
        list_tables()
        return 0
    if not options.paths:
        raise UserError("report: say which runs, as in prune-cli report outputs/runs; --tables lists the experiments")
    return 0 if present(collect(options.paths), options.output) else 1


def list_tables() -> None:
    """The experiments that come with the program."""
    from prune_cli.compose import shipped_tables  # Hydra

    listed = Table("experiment", "rows", "what it reproduces", box=box.SIMPLE_HEAD, pad_edge=False)
    for table in shipped_tables():
        listed.add_row(table.name, str(len(table.rows)), f"{table.title}\n[dim]{table.source or 'no paper has it'}[/dim]")
    listed.columns[0].no_wrap = True
    listed.columns[1].justify = "right"
    Console().print(listed)
    print("prune-cli experiment=NAME runs all rows of one, row=NAME a single row.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"report: {message}; prune-cli report --help lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prune-cli report", description="Tables of finished runs, beside the paper's numbers.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="OUTPUT_DIR", help="folders with records, or records")
    parser.add_argument("--tables", action="store_true", help="list the published tables that experiments reproduce")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"of the files (default: {OUTPUT}/...)")
    return parser
