"""The one training loop."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.checkpoint import load_tensors
from prune_cli.datasets.dataset import Splits
from prune_cli.errors import StageError
from prune_cli.hooks import Progress, TrainingHooks
from prune_cli.metrics.accuracy import accuracy
from prune_cli.seeding import derive, seeded
from prune_cli.settings import FitSettings, Precision

History = list[dict[str, float]]

# Logits are kept this many batches before they are compared with the labels in one go.
TALLY_BATCHES = 64


class Checkpoint(Protocol):
    """Where the state of an unfinished run lives (`store.Partial`)."""

    def save(self, state: Mapping[str, Any]) -> None: ...

    def load(self) -> dict[str, Any] | None: ...


class Monitor(Protocol):
    """Who is told how it goes (`journal.StageJournal`)."""

    def resumed(self, history: History) -> None: ...

    def step(self) -> None: ...

    def epoch(self, epoch: int, values: Mapping[str, float], tensors: Mapping[str, Tensor] | None = None) -> None: ...


def fit(
    model: nn.Module,
    splits: Splits,
    settings: FitSettings,
    hooks: TrainingHooks,
    *,
    precision: Precision,
    seed: int,
    stage: str,
    checkpoint: Checkpoint,
    monitor: Monitor,
    watch: Callable[[nn.Module], Mapping[str, Tensor]] = lambda model: {},
    start: int = 0,
    stop: int | None = None,
) -> History:
    """Train `model` in place and return one row of figures per epoch.

    Of the schedule's optimizer steps those from `start` up to before `stop` are trained (None: to the end). A run
    that starts within an epoch takes the rest of that epoch's batches first. One that ended at `stop` goes on
    from its checkpoint, which is that of the last whole epoch, as if it had never ended.

    The order of the hooks is drawn in `TrainingHooks`. Every epoch takes its randomness (order of
    the images, augmentation, dropout, hooks) from (seed, stage, epoch) and ends in `checkpoint`, so
    a run that is killed and started again ends with the same weights, bit for bit. Nothing in the
    loop waits for the device.

    Raises StageError: the loss or a weight is not finite, or the accuracy collapsed to chance.
    """
    run = _Run(model, splits, settings, precision, start)
    if run.resume(checkpoint):
        monitor.resumed(run.history)
    else:
        with seeded(derive(seed, stage, "before_fit"), run.device):
            hooks.before_fit(model, run.progress())
    last = run.steps if stop is None else stop
    while run.step < last:
        epoch_seed = derive(seed, stage, run.epoch)
        with seeded(epoch_seed, run.device):
            figures = _train_epoch(run, hooks, epoch_seed, monitor, last)
            hooks.after_epoch(model, run.progress())
        if splits.validation is not None:
            figures["validation"] = accuracy(model, splits.validation)
        watched = watch(model)
        figures |= {f"sparsity/{layer}": float((tensor == 0).float().mean()) for layer, tensor in watched.items()}
        run.history.append(figures)
        _check_alive(run, stage, splits.classes)
        if run.step % run.per_epoch == 0:
            checkpoint.save(run.state())
        monitor.epoch(run.epoch, figures, watched)
    return run.history


def _train_epoch(run: "_Run", hooks: TrainingHooks, seed: int, monitor: Monitor, last: int) -> dict[str, float]:
    """Up to before step `last`, if that comes first."""
    model, optimizer, tally = run.model, run.optimizer, _Tally()
    model.train()
    for step, (x, y) in enumerate(run.splits.train.batches(run.settings.batch_size, seed=seed), run.first_step):
        if step < run.step or run.leaves_out(x):
            continue
        if step == last:
            break
        progress = run.progress()
        rate = run.set_learning_rate()
        with run.autocast():
            x = x.contiguous(memory_format=run.layout)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            terms = hooks.batch_loss(model, progress, x, logits)
        terms = {**terms, **hooks.penalty(model, progress)}
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values(), loss.float()).backward()
        hooks.after_backward(model, progress)
        optimizer.step()
        run.step += 1
        hooks.after_step(model, progress)
        tally.add(logits.detach(), y, loss.detach(), terms)
        monitor.step()
    return tally.figures() | {"learning_rate": rate}


class _Run:
    """What one `fit` moves forward: weights, optimizer, step, history; and how to save it."""

    def __init__(
        self, model: nn.Module, splits: Splits, settings: FitSettings, precision: Precision, start: int
    ) -> None:
        self.model, self.splits, self.settings = model, splits, settings
        self.device = next(model.parameters()).device
        convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self.layout = torch.channels_last if convolves else torch.contiguous_format
        model.to(memory_format=self.layout)
        self.precision = precision
        self.per_epoch = steps_per_epoch(len(splits.train), settings.batch_size)
        self.steps = self.per_epoch * settings.epochs
        self.travel = travel(settings, self.steps)
        self.optimizer = _optimizer(model, settings)
        self.start, self.step = start // self.per_epoch, start
        self.history: History = []

    @property
    def epoch(self) -> int:
        """Epochs of the schedule that lie behind."""
        return self.start + len(self.history)

    @property
    def first_step(self) -> int:
        """Of the epoch that comes next, or is under way."""
        return self.per_epoch * self.epoch

    def leaves_out(self, x: Tensor) -> bool:
        """Whether the batch is a last one of a single image, which batch norm cannot normalise."""
        return len(x) == 1 < min(self.settings.batch_size, len(self.splits.train))

    def progress(self) -> Progress:
        settings = self.settings
        return Progress(self.epoch, settings.epochs, self.step, self.steps, self.travel, settings.weight_decay)

    def set_learning_rate(self) -> float:
        rate = learning_rate(self.settings, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def state(self) -> dict[str, Any]:
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "step": self.step,
            "history": self.history,
            "threads": torch.get_num_threads(),
        }

    def resume(self, checkpoint: Checkpoint) -> bool:
        """Go back to where `checkpoint` stands, if it holds anything."""
        state = checkpoint.load()
        if state is None:
            return False
        # Sums are split by thread: another count would round differently.
        torch.set_num_threads(state["threads"])
        load_tensors(self.model, state["model"])  # copies into tensors that keep their layout
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for parameter, slots in self.optimizer.state.items():
            for name, value in slots.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    slots[name] = torch.empty_like(parameter).copy_(value)
        self.step, self.history = state["step"], state["history"]
        return True


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Optimizer steps in an epoch; a last batch of one image is left out."""
    full, rest = divmod(images, batch_size)
    return max(1, full + (rest > 1))


