"""Removal is lossless, shown on every convolutional classification model of torchvision.

    python scripts/prove_removal.py                      all models, all methods that remove channels
    python scripts/prove_removal.py --models resnet18    only these
    python scripts/prove_removal.py --output FOLDER      elsewhere than outputs/published/torchvision_proof

For every model and method at ratio 0.5: the constants of the network (batch norm scales, shifts and
statistics, biases) are randomised first, since removing a zero filter is exact by accident otherwise; the
masked network must differ from the dense one and equal the cut one in evaluation mode, at least 30 % of the
channels and some MACs must be gone, a training step must run, and the saved file must compute the same
in a fresh process. Torch-Pruning's own MagnitudePruner runs beside it on the same networks.

Rows are written to rows.csv in batches, when a fresh process has loaded their files, and at the end, an
interrupted one included; what is there is not measured again. A channel is an output
of a convolution, or of a linear layer on maps. A model counts as convolutional if it contains nn.Conv2d
and no attention.
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import randomise

from prune_cli import surgery
from prune_cli.build import build
from prune_cli.grouping import traced
from prune_cli.checkpoint import load_model, save_model
from prune_cli.compose import CONF, Composer, loader
from prune_cli.environment import write_env
from prune_cli.errors import StageError, UserError
from prune_cli.evaluation import evaluating
from prune_cli.method import PruningMethod
from prune_cli.metrics.macs import count_macs, count_parameters
from prune_cli.models.spec import ModelSpec
from prune_cli.vision import torchvision

OUTPUT = ROOT / "outputs/published/torchvision_proof"
RATIO, CLASSES, BATCH = 0.5, 10, 4
RESOLUTIONS = (64, 96, 128, 224)  # the first that the model can read
TOLERANCE, GONE = 1e-4, 0.3
# Settings with which a method reaches the channels of residual sums and grouped convolutions, where it has them.
EVERYWHERE = {"coupled": "joint", "residual": True, "exclude": ()}
BATCH_BYTES = 200_000_000  # files that one fresh process checks


@dataclass(frozen=True)
class Row:
    """One model under one method. `reason`: why it fails or does not apply, empty where everything holds."""

    model: str
    method: str
    resolution: int
    channels: float | None = None
    parameters: float | None = None
    macs: float | None = None
    masked: float | None = None
    difference: float | None = None
    reloaded: float | None = None
    seconds: float | None = None
    reason: str = ""


def by_size() -> list[str]:
    """torchvision's classification models, those with the fewest parameters first."""
    models = torchvision().models
    weights = {name: models.get_model_weights(name) for name in models.list_models(module=models)}
    return sorted(weights, key=lambda name: next(iter(weights[name])).meta["num_params"])


def convolutional(model: nn.Module) -> bool:
    """Whether the model contains nn.Conv2d and no attention."""
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    return not attention and any(isinstance(module, nn.Conv2d) for module in model.modules())


def removing_methods() -> dict[str, PruningMethod]:
    """The methods of conf/method whose unit is the filter, with the settings that reach every channel."""
    composer, found = Composer(loader(), "config"), {}
    for path in sorted((CONF / "method").glob("*.yaml")):
        method = build(composer.compose([f"method={path.stem}", f"ratio={RATIO}"])).method
        if method.unit == "filter":
            found[path.stem] = replace(method, **{k: v for k, v in EVERYWHERE.items() if hasattr(method, k)})
    return found


def network(name: str) -> tuple[nn.Module, ModelSpec]:
    """The model for the smallest resolution that it reads, every constant of it random."""
    torch.manual_seed(0)
    spec = ModelSpec(name, "prune_cli.models.zoo.classifier", {"architecture": name})
    for resolution in RESOLUTIONS:
        try:
            model = spec.build(3, resolution, CLASSES)
        except UserError:
            continue
        return calibrated(randomise(model).eval()), spec
    raise UserError(f"{name} reads none of {RESOLUTIONS}")


