"""What a run leaves behind as plain data: one `Record`, the only thing that reports read.

No torch: reports and tables open in the time it takes to parse JSON.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from prune_cli.errors import UserError
from prune_cli.published import Reference, reference, table_in

SCHEMA = 1


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass: median, 25th and 75th percentile of `runs` runs, milliseconds."""

    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


@dataclass(frozen=True)
class StageResult:
    """The network as one stage left it.

    stage            dense, base (what a run goes on from), sparse, pruned, random (the control:
                     random selection at the same ratio), finetuned, or a control of that: learning_rate,
                     rewind, scratch_e, scratch_b, random_finetuned
    key              of its artifact in the store
    accuracy         top-1 on the test set after the last epoch, in [0, 1]; read once
    validation       the same on the validation split, None where nothing was held out
    best_validation  highest of all epochs, reached after epoch `best_epoch` (the first is 1)
    parameters       numbers stored; macs: multiply-adds of one image; file_bytes: of the artifact
    seconds          spent when it was computed; cached: it came from the store this time
    nonzero          of the parameters; None in records that were written before it was counted
    elementwise      elements that batch norms and ReLUs write and poolings read, for one image
    round            1, 2, ... where the run repeats sparsify, prune and finetune, else None
    epochs           that it was trained; None where nothing is trained
    """

    stage: str
    key: str
    accuracy: float
    validation: float | None
    best_validation: float | None
    best_epoch: int | None
    parameters: int
    macs: int
    file_bytes: int
    latency: tuple[Latency, ...] = ()
    seconds: float = 0.0
    cached: bool = False
    nonzero: int | None = None
    elementwise: Mapping[str, int] | None = None
    round: int | None = None
    epochs: int | None = None

    def at(self, batch: int) -> Latency | None:
        """The latency at this batch size, None where it was not measured."""
        return next((latency for latency in self.latency if latency.batch == batch), None)


@dataclass(frozen=True)
class LayerChange:
    """A convolution or linear layer before and after the cut.

    macs, parameters  (dense, pruned); stripes: filters x kernel positions of its shape, likewise
    units             of what the method removes: `kept` of `total`; for stripes and groups also the
                      fraction kept at each `positions` (K, K) of the kernel, and as `skeleton` which
                      of them, filter by filter (see `pictures.unpacked`); None = not prunable
    """

    name: str
    macs: tuple[int, int]
    parameters: tuple[int, int]
    stripes: tuple[int, int]
    units: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """One run. `config`, `machine` and `versions` hold plain JSON values.

    `requested` and `obtained` are fractions of what `unit` names. `target` is what the user's ratio is a
    fraction of: units, macs or params; of the latter two `removed` is the fraction obtained. In a run
    that did not finish `status` says failed or interrupted, `failure` why, and what is not known is
    None. `layers` compares the dense network with the cut one; `reference` is the run's place in a
    paper's table.
    """

    name: str
    status: str
    command: str
    config: dict[str, Any]
    seed: int | None
    ratio: float | None
    unit: str | None
    requested: float | None
    obtained: float | None
    notes: tuple[str, ...]
    stages: tuple[StageResult, ...]
    machine: dict[str, Any]
    versions: dict[str, Any]
    layers: tuple[LayerChange, ...] = ()
    reference: Reference | None = None
    failure: str | None = None
    target: str = "units"
    removed: float | None = None
    schema: int = SCHEMA

    def stage(self, name: str) -> StageResult | None:
        """The result of the stage called `name` (of the last round), None when the run has no such stage."""
        return next((result for result in reversed(self.stages) if result.stage == name), None)

    @property
    def objective(self) -> float | None:
        """What a sweeper maximises: the accuracy of the smaller network a user would take."""
        last = self.stage("finetuned") or self.stage("pruned")
        return last.accuracy if last else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in the file `path`. Raises UserError: missing, damaged, another schema."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = values["schema"]
            if schema != SCHEMA:
                raise UserError(f"{path}: a record of schema {schema}; this version reads {SCHEMA}")
            read = {
                "stages": tuple(_stage(stage) for stage in values["stages"]),
                "notes": tuple(values["notes"]),
                "layers": tuple(_layer(layer) for layer in values.get("layers", ())),
                "reference": Reference.read(values["reference"]) if values.get("reference") else None,
            }
            return cls(**{**values, **read})
        except OSError as problem:
            raise UserError(f"{path}: no record can be read there ({problem.strerror})") from problem
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(f"{path}: not a record ({problem})") from problem

    def write(self, path: Path) -> None:
        """Write JSON to `path`: the whole file or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump(asdict(self), file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _stage(values: Mapping[str, Any]) -> StageResult:
    return StageResult(**{**values, "latency": tuple(Latency(**latency) for latency in values["latency"])})


def _layer(values: Mapping[str, Any]) -> LayerChange:
    return LayerChange(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def write_failure(
    run_dir: Path, sentence: str, *, config: Mapping[str, Any], command: str, status: str = "failed"
) -> None:
    """Write the record.json of a run that ended with `sentence` instead of a result.

    `run_dir` is outputs/runs/<name>/<date>_<time>; `status` is failed or interrupted.
    """
    run_dir = Path(run_dir)
    ratio = config.get("ratio")
    settings = {key: value for key, value in config.items() if key not in ("table", "row")}
    Record(
        name=run_dir.absolute().parent.name,
        status=status,
        command=command,
        config=settings,
        seed=config.get("seed"),
        ratio=ratio,
        unit=None,
        requested=ratio,
        obtained=None,
        notes=(),
        stages=(),
        machine={},
        versions={},
        reference=reference(table_in(config), config.get("row")),
        failure=sentence,
    ).write(run_dir / "record.json")
