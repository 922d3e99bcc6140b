"""How fast the trainer is, as ratios measured in one run.

    python scripts/benchmark_training.py [--data DIR] [--seconds S] [--out FILE.json]

1. the trainer against a bare PyTorch loop on one fixed batch: same model, batch size, precision
   and memory format (1.00 = nothing lost to hooks, shuffling, normalisation, logging);
2. memory formats and precisions of the bare loop against each other;
3. LeNet-300-100 on Fashion-MNIST (needs --data): the trainer against the usual DataLoader with
   per-sample transforms and one worker.
All loops of a comparison take turns, so a drift of the machine's speed hits all alike, the trainer
and the bare loop even step by step; what is printed is the median of the turns' ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.datasets.dataset import Splits
from prune_cli.datasets.synthetic import Synthetic
from prune_cli.datasets.torchvision_sets import TorchvisionSet
from prune_cli.environment import machine, versions
from prune_cli.hooks import TrainingHooks
from prune_cli.models.lenet import LeNet300100
from prune_cli.models.resnet import CifarResNet
from prune_cli.models.vgg import VGG
from prune_cli.precision import resolved_precision
from prune_cli.settings import FitSettings
from prune_cli.trainer import fit

BATCH = 128
FASHION_MNIST_IMAGES = 60_000
TURNS = 3
SHORTEST = 8  # steps of a turn: fewer would show what `fit` does once, checking every weight for instance
FIT = FitSettings(
    epochs=1, batch_size=BATCH, optimizer="sgd", lr=0.01, momentum=0.9, nesterov=False,
    weight_decay=1e-4, schedule="constant",
)  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet56": lambda: _shaped(CifarResNet(3, 32, 10, depth=56), (3, 32, 32)),
    "vgg16": lambda: _shaped(VGG(3, 32, 10, depth=16), (3, 32, 32)),
    "lenet_300_100": lambda: _shaped(LeNet300100(1, 28, 10), (1, 28, 28)),
}


class Silent:
    """Neither a checkpoint nor a journal: what is timed is training."""

    def load(self) -> None: ...

    def save(self, state) -> None: ...

    def resumed(self, history) -> None: ...

    def step(self) -> None: ...

    def epoch(self, epoch, values, tensors=None) -> None: ...


class Interleaved(Silent):
    """After every step of the trainer runs one of another loop; seconds of each."""

    def __init__(self, other: Callable[[int], None]) -> None:
        self.other, self.ours, self.others = other, [], []
        self.since = time.perf_counter()

    def step(self) -> None:
        ended = time.perf_counter()
        self.other(1)
        self.ours.append(ended - self.since)
        self.since = time.perf_counter()
        self.others.append(self.since - ended)


def bare_loop(model: nn.Module, precision: str, layout: torch.memory_format) -> Callable[[int], None]:
    """The shortest training loop there is, on one batch that never changes."""
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    x = torch.randn(BATCH, *model.input_shape).contiguous(memory_format=layout)
    y = torch.randint(0, 10, (BATCH,))

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def trainer_loop(
    model: nn.Module, splits_of: Callable[[int], Splits], precision: str, batch_size: int = BATCH
) -> Callable[..., None]:
    """`trainer.fit` over `steps` batches."""
    settings = replace(FIT, batch_size=batch_size)

    def run(steps: int, monitor: Silent | None = None) -> None:
        fit(
            model, splits_of(steps), settings, TrainingHooks(), precision=precision, seed=0, stage="dense",
            checkpoint=Silent(), monitor=monitor or Silent(),
        )  # fmt: skip

    return run


def dataloader_loop(model: nn.Module, data_root: Path, batch_size: int) -> Callable[[int], None]:
    """The usual pipeline: per-sample ToTensor and Normalize in one worker process."""
    from prune_cli.vision import torchvision

    tv = torchvision()
    transform = tv.transforms.Compose([tv.transforms.ToTensor(), tv.transforms.Normalize((0.5,), (0.5,))])
    images = tv.datasets.FashionMNIST(str(data_root), train=True, transform=transform)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def run(steps: int) -> None:
        subset = torch.utils.data.Subset(images, range(steps * batch_size))
        for x, y in torch.utils.data.DataLoader(subset, batch_size, shuffle=True, num_workers=1):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def images_per_second(
    loops: dict[str, Callable[[int], None]], seconds: float, batch_size: int = BATCH
) -> dict[str, list[float]]:
    """Every loop's speed in every turn; the loops take turns of about `seconds`."""
    steps = {}
    for name, loop in loops.items():
        steps[name] = min(steps_of(loop, seconds), FASHION_MNIST_IMAGES // batch_size)
        loop(steps[name])  # and its data
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(TURNS):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop(steps[name])
            speeds[name].append(steps[name] * batch_size / (time.perf_counter() - began))
    return speeds


def steps_of(loop: Callable[[int], None], seconds: float) -> int:
    """How many steps a turn of `seconds` has; the loop is warm then."""
    loop(2)  # allocations, choice of kernels
    began = time.perf_counter()
    loop(2)
    return max(SHORTEST, int(2 * seconds / (time.perf_counter() - began)))


def step_by_step(trainer: Callable[..., None], bare: Callable[[int], None], seconds: float) -> dict[str, list[float]]:
    """Both loops' speed in every turn, in which their steps alternate: that of the median step."""
    steps = max(steps_of(bare, seconds), steps_of(trainer, seconds))
    speeds: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    trainer(steps)  # makes the data
    for _ in range(TURNS):
        turn = Interleaved(bare)
        trainer(steps, turn)
        for name, seconds_of in (("trainer", turn.ours), ("bare loop", turn.others)):
            speeds[name].append(BATCH / statistics.median(seconds_of[1:]))  # the first has what `fit` does once
    return speeds


def row(name: str, speeds: dict[str, list[float]], ours: str, reference: str) -> dict:
    """One line of the result: medians, and the median of the ratios turn by turn."""
    ratios = [a / b for a, b in zip(speeds[ours], speeds[reference], strict=True)]
    result = {
        "case": name, "ours": ours, "reference": reference,
        "images_per_second": {k: round(statistics.median(v), 1) for k, v in speeds.items()},
        "ratio": round(statistics.median(ratios), 3), "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3), "turns": TURNS,
    }  # fmt: skip
    print(
        f"{name:42s} {result['images_per_second'][ours]:9.0f} / {result['images_per_second'][reference]:9.0f} images/s"
        f" = {result['ratio']:.2f} [{result['ratio_low']:.2f}-{result['ratio_high']:.2f}]", flush=True,
    )  # fmt: skip
    return result


def _shaped(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    model.input_shape = shape
    return model


def _synthetic(model: nn.Module) -> Callable[[int], Splits]:
    channels, resolution = model.input_shape[:2]

    @cache
    def splits_of(steps: int) -> Splits:
        dataset = Synthetic(
            name="synthetic", channels=channels, resolution=resolution, classes=10,
            train_size=steps * BATCH, test_size=10, mean=(0.5,), std=(0.25,),
        )  # fmt: skip
        return dataset.load(Path(), torch.device("cpu"), validation=0.0, limit=None, workers=0)

    return splits_of


def _fashion_mnist(data_root: Path, batch_size: int) -> Callable[[int], Splits]:
    dataset = TorchvisionSet(name="fashion_mnist", source="FashionMNIST", mean=(0.5,), std=(0.5,))

    @cache
    def splits_of(steps: int) -> Splits:
        limit = min(steps * batch_size, FASHION_MNIST_IMAGES)
        return dataset.load(data_root, torch.device("cpu"), validation=0.0, limit=limit, workers=0)

    return splits_of


def comparisons(data_root: Path | None, seconds: float) -> Iterator[dict]:
    """All rows of the result, one after the other."""
    for name, make in MODELS.items():
        precision = resolved_precision("auto", torch.device("cpu"), make(), BATCH)
        layout = torch.contiguous_format if name == "lenet_300_100" else torch.channels_last
        model = make()
        trainer, bare = trainer_loop(model, _synthetic(model), precision), bare_loop(make(), precision, layout)
        yield row(f"{name}, {precision}", step_by_step(trainer, bare, seconds), "trainer", "bare loop")
    for batch_size in (BATCH, 4 * BATCH, 16 * BATCH) if data_root else ():
        ours = _fashion_mnist(data_root, batch_size)
        precision = resolved_precision("auto", torch.device("cpu"), MODELS["lenet_300_100"](), batch_size)
        loops = {
            "trainer": trainer_loop(MODELS["lenet_300_100"](), ours, precision, batch_size),
            "DataLoader": dataloader_loop(MODELS["lenet_300_100"](), data_root, batch_size),
        }
        speeds = images_per_second(loops, seconds, batch_size)
        yield row(f"lenet_300_100 on fashion_mnist, batch {batch_size}, {precision}", speeds, "trainer", "DataLoader")
    for name in ("resnet56", "vgg16"):
        loops = {
            "bfloat16, channels_last": bare_loop(MODELS[name](), "bfloat16", torch.channels_last),
            "float32, channels_last": bare_loop(MODELS[name](), "float32", torch.channels_last),
            "float32, NCHW": bare_loop(MODELS[name](), "float32", torch.contiguous_format),
        }
        speeds = images_per_second(loops, seconds)
        yield from (row(f"{name}: {loop} / float32, NCHW", speeds, loop, "float32, NCHW") for loop in list(loops)[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one turn, seconds")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    rows: list[dict] = []
    for found in comparisons(arguments.data, arguments.seconds):
        rows.append(found)
        if arguments.out:  # after every comparison: a run that is stopped leaves what it had
            content = {"benchmark": "training", "machine": machine(), "versions": versions(), "rows": rows}
            arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
