"""Runs -> rows: one per setting, its runs over the seeds taken together, under a name of its own."""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from prune_cli.published import PaperNumbers
from prune_cli.record import Record
from prune_cli.report.collect import Run

Figures = tuple[float, ...]  # one value per seed


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only. `label` names what sets them apart from other rows."""

    label: str
    runs: tuple[Run, ...]
    failures: tuple[Run, ...]

    @property
    def records(self) -> list[Record]:
        return [run.record for run in self.runs]

    @property
    def first(self) -> Record:
        return (self.runs or self.failures)[0].record

    @property
    def series(self) -> tuple[str, ...]:
        """What rows have in common that differ in how much is removed: prune_50 and prune_60; outside a published
        table also network, data set and recipe."""
        if self.first.reference:
            return (re.sub(r"_[\d.]+$", "", self.label),)
        return self.label, *(name_of(self.first, part) for part in ("model", "dataset", "recipe"))

    @property
    def paper(self) -> PaperNumbers | None:
        return self.first.reference.paper if self.first.reference else None

    def over_seeds(self, figure: Callable[[Record], float | None]) -> Figures | None:
        """The figure of every run; None unless all have it."""
        values = tuple(figure(record) for record in self.records)
        return None if not values or None in values else values

    def accuracy(self, stage: str) -> Figures | None:
        """Top-1 of a stage, percent."""
        return self.over_seeds(lambda record: percent(result.accuracy) if (result := record.stage(stage)) else None)

    @property
    def final(self) -> Figures | None:
        """Top-1 of the smaller network at the end, percent."""
        return self.over_seeds(lambda record: percent(record.objective))

    @property
    def drop(self) -> Figures | None:
        """Points lost from the dense network to the end."""
        return self.over_seeds(
            lambda record: 100 * (dense.accuracy - record.objective)
            if (dense := record.stage("dense")) and record.objective is not None else None
        )  # fmt: skip

    @property
    def on_the_papers_data(self) -> bool:
        """Whether the paper prints an accuracy that ours can be compared with."""
        printed = self.paper is not None and self.paper.accuracy is not None
        return printed and dataset_of(self.first) == self.first.reference.dataset

    @property
    def deviation(self) -> tuple[float, str] | None:
        """Our mean against the paper's number in points, above 0 = better, and what was compared:
        the accuracy on the paper's data set, elsewhere (or where that is all it prints) the drop."""
        paper = self.paper
        if paper is None or self.final is None:
            return None
        if self.on_the_papers_data:
            return mean(self.final) - paper.accuracy, "accuracy"
        lost = paper_drop(paper)
        return None if lost is None or self.drop is None else (lost - mean(self.drop), "drop")


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """The rows of one table, in the order of the published one; else as the runs were made."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_setting(run.record), []).append(run)
    labels = _labels([group[0].record for group in groups.values()])
    rows = []
    for label, group in zip(labels, groups.values(), strict=True):
        by_seed = sorted(group, key=lambda run: -1 if run.record.seed is None else run.record.seed)
        complete, failed = [r for r in by_seed if r.complete], [r for r in by_seed if not r.complete]
        rows.append(Row(label, tuple(complete), tuple(failed)))
    return sorted(rows, key=lambda row: row.first.reference.position if row.first.reference else 0)


def paper_drop(paper: PaperNumbers) -> float | None:
    """Points that the paper's network lost, as printed, or from its two accuracies."""
    if paper.drop is not None or paper.dense is None or paper.accuracy is None:
        return paper.drop
    return paper.dense - paper.accuracy


def method_of(record: Record) -> str:
    """What the method is called on the command line."""
    name = record.config.get("method_name") or name_of(record, "method")
    return name or record.name.partition("-")[0]


def name_of(record: Record, part: str) -> str:
    """What a part of the run is called (model, dataset, recipe); empty where the record does not say."""
    values = record.config.get(part)
    return str(values.get("name", "")) if isinstance(values, Mapping) else ""


def dataset_of(record: Record) -> str:
    """Name of the data set; empty where the record does not say."""
    return name_of(record, "dataset")


def percent(fraction: float | None) -> float | None:
    """In percent; None stays None."""
    return None if fraction is None else 100 * fraction


def _setting(record: Record) -> str:
    """The same for runs that differ in their seed only."""
    if record.reference:
        return record.reference.row
    if record.status != "complete":
        return " ".join(_overrides(record)) or record.name
    return json.dumps([record.name, *_flat(record).items()], sort_keys=True)


def _overrides(record: Record) -> list[str]:
    """Those of its command, but for the seed."""
    return [line for line in shlex.split(record.command)[1:] if not line.startswith("seed=")]


def _flat(record: Record) -> dict[str, Any]:
    """The settings that decide the result, by dotted name; a method that is given the run's seed
    differs by seed as the run does."""
    def leaves(prefix: str, values: Mapping[str, Any]):
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from leaves(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}", value

    found = dict(leaves("", {k: v for k, v in record.config.items() if k not in ("runtime", "seed")}))
    if found.get("method.seed") == record.seed:
        found.pop("method.seed", None)
    return found


def _labels(records: Sequence[Record]) -> list[str]:
    """Row names of a published table, else the method and at most three settings that set the row apart from
    those of the same method, model, data set and recipe, which have columns of their own."""
    if records[0].reference:
        return [record.reference.row for record in records]
    labels = []
    for record in records:
        alike = [other for other in records if _kind(other) == _kind(record)]
        apart = _settings_apart if record.status == "complete" else _overrides_apart
        labels.append(" ".join([method_of(record), *apart(record, alike if record.config else records)[:3]]))
    return labels


def _kind(record: Record) -> tuple[str, ...]:
    return method_of(record), *(name_of(record, part) for part in ("model", "dataset", "recipe"))


def _settings_apart(record: Record, others: Sequence[Record]) -> list[str]:
    """Settings besides the ratio that others have otherwise."""
    own, settings = _flat(record), [_flat(other) for other in others if other.status == "complete"]
    apart = [
        key for key in own
        if key not in ("ratio", "method.ratio", "name") and any(other.get(key) != own[key] for other in settings)
    ]  # fmt: skip
    return [f"{key.rpartition('.')[2]}={_plain(own[key])}" for key in apart if not key.endswith("target")]


def _overrides_apart(record: Record, others: Sequence[Record]) -> list[str]:
    """The same of a run that failed, whose settings may be wrong: what was written, but for what has a column."""
    shared = set.intersection(*(set(_overrides(other)) for other in others))
    columns = ("method=", "model=", "dataset=", "recipe=", "ratio=") if record.config else ()
    return [line for line in _overrides(record) if line not in shared and not line.startswith(columns)]


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