@torch.no_grad()
def calibrated(model: nn.Module) -> nn.Module:
    """Random statistics near the real ones: far from them, a hundred layers would end in infinity or nothing."""
    generator = torch.Generator().manual_seed(1)

    def near(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3)) + 1e-3
        noise = torch.randn(len(mean), generator=generator)
        norm.running_mean.copy_(mean + 0.3 * noise * variance.sqrt())
        norm.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2, generator=generator))

    hooks = [m.register_forward_pre_hook(near) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(images(model))
    for hook in hooks:
        hook.remove()
    return model


def images(model: nn.Module) -> Tensor:
    return torch.randn(BATCH, *model.input_shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    with evaluating(model):
        return model(images(model))


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest, relative to the largest expected value."""
    return float((expected - found).abs().max() / expected.abs().max())


def channels(model: nn.Module, on_maps: frozenset[str]) -> int:
    """Outputs of convolutions, and of the linear layers on maps that the dense network has under these names."""
    own = on_maps | {f"{name}.layer" for name in on_maps}  # a scatter behind the layer has taken its name
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name in own}
    return sum(len(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) or name in linear)


def train_step(model: nn.Module) -> None:
    """One step of SGD that moves the weights and leaves them finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().sum() for parameter in model.parameters()]
    F.cross_entropy(model(images(model)), torch.arange(BATCH) % CLASSES).backward()
    optimizer.step()
    after = [parameter.detach().sum() for parameter in model.parameters()]
    if all(torch.equal(a, b) for a, b in zip(before, after)) or not all(t.isfinite() for t in after):
        raise StageError("a training step changes nothing, or ends in numbers that are not finite")


class Proof:
    """The dense network of one model, and what each method makes of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dense, self.spec = network(name)
        self.on_maps = traced(self.dense).pointwise
        self.expected = output(self.dense)
        self.channels = channels(self.dense, self.on_maps)
        self.parameters = count_parameters(self.dense)
        self.macs = count_macs(self.dense, self.dense.input_shape)
        self.resolution = self.dense.input_shape[1]

    def by_method(self, label: str, method: PruningMethod, file: Path) -> Row:
        """Select, mask, cut, compare, save to `file` with the output that the reloaded network must have, train."""
        model = method.prepare(self.dense)
        masks = method.prune(model, RATIO)
        model = method.compensate(model, masks)
        masked, small = surgery.masked_and_cut(model, masks, method.constant)
        surgery.verify(masked, small)
        expected, found = output(masked), output(small.model)
        save_model(file, small.model, self.spec, CLASSES)
        torch.save(found, file.with_suffix(".pt"))
        differences = {"masked": difference(self.expected, expected), "difference": difference(expected, found)}
        row = self._row(label, small.model, **differences)
        train_step(small.model)
        return replace(row, reason=shortfall(row))

    def by_torch_pruning(self) -> Row:
        """Its MagnitudePruner with default settings; it claims no equality, so none is asked for."""
        model = network(self.name)[0]
        last = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and len(m.weight) == CLASSES]
        pruner = tp.pruner.MagnitudePruner(
            model, images(model), tp.importance.MagnitudeImportance(), pruning_ratio=RATIO, ignored_layers=last,
        )  # fmt: skip
        pruner.step()
        output(model)
        row = self._row("Torch-Pruning", model)
        train_step(model)
        return replace(row, reason=shortfall(row))

    def _row(self, label: str, model: nn.Module, **more: float) -> Row:
        return Row(
            self.name, label, self.resolution,
            channels=1 - channels(model, self.on_maps) / self.channels,
            parameters=1 - count_parameters(model) / self.parameters,
            macs=1 - count_macs(model, self.dense.input_shape) / self.macs,
            **more,
        )  # fmt: skip


def shortfall(row: Row) -> str:
    """What does not hold, of what is known without reloading."""
    if row.difference is not None and not row.difference <= TOLERANCE:
        return f"masked and cut differ by {row.difference:.1e}"
    if row.masked is not None and not row.masked > 1e-3:
        return "the masked network is the dense one"
    if row.macs <= 0:
        return "no MACs fell"
    return "" if row.channels >= GONE else f"only {row.channels:.0%} of the channels are gone"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so many seconds."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def measured(name: str, label: str, resolution: int, limit: int, make: Callable[[], Row]) -> Row:
    """The row, or one that says why there is none."""
    start = time.perf_counter()
    try:
        with at_most(limit):
            row = make()
    except (UserError, TimeoutError) as problem:
        row = Row(name, label, resolution, reason=str(problem))
    except Exception as problem:  # of another library, or a proof that failed: a row of the table either way
        row = Row(name, label, resolution, reason=f"{type(problem).__name__}: {problem}"[:200])
    return replace(row, seconds=round(time.perf_counter() - start, 2))


def reloaded(row: Row, off: float | str) -> Row:
    """The row with how far the reloaded network is off, or why there is none."""
    if isinstance(off, str):
        return replace(row, reason=row.reason or off)
    wrong = "" if off <= TOLERANCE else f"reloaded, it is off by {off:.1e}"
    return replace(row, reloaded=off, reason=row.reason or wrong)


class Table:
    """rows.csv and env.json in a folder, and the files whose fresh process is still to come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "rows.csv"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        self.waiting: dict[Path, Row] = {}

    def has(self, model: str, method: str) -> bool:
        return any((row["model"], row["method"]) == (model, method) for row in self.rows)

    def add(self, row: Row, file: Path) -> None:
        if file.exists():
            self.waiting[file] = row
        else:
            self.rows.append(asdict(row))
        if sum(f.stat().st_size for f in self.waiting) > BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Reload what waits, in a process that has never seen it, and write everything down."""
        if self.waiting:
            command = [sys.executable, __file__, "--reload", *map(str, self.waiting)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            for file, row in self.waiting.items():
                self.rows.append(asdict(reloaded(row, found[str(file)])))
                file.unlink()
                file.with_suffix(".pt").unlink()
            self.waiting = {}
        aside = self.path.with_suffix(".part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        aside.replace(self.path)
        write_env(self.folder / "env.json", device="cpu")


def prove(models: list[str], methods: dict[str, PruningMethod], table: Table, limit: int, scratch: Path) -> None:
    try:
        for name in models:
            labels = [label for label in [*methods, "Torch-Pruning"] if not table.has(name, label)]
            if not labels:
                continue
            if not convolutional(torchvision().models.get_model(name, weights=None)):
                continue
            proof = Proof(name)
            for label in labels:
                file = scratch / f"{name}-{label}.safetensors"
                by_method = partial(proof.by_method, label, methods.get(label), file)
                make = by_method if label in methods else proof.by_torch_pruning
                row = measured(name, label, proof.resolution, limit, make)
                if row.channels is None:
                    file.unlink(missing_ok=True)
                table.add(row, file)
                print(f"{name:20} {label:15} {row.seconds:6.1f} s  {row.reason or 'holds'}", flush=True)
    finally:
        table.flush()


def reload(files: list[Path]) -> None:
    """Print, per file, how far the loaded network is from the output beside it."""
    off = {}
    for file in files:
        try:
            off[str(file)] = difference(torch.load(file.with_suffix(".pt")), output(load_model(file)))
        except UserError as problem:
            off[str(file)] = str(problem)
    print(json.dumps(off))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these (default: all convolutional ones)")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one model under one method (default: 120)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--reload", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reload:
        return reload(arguments.reload)
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models or by_size()
        prove(models, removing_methods(), Table(arguments.output), arguments.limit, Path(scratch))


if __name__ == "__main__":
    main()