def learning_rate(settings: FitSettings, step: int, steps: int) -> float:
    """The learning rate of step 0 <= `step` < `steps`."""
    position = step / steps
    if settings.schedule == "one_cycle":
        warmup = 0.2
        if position < warmup:
            return settings.lr * (step + 1) / (steps * warmup + 1)
        return settings.lr * (1 + math.cos(math.pi * (position - warmup) / (1 - warmup))) / 2
    if settings.schedule == "step":
        return settings.lr * settings.gamma ** sum(position >= m for m in settings.milestones)
    return settings.lr


def travel(settings: FitSettings, steps: int) -> float | None:
    """`Progress.travel` of a run of so many steps."""
    if settings.optimizer != "sgd":
        return None
    return sum(learning_rate(settings, step, steps) for step in range(steps)) / (1 - settings.momentum)


def _optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adam":
        return torch.optim.Adam(
            parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters, settings.lr, settings.momentum,
        weight_decay=settings.weight_decay, nesterov=settings.nesterov, fused=True,
    )


class _Tally:
    """Sums of an epoch, kept on the device until it ends."""

    def __init__(self) -> None:
        self.images, self.batches = 0, 0
        self.right: Tensor | int = 0
        self.sums: dict[str, Tensor] = {}
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        self.images += len(labels)
        self.batches += 1
        for name, term in {"loss": loss, **terms}.items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().float()
        self.waiting.append((logits, labels))
        if len(self.waiting) == TALLY_BATCHES:
            self._compare()

    def figures(self) -> dict[str, float]:
        """Means over the epoch: accuracy in [0, 1], the loss and every further term per batch."""
        self._compare()
        means = {name: float(total) / self.batches for name, total in self.sums.items()}
        return means | {"accuracy": float(self.right) / self.images}

    def _compare(self) -> None:
        if self.waiting:
            logits, labels = (torch.cat(parts) for parts in zip(*self.waiting))
            self.right = self.right + (logits.argmax(1) == labels).sum()
            self.waiting.clear()


def _check_alive(run: _Run, stage: str, classes: int) -> None:
    """Stop a run that cannot end well, saying which layer looks how."""
    last, epoch = run.history[-1], run.epoch
    if not math.isfinite(last["loss"]) or not all(t.isfinite().all() for t in run.model.state_dict().values()):
        raise StageError(f"{stage}, epoch {epoch}: the loss is {last['loss']:.3g}; {_layer_statistics(run.model)}")
    # Far above chance once, at chance for two epochs now: nothing comes back from that.
    chance = 1 / classes
    far = min(3 * chance, (1 + chance) / 2)  # few classes: half the way from chance to one
    near = min(1.25 * chance, chance + 0.03 * (1 - chance))
    curve = [figures["accuracy"] for figures in run.history]
    if max(curve) > far and max(curve[-2:]) < near:
        raise StageError(
            f"{stage}, epoch {epoch}: the accuracy collapsed from {max(curve):.1%} to chance "
            f"({curve[-1]:.1%}); {_layer_statistics(run.model)}"
        )


def _layer_statistics(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            return f"the first of its tensors that is not finite is {name}"
    parameters = dict(model.named_parameters())
    name = max(parameters, key=lambda n: float(parameters[n].detach().abs().max()))
    emptiest = max(parameters, key=lambda n: float((parameters[n] == 0).float().mean()))
    zeros = float((parameters[emptiest] == 0).float().mean())
    largest = float(parameters[name].detach().abs().max())
    return f"the largest weight is {largest:.3g} in {name}, the most zeros ({zeros:.0%}) are in {emptiest}"
