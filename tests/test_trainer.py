"""The training loop: the order of its hooks, resuming bit for bit, and when it gives up."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyResNet, TinyVGG
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune_cli.datasets.dataset import Splits
from prune_cli.errors import StageError
from prune_cli.hooks import Together, TrainingHooks
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.methods.stripe import StripePruning
from prune_cli.metrics.accuracy import accuracy
from prune_cli.settings import FitSettings
from prune_cli.store import Partial
from prune_cli.trainer import fit, learning_rate, steps_per_epoch

SETTINGS = FitSettings(
    epochs=3, batch_size=8, optimizer="sgd", lr=0.05, momentum=0.9, nesterov=False, weight_decay=1e-3, schedule="one_cycle"
)  # fmt: skip
CPU = torch.device("cpu")
CLASSES = 4


class Noise:
    """A split of random images whose class is a shift of their brightness."""

    def __init__(self, images: int, seed: int = 0, resolution: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(images) % CLASSES
        self.x = torch.randn(images, 2, resolution, resolution, generator=generator) + self.y.view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, batch_size, seed=None):
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for chosen in order.split(batch_size):
            yield self.x[chosen], self.y[chosen]


def _splits(train: int = 32, validation: int | None = 12) -> Splits:
    held_out = None if validation is None else Noise(validation, 1)
    return Splits(Noise(train), held_out, Noise(12, 2), channels=2, resolution=8, classes=CLASSES)


class Dropout(nn.Module):
    """Random numbers in every step, and no convolution."""

    def __init__(self, channels, resolution, classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * resolution**2, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes)
        )

    def forward(self, x):
        return self.layers(x)


def _model(kind=TinyResNet) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(2, 8, CLASSES)
    model.input_shape = (2, 8, 8)
    return model


class Memory:
    """A checkpoint that is always empty, and a monitor that listens."""

    def __init__(self):
        self.events, self.epochs = [], []

    def save(self, state):
        self.events.append("save")

    def load(self):
        return None

    def resumed(self, history):
        self.events.append("resumed")

    def step(self):
        pass

    def epoch(self, epoch, values, tensors=None):
        self.events.append("epoch")
        self.epochs.append((epoch, dict(values), dict(tensors or {})))


def _fit(model, settings=SETTINGS, hooks=None, *, splits=None, checkpoint=None, monitor=None, precision="float32", **more):
    memory = Memory()
    return fit(
        model, splits or _splits(), settings, hooks or TrainingHooks(), precision=precision, seed=0, stage="dense",
        checkpoint=checkpoint or memory, monitor=monitor or memory, **more,
    )  # fmt: skip


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Hooks


class Spy(TrainingHooks):
    """Writes down what happens, and checks what every hook may rely on."""

    def __init__(self, model, events, autocast):
        self.model, self.events, self.weight = model, events, next(model.parameters())
        self.autocast = autocast
        self.steps = []
        model.register_forward_hook(lambda m, *_: events.append("forward" if m.training else "evaluated"))

    def before_fit(self, model, progress):
        self.events.append("before_fit")
        assert (progress.epoch, progress.step) == (0, 0)
        assert progress.travel > 0 and progress.weight_decay == SETTINGS.weight_decay

    def batch_loss(self, model, progress, x, logits):
        self.events.append("batch_loss")
        assert torch.is_autocast_enabled("cpu") == self.autocast and logits.requires_grad
        assert x.shape == (8, 2, 8, 8) and logits.shape == (8, CLASSES)
        return {"logits": 0.1 * logits.float().square().mean()}

    def penalty(self, model, progress):
        self.events.append("penalty")
        self.steps.append((progress.epoch, progress.step))
        self.before = self.weight.detach().clone()
        self.at_penalty = self.weight.square().sum()
        assert not torch.is_autocast_enabled("cpu") and self.at_penalty.dtype == torch.float32
        return {"ridge": 0.5 * self.at_penalty, "constant": torch.ones(())}

    def after_backward(self, model, progress):
        self.events.append("after_backward")
        assert torch.equal(self.weight, self.before) and self.weight.grad.abs().sum() > 0

    def after_step(self, model, progress):
        self.events.append("after_step")
        assert not torch.equal(self.weight, self.before)

    def after_epoch(self, model, progress):
        self.events.append("after_epoch")
        assert progress.step == (progress.epoch + 1) * 4 and progress.steps == 12 and progress.epochs == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_hooks_come_in_the_order_that_is_drawn(precision):
    model, memory = _model(), Memory()
    spy = Spy(model, memory.events, autocast=precision == "bfloat16")
    history = _fit(model, hooks=spy, checkpoint=memory, monitor=memory, precision=precision)
    batch = ["forward", "batch_loss", "penalty", "after_backward", "after_step"]
    epoch = [*batch * 4, "after_epoch", "evaluated", "save", "epoch"]
    assert memory.events == ["before_fit", *epoch * 3]
    assert spy.steps == [(step // 4, step) for step in range(12)]
    assert [figures["constant"] for figures in history] == [1, 1, 1]
    assert all({"loss", "ridge", "logits", "accuracy", "validation", "learning_rate"} <= set(figures) for figures in history)
    assert [(number, values) for number, values, _ in memory.epochs] == list(enumerate(history, 1))


def test_a_penalty_reaches_the_gradient_and_is_no_part_of_the_loss_that_is_shown():
    class Heavy(TrainingHooks):
        def penalty(self, model, progress):
            return {"heavy": 100 * next(model.parameters()).square().sum()}

        def after_backward(self, model, progress):
            weight = next(model.parameters())
            assert torch.allclose(weight.grad, 200 * weight.detach(), rtol=0.2, atol=1)

    one = replace(SETTINGS, epochs=1, batch_size=32, lr=1e-6)
    (with_,), (without,) = _fit(_model(), one, Heavy()), _fit(_model(), one)
    assert with_["heavy"] > 10 and with_["loss"] == without["loss"]


def test_hooks_draw_the_same_random_numbers_however_the_run_got_there(tmp_path):
    class Noisy(TrainingHooks):
        def before_fit(self, model, progress):
            self._shake(model)

        after_epoch = after_step = before_fit

        def _shake(self, model):
            with torch.no_grad():
                next(model.parameters()).add_(0.01 * torch.randn(()))

    def final(stop):
        torch.manual_seed(stop)
        model = _model()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                _fit(_model(), hooks=Noisy(), checkpoint=Partial(tmp_path / "p"), monitor=Stops(stop))
            torch.manual_seed(100 + stop)
        _fit(model, hooks=Noisy(), checkpoint=Partial(tmp_path / "p") if stop else None)
        return _state(model)

    state = torch.get_rng_state()
    assert _same(final(0), final(6))
    torch.set_rng_state(state)
    _fit(_model())
    assert torch.equal(torch.get_rng_state(), state)  # and nobody outside notices


def test_frozen_parameters_stay():
    model = _model()
    frozen = [p for name, p in model.named_parameters() if "conv" in name]
    for parameter in frozen:
        parameter.requires_grad = False
    before = [p.clone() for p in model.parameters()]
    _fit(model)
    moved = {id(p): not torch.equal(p, old) for p, old in zip(model.parameters(), before)}
    assert {id(p) for p in frozen} == {number for number, has in moved.items() if not has}


def test_what_a_method_watches_reaches_the_monitor():
    memory = Memory()
    _fit(_model(), monitor=memory, watch=lambda model: {"w": next(model.parameters())})
    assert [set(tensors) for *_, tensors in memory.epochs] == [{"w"}] * 3


# Learning rate

SCHEDULES = st.builds(
    lambda **changes: replace(SETTINGS, **changes),
    schedule=st.sampled_from(["constant", "step", "one_cycle"]), lr=st.floats(1e-4, 10), gamma=st.floats(0.01, 1),
    milestones=st.lists(st.floats(0, 1), max_size=3).map(lambda values: tuple(sorted(values))),
)  # fmt: skip


@given(SCHEDULES, st.integers(1, 300))
def test_the_learning_rate_is_positive_and_never_above_its_peak(settings, steps):
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert all(0 < rate <= settings.lr for rate in rates)
    if settings.schedule == "constant":
        assert set(rates) == {settings.lr}


@given(st.integers(10, 2000), st.floats(1e-3, 10))
def test_one_cycle_rises_for_a_fifth_to_its_peak_and_falls_to_nothing(steps, lr):
    settings = replace(SETTINGS, lr=lr)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert abs(peak - steps / 5) <= 1 and max(rates) > 0.95 * lr
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 0.5 * lr and rates[-1] < 0.05 * lr


@given(st.integers(1, 40), st.lists(st.integers(1, 9), unique=True, max_size=3), st.floats(0.1, 0.9))
def test_step_falls_exactly_at_its_milestones(tens, tenths, gamma):
    settings = replace(SETTINGS, schedule="step", milestones=tuple(n / 10 for n in tenths), gamma=gamma)
    for step in range(10 * tens):
        passed = sum(step >= n * tens for n in tenths)
        assert learning_rate(settings, step, 10 * tens) == pytest.approx(settings.lr * gamma**passed)


def test_the_learning_rate_is_what_the_optimizer_uses():
    model, rates = _model(Dropout), []

    class Watch(TrainingHooks):
        def after_backward(self, model, progress):
            parameter = list(model.parameters())[-1]
            self.before, self.gradient = parameter.detach().clone(), parameter.grad.clone()

        def after_step(self, model, progress):
            moved = (self.before - list(model.parameters())[-1].detach()).norm() / self.gradient.norm()
            rates.append((float(moved), learning_rate(settings, progress.step, progress.steps)))

    settings = replace(SETTINGS, momentum=0.0, weight_decay=0.0)
    _fit(model, settings, Watch())
    assert all(moved == pytest.approx(rate, rel=1e-3) for moved, rate in rates) and len(rates) == 12


# Resuming


class Stops(Memory):
    """Ctrl-C after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def step(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def _striped():
    return StripePruning(alpha=0.02)


CASES = {
    "float32": (TinyResNet, {}, "float32"),
    "bfloat16": (TinyResNet, {}, "bfloat16"),
    "nesterov": (TinyVGG, {"nesterov": True}, "bfloat16"),
    "no momentum": (TinyVGG, {"momentum": 0.0}, "float32"),
    "adam": (TinyResNet, {"optimizer": "adam", "lr": 0.01}, "bfloat16"),
    "adam, step": (TinyVGG, {"optimizer": "adam", "lr": 0.01, "schedule": "step", "milestones": (0.5,)}, "float32"),
    "dropout": (Dropout, {}, "float32"),
    "dropout, adam": (Dropout, {"optimizer": "adam"}, "bfloat16"),
    "last batch of one": (TinyVGG, {"batch_size": 31}, "bfloat16"),
}


@pytest.mark.parametrize(("case", "stripes"), [(c, s) for c in CASES for s in (False, True) if not s or CASES[c][0] is not Dropout])
def test_resuming_is_exact(case, stripes, tmp_path):
    kind, changes, precision = CASES[case]
    settings = replace(SETTINGS, **changes)
    hooks = _striped() if stripes else TrainingHooks()

    def start():
        return hooks.prepare(_model(kind)) if stripes else _model(kind)

    whole = start()
    history = _fit(whole, settings, hooks, precision=precision)
    steps = steps_per_epoch(32, settings.batch_size)
    assert _state(whole).keys() and not _same(_state(whole), _state(start()))
    for stop in {1, steps, steps + 1, 2 * steps + 1, 3 * steps}:  # within, and at the end of, every epoch
        partial = Partial(tmp_path / f"{stop}.partial")
        with pytest.raises(KeyboardInterrupt):
            _fit(start(), settings, hooks, precision=precision, checkpoint=partial, monitor=Stops(stop))
        resumed, memory = start(), Memory()
        assert _fit(resumed, settings, hooks, precision=precision, checkpoint=partial, monitor=memory) == history
        assert ("resumed" in memory.events) == (stop > steps)
        assert len(memory.epochs) == 3 - (stop - 1) // steps
        assert _same(_state(whole), _state(resumed)), stop
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert a.stride() == b.stride()


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_stops_at_an_epoch_goes_on_from_there(case, tmp_path):
    """The first half is a run of its own; with it the second one ends where a run without a stop ends."""
    kind, changes, precision = CASES[case]
    settings = replace(SETTINGS, **changes)
    whole, halves, stop = _model(kind), _model(kind), 2 * steps_per_epoch(32, settings.batch_size)
    history = _fit(whole, settings, precision=precision)
    assert _fit(halves, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop) == history[:2]
    assert not _same(_state(whole), _state(halves))
    assert _fit(_model(kind), settings, precision=precision, stop=stop) == history[:2]
    continued = _model(kind)
    assert _fit(continued, settings, precision=precision, checkpoint=Partial(tmp_path / "p")) == history
    assert _same(_state(whole), _state(continued))


def test_a_run_that_starts_later_takes_the_rest_of_the_schedule(tmp_path):
    seen, memory = [], Memory()

    class Watch(TrainingHooks):
        def before_fit(self, model, progress):
            seen.append((progress.epoch, progress.step))

        def after_step(self, model, progress):
            seen.append((progress.epoch, progress.step))

    history = _fit(_model(), hooks=Watch(), start=4, monitor=memory)
    assert seen == [(1, 4), *((step // 4, step) for step in range(4, 12))]
    whole = _fit(_model())
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in whole[1:]]
    assert [epoch for epoch, *_ in memory.epochs] == [2, 3]
    with pytest.raises(KeyboardInterrupt):
        _fit(_model(), start=4, checkpoint=Partial(tmp_path / "p"), monitor=Stops(6))
    model = _model()
    assert _fit(model, start=4, checkpoint=Partial(tmp_path / "p")) == history
    other = _model()
    _fit(other, start=4)
    assert _same(_state(model), _state(other))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole_epochs", [0, 1])
def test_a_run_that_stops_within_an_epoch_has_the_weights_of_one_that_does_not(case, whole_epochs, tmp_path):
    """And its checkpoint is that of the last whole epoch, from which the longer run goes on."""
    kind, changes, precision = CASES[case]
    settings, passed = replace(SETTINGS, **{**changes, "batch_size": 8}), []
    stop = 4 * whole_epochs + 2

    class Look(TrainingHooks):
        def after_step(self, model, progress):
            if progress.step == stop - 1:
                passed.append(_state(model))

    history = _fit(whole := _model(kind), settings, Look(), precision=precision)
    part, continued = _model(kind), _model(kind)
    assert _fit(part, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop)[:-1] == history[:whole_epochs]
    assert _same(_state(part), passed[0])
    assert (Partial(tmp_path / "p").load() is None) == (not whole_epochs)
    again = _model(kind)
    _fit(again, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop)  # killed before it was kept
    assert _same(_state(again), passed[0])
    assert _fit(continued, settings, precision=precision, checkpoint=Partial(tmp_path / "p")) == history
    assert _same(_state(whole), _state(continued))


def test_a_run_that_starts_within_an_epoch_takes_the_rest_of_it_first(tmp_path):
    class Watch(TrainingHooks):
        def __init__(self):
            self.seen = {}

        def batch_loss(self, model, progress, x, logits):
            self.seen[progress.epoch, progress.step] = x
            return {}

    memory, late, all_ = Memory(), Watch(), Watch()
    history, whole = _fit(_model(), hooks=late, start=6, monitor=memory), _fit(_model(), hooks=all_)
    assert list(late.seen) == [(step // 4, step) for step in range(6, 12)]
    assert all(torch.equal(x, all_.seen[step]) for step, x in late.seen.items())
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in whole[1:]]
    assert [epoch for epoch, *_ in memory.epochs] == [2, 3]
    with pytest.raises(KeyboardInterrupt):
        _fit(_model(), start=6, checkpoint=Partial(tmp_path / "p"), monitor=Stops(4))
    resumed, uninterrupted = _model(), _model()
    assert _fit(resumed, start=6, checkpoint=Partial(tmp_path / "p")) == history
    _fit(uninterrupted, start=6)
    assert _same(_state(resumed), _state(uninterrupted))


def test_two_hooks_work_as_one():
    class Term(TrainingHooks):
        def __init__(self, name):
            self.name, self.calls = name, Counter()

        def __getattribute__(self, name):
            if name in vars(TrainingHooks) and not name.startswith("_"):
                self.calls[name] += 1
            return super().__getattribute__(name)

        def penalty(self, model, progress):
            return {f"{self.name} penalty": next(model.parameters()).sum()}

        def batch_loss(self, model, progress, x, logits):
            return {f"{self.name} batch": logits.mean()}

    one, two = Term("one"), Term("two")
    history = _fit(_model(), hooks=Together((one, two)))
    assert one.calls == two.calls and set(one.calls) == {n for n in vars(TrainingHooks) if not n.startswith("_")}
    assert {"one penalty", "two penalty", "one batch", "two batch"} <= set(history[0])


def test_a_run_that_was_killed_when_all_was_trained_trains_nothing(tmp_path):
    model = _model()
    history = _fit(model, checkpoint=Partial(tmp_path / "p"))
    again, memory = _model(), Memory()
    assert _fit(again, checkpoint=Partial(tmp_path / "p"), monitor=memory) == history
    assert memory.events == ["resumed"] and _same(_state(model), _state(again))


def test_resuming_takes_back_the_number_of_threads(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit(_model(), checkpoint=Partial(tmp_path / "p"), monitor=Stops(5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        _fit(_model(), checkpoint=Partial(tmp_path / "p"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


def test_convolutions_are_trained_in_channels_last():
    model, layouts = _striped().prepare(_model(TinyVGG)), []
    layer = next(m for m in model.modules() if isinstance(m, SkeletonConv2d))
    layer.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    _fit(model, replace(SETTINGS, epochs=1))
    assert all(layouts) and layer.weight.is_contiguous(memory_format=torch.channels_last)


# Batches


@pytest.mark.parametrize(("images", "batch_size", "steps"), [(33, 8, 4), (34, 8, 5), (32, 8, 4), (3, 8, 1), (5, 1, 5), (1, 8, 1), (2, 1, 2)])
def test_a_last_batch_of_one_image_is_left_out(images, batch_size, steps):
    seen = []

    class Count(TrainingHooks):
        def after_step(self, model, progress):
            seen.append(progress.step)
            assert progress.step < progress.steps

    kind = Dropout if 1 in (images, batch_size) else TinyVGG
    _fit(_model(kind), replace(SETTINGS, epochs=2, batch_size=batch_size), Count(), splits=_splits(images, None))
    assert len(seen) == 2 * steps == 2 * steps_per_epoch(images, batch_size)


def test_no_epochs_change_nothing():
    model = _model()
    before = _state(model)
    assert _fit(model, replace(SETTINGS, epochs=0)) == [] and _same(before, _state(model))


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stripes", [False, True])
def test_no_batch_waits_for_the_device(stripes, optimizer):
    counts = []
    for images in (16, 80):
        hooks = _striped() if stripes else TrainingHooks()
        model = hooks.prepare(_model(TinyVGG)) if stripes else _model(TinyVGG)
        with Waits() as waits:
            _fit(model, replace(SETTINGS, optimizer=optimizer, epochs=2), hooks, splits=_splits(images, None))
        counts.append(waits.counts)
    assert counts[0] == counts[1] and counts[0]


# What cannot end well


class Breaks(TrainingHooks):
    """Does something to the network after an epoch, or after the last step of it."""

    def __init__(self, epoch, action, event="after_step"):
        self.epoch, self.action = epoch, action
        setattr(self, event, self.act)

    @torch.no_grad()
    def act(self, model, progress):
        if progress.epoch == self.epoch and progress.step >= 4 * self.epoch + 3:
            self.action(model)


def _nan(model):
    model.block1.conv2.weight[0] = float("nan")


@pytest.mark.parametrize("event", ["after_step", "after_epoch"])
@pytest.mark.parametrize("epoch", [0, 2])  # 2 is the last: no later loss would tell
def test_weights_that_are_not_finite_end_the_stage(epoch, event, tmp_path):
    partial = Partial(tmp_path / "p")
    with pytest.raises(StageError, match=rf"dense, epoch {epoch + 1}: .*block1\.conv2\.weight"):
        _fit(_model(), hooks=Breaks(epoch, _nan, event), checkpoint=partial)
    saved = partial.load()
    assert (saved is None) if epoch == 0 else len(saved["history"]) == epoch  # the sound epochs stay


def test_a_loss_that_is_not_finite_ends_the_stage():
    class Infinite(TrainingHooks):
        def penalty(self, model, progress):
            return {"p": next(model.parameters()).sum() * float("inf")}

    with pytest.raises(StageError, match="dense, epoch 1: the loss is nan; .*not finite is "):
        _fit(_model(), hooks=Infinite())
    with pytest.raises(StageError, match="dense, epoch 1: the loss is "):
        _fit(_model(), replace(SETTINGS, lr=1e30, schedule="constant"))


def test_a_collapse_to_chance_ends_the_stage():
    class Kills(TrainingHooks):
        @torch.no_grad()
        def after_step(self, model, progress):
            if progress.epoch >= 4:
                model.head[2].weight.zero_()
                model.head[2].bias.zero_()

    settings = replace(SETTINGS, epochs=12, lr=0.1, schedule="constant")
    splits = _splits(64)
    history = _fit(_model(), settings, splits=splits)
    assert max(figures["accuracy"] for figures in history) > 0.7  # as it should be
    with pytest.raises(StageError, match=r"dense, epoch \d+: the accuracy collapsed from .* to chance .*head\.2\."):
        _fit(_model(), settings, Kills(), splits=splits)


def test_a_network_that_never_learns_is_not_stopped():
    history = _fit(_model(), replace(SETTINGS, lr=1e-9, epochs=4))
    assert len(history) == 4


# Precision and accuracy


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    model, seen = _model(), set()
    model.stem[0].register_forward_hook(lambda *arguments: seen.add(arguments[-1].dtype))
    splits = _splits(32, None)
    _fit(model, precision="bfloat16", splits=splits)
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    seen.clear()
    accuracy(model, splits.test)
    assert seen == {torch.float32}


@pytest.mark.parametrize("images", [1, 12, 1001])
def test_accuracy_is_the_fraction_that_is_right_and_leaves_no_trace(images):
    model, split = _model(), Noise(images)
    model.block1.eval()
    before, flags = _state(model), [m.training for m in model.modules()]
    found = accuracy(model, split)
    assert flags == [m.training for m in model.modules()] and _same(before, _state(model))
    with torch.no_grad():
        expected = (model.eval()(split.x).argmax(1) == split.y).float().mean()
    assert found == pytest.approx(float(expected))
