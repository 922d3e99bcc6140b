"""The rows of an experiment's table as jobs: which of them a command line means, and what each sets.

    experiment=NAME                  every row
    experiment=NAME row=a,b          these
    experiment=NAME ratio=0.5        those of this ratio: a setting that rows make narrows them
    experiment=NAME seed=0,1,2       every row with every seed: all other settings change the jobs
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from prune_cli.compose import Composer
from prune_cli.errors import UserError
from prune_cli.published import Table, override_line, reference, table_in


class Override(Protocol):
    """What is used of Hydra's."""

    input_line: str
    key_or_group: str

    def is_sweep_override(self) -> bool: ...
    def sweep_string_iterator(self) -> Iterator[str]: ...


class Rows:
    """The rows that a command line chooses, and its other overrides."""

    def __init__(self, composer: Composer, table: Table, overrides: Sequence[Override]):
        self.composer, self.table = composer, table
        set_by_rows = {key for row in table.rows.values() for key in row.set}
        narrowing = [o for o in overrides if o.key_or_group in set_by_rows]
        naming = [o for o in overrides if o.key_or_group == "row"]
        self.further = [o for o in overrides if o not in narrowing and o not in naming]
        names = [name for o in naming for name in self._values(o)]
        for name in names:
            reference(table, name)  # refuses one that is not there
        self.names = names or list(table.rows)
        for override in narrowing:
            self.names = self._narrowed(override)

    def job(self, name: str, lines: Sequence[str]) -> list[str]:
        """The overrides of one row's job; `lines` are those of the command besides the row."""
        config = self.composer.chosen(lines)
        given = {self.composer.parse(line).key_or_group for line in lines}
        sets = self.table.overrides(name, config["recipe"]["name"])
        named = sorted([*lines, f"row={name}"], key=lambda line: not line.startswith(("experiment=", "row=")))
        return [*named, *(override_line(k, v) for k, v in sets.items() if k not in given)]

    def _narrowed(self, override: Override) -> list[str]:
        """The rows whose setting is among the override's values."""
        key, wanted = override.key_or_group, self._values(override)
        defaults = self.composer.chosen([f"experiment={self.table.name}"])
        choices = defaults["hydra"]["runtime"]["choices"]
        default = choices[key] if key in choices else _at(defaults, key)
        made = {name: {**self.table.set, **self.table.rows[name].set}.get(key, default) for name in self.names}
        kept = [name for name in self.names if made[name] in wanted]
        if not kept:
            there = ", ".join(dict.fromkeys(override_line(key, value).partition("=")[2] for value in made.values()))
            raise UserError(f"{override.input_line}: no row of {self.table.name} has it; rows have {there}")
        return kept

    def _values(self, override: Override) -> list[Any]:
        if not override.is_sweep_override():
            return [override.value()]
        key = override.key_or_group
        return [self.composer.parse(f"{key}={text}").value() for text in override.sweep_string_iterator()]


def of_one_row(composer: Composer, lines: Sequence[str], why: str = "") -> list[str]:
    """The overrides of the row that the lines choose; as they are where they choose no single one.

    Raises UserError: with `why`, where one has to be chosen.
    """
    table = table_of(composer, lines)
    if table is None:
        return list(lines)
    rows = Rows(composer, table, [composer.parse(line) for line in lines])
    if len(rows.names) == 1:
        return rows.job(rows.names[0], [o.input_line for o in rows.further])
    if why:
        raise UserError(f"{why}: {table.name} has {len(rows.names)} rows; choose one, as in row={rows.names[0]}")
    return list(lines)


def table_of(composer: Composer, lines: Sequence[str]) -> Table | None:
    """The table of the experiment that the overrides choose; None where there is none."""
    return table_in(composer.chosen([line for line in lines if line.startswith("experiment=")]))


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted name; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
