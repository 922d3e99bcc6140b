"""Why filters that soft pruning has zeroed cost accuracy: behind a batch norm they burst back.

    python scripts/explain_regrowth.py [--seeds N...] [--out FILE.json]

ResNet-20 on the digits (`method=sfp ratio=0.4`, validation split), with the constant and with the growing rate,
with the batch norms' usual epsilon and with one that is large beside the variance of a filter at zero. For each:
validation accuracy just before and after the last zeroing, and what became of the zeroed filters within an
epoch: their largest mean norm relative to that of the filters that stayed, and how many were zeroed again.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from torch import Tensor, nn

from prune_cli.build import build
from prune_cli.compose import Composer, loader
from prune_cli.datasets.dataset import Split
from prune_cli.environment import machine, versions
from prune_cli.hooks import Progress
from prune_cli.journal import Journal
from prune_cli.methods.sfp import SoftFilterPruning
from prune_cli.metrics.accuracy import accuracy
from prune_cli.store import Store
from prune_cli.trainer import fit
from prune_cli.workshop import Workshop

RATES, EPSILONS = {"constant": False, "growing": True}, (1e-5, 0.1)
OVERRIDES = ("method=sfp", "ratio=0.4", "recipe.validation=0.2")


@dataclass(frozen=True)
class Outcome:
    """One training. Accuracies in percent; `again`: of the filters that an epoch began with at zero, in percent."""

    rate: str
    epsilon: float
    seed: int
    before: float
    after: float
    norm: float
    again: float


@dataclass(frozen=True, kw_only=True)
class Watched(SoftFilterPruning):
    """Soft filter pruning that writes down what it does. `dead`: per layer the filters that are at zero."""

    validation: Split
    dead: dict[str, Tensor] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)

    def before_fit(self, model: nn.Module, progress: Progress) -> None:
        super().before_fit(model, progress)
        self.dead.update(_at_zero(model, self))

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        norms = {n: model.get_submodule(n).weight.detach().flatten(1).norm(dim=1) for n in self.dead}
        regrown = [float(norms[n][d].mean() / norms[n][~d].mean()) for n, d in self.dead.items() if d.any()]
        before = accuracy(model, self.validation)
        super().after_epoch(model, progress)
        now = _at_zero(model, self)
        again = sum(int((now[n] & d).sum()) for n, d in self.dead.items())
        were = sum(int(d.sum()) for d in self.dead.values())
        self.epochs.append({
            "before": before, "after": accuracy(model, self.validation),
            "norm": mean(regrown) if regrown else 0.0, "again": again / were if were else 1.0,
        })  # fmt: skip
        self.dead.update(now)


def _at_zero(model: nn.Module, method: SoftFilterPruning) -> dict[str, Tensor]:
    """Per prunable layer (O,) bool."""
    return {name: ~layer.weight.detach().flatten(1).any(1) for name, layer in method.prunable(model).layers.items()}


class _Unheard:
    """Neither a checkpoint nor a monitor: nothing is kept, nothing is shown."""

    def load(self) -> None:
        return None

    def note(self, *_: object) -> None: ...

    save = resumed = step = epoch = note


def train(rate: str, epsilon: float, seed: int, scratch: Path) -> Outcome:
    overrides = [*OVERRIDES, f"method.asymptotic={RATES[rate]}", f"seed={seed}", "runtime.device=cpu"]
    experiment = build(Composer(loader(), "config").compose(overrides))
    shop = Workshop(experiment, Store(scratch), Journal(None, Console(quiet=True)))
    settings = {f.name: getattr(experiment.method, f.name) for f in fields(experiment.method)}
    method = Watched(**settings, validation=shop.splits.validation)
    model = method.prepare(shop.untrained())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    fit(
        model, shop.splits, experiment.recipe.sparsify, method, precision=shop.precision, seed=seed, stage="sparse",
        checkpoint=_Unheard(), monitor=_Unheard(),
    )  # fmt: skip
    before, after = (100 * method.epochs[-1][when] for when in ("before", "after"))
    norm = max(epoch["norm"] for epoch in method.epochs)
    return Outcome(rate, epsilon, seed, before, after, norm, 100 * mean(epoch["again"] for epoch in method.epochs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13])
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for rate, epsilon, seed in itertools.product(RATES, EPSILONS, arguments.seeds):
            outcomes.append(train(rate, epsilon, seed, Path(scratch)))
            print(outcomes[-1], flush=True)
    if arguments.out:
        content = {"outcomes": [asdict(o) for o in outcomes], "machine": machine(), "versions": versions()}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
