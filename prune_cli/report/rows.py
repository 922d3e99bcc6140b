"""Runs -> rows: one per setting, its runs over the seeds taken together, under a name of its own."""

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
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
    def series(self) -> str:
        """What rows have in common that differ in how much is removed: prune_50 and prune_60."""
        return re.sub(r"[_ ]?\d+$", "", self.label) or self.label

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
        return " ".join(_words(record)) or record.name
    return json.dumps([record.name, *_flat(record).items()], sort_keys=True)


def _words(record: Record) -> list[str]:
    """The overrides of its command, but for the seed."""
    return [word for word in shlex.split(record.command)[1:] if not word.startswith("seed=")]


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
    """Row names of a published table, else the method and what differs between its rows."""
    if records[0].reference:
        return [record.reference.row for record in records]
    shared = set.intersection(*(set(_words(record)) for record in records))
    shown = ("method_name", "method.target", "method.ratio", "ratio", "model.name", "dataset.name", "name")
    settings = [_flat(record) if record.status == "complete" else {} for record in records]
    labels = []
    for record, own in zip(records, settings, strict=True):
        if not own:
            labels.append(_label_of_a_failure(record, shared))
            continue
        same = [other for other in settings if other.get("method_name") == own.get("method_name")]
        apart = [key for key in own if key not in shown and any(other.get(key) != own[key] for other in same)]
        short = [f"{key.rpartition('.')[2]}={_plain(own[key])}" for key in apart if not key.endswith("target")]
        labels.append(" ".join([method_of(record), *short[:3]]))
    return labels


def _label_of_a_failure(record: Record, shared: Collection[str]) -> str:
    """Its settings may be wrong: the overrides speak that not all rows share, but for what has a column."""
    if not record.config:
        return " ".join([record.name, *(word for word in _words(record) if word not in shared)])
    apart = [w for w in _words(record) if w not in shared and not w.startswith(("method=", "ratio=", "model=", "dataset="))]
    return " ".join([method_of(record), *apart])


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
