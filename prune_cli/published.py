"""What a paper's table says, as an experiment file states it: rows, and the paper's numbers for each.

A row is a small change to the experiment: a sweep over an irregular table is a sweep over its rows.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from prune_cli.errors import UserError
from prune_cli.settings import Bounds, Count, NonNegative, nearest, typed

Percent = Annotated[float, Bounds(0, 100)]
# How a paper counts what it removed; `report.counting` computes each of them for our networks.
Counting = Literal["macs", "flops", "flops_without_relu", "ideal"]


@dataclass(frozen=True)
class PaperNumbers:
    """What the paper prints for one row; accuracies are top-1 in percent, None = not printed.

    dense               of the dense network
    pruned              of the pruned network before it is trained again
    accuracy            of the network at the end
    scratch             of the pruned architecture trained from scratch
    drop                points lost from dense to the end, where that is printed; below 0 = gained
    *_std               standard deviation over the paper's runs
    parameters_removed  percent
    macs_removed        percent, counted as `Table.counting` says
    """

    dense: Percent | None = None
    dense_std: NonNegative | None = None
    pruned: Percent | None = None
    accuracy: Percent | None = None
    accuracy_std: NonNegative | None = None
    scratch: Percent | None = None
    drop: float | None = None
    parameters_removed: Percent | None = None
    macs_removed: Percent | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table: overrides by their dotted name, and the paper's numbers."""

    set: dict[str, Any] = field(default_factory=dict)
    paper: PaperNumbers | None = None


@dataclass(frozen=True)
class Table:
    """A published table.

    name      of the experiment, as on the command line
    title     what the table shows
    source    paper and table that the numbers come from; None: a table that no paper has
    dataset   name of the data set that they were measured on
    recipe    the recipe that the table is made with; overrides of recipe.* hold under it alone
    counting  how the paper counts `macs_removed`: macs = as we do; flops = 2 MACs + 2 BN + ReLU +
              pooling; flops_without_relu; ideal = the closed form of SFP and FPGM, convolutions
              only, as if ratio x width were never rounded
    skeleton  whether the paper's parameters include a filter skeleton
    set       overrides that all rows share
    """

    name: str
    title: str
    dataset: str
    rows: dict[str, Row]
    source: str | None = None
    recipe: str = "paper"
    counting: Counting = "macs"
    skeleton: bool = False
    set: dict[str, Any] = field(default_factory=dict)

    def overrides(self, row: str, recipe: str) -> dict[str, Any]:
        """What the row sets, by dotted name; the published schedule only under the table's recipe."""
        found = {**self.set, **self.rows[row].set}
        return {k: v for k, v in found.items() if recipe == self.recipe or not k.startswith("recipe.")}


@dataclass(frozen=True)
class Reference:
    """Where a run stands in a published table: what its record keeps of `Table` and `Row`."""

    name: str
    row: str
    position: Count
    title: str
    source: str | None
    dataset: str
    recipe: str
    counting: Counting
    skeleton: bool
    paper: PaperNumbers | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Reference":
        """From what JSON holds."""
        paper = values.get("paper")
        return cls(**{**values, "paper": None if paper is None else PaperNumbers(**paper)})


def reference(table: Table | None, row: str | None) -> Reference | None:
    """The place of `row` in `table`; None without a row. Raises UserError: there is no such row."""
    if row is None:
        return None
    if table is None:
        raise UserError(f"row={row}: rows are those of an experiment's table; choose one, as in experiment=NAME")
    if row not in table.rows:
        raise UserError(f"row={row}: {table.name} has no such row; {nearest(row, table.rows)}")
    shared = {f.name: getattr(table, f.name) for f in fields(Table) if f.name not in ("rows", "set")}
    return Reference(row=row, position=list(table.rows).index(row) + 1, paper=table.rows[row].paper, **shared)


def table_in(config: Mapping[str, Any]) -> Table | None:
    """The table of a composed config. Raises UserError: it is not one."""
    values = config.get("table")
    return None if values is None else Table(**typed(Table, values, "table"))


def override_line(name: str, value: Any) -> str:
    """`name=value` as the command line takes it."""
    return f"{name}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./*-]+", value):
        return "'" + value.replace("'", "\\'") + "'"
    return value if isinstance(value, str) else json.dumps(value)
